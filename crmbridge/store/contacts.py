"""Customers as one account knows them, and the numbers that order what goes to and from them."""

from collections.abc import Sequence
from typing import Literal

from crmbridge.events import new_id
from crmbridge.store.database import Reads, Row, Tx

ERASED = "erased_"  # how a contact begins who was erased
Target = Literal["crm", "instagram"]
_COUNT = """
    INSERT INTO contacts (account_id, contact, conversation_id, {0}, created_at) VALUES (?, ?, ?, 1, ?)
    ON CONFLICT (account_id, contact) DO UPDATE SET {0} = contacts.{0} + 1
    RETURNING {0}"""
_NEXT_EVENT, _NEXT_SEND = _COUNT.format("crm_sequence"), _COUNT.format("sends")


def next_sequence(tx: Tx, account_id: str, contact: str) -> int:
    """Give out the next number of what a CRM hears about a contact, who is made at the first mention."""
    return int(tx.value(_NEXT_EVENT, (account_id, contact, new_id("cnv"), tx.now)))


def count_send(tx: Tx, account_id: str, contact: str) -> None:
    """Count a send; the contact is made at the first mention, and nobody else writes to their lane meanwhile."""
    tx.value(_NEXT_SEND, (account_id, contact, new_id("cnv"), tx.now))


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
