"""Erasure on request: of a customer, of a whole account, and a log of it that names nobody.

Steps are small, so that the write lock is never held for long; an erasure that was broken off is simply run again.
"""

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from crmbridge.events import WITHDRAWN, instant, new_id
from crmbridge.store import accounts, contacts, deliveries, history, messages, questions, turn
from crmbridge.store.database import Database, Reads, Row, Tx

_AT_ONCE = 200
_GRACE_S = 300.0  # a call in flight ends before its rows go
_GONE = "the owner removed the app from the Instagram account: connect it again with a new access token"


# Where a customer stands, by account and contact. `_NAMED` takes the contact as a pattern first, to look at few rows:
# an id may be a part of somebody else's. Of JSON that SQLite cannot read, with Infinity in it, the pattern is enough.
_OWED = "deliveries WHERE account_id = ? AND contact = ?"
_SENT = "outbound_messages WHERE account_id = ? AND recipient_id = ?"
_PRIVATE = """
    outbound_messages JOIN deliveries ON message_id = outbound_messages.id
    WHERE outbound_messages.account_id = ? AND recipient_id = ? AND contact LIKE 'comment:%'"""
_HEARD = "events WHERE account_id = ? AND contact = ?"
_NAMED = r"""
    events WHERE account_id = ? AND contact = '' AND payload LIKE ? ESCAPE '\'
    AND CASE WHEN json_valid(payload) THEN EXISTS (SELECT 1 FROM json_tree(payload) WHERE CAST(atom AS TEXT) = ?)
        ELSE TRUE END"""
_UNROUTED = "events WHERE account_id IS NULL AND contact = ?"


@dataclass(frozen=True)
class Erased:
    """How many rows of each table were erased."""

    deliveries: int = 0
    messages: int = 0
    events: int = 0

    def __add__(self, other: "Erased") -> "Erased":
        return Erased(**{name: rows + vars(other)[name] for name, rows in vars(self).items()})


# --- a customer ---


def erase_contact(db: Database, account_id: str, contact: str) -> Erased:
    """Erase what a customer wrote and was written, their name and id, also where it is still owed.

    What is owed ends: the CRM hears that a pending send failed as ``erased``, with the message's id alone. The rows
    stay, under a name that says nothing, so that a repetition by the channel is still known as one.
    """
    db.overwrite_what_is_deleted()
    lane, alias, total = (account_id, contact), _alias(), Erased()
    # The last first: what waits behind a head must not become one.
    owed = f"SELECT id FROM {_OWED} ORDER BY finished_at IS NOT NULL, position DESC"
    sent, private = f"SELECT id FROM {_SENT} ORDER BY id", f"SELECT deliveries.id FROM {_PRIVATE}"
    heard, named = f"SELECT id FROM {_HEARD}", f"SELECT id FROM {_NAMED}"
    # First, while it is known which messages are theirs.
    db.write_last(lambda tx: questions.forget_contact(tx, account_id, contact))
    while True:  # somebody may be writing meanwhile
        step = Erased(
            deliveries=_in_steps(db, owed, lane, lambda tx, ids: _end_deliveries(tx, ids, alias))
            + _in_steps(db, private, lane, lambda tx, ids: _end_deliveries(tx, ids, alias)),
            messages=_in_steps(db, sent, lane, lambda tx, ids: _blank_messages(tx, ids, alias)),
            events=_in_steps(db, heard, lane, lambda tx, ids: _blank_events(tx, ids, contact, alias))
            + _in_steps(
                db,
                named,
                (account_id, _within(contact), contact),
                lambda tx, ids: _blank_events(tx, ids, contact, alias),
            ),
        )
        if step == Erased():
            break
        total += step

    def forget(tx: Tx) -> None:
        questions.forget_contact(tx, account_id, contact)
        tx.run("DELETE FROM contacts WHERE account_id = ? AND contact = ?", lane)

    db.write_last(forget)
    return total


def erase_unrouted(db: Database, contact: str) -> Erased:
    """Erase what a customer wrote to accounts that are not configured here."""
    alias, unrouted = _alias(), f"SELECT id FROM {_UNROUTED}"
    return Erased(events=_in_steps(db, unrouted, (contact,), lambda tx, ids: _blank_events(tx, ids, contact, alias)))


def log_contact(db: Database, erased: Erased, account_id: str | None, now: str) -> str:
    """Note in the log that somebody was erased, but not who; return the entry's id."""
    row = {"id": new_id("era"), "kind": "contact", "account_id": account_id, "asked_at": now, "done_at": now}
    db.write_last(lambda tx: tx.insert("erasures", {**row, **vars(erased)}))
    return str(row["id"])


def _alias() -> str:
    return contacts.ERASED + secrets.token_hex(8)


