"""Sees to it that Instagram sends each account's webhooks here: after failures Meta ends a subscription by itself."""

from collections.abc import Callable

from crmbridge import log
from crmbridge.alerts import Alarm
from crmbridge.errors import BridgeError, Unavailable
from crmbridge.instagram import reading
from crmbridge.instagram.client import Client, Refusal
from crmbridge.store import accounts
from crmbridge.store.database import Database, Row
from crmbridge.vault import Vault


class Subscriptions:
    """Looks at the subscriptions and renews them."""

    def __init__(
        self,
        db: Database,
        client: Client,
        vault: Vault,
        alarm: Alarm,
        *,
        clock: Callable[[], float],
    ) -> None:
        self._db = db
        self._client = client
        self._vault = vault
        self._alarm = alarm
        self._clock = clock

    def check(self, *, renew: bool = False) -> None:
        """Subscribe again what is not subscribed; with `renew`, everything."""
        for account in accounts.everyone(self._db):
            if account["status"] != "inactive" and account["access_token_sealed"]:
                try:
                    self._check(account, renew=renew)
                except BridgeError as problem:  # a token that does not open, an account deleted meanwhile
                    log.warning("subscription.unknown", account=account["id"], error=problem.message)

    def _check(self, account: Row, *, renew: bool) -> None:
        token = accounts.token(self._vault, account)
        try:
            lacking = reading.lacking(self._client, token, account["instagram_account_id"])
        except (Refusal, Unavailable) as problem:
            log.info("subscription.unknown", account=account["id"], error=problem.message)
            if not renew:
                return
            lacking = []
        if not lacking and not renew:
            self._note(account, None)
            return
        problem_now = self._client.subscribe(token, account["instagram_account_id"])
        self._note(account, problem_now)
        if problem_now is None:
            log.warning("subscription.renewed", account=account["id"], lacked=",".join(lacking) or None)

    def _note(self, account: Row, problem: str | None) -> None:
        """Store what is news, and raise or end the alert."""
        if (account["subscription_ok"], account["subscription_error"]) != (int(problem is None), problem):
            values = {"subscription_ok": int(problem is None), "subscription_error": problem}
            accounts.update(self._db, account["id"], values)
        if problem is None:
            self._alarm.clear("subscription_lost", account=account["id"])
        else:
            message = f"Instagram's webhooks for {account['username'] or account['id']} cannot be subscribed: {problem}"
            self._alarm.alert("subscription_lost", message, account=account["id"])
