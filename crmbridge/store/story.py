"""What is known of one message, conversation or account, whatever id it is asked by. Only reads."""

import itertools
from dataclasses import dataclass
from typing import Any, Literal

from crmbridge.store import accounts, bodies, dead, endpoints, history, messages
from crmbridge.store.database import Reads, Row

Kind = Literal["message", "event", "account", "conversation"]
MEANINGS_MOST = 50
NEWEST = 20  # deliveries of a conversation that are told
_DELIVERIES = "SELECT deliveries.*, sequence FROM deliveries LEFT JOIN events ON events.id = event_id"
_REPEATS = """
    (SELECT COUNT(*) FROM history WHERE subject = events.id AND kind = 'repeat') AS repeats,
    (SELECT MAX(at) FROM history WHERE subject = events.id AND kind = 'repeat') AS repeated_at"""


@dataclass(frozen=True)
class Owed:
    """A delivery with its calls, what befell it between them, the holds that it outlived (`held`), and what it awaits.

    That is what locks its endpoint, or the head of its lane. Its age counts from `aged_from`. A dead one has an
    `obstacle` where it would not go out if it were tried again. A send is as good as a person's until `tagged_until`.
    """

    row: Row
    calls: list[Row]
    befell: list[Row]
    held: list[Row]
    hold: Row | None
    head: Row | None
    aged_from: str
    send_before: str | None
    obstacle: str | None = None
    tagged_until: str | None = None


@dataclass(frozen=True)
class Life:
    """A message that was sent (`message`) or something that came in (`event`), with all that became of it.

    `changes` are those of its status, `heard` the channel's echoes and receipts of it, each with its `repeats`.
    """

    message: Row | None
    event: Row | None
    account: Row | None
    conversation_id: str | None
    changes: list[Row]
    heard: list[Row]
    owed: list[Owed]


def meanings(db: Reads, given: str) -> list[tuple[Kind, str]]:
    """Return what an id of any kind may mean: kind and our own id, at most `MEANINGS_MOST` and one."""
    prefix, _, rest = given.partition("_")
    found: list[tuple[Kind, str]] = []

    def look(kind: Kind, sql: str, *parameters: Any) -> None:
        for row in db.rows(f"{sql} LIMIT {MEANINGS_MOST + 1}", parameters):
            if (kind, row["id"]) not in found:
                found.append((kind, row["id"]))

    if prefix == "msg":
        look("message", "SELECT id FROM outbound_messages WHERE id = ?", given)
        look("event", "SELECT id FROM events WHERE message_id IS NULL AND id = ?", f"evt_{rest}")
    elif prefix == "evt":
        look("event", "SELECT id FROM events WHERE message_id IS NULL AND id = ?", given)
        look("message", "SELECT message_id AS id FROM events WHERE message_id IS NOT NULL AND id = ?", given)
    elif prefix == "dlv":
        look("message", "SELECT message_id AS id FROM deliveries WHERE id = ? AND message_id IS NOT NULL", given)
        look("event", "SELECT event_id AS id FROM deliveries WHERE id = ? AND message_id IS NULL", given)
    elif prefix == "acc":
        look("account", "SELECT id FROM accounts WHERE id = ?", given)
    elif prefix == "cnv":
        look("conversation", "SELECT conversation_id AS id FROM contacts WHERE conversation_id = ?", given)
    if found:
        return found
    ours = "account_id IN (SELECT id FROM accounts)"
    look("message", f"SELECT id FROM outbound_messages WHERE {ours} AND instagram_message_id = ?", given)
    if not found:  # its echoes and receipts belong to its own story
        for owner in (ours, "account_id IS NULL"):
            heard = f"SELECT id FROM events WHERE {owner} AND instagram_message_id = ?"
            look("event", f"{heard} AND kind <> 'message.read'", given)
    look("message", f"SELECT id FROM outbound_messages WHERE {ours} AND idempotency_key = ?", given)
    look("message", "SELECT id FROM outbound_messages WHERE correlation_id = ?", given)
    look("event", "SELECT id FROM events WHERE message_id IS NULL AND correlation_id = ?", given)
    look("conversation", f"SELECT conversation_id AS id FROM contacts WHERE {ours} AND contact = ?", given)
    if not found:  # of whom no CRM has heard yet
        waits = "target = 'instagram' AND finished_at IS NULL"
        look("message", f"SELECT message_id AS id FROM deliveries WHERE {waits} AND {ours} AND contact = ?", given)
    look("account", "SELECT id FROM accounts WHERE instagram_account_id = ?", given)
    return found[: MEANINGS_MOST + 1]


def of_message(db: Reads, message_id: str, now: str) -> Life:
    """Return what became of a message that a CRM asked us to send."""
    message = _one(db, "SELECT * FROM outbound_messages WHERE id = ?", message_id)
    heard = _heard(db, message["account_id"], message["instagram_message_id"])
    owed = db.rows(f"{_DELIVERIES} WHERE deliveries.message_id = ? ORDER BY deliveries.position", (message_id,))
    return _life(db, message, None, message["account_id"], message["recipient_id"], heard, owed, now)