def _within(contact: str) -> str:
    return "%" + contact.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_") + "%"


def _end_deliveries(tx: Tx, ids: Sequence[str], alias: str) -> None:
    marks = _marks(ids)
    deliveries.break_off(tx, f"id IN ({marks})", ids, "erased")
    # What became of a private reply names nobody by its contact, which is the comment.
    told = {"contact": alias, "payload": None, "body": None, "gone": 1}
    owed = f"SELECT event_id FROM deliveries WHERE id IN ({marks})"
    theirs = f"message_id IS NOT NULL AND contact LIKE 'comment:%' AND id IN ({owed})"
    tx.update("events", told, theirs, ids)
    deliveries.move(tx, "done", f"id IN ({marks})", ids, {"last_code": "erased"})
    tx.update("deliveries", {"contact": alias, "gone": 1, "last_error": None}, f"id IN ({marks})", ids)
    tx.run(f"UPDATE history SET text = NULL WHERE subject IN ({marks})", ids)


def _blank_messages(tx: Tx, ids: Sequence[str], alias: str) -> None:
    these = f"id IN ({_marks(ids)})"
    tx.update(
        "outbound_messages", {"recipient_id": alias, "comment_id": None, "content": None, "metadata": None}, these, ids
    )
    for row in tx.rows(f"SELECT id FROM outbound_messages WHERE status = 'pending' AND {these}", ids):
        messages.fail(tx, row["id"], "erased", "what is stored about the recipient was erased")


def _blank_events(tx: Tx, ids: Sequence[str], contact: str, alias: str) -> None:
    tx.run(
        f"""
        UPDATE events SET contact = ?, party = NULL, payload = NULL, body = NULL, gone = 1,
            rank = CASE WHEN rank IS NOT NULL THEN {WITHDRAWN} END,
            dedupe_key = REPLACE(dedupe_key, ?, ?),
            state = CASE WHEN state IN ('held', 'unrouted') THEN 'noted' ELSE state END WHERE id IN ({_marks(ids)})""",
        (alias, contact, alias, *ids),
    )


@dataclass(frozen=True)
class Stored:
    """The rows about a customer of an account; `other_deliveries` are of neither an event nor a message of theirs."""

    profile: Row | None
    events: list[Row]
    messages: list[Row]
    other_deliveries: list[Row]

    @property
    def is_something(self) -> bool:
        """Whether there is any."""
        return any((self.profile, self.events, self.messages, self.other_deliveries))


def stored(db: Reads, account_id: str, contact: str) -> Stored:
    """Return what is stored about a customer of an account, which is what `erase_contact` erases, oldest first."""
    lane = (account_id, contact)
    if contact.startswith(contacts.ERASED):  # what an erasure left is nobody's any more
        return Stored(None, [], [], [])
    told = f"message_id IS NOT NULL AND id IN (SELECT event_id FROM (SELECT deliveries.* FROM {_PRIVATE}))"
    events = db.rows(f"SELECT * FROM {_HEARD}", lane) + db.rows(f"SELECT * FROM events WHERE {told}", lane)
    events += db.rows(f"SELECT * FROM {_NAMED}", (account_id, _within(contact), contact))
    events.sort(key=lambda row: int(row["position"]))
    messages_of = db.rows(f"SELECT * FROM {_SENT} ORDER BY id", lane)
    ids = {row["id"] for row in (*events, *messages_of)}
    others = [row for row in db.rows(f"SELECT * FROM {_OWED}", lane) if not ids & {row["event_id"], row["message_id"]}]
    profile = db.row("SELECT * FROM contacts WHERE account_id = ? AND contact = ?", lane)
    return Stored(profile, events, messages_of, others)


def stored_unrouted(db: Reads, contact: str) -> list[Row]:
    """Return what a customer wrote to accounts that are not configured here."""
    return db.rows(f"SELECT * FROM {_UNROUTED} ORDER BY position", (contact,))


def deliveries_of(db: Reads, *, event_id: str | None = None, message_id: str | None = None) -> list[Row]:
    """Return what was owed of an event to the CRM, or of a message to the channel."""
    if event_id is not None:
        return db.rows("SELECT * FROM deliveries WHERE event_id = ? ORDER BY position", (event_id,))
    of = "message_id = ? AND target = 'instagram'"
    return db.rows(f"SELECT * FROM deliveries WHERE {of} ORDER BY position", (message_id,))


# --- an account, by Meta's callbacks ---


def find_account(db: Reads, user_id: str) -> Row | None:
    """Return the account that Meta calls so, by its app-scoped id or by the one in webhooks."""
    found = db.row("SELECT * FROM accounts WHERE app_scoped_id = ? AND deleted_at IS NULL", (user_id,))
    return found or accounts.find_external(db, user_id)


