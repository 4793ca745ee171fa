"""Customers as one account knows them, and the numbers that order what goes to and from them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from crmbridge.events import new_id
from crmbridge.store.database import Reads, Row, Tx

ERASED = "erased_"  # how a contact begins who was erased
Target = Literal["crm", "instagram"]
_LATER = "CASE WHEN contacts.{0} > excluded.{0} THEN contacts.{0} ELSE COALESCE(excluded.{0}, contacts.{0}) END"
_HEAR = f"""
    INSERT INTO contacts (account_id, contact, conversation_id, created_at, last_wrote_at, window_until, username,
        crm_sequence)
    SELECT account_id, ?, ?, ?, ?, ?, ?, 1 FROM endpoints WHERE account_id = ? AND kind = 'crm'
    ON CONFLICT (account_id, contact) DO UPDATE SET crm_sequence = contacts.crm_sequence + 1,
        last_wrote_at = {_LATER.format("last_wrote_at")}, window_until = {_LATER.format("window_until")},
        username = COALESCE(excluded.username, contacts.username)
    RETURNING crm_sequence, profile_checked_at, profile_due,
        (SELECT url FROM endpoints WHERE account_id = contacts.account_id AND kind = 'crm') AS crm_url"""


@dataclass(frozen=True, slots=True)
class Act:
    """What something that a customer did tells of them: when it opened the window, until when beyond its usual length.

    None changes nothing, nor does an earlier time than the one that is known.
    """

    at: str | None = None
    until: str | None = None
    username: str | None = None


NOTHING = Act()


def hear(tx: Tx, account_id: str, contact: str, act: Act = NOTHING) -> Row:
    """Give out the next number of what a CRM hears about a contact, who is made at the first mention.

    Returns `crm_sequence`, and with it when their names were asked for and are to be again, and the CRM's URL. Nothing
    for an account that is deleted: nobody hears of it any more.
    """
    return tx.row(_HEAR, (contact, new_id("cnv"), tx.now, act.at, act.until, act.username, account_id)) or {}


def note(tx: Tx, account_id: str, contact: str, act: Act) -> None:
    """Note what a customer did, of which no CRM hears."""
    if act == NOTHING:
        return
    told = {"last_wrote_at": act.at, "window_until": act.until}
    later = ", ".join(f"{name} = CASE WHEN {name} > ? THEN {name} ELSE COALESCE(?, {name}) END" for name in told)
    sql = f"UPDATE contacts SET {later}, username = COALESCE(?, username) WHERE account_id = ? AND contact = ?"
    tx.run(sql, (act.at, act.at, act.until, act.until, act.username, account_id, contact))


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
