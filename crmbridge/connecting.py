"""An Instagram account is connected, changed or taken away: what the API and the command line do alike.

Instagram is asked whose a token is, and to send the account's webhooks here; the store decides what a change means.
"""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from crmbridge import net, signing
from crmbridge.errors import BridgeError, Conflict, Invalid, Unavailable
from crmbridge.events import Wake, instant
from crmbridge.instagram.client import Client, Identity
from crmbridge.store import accounts, dead, inbound, turn
from crmbridge.store.database import Database, Row
from crmbridge.vault import Vault

_TOO_YOUNG_S = 86_400


@dataclass(frozen=True)
class Connected:
    """What came of it. `made` is a webhook secret that was made here, to be shown this once.

    `adopted` events had come for the account before it was here; `released` tells whether a hold of its deliveries
    ended, and how many events that a 401 ended are sent again.
    """

    account: Row
    made: str | None
    warnings: list[str]
    adopted: int = 0
    released: tuple[bool, int] = (False, 0)


class Connector:
    """What is needed for it: where CRM URLs may lead, how long a message waits for names, what rings the worker."""

    def __init__(
        self, db: Database, vault: Vault, client: Client, reach: net.Reach, *, wake: Wake, ask_s: float
    ) -> None:
        self._db, self._vault = db, vault
        self._client, self._reach = client, reach
        self._wake, self._ask_s = wake, ask_s

    def add(
        self,
        instagram_account_id: str | None,
        *,
        token: str,
        url: str | None,
        secret: str | None,
        username: str | None,
        now_s: float,
    ) -> Connected:
        """Check the token, store the account, subscribe it to its webhooks, and route what already came for it.

        Without an id it is whoever the token belongs to. Raises Invalid, Conflict, Unavailable.
        """
        made = signing.make_secret() if url and secret is None else None
        secret = secret or made
        warnings = self._check_target(url, secret)
        # Whether it exists can be told without asking Instagram.
        known = accounts.find_external(self._db, instagram_account_id) if instagram_account_id else None
        if known:
            raise Conflict(f"This Instagram account is already here, as {known['id']}.", code="account_exists")
        identity = self._identify(token, instagram_account_id)
        values = {
            "instagram_account_id": identity.user_id,
            "app_scoped_id": identity.app_scoped_id,
            "username": identity.username or username,
            "token_checked_at": instant(now_s),
            "token_refresh_at": _refresh_at(now_s),
        }
        row = accounts.create(self._db, self._vault, values, token=token, url=url, secret=secret)
        adopted = 0
        with contextlib.suppress(Unavailable):  # the sweep does it; the secret that was made must be shown now
            adopted = inbound.adopt(self._db, row, self._ask_s)
        if adopted:
            self._wake({row["id"]})
        return Connected(self._subscribe(row, token), made, warnings, adopted)

    def change(self, row: Row, given: Mapping[str, Any], now_s: float) -> Connected:
        """Change what is given, by the names of the API; a new token must belong to the same Instagram account.

        Raises Invalid, Conflict, Unavailable.
        """
        given = dict(given)
        url = given.get("crm_webhook_url", row["crm_webhook_url"])
        spare = signing.make_secret() if given.get("crm_webhook_url") and "webhook_secret" not in given else None
        is_mended = bool(given.keys() & {"crm_webhook_url", "webhook_secret"})
        warnings: list[str] = []
        if is_mended:
            has_secret = spare is not None or (row["webhook_secret_sealed"] and "webhook_secret" not in given)
            warnings = self._check_target(url, given.get("webhook_secret"), has_secret=has_secret)
        token = given.get("access_token")
        owner = self._owner(row, token, now_s) if token else {}
        row, is_taken = accounts.change(self._db, self._vault, row["id"], given, owner, spare)
        made = spare if is_taken else None
        if row["crm_webhook_url"] is None:  # the CRM reads the rest when it asks
            turn.end_leftovers(self._db)
        released = dead.release(self._db, row, "crm") if row["crm_webhook_url"] and is_mended else (False, 0)
        row = self._subscribe(row, token) if token else row
        self._wake({row["id"]})
        return Connected(row, made, warnings, released=released)

    def remove(self, row: Row) -> BridgeError | None:
        """Erase an account's secrets and end what it still owes; return why its webhooks could not be ended."""
        problem: BridgeError | None = None
        try:
            self._client.unsubscribe(accounts.token(self._vault, row), row["instagram_account_id"])
        except BridgeError as error:  # the account goes all the same: a dead token is a common reason to delete it
            problem = error
        turn.delete_account(self._db, row["id"])
        return problem

    def _owner(self, row: Row, token: str, now_s: float) -> Row:
        """Return what a new token changes of the account, once Instagram says whose it is."""
        identity = self._identify(token, row["instagram_account_id"])
        return {
            "app_scoped_id": identity.app_scoped_id,
            "username": identity.username or row["username"],
            "token_checked_at": instant(now_s),
            "token_expires_at": None,
            "token_refresh_at": _refresh_at(now_s),
            "token_refusals": 0,
        }

    def _identify(self, token: str, wanted: str | None) -> Identity:
        identity = self._client.whoami(token)
        if wanted is not None and wanted not in (identity.user_id, identity.app_scoped_id):
            problem = f"the token belongs to user_id {identity.user_id} (app-scoped id {identity.app_scoped_id})"
            detail = {"field": "instagram_account_id", "problem": problem}
            raise Invalid(f"{wanted} is not the token's account: {problem}.", code="account_mismatch", details=[detail])
        return identity

    def _subscribe(self, row: Row, token: str) -> Row:
        problem = self._client.subscribe(token, row["instagram_account_id"])
        values = {"subscription_ok": int(problem is None), "subscription_error": problem}
        return accounts.update(self._db, row["id"], values)

    def _check_target(self, url: str | None, secret: str | None, *, has_secret: bool = False) -> list[str]:
        """Return the warnings for where events go and what signs them. Raises Invalid."""
        if url is not None:
            self._reach.check_url(url, "crm_webhook_url")
        problem = signing.problem_of(secret) if secret is not None else None
        if secret is None and url is not None and not has_secret:
            problem = "is required with crm_webhook_url: it signs every webhook"
        if problem:
            detail = {"field": "webhook_secret", "problem": problem}
            raise Invalid(f"webhook_secret {problem}.", details=[detail])
        return ["webhook_secret_weak"] if secret is not None and signing.is_weak(secret) else []


def _refresh_at(now_s: float) -> str:
    """Return when to ask for a fresh token: Instagram gives none for one that is younger than 24 hours."""
    return instant(now_s + _TOO_YOUNG_S)