def entry(db: Reads, entry_id: str) -> Row | None:
    """Return an entry of the log, or None."""
    return db.row("SELECT * FROM erasures WHERE id = ?", (entry_id,))


def deauthorize(db: Database, account: Row | None, code: str, now: str) -> bool:
    """Drop an account's token and hold its sends; tell whether the call was new."""
    log_id = f"deauthorized_{code}"  # a request for deletion in the same second is signed with the same code
    if entry(db, log_id) is not None:
        return False
    if account is not None:
        accounts.lose(db, account["id"], _GONE)
    return _note(db, "deauthorized", account, log_id, now, done_at=now)


def request_deletion(db: Database, account: Row | None, code: str, now_s: float) -> bool:
    """Delete an account, and have all that is stored about it erased soon; tell whether the call was new."""
    now = instant(now_s)
    is_new = _note(db, "account", account, code, now, done_at=None if account else now)
    if is_new and account is not None:
        turn.delete_account(db, account["id"])
    return is_new


def _note(
    db: Database,
    kind: Literal["account", "deauthorized"],
    account: Row | None,
    log_id: str,
    now: str,
    *,
    done_at: str | None,
) -> bool:
    account_id = account["id"] if account else None
    row = {"id": log_id, "kind": kind, "account_id": account_id, "asked_at": now, "done_at": done_at}
    return db.write(lambda tx: tx.insert("erasures", row, once=True))


def erase_accounts(db: Database, now_s: float) -> list[Row]:
    """Erase the accounts whose deletion was requested some minutes ago; return their entries of the log."""
    before, now = instant(now_s - _GRACE_S), instant(now_s)
    due = db.rows("SELECT * FROM erasures WHERE done_at IS NULL AND asked_at <= ?", (before,))
    for request in due:
        if accounts.find(db, request["account_id"]):  # broken off right after the request
            turn.delete_account(db, request["account_id"])
            continue
        erased = _erase_account(db, request["account_id"])
        done = {"done_at": now, **{name: request[name] + rows for name, rows in vars(erased).items()}}
        db.write_last(lambda tx, done=done, code=request["id"]: tx.update("erasures", done, "id = ?", [code]))  # type: ignore[misc]
    return [row for row in (entry(db, request["id"]) for request in due) if row and row["done_at"]]


def _erase_account(db: Database, account_id: str) -> Erased:
    db.overwrite_what_is_deleted()
    of_account = (account_id,)
    external_id = db.value("SELECT instagram_account_id FROM accounts WHERE id = ?", of_account)
    unrouted = "SELECT id FROM events WHERE account_id IS NULL AND ? IN (instagram_account_id, party)"
    erased = Erased(
        deliveries=_in_steps(
            db, "SELECT id FROM deliveries WHERE account_id = ?", of_account,
            lambda tx, ids: _delete(tx, ids, "deliveries"),
        ),
        messages=_in_steps(
            db, "SELECT id FROM outbound_messages WHERE account_id = ?", of_account,
            lambda tx, ids: _delete(tx, ids, "outbound_messages"),
        ),
        events=_in_steps(
            db, "SELECT id FROM events WHERE account_id = ?", of_account,
            lambda tx, ids: _delete(tx, ids, "events"),
        )
        + _in_steps(db, unrouted, (external_id,), lambda tx, ids: _delete(tx, ids, "events")),
    )  # fmt: skip
    _in_steps(
        db, "SELECT contact AS id FROM contacts WHERE account_id = ?", of_account,
        lambda tx, ids: tx.run(
            f"DELETE FROM contacts WHERE account_id = ? AND contact IN ({_marks(ids)})", (account_id, *ids)
        ),
    )  # fmt: skip
    blank = {"instagram_account_id": "erased", "app_scoped_id": None, "username": None}

    def finish(tx: Tx) -> None:
        history.forget(tx, of_account)
        tx.update("accounts", blank, "id = ?", of_account)

    db.write_last(finish)
    return erased


def _delete(tx: Tx, ids: Sequence[str], table: str) -> None:
    history.forget(tx, ids)
    tx.run(f"DELETE FROM {table} WHERE id IN ({_marks(ids)})", ids)


def _in_steps(db: Database, query: str, parameters: Sequence[Any], job: Callable[[Tx, Sequence[str]], Any]) -> int:
    """Do a job on all that a query finds, a few at a time, until it finds none; return how many there were."""

    def step(tx: Tx, ids: Sequence[str]) -> int:
        job(tx, ids)
        return len(ids)

    return db.in_steps(iter(lambda: [row["id"] for row in db.rows(f"{query} LIMIT {_AT_ONCE}", parameters)], []), step)


def _marks(ids: Sequence[str]) -> str:
    return ", ".join("?" * len(ids))
