"""``crmbridge account``: list the accounts, hold their deliveries or sends, let them go on."""

import time
from collections.abc import Sequence

from crmbridge import log, terminal
from crmbridge.errors import Misconfigured, NotFound
from crmbridge.events import instant, read_instant, read_span
from crmbridge.store import accounts, dead, endpoints
from crmbridge.store.database import Database


def show(db: Database) -> None:
    """Print a line for each account, oldest first, and below it what is held back and why."""
    for row in accounts.everyone(db):
        subscribed = {1: "subscribed", 0: "not subscribed", None: "?"}[row["subscription_ok"]]
        target = log.origin(row["crm_webhook_url"]) if row["crm_webhook_url"] else "(pull)"
        name = row["username"] or "-"
        terminal.say(f"{row['id']}  {row['status']:8} {subscribed:14} {row['instagram_account_id']}  {name}  {target}")
        for what, kind in endpoints.WHAT.items():
            for hold in endpoints.locks(endpoints.find(db, row["id"], kind)):
                until = f" until {hold['until']}" if hold["until"] else ""
                why = f": {hold['reason']}" if hold["reason"] else ""
                terminal.say(f"  {what} held since {hold['since']}{until}{why}")


def pause(
    db: Database, account_id: str, what: Sequence[str], *, until: str | None, lasts: str | None, reason: str | None
) -> None:
    """Hold deliveries or sends back, or with neither both. Raises Misconfigured for a time that makes no sense."""
    _require(db, account_id)
    now_s = time.time()
    try:
        if lasts is not None:
            until = instant(now_s + read_span(lasts))
        elif until is not None:
            until = read_instant(until)
    except ValueError as error:
        raise Misconfigured(f"{'--for' if lasts is not None else '--until'} {error}") from None
    if reason is not None and not (reason.isprintable() and 0 < len(reason) <= 255):
        raise Misconfigured("--reason must be printable text of at most 255 characters")
    endpoints.pause(db, account_id, what or list(endpoints.WHAT), reason=reason, until=until)
    for name in what or endpoints.WHAT:
        terminal.say(f"paused {name} of {account_id}" + (f" until {until}" if until else ""))


def resume(db: Database, account_id: str, what: Sequence[str], *, held: bool) -> None:
    """Let what was paused go on, of the two or both; where nothing was, or if `held`, also what an answer holds."""
    _require(db, account_id)
    for name in what or endpoints.WHAT:
        target = endpoints.WHAT[name]
        was_paused = endpoints.resume(db, account_id, target)
        if was_paused:
            terminal.say(f"resumed {name} of {account_id}")
        account = accounts.found(db, account_id)
        may_release = held or not was_paused
        was_held, again = dead.release(db, account, target) if may_release else (False, 0)
        if again:
            terminal.say(f"{again} event(s) of {account_id} that a 401 ended are sent again")
        if was_held:
            terminal.say(f"released {name} of {account_id}")
        elif (left := endpoints.locked(db, account_id, target)) is not None:
            todo = endpoints.to_type(account_id, target, left["cause"])
            terminal.say(
                f"{name} of {account_id} are still held: {left['reason'] or left['cause']}; to end that: {todo}"
            )
        elif not was_paused and not again:
            terminal.say(f"{name} of {account_id} were not paused")


def _require(db: Database, account_id: str) -> None:
    try:
        accounts.found(db, account_id)
    except NotFound:
        raise Misconfigured(f"there is no account {account_id}; 'crmbridge account list' shows them") from None
