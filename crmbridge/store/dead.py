"""Dead deliveries: list them, owe one or many again, want some no more."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from crmbridge.errors import Conflict, Invalid, NotFound
from crmbridge.events import instant
from crmbridge.store import accounts, bodies, contacts, deliveries, endpoints, messages
from crmbridge.store.contacts import Target
from crmbridge.store.database import Database, Reads, Row, Tx

_SAID: dict[str, str] = {
    "account_deleted": "Its account was deleted.",
    "content_gone": "Its content is gone: retention erased it.",
    "not_pushed": "The account has no crm_webhook_url.",
    "endpoint_held": "Its endpoint is held back: ",
    "in_doubt": "It may have arrived, and would arrive twice: look into Instagram, then use force.",
}
_NOT_DEAD = {
    "discarded": "It is not dead any more: somebody discarded it.",
    "not_pushed": "It is not dead: the account had no crm_webhook_url, so the CRM reads it by GET /api/v1/events.",
}
_AT_ONCE = 200
_EVENTS = (*bodies.TOLD, *messages.TOLD, deliveries.SEND, deliveries.ACTION)
# Why a dead row cannot be tried again; a send in doubt can, by force.
_NOT_ITSELF = """
    CASE WHEN account.id IS NULL OR account.deleted_at IS NOT NULL THEN 'account_deleted'
        WHEN dead.target = 'instagram' AND message.content IS NULL THEN 'content_gone'
        WHEN dead.target = 'crm' AND heard.body IS NULL AND heard.payload IS NULL THEN 'content_gone'
        WHEN dead.target = 'crm' AND endpoint.url IS NULL THEN 'not_pushed'
        {}WHEN dead.target = 'instagram' AND dead.last_code = 'in_doubt' THEN 'in_doubt' END"""
_BECAUSE = _NOT_ITSELF.format(
    "WHEN endpoint.paused_at IS NOT NULL OR endpoint.held_by IS NOT NULL THEN 'endpoint_held' "
)
_DEAD = """
    FROM deliveries AS dead LEFT JOIN accounts AS account ON account.id = dead.account_id
        LEFT JOIN endpoints AS endpoint ON endpoint.account_id = dead.account_id AND endpoint.kind = dead.target
        LEFT JOIN outbound_messages AS message ON message.id = dead.message_id
        LEFT JOIN events AS heard ON heard.id = dead.event_id
    WHERE dead.place = 'dead'"""


@dataclass(frozen=True)
class Filter:
    """Which dead deliveries are meant; None: any. Times are `instant` text, and the ends are included."""

    target: Target
    account_id: str | None = None
    event: str | None = None
    code: str | None = None
    dead_after: str | None = None
    dead_before: str | None = None


@dataclass(frozen=True)
class Revived:
    """How many rows match, how many of these are owed again, or are left out, and why."""

    matching: int
    revived: int
    left_out: dict[str, int]


def check(db: Reads, wanted: Filter) -> None:
    """Raise NotFound for an account that never was, Invalid for what no dead delivery can match."""
    if wanted.account_id is not None and wanted.account_id not in accounts.ids(db):
        raise NotFound(f"There is no account {wanted.account_id}.", code="account_not_found")
    if wanted.event is not None and wanted.event not in _EVENTS:
        detail = {"field": "event", "problem": "must be one of " + ", ".join(_EVENTS)}
        raise Invalid(f"There is no event {wanted.event}; known: {', '.join(_EVENTS)}.", details=[detail])
    if (wanted.dead_after or "") > (wanted.dead_before or "~"):
        detail = {"field": "dead_after", "problem": "must not be later than dead_before"}
        raise Invalid("Nothing can have died after dead_after and before dead_before.", details=[detail])


def page(db: Reads, wanted: Filter, *, after: tuple[str, int] | None, limit: int) -> list[Row]:
    """Return dead rows in the order of their death, after the one with that (finished_at, position).

    Each has `because`: why it cannot be tried again, or None.
    """
    where, parameters = _matching(wanted)
    if after is not None:
        where += " AND (dead.finished_at, dead.position) > (?, ?)"
        parameters += after
    shown, order = f"dead.*, heard.sequence, {_BECAUSE} AS because", "dead.finished_at, dead.position"
    return db.rows(f"SELECT {shown} {_DEAD}{where} ORDER BY {order} LIMIT ?", (*parameters, limit))


def sums(db: Reads, wanted: Filter) -> list[Row]:
    """Return `number`, `oldest` and `newest` death of what matches, by account_id, target and last_code."""
    where, parameters = _matching(wanted)
    by = "dead.account_id, dead.target, dead.last_code"
    of = "COUNT(*) AS number, MIN(dead.finished_at) AS oldest, MAX(dead.finished_at) AS newest"
    return db.rows(f"SELECT {by}, {of} {_DEAD}{where} GROUP BY {by} ORDER BY {by}", parameters)


def _matching(wanted: Filter) -> tuple[str, list[Any]]:
    where = " AND dead.target = ?"
    parameters: list[Any] = [wanted.target]
    for column, sign, value in (
        ("account_id", "=", wanted.account_id),
        ("event", "=", wanted.event),
        ("last_code", "=", wanted.code),
        ("finished_at", ">=", wanted.dead_after),
        ("finished_at", "<=", wanted.dead_before),
    ):
        if value is not None:
            where += f" AND dead.{column} {sign} ?"
            parameters.append(value)
    return where, parameters


# --- one, at once ---


def find(db: Reads, name: str) -> Row | None:
    """Return the delivery with an id, or the send of the message with that id; None when there is none."""
    if name.startswith("msg_"):
        return db.row("SELECT * FROM deliveries WHERE message_id = ? AND target = 'instagram'", (name,))
    return db.row("SELECT * FROM deliveries WHERE id = ?", (name,))


def revive(db: Database, delivery_id: str, *, force: bool = False, by: str | None = None) -> None:
    """Owe a dead delivery again, at once, and note `by` whom. Raises Conflict as `retryable` does."""
    db.write(lambda tx: _owe_again(tx, [retryable(tx, delivery_id, force=force)], by))


def retryable(db: Reads, delivery_id: str, *, force: bool) -> Row:
    """Return a dead delivery that can be tried again. Raises Conflict, with the reason as its code, for another."""
    row = _dead(db, delivery_id)
    because: str | None = row["because"]
    if because == "endpoint_held":
        held = endpoints.locks(endpoints.find(db, row["account_id"], row["target"]))
        todo = ", then ".join(endpoints.to_type(row["account_id"], row["target"], one["cause"]) for one in held)
        raise Conflict(_SAID[because] + todo, code=because)
    if because is not None and not (force and because == "in_doubt"):
        raise Conflict(_SAID[because], code=because)
    return row


def obstacle(db: Reads, row: Row, now: str) -> str | None:
    """Return why a dead delivery would not go out if it were tried again now, or None.

    Beside the reasons of `page` a send's is ``expired`` (its send_before has passed) or ``window_closed``.
    """
    because: str | None = _dead(db, row["id"])["because"]
    if because not in (None, "endpoint_held") or row["target"] == "crm":
        return because
    try:
        messages.body(db, row, accounts.found(db, row["account_id"]), now)
    except Conflict as problem:
        return problem.code
    wrote_at = contacts.find(db, row["account_id"], row["contact"])["last_wrote_at"]
    is_shut = row["last_code"] == "window_closed" and (wrote_at or "") <= row["finished_at"]
    return "window_closed" if is_shut else because


def _dead(db: Reads, delivery_id: str) -> Row:
    row = db.row(f"SELECT dead.*, {_BECAUSE} AS because {_DEAD} AND dead.id = ?", (delivery_id,))
    if row is None:
        code = db.value("SELECT last_code FROM deliveries WHERE id = ?", (delivery_id,))
        raise Conflict(_NOT_DEAD.get(code, "It is not dead: it was delivered, or is being tried."), code="not_dead")
    return row


def _owe_again(tx: Tx, rows: Sequence[Row], by: str | None) -> None:
    """Put dead rows of one lane back into it, in front of what came after them and was not sent yet."""
    if rows[0]["target"] == "instagram":
        for row in rows:
            messages.revive(tx, row["message_id"])
    deliveries.revive(tx, rows, by=by)


# --- many ---


def revive_all(db: Database, wanted: Filter, now_s: float, *, preview: bool, by: str | None = None) -> Revived:
    """Owe all matching rows again that can be, lane by lane in their old order, and note `by` whom.

    A send that ended in doubt is left out: only a person who has looked can tell, one by one. What dies from now on is
    not meant. With `preview` they are only counted.
    """
    where, parameters = _matching(_until(wanted, instant(now_s)))
    counts = db.rows(f"SELECT {_BECAUSE} AS because, COUNT(*) AS number {_DEAD}{where} GROUP BY 1", parameters)
    left_out = dict.fromkeys(_SAID, 0) | {row["because"]: row["number"] for row in counts if row["because"]}
    able = sum(row["number"] for row in counts if not row["because"])
    revived = able if preview else _revive_pages(db, where, parameters, by)
    return Revived(able + sum(left_out.values()), revived, left_out)


def _until(wanted: Filter, now: str) -> Filter:
    return replace(wanted, dead_before=min(wanted.dead_before or now, now))


def _revive_pages(db: Database, where: str, parameters: Sequence[Any], by: str | None, because: str = _BECAUSE) -> int:
    sql = f"SELECT dead.id, dead.finished_at, dead.position {_DEAD}{where} AND ({because}) IS NULL"
    pages = db.pages(sql, parameters, key=("dead.finished_at", "dead.position"), limit=_AT_ONCE)
    return db.in_steps(pages, lambda tx, rows: _revive_some(tx, rows, by, because))


def _revive_some(tx: Tx, rows: Sequence[Row], by: str | None, because: str) -> int:
    ids = [row["id"] for row in rows]
    still = tx.rows(
        f"""
        SELECT dead.* {_DEAD} AND dead.id IN ({", ".join("?" * len(ids))}) AND ({because}) IS NULL
        ORDER BY dead.target, dead.account_id, dead.contact, dead.position""",
        ids,
    )
    for _, lane in itertools.groupby(still, key=lambda row: (row["target"], row["account_id"], row["contact"])):
        _owe_again(tx, list(lane), by)
    return len(still)


# --- what the CRM refused our signature for ---

MENDED = "mended"  # by whom a delivery was revived: a person mended what the 401 was about


def release(db: Database, account: Row, target: Target) -> tuple[bool, int]:
    """End what a far side's answer holds back, as a person says that it is mended.

    First what the CRM's 401 ended is put back, in its old order: all of it, and each event once. Return whether there
    was a hold, and how many were put back.
    """
    where = f"""
        AND dead.target = ? AND dead.account_id = ? AND dead.last_code = 'crm_unauthorized'
        AND NOT EXISTS (SELECT 1 FROM history WHERE subject = dead.id AND kind = 'revived' AND text = '{MENDED}')"""
    key = [target, account["id"]]
    again = _revive_pages(db, where, key, MENDED, _NOT_ITSELF.format("")) if target == "crm" else 0
    return endpoints.let_go(db, account["id"], target), again


# --- what nobody wants any more ---


def discard(db: Database, delivery_id: str, *, by: str, preview: bool = False) -> None:
    """End a dead delivery for good, though its content stays as long as it would. Raises Conflict when it is not dead.

    With `preview` only that is found out.
    """

    def job(tx: Tx) -> None:
        position = _dead(tx, delivery_id)["position"]
        if not preview:
            _discard(tx, [position], by)

    db.write(job)


def discard_all(db: Database, wanted: Filter, now_s: float, *, by: str, preview: bool = False) -> int:
    """End all dead deliveries that match, a step to a commit; return how many. With `preview`, only count them."""
    where, parameters = _matching(_until(wanted, instant(now_s)))
    if preview:
        return int(db.value(f"SELECT COUNT(*) {_DEAD}{where}", parameters))
    sql = f"SELECT dead.finished_at, dead.position {_DEAD}{where}"
    pages = db.pages(sql, parameters, key=("dead.finished_at", "dead.position"), limit=_AT_ONCE)
    return db.in_steps(pages, lambda tx, rows: _discard(tx, [row["position"] for row in rows], by))


def _discard(tx: Tx, positions: Sequence[int], by: str) -> int:
    these = f"position IN ({', '.join('?' * len(positions))}) AND place = 'dead'"
    return deliveries.move(
        tx, "done", these, positions, {"last_code": "discarded"}, told={"kind": "discarded", "text": by}
    )
