"""Customers as one account knows them, and the numbers that order what goes to and from them."""

from collections.abc import Sequence
from typing import Literal

from crmbridge.events import new_id
from crmbridge.store.database import Reads, Row, Tx

ERASED = "erased_"  # how a contact begins who was erased
Target = Literal["crm", "instagram"]
_NEXT = {
    target: f"""
    INSERT INTO contacts (account_id, contact, conversation_id, {column}, created_at) VALUES (?, ?, ?, 1, ?)
    ON CONFLICT (account_id, contact) DO UPDATE SET {column} = contacts.{column} + 1
    RETURNING {column}"""
    for target, column in (("crm", "crm_sequence"), ("instagram", "send_sequence"))
}


def next_sequence(db: Reads, target: Target, account_id: str, contact: str, now: str) -> int:
    """Give out the next number of a lane; the contact is made at its first mention."""
    return int(db.value(_NEXT[target], (account_id, contact, new_id("cnv"), now)))


def acted(tx: Tx, account_id: str, contact: str, *, at: str | None, until: str | None) -> None:
    """Note when a customer last opened the window, and until when it may be open beyond its usual length.

    An earlier time than the one that is known changes nothing. Runs inside a write, after `next_sequence`.
    """
    for column, time in (("last_wrote_at", at), ("window_until", until)):
        if time is not None:
            tx.run(
                f"""
                UPDATE contacts SET {column} = ? WHERE account_id = ? AND contact = ?
                    AND ({column} IS NULL OR {column} < ?)""",
                (time, account_id, contact, time),
            )


def name(tx: Tx, account_id: str, contact: str, username: str) -> None:
    """Note what a customer is called; runs inside a write."""
    tx.update("contacts", {"username": username}, "account_id = ? AND contact = ?", [account_id, contact])


def find(db: Reads, account_id: str, contact: str) -> Row:
    """Return the contact's conversation_id, username, name, last_wrote_at and window_until."""
    return _columns(db, account_id, contact, ("conversation_id", "username", "name", "last_wrote_at", "window_until"))


def profile(db: Reads, account_id: str, contact: str) -> Row:
    """Return when the contact's names were asked for, when they are to be again, and how often that failed in a row."""
    return _columns(db, account_id, contact, ("profile_checked_at", "profile_due", "profile_failures"))


def _columns(db: Reads, account_id: str, contact: str, names: Sequence[str]) -> Row:
    found = db.row(
        f"SELECT {', '.join(names)} FROM contacts WHERE account_id = ? AND contact = ?", (account_id, contact)
    )
    return found or dict.fromkeys(names)
