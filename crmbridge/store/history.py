"""What became of things, beside what their own rows tell: a row for each thing that happened to one.

A subject is a delivery, a message, an event or an account, by its id; its history goes with it, and never holds what a
message says.
"""

from collections.abc import Sequence
from typing import Any, Literal

from crmbridge.store.database import Reads, Row, Tx

Kind = Literal[
    "call", "look_up",  # to the far side, from `at` to `until`, with an outcome
    "status",  # of a message: `code`; `text` is an error's code, or how we know
    "repeat",  # the channel told an event again
    "stepped_aside", "done", "dead",  # a delivery, without a call, or for good: `code` tells why
    "revived", "discarded", "restored",  # by whom: `text`
    "crm_held", "instagram_held",  # an account's endpoint, from `at` to `until`, by `code`
]  # fmt: skip
CALLS: tuple[Kind, ...] = ("call", "look_up")


def note(tx: Tx, subject: str, kind: Kind, *, at: str | None = None, **more: Any) -> None:
    """Write down what happened to a subject, now or at another time."""
    tx.insert("history", {"subject": subject, "at": at or tx.now, "kind": kind, **more})


def note_where(
    tx: Tx, kind: Kind, where: str, parameters: Sequence[Any], *, at: str | None = None, **more: Any
) -> None:
    """Write down what happened to each delivery that matches."""
    values = {"at": at or tx.now, "kind": kind, **more}
    names, marks = ", ".join(values), ", ".join("?" * len(values))
    sql = f"INSERT INTO history (subject, {names}) SELECT id, {marks} FROM deliveries WHERE {where}"
    tx.run(sql, (*values.values(), *parameters))


def of(db: Reads, subject: str, *kinds: Kind) -> list[Row]:
    """Return what is written down of a subject, of some kinds or all, in the order in which that was done."""
    which = f" AND kind IN ({', '.join('?' * len(kinds))})" if kinds else ""
    return db.rows(f"SELECT * FROM history WHERE subject = ?{which} ORDER BY position", (subject, *kinds))


def forget(tx: Tx, subjects: Sequence[str]) -> None:
    """Drop the history of what goes."""
    tx.run(f"DELETE FROM history WHERE subject IN ({', '.join('?' * len(subjects))})", subjects)


def calls(db: Reads, delivery: Row) -> list[Row]:
    """Return the calls of a delivery: `kind`, `number`, `started_at`, `finished_at`, `outcome`, `code`, `http_status`,
    `error` and `duration_ms` of each.

    A look-up has the number of the call that it is about. The first call is told by the delivery's own row if it
    succeeded at once, and so is a call that is under way.
    """
    found: list[Row] = []
    number = 0
    for row in of(db, delivery["id"], *CALLS, "restored"):
        number += row["kind"] != "look_up"
        if row["kind"] != "restored":  # after a backup was put back: what was called since is not known
            found.append(_call(number, row))
    if number < delivery["attempts"]:
        is_over = delivery["place"] == "done" and delivery["last_code"] is None
        if is_over or (delivery["claim_id"] is not None and not delivery["in_doubt"]):
            own: Row = {"kind": "call", "at": delivery["tried_at"], "until": delivery["finished_at"], "code": None}
            answer = {"http": delivery["last_http_status"], "ms": delivery["last_ms"]} if is_over else {}
            found.append(_call(number + 1, {**own, "outcome": "done" if is_over else None, **answer}))
    return found


def _call(number: int, row: Row) -> Row:
    return {
        "kind": row["kind"],
        "number": number,
        "started_at": row["at"],
        "finished_at": row["until"],
        "outcome": row["outcome"],
        "code": row["code"],
        "http_status": row.get("http"),
        "error": row.get("text"),
        "duration_ms": row.get("ms"),
    }


def first_call(db: Reads, delivery_id: str) -> str | None:
    """Return when the first call of a delivery began that came to an end, or None."""
    found = db.value("SELECT MIN(at) FROM history WHERE subject = ? AND kind = 'call'", (delivery_id,))
    return str(found) if found else None
