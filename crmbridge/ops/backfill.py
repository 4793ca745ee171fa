"""``crmbridge backfill``: have the worker read again what Instagram may have told while nobody listened."""

import time

from crmbridge import terminal
from crmbridge.errors import Misconfigured
from crmbridge.events import epoch_s, instant, read_instant, read_span
from crmbridge.store import accounts, questions
from crmbridge.store.database import Database


def ask(db: Database, account_id: str | None, since: str, now_s: float | None = None) -> None:
    """Note a backfill for an account, or for all; `since` is a time or a duration. Raises Misconfigured."""
    now_s = time.time() if now_s is None else now_s
    begin = _instant(since, now_s)
    if epoch_s(begin) > now_s:
        raise Misconfigured("--since lies ahead")
    chosen = [row for row in accounts.everyone(db) if account_id in (None, row["id"])]
    if not chosen:
        raise Misconfigured(f"there is no account {account_id}" if account_id else "there are no accounts")
    for row in chosen:
        questions.ask_backfill(db, row["id"], begin)
        terminal.say(f"asked    {row['id']}  since {begin}")


def _instant(text: str, now_s: float) -> str:
    try:
        return instant(now_s - read_span(text))
    except ValueError:
        pass
    try:
        return read_instant(text)
    except ValueError as error:
        raise Misconfigured(f"--since {error}, or a duration such as 2h") from None
