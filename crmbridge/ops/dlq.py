"""``crmbridge dlq``: the dead deliveries, and another try for them, or none."""

import heapq
import time
from collections.abc import Callable, Iterator, Sequence

from crmbridge import terminal
from crmbridge.errors import Conflict
from crmbridge.events import epoch_s
from crmbridge.store import dead
from crmbridge.store.database import Database, Row
from crmbridge.store.dead import Filter
from crmbridge.store.overview import NAMES

_PAGE = 200
_BY = "cli"
_SUM = "{:30}  {:9}  {:20}  {:>6}  {:24}  {:24}"
_LINE = "{:30}  {:24}  {:>6}  {:30}  {:9}  {:52}  {:>8}  {:16}  {:>4}  {}"


def check(db: Database, wanted: Sequence[Filter]) -> None:
    """Raise NotFound or Invalid for filters that nothing can match."""
    for one in wanted:
        dead.check(db, one)


def show(db: Database, wanted: Sequence[Filter], *, each: bool) -> None:
    """Print how many dead deliveries match, by account, target and code, or each of them, oldest first."""
    number = _show_each(db, wanted) if each else _show_sums(db, wanted)
    hint = "" if each or not number else "; --all shows each, with its ID"
    terminal.say(f"{number} dead letter{'s' * (number != 1)}{hint}" if number else "no dead letters")


def _show_sums(db: Database, wanted: Sequence[Filter]) -> int:
    sums = [row for one in wanted for row in dead.sums(db, one)]
    if sums:
        terminal.say(_SUM.format("ACCOUNT", "TARGET", "CODE", "NUMBER", "OLDEST", "NEWEST"))
    for row in sums:
        terminal.say(_SUM.format(*("-" if cell is None else cell for cell in row.values())))
    return sum(row["number"] for row in sums)


def _show_each(db: Database, wanted: Sequence[Filter]) -> int:
    now_s, number = time.time(), 0
    for row in heapq.merge(*(_rows(db, one) for one in wanted), key=lambda row: (row["finished_at"], row["position"])):
        if not number:
            terminal.say(
                _LINE.format("ID", "DIED", "AGE", "ACCOUNT", "TARGET", "WHAT", "ATTEMPTS", "CODE", "HTTP", "ERROR")
            )
        number += 1
        what = row["message_id"] if row["target"] == "instagram" else f"{row['event']} {row['event_id']}"
        cells = (row["account_id"], row["target"], what, row["attempts"], row["last_code"], row["last_http_status"])
        shown = ["-" if cell is None else cell for cell in cells]
        age = _age(now_s - epoch_s(row["finished_at"]))
        terminal.say(_LINE.format(row["id"], row["finished_at"], age, *shown, row["last_error"] or "-"))
    return number


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


def retry(db: Database, names: Sequence[str], *, force: bool, preview: bool) -> int:
    """Owe the named deliveries again, at once; print what became of each; return 1 when one was left as it was.

    With `preview`, only print what would become of them.
    """

    def revive(delivery_id: str) -> None:
        if preview:
            dead.retryable(db, delivery_id, force=force)
        else:
            dead.revive(db, delivery_id, force=force, by=_BY)

    return _each(db, names, revive, "would be revived" if preview else "revived ")


def discard(db: Database, names: Sequence[str], *, preview: bool) -> int:
    """End the named deliveries for good; print what became of each; return 1 when one was left as it was."""
    said = "would be discarded" if preview else "discarded"
    return _each(db, names, lambda name: dead.discard(db, name, by=_BY, preview=preview), said)


def _each(db: Database, names: Sequence[str], what: Callable[[str], None], said: str) -> int:
    left = 0
    for name in names:
        row = dead.find(db, name)
        try:
            if row is None:
                raise Conflict("There is no such delivery or send.")
            what(row["id"])
            terminal.say(f"{said} {name}")
        except Conflict as problem:
            left = 1
            terminal.say(f"left     {name}  {problem.message}")
    return left


def retry_all(db: Database, wanted: Sequence[Filter], *, preview: bool) -> None:
    """Have all that match tried again, behind live traffic, and print how many; with `preview`, only count them."""
    for one in wanted:
        found = dead.revive_all(db, one, time.time(), preview=preview, by=_BY)
        reasons = ", ".join(f"{number} {because}" for because, number in found.left_out.items() if number)
        revived = "to be revived" if preview else "revived"
        left = f", left out: {reasons}" if reasons else ""
        terminal.say(f"{NAMES[one.target]}: {found.matching} match, {found.revived} {revived}{left}")


def discard_all(db: Database, wanted: Sequence[Filter], *, preview: bool) -> None:
    """End all that match for good, and print how many; with `preview`, only count them."""
    for one in wanted:
        number = dead.discard_all(db, one, time.time(), by=_BY, preview=preview)
        terminal.say(f"{NAMES[one.target]}: {number} {'to be discarded' if preview else 'discarded'}")
