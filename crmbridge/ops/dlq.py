"""``crmbridge dlq``: the dead deliveries, and another try for them."""

import heapq
import time
from collections.abc import Iterator, Sequence

from crmbridge.errors import Conflict
from crmbridge.events import epoch_s
from crmbridge.store import dead
from crmbridge.store.database import Database, Row
from crmbridge.store.dead import Filter
from crmbridge.store.deliveries import Patience

_PAGE = 200
_LINE = "{:30}  {:24}  {:>6}  {:30}  {:9}  {:52}  {:>8}  {:16}  {:>4}  {}"


def show(db: Database, wanted: Sequence[Filter]) -> None:
    """Print the dead deliveries that match, oldest first."""
    now_s = time.time()
    print(_LINE.format("ID", "DIED", "AGE", "ACCOUNT", "TARGET", "WHAT", "ATTEMPTS", "CODE", "HTTP", "ERROR"))
    for row in heapq.merge(*(_rows(db, one) for one in wanted), key=lambda row: (row["finished_at"], row["position"])):
        what = row["message_id"] if row["target"] == "instagram" else f"{row['event']} {row['event_id']}"
        cells = (row["account_id"], row["target"], what, row["attempts"], row["last_code"], row["last_http_status"])
        shown = ["-" if cell is None else cell for cell in cells]
        age = _age(now_s - epoch_s(row["finished_at"]))
        print(_LINE.format(row["id"], row["finished_at"], age, *shown, row["last_error"] or "-"))


def _rows(db: Database, wanted: Filter) -> Iterator[Row]:
    after = None
    while rows := dead.page(db, wanted, after=after, limit=_PAGE):
        yield from rows
        after = (rows[-1]["finished_at"], rows[-1]["position"])


def _age(seconds: float) -> str:
    for unit, size in (("d", 86_400), ("h", 3_600), ("m", 60)):
        if seconds >= 2 * size:
            return f"{seconds // size:.0f}{unit}"
    return f"{seconds:.0f}s"


def retry(db: Database, names: Sequence[str], patience: Patience, *, force: bool) -> int:
    """Owe the named deliveries again, at once; print what became of each; return 1 when one was left as it was."""
    left = 0
    for name in names:
        row = dead.find(db, name)
        try:
            if row is None:
                raise Conflict("There is no such delivery or send.")
            dead.revive(db, row["id"], time.time(), patience, force=force)
            print(f"revived  {name}")
        except Conflict as problem:
            left = 1
            print(f"left     {name}  {problem.message}")
    return left


def retry_all(db: Database, wanted: Sequence[Filter], *, force: bool, preview: bool) -> None:
    """Have all that match tried again, behind live traffic, and print how many; with `preview`, only count them."""
    for one in wanted:
        found = dead.ask(db, one, time.time(), force=force, preview=preview)
        reasons = ", ".join(f"{number} {because}" for because, number in found.left_out.items() if number)
        name = "webhooks" if one.target == "crm" else "sends"
        asked = "to be asked for" if preview else "asked for"
        print(
            f"{name}: {found.matching} match, {found.asked} {asked}, {found.already_asked} before"
            + (f", left out: {reasons}" if reasons else "")
        )