def of_event(db: Reads, event_id: str, now: str) -> Life:
    """Return what became of something that the channel told us."""
    event = _one(db, f"SELECT *, {_REPEATS} FROM events WHERE id = ?", event_id)
    owed = db.rows(f"{_DELIVERIES} WHERE event_id = ? ORDER BY deliveries.position", (event_id,))
    heard = _heard(db, event["account_id"], event["instagram_message_id"]) if event["kind"] in bodies.MESSAGES else []
    heard = [row for row in heard if row["id"] != event_id]
    return _life(db, None, event, event["account_id"], event["contact"], heard, owed, now)


def _heard(db: Reads, account_id: str | None, external_id: str | None) -> list[Row]:
    """Return what the channel told of a message, in the order in which it came."""
    found = db.rows(
        f"SELECT id, kind, state, occurred_at, received_at, {_REPEATS} FROM events"
        " WHERE account_id = ? AND instagram_message_id = ?",
        (account_id, external_id),
    )
    # Sorted here: with ORDER BY SQLite reads all of the account's events by their age.
    return sorted(found, key=lambda row: str(row["received_at"]))


def _life(
    db: Reads,
    message: Row | None,
    event: Row | None,
    account_id: str | None,
    contact: str,
    heard: list[Row],
    rows: list[Row],
    now: str,
) -> Life:
    account = accounts.find_any(db, account_id)
    conversation_id = db.value(
        "SELECT conversation_id FROM contacts WHERE account_id = ? AND contact = ?", (account_id, contact)
    )
    owed = [_owed(db, row, now) for row in rows]
    changes = history.of(db, message["id"], "status") if message else []
    return Life(message, event, account, conversation_id, changes, heard, owed)


def _owed(db: Reads, row: Row, now: str) -> Owed:
    befell = [one for one in history.of(db, row["id"]) if one["kind"] not in history.CALLS]
    head = None
    if row["place"] == "behind":
        head = db.row(
            "SELECT * FROM deliveries WHERE finished_at IS NULL AND target = ? AND account_id = ? AND contact = ?"
            " AND place = 'head'",
            (row["target"], row["account_id"], row["contact"]),
        )
    lived = {"begin": row["accepted_at"], "end": row["finished_at"] or "9999"}
    # What held its endpoint only while it was dead did not hold it.
    lay = [(one["at"], again["at"]) for one, again in itertools.pairwise(befell) if again["kind"] == "revived"]
    held = [
        one
        for one in endpoints.past(db, row["account_id"], row["target"], **lived)
        if not any(died < one["since"] and one["ended_at"] <= revived for died, revived in lay)
    ]
    end = endpoints.find(db, row["account_id"], row["target"])
    aged_from = max(row["aged_from"], end["aged_from"]) if end else row["aged_from"]
    before = "SELECT send_before FROM outbound_messages WHERE id = ?"
    send_before = db.value(before, (row["message_id"],)) if row["target"] == "instagram" else None
    obstacle = dead.obstacle(db, row, now) if row["place"] == "dead" else None
    until = messages.tagged_until(db, row["message_id"]) if obstacle == "window_closed" else None
    calls, hold = history.calls(db, row), endpoints.lock(end)
    return Owed(row, calls, befell, held, hold, head, aged_from, send_before, obstacle, until)


def account(db: Reads, account_id: str) -> Row:
    """Return an account, also a deleted one, without its secrets."""
    row = accounts.find_any(db, account_id)
    if row is None:
        raise LookupError(account_id)
    return {name: value for name, value in row.items() if not name.endswith("_sealed")}


def stuck(db: Reads, account_id: str, limit: int) -> list[Row]:
    """Return what of an account is not on its normal way, the longest waiting first."""
    return db.rows("SELECT * FROM stuck WHERE account_id = ? LIMIT ?", (account_id, limit))


def conversation(db: Reads, conversation_id: str) -> tuple[Row, list[Row]]:
    """Return a contact, and the newest deliveries about it, oldest first."""
    contact = _one(db, "SELECT * FROM contacts WHERE conversation_id = ?", conversation_id)
    rows = db.rows(
        "SELECT * FROM deliveries WHERE account_id = ? AND contact = ? ORDER BY position DESC LIMIT ?",
        (contact["account_id"], contact["contact"], NEWEST),
    )
    return contact, rows[::-1]


def waiting(db: Reads, contact: Row) -> list[Row]:
    """Return how many deliveries wait in each lane of a contact, and which is the head."""
    return db.rows(
        """
        SELECT target, COUNT(*) AS number, MAX(CASE WHEN place = 'head' THEN id END) AS head FROM deliveries
        WHERE finished_at IS NULL AND account_id = ? AND contact = ? GROUP BY target""",
        (contact["account_id"], contact["contact"]),
    )


def _one(db: Reads, sql: str, value: str) -> Row:
    row = db.row(sql, (value,))
    if row is None:
        raise LookupError(value)
    return row
