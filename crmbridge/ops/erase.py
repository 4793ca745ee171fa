"""``crmbridge erase``: what is stored about one customer goes, also where it is still owed."""

import time

from crmbridge import terminal
from crmbridge.errors import Misconfigured
from crmbridge.events import instant
from crmbridge.store import accounts, privacy
from crmbridge.store.database import Database


def run(db: Database, contact: str, account_id: str | None) -> int:
    """Erase a customer and print how much there was; return 1 when there was nothing.

    Raises Misconfigured as `places` does.
    """
    total, now_s = privacy.Erased(), time.time()
    for one in places(db, contact, account_id):
        erased = privacy.erase_contact(db, one, contact)
        if erased != privacy.Erased():
            terminal.say(f"{one}: erased " + ", ".join(f"{rows} {name}" for name, rows in vars(erased).items()))
        total += erased
    if account_id is None:
        total += privacy.erase_unrouted(db, contact)
    if total == privacy.Erased():
        terminal.say("nothing is stored about this contact")
        return 1
    terminal.say(f"logged as {privacy.log_contact(db, total, account_id, instant(now_s))}, without saying who it was")
    return 0


def places(db: Database, contact: str, account_id: str | None) -> list[str]:
    """Return the accounts at which a customer is looked for, deleted ones too.

    Raises Misconfigured for an account that never was here, and for a contact that is none.
    """
    known = accounts.ids(db)
    if account_id is not None and account_id not in known:
        raise Misconfigured(f"there is no account {account_id}; 'crmbridge account list' shows them")
    if not contact.strip():
        raise Misconfigured("--contact needs the customer's id, the sender_id of an event")
    return known if account_id is None else [account_id]
