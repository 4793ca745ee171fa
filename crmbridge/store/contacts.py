"""Customers as one account knows them, and the numbers that order what goes to and from them."""

from collections.abc import Sequence
from typing import Literal

from crmbridge.events import new_id
from crmbridge.store.database import Database, Row

ERASED = "erased_"  # how a contact begins who was erased
Target = Literal["crm", "instagram"]
_NEXT = {
    target: f"""
    INSERT INTO contacts (account_id, contact, conversation_id, {column}, created_at) VALUES (?, ?, ?, 1, ?)
    ON CONFLICT (account_id, contact) DO UPDATE SET {column} = contacts.{column} + 1
    RETURNING {column}"""
    for target, column in (("crm", "crm_sequence"), ("instagram", "send_sequence"))
}


def next_sequence(db: Database, target: Target, account_id: str, contact: str, now: str) -> int:
    """Give out the next number of a lane; the contact is made at its first mention."""
    return int(db.value(_NEXT[target], (account_id, contact, new_id("cnv"), now)))


def wrote(db: Database, account_id: str, contact: str, at: str) -> None:
    """Note when a customer last wrote; runs inside a write, after `next_sequence`."""
    db.run(
        """
        UPDATE contacts SET last_wrote_at = ? WHERE account_id = ? AND contact = ?
            AND (last_wrote_at IS NULL OR last_wrote_at < ?)""",
        (at, account_id, contact, at),
    )


def name(db: Database, account_id: str, contact: str, username: str) -> None:
    """Note what a customer is called; runs inside a write."""
    db.update("contacts", {"username": username}, "account_id = ? AND contact = ?", [account_id, contact])


def find(db: Database, account_id: str, contact: str) -> Row:
    """Return the contact's conversation_id, username, name and last_wrote_at."""
    return _columns(db, account_id, contact, ("conversation_id", "username", "name", "last_wrote_at"))


def profile(db: Database, account_id: str, contact: str) -> Row:
    """Return when the contact's names were asked for, when they are to be again, and how often that failed in a row."""
    return _columns(db, account_id, contact, ("profile_checked_at", "profile_due", "profile_failures"))


def _columns(db: Database, account_id: str, contact: str, names: Sequence[str]) -> Row:
    found = db.row(
        f"SELECT {', '.join(names)} FROM contacts WHERE account_id = ? AND contact = ?", (account_id, contact)
    )
    return found or dict.fromkeys(names)
