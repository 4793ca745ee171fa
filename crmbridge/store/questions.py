"""What the channel is to be asked beside the messages: stored with what raised it, so that no restart forgets it."""

from collections.abc import Collection, Sequence
from typing import Literal

from crmbridge.events import instant
from crmbridge.store import contacts, deliveries
from crmbridge.store.database import Database, Reads, Row, Tx

Kind = Literal["profile", "message"]
FRESH_S = 86_400.0
REFUSED_S = 7 * 86_400.0  # the person blocked us, for instance
_FAILED_S = 3600.0  # doubled with each failure in a row


def ask(tx: Tx, account_id: str, kind: Kind, subject: str) -> bool:
    """Note a question, once; runs inside a write. Return whether it is a new one."""
    question = {"account_id": account_id, "kind": kind, "subject": subject, "asked_at": tx.now, "due": tx.now}
    return tx.insert("questions", question, once=True)


def due(db: Reads, now: str, *, but: Collection[str], limit: int) -> list[Row]:
    """Return questions that are due, but none of the accounts in `but`: the newest first, as a message waits for it."""
    others = f" AND account_id NOT IN ({', '.join('?' * len(but))})" if but else ""
    return db.rows(f"SELECT * FROM questions WHERE due <= ?{others} ORDER BY due DESC LIMIT ?", (now, *but, limit))


def next_due(db: Reads, now: str) -> str | None:
    """Return when the next question is due that is not yet."""
    found = db.value("SELECT MIN(due) FROM questions WHERE due > ?", (now,))
    return str(found) if found else None


def later(db: Database, question: Row, due_at: str) -> None:
    """Ask again then."""
    again: Row = {"due": due_at, "tries": question["tries"] + 1}
    db.write(lambda tx: tx.update("questions", again, *_only(question)))


def drop(db: Database, question: Row) -> None:
    """Ask no more, and let go what waited for the answer."""
    named = (question["account_id"], question["subject"])

    def job(tx: Tx) -> None:
        for row in tx.rows("SELECT contact FROM events WHERE account_id = ? AND instagram_message_id = ?", named):
            deliveries.wait_no_more(tx, question["account_id"], row["contact"])
        tx.run(f"DELETE FROM questions WHERE {_only(question)[0]}", _only(question)[1])

    db.write(job)


def forget(db: Database, before: str, messages_before: str) -> int:
    """Drop what could not be asked since then: the next message asks again for a name, but for no message."""
    old = "DELETE FROM questions WHERE asked_at < ? AND (kind = 'profile' OR asked_at < ?)"
    return db.write_last(lambda tx: tx.run(old, (before, messages_before)))


def forget_contact(tx: Tx, account_id: str, contact: str) -> None:
    """Ask no more about a customer who is being erased; runs inside a write."""
    announced = "SELECT instagram_message_id FROM events WHERE account_id = ? AND contact = ?"
    tx.run(
        f"""
        DELETE FROM questions
        WHERE account_id = ? AND (subject = ? OR (kind = 'message' AND subject IN ({announced})))""",
        (account_id, contact, account_id, contact),
    )


def forget_account(tx: Tx, account_id: str) -> None:
    """Ask no more for an account that is being deleted; runs inside a write."""
    for table in ("questions", "backfills"):
        tx.run(f"DELETE FROM {table} WHERE account_id = ?", (account_id,))


def keep_profile(db: Database, question: Row, username: str | None, name: str | None, now_s: float) -> None:
    """Store a contact's names, and let a first message go that waited for them."""
    told = {"username": username, "name": name, "profile_failures": 0}
    _settle(db, question, {**told, "profile_due": instant(now_s + FRESH_S)})


def keep_silence(db: Database, question: Row, now_s: float, *, refused: bool) -> None:
    """Store that the channel did not tell a contact's names, so that it is not asked with every message."""
    failures = contacts.profile(db, question["account_id"], question["subject"])["profile_failures"] or 0
    wait_s = REFUSED_S if refused else min(_FAILED_S * 2 ** min(failures, 5), FRESH_S)
    _settle(db, question, {"profile_failures": failures + 1, "profile_due": instant(now_s + wait_s)})


def keep_reticence(db: Database, question: Row) -> None:
    """Store that a contact has not consented yet to tell their names: what they write next asks again."""
    _settle(db, question, {"profile_failures": 0, "profile_due": None})


def _settle(db: Database, question: Row, values: Row) -> None:
    where, key = _only(question)

    def job(tx: Tx) -> None:
        contact = [question["account_id"], question["subject"]]
        tx.update("contacts", {**values, "profile_checked_at": tx.now}, "account_id = ? AND contact = ?", contact)
        deliveries.wait_no_more(tx, question["account_id"], question["subject"])
        tx.run(f"DELETE FROM questions WHERE {where}", key)

    db.write(job)


def _only(question: Row) -> tuple[str, Sequence[str]]:
    where = "account_id = ? AND kind = ? AND subject = ?"
    return where, [question["account_id"], question["kind"], question["subject"]]


# --- what was missed ---


def ask_backfill(db: Database, account_id: str, since: str) -> None:
    """Note that an account's conversations are to be read again, from the earlier time if they were already."""
    db.write_last(
        lambda tx: tx.run(
            """
            INSERT INTO backfills (account_id, since, asked_at, due) VALUES (?, ?, ?, ?)
            ON CONFLICT (account_id) DO UPDATE SET asked_at = excluded.asked_at, due = excluded.due, tries = 0,
                since = CASE WHEN since < excluded.since THEN since ELSE excluded.since END""",
            (account_id, since, tx.now, tx.now),
        )
    )


def backfills(db: Reads, now: str) -> list[Row]:
    """Return the backfills that are due."""
    return db.rows("SELECT * FROM backfills WHERE due <= ? ORDER BY due", (now,))


def backfill_later(db: Database, backfill: Row, due_at: str) -> None:
    """Try a backfill again then."""
    again: Row = {"due": due_at, "tries": backfill["tries"] + 1}
    db.write_last(lambda tx: tx.update("backfills", again, "account_id = ?", [backfill["account_id"]]))


def end_backfill(db: Database, backfill: Row) -> None:
    """A backfill is through, unless it was asked for once more meanwhile."""
    key = (backfill["account_id"], backfill["since"], backfill["asked_at"])
    sql = "DELETE FROM backfills WHERE account_id = ? AND since = ? AND asked_at = ?"
    db.write_last(lambda tx: tx.run(sql, key))
