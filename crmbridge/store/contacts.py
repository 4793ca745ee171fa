"""Customers as one account knows them, and the numbers that order what goes to and from them."""

from typing import Literal

from crmbridge.events import new_id
from crmbridge.store.database import Database, Row

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


def find(db: Database, account_id: str, contact: str) -> Row:
    """Return the contact's conversation_id and username."""
    row = db.row(
        "SELECT conversation_id, username FROM contacts WHERE account_id = ? AND contact = ?", (account_id, contact)
    )
    return row or {"conversation_id": None, "username": None}
