"""Keeps access tokens alive: a fresh one every week, the old one in use until the new one is stored."""

from collections.abc import Callable

from crmbridge import log
from crmbridge.alerts import Alarm
from crmbridge.alerts.kinds import kind_of
from crmbridge.errors import BridgeError, Invalid, Unavailable
from crmbridge.events import instant
from crmbridge.instagram import reading
from crmbridge.instagram.client import Client, Refusal
from crmbridge.store import accounts
from crmbridge.store.database import Database, Row
from crmbridge.vault import Vault

# Instagram refreshes no token younger than this, and how old a pasted one is nobody tells.
DAY_S = 86_400.0
_WEEK_S = 7 * DAY_S
_AGAIN_S = 3600.0


class Tokens:
    """Asks for fresh tokens when their time has come."""

    def __init__(self, db: Database, client: Client, vault: Vault, alarm: Alarm, *, clock: Callable[[], float]) -> None:
        self._db = db
        self._client = client
        self._vault = vault
        self._alarm = alarm
        self._clock = clock

    def refresh(self) -> None:
        """Refresh every token whose time has come; one that Instagram calls dead stops its account.

        A refusal is asked about again a day later, and the second one running is told: the old token ends.
        """
        for account in accounts.to_refresh(self._db, instant(self._clock())):
            try:
                self._refresh(account)
            except BridgeError as problem:  # a token that does not open, an account deleted meanwhile
                log.error("token.not_refreshed", account=account["id"], code=problem.code, error=problem.message)

    def _refresh(self, account: Row) -> None:
        now_s = self._clock()
        try:
            fresh = reading.refresh(self._client, accounts.token(self._vault, account))
        except Unavailable as problem:
            log.warning("token.not_refreshed", account=account["id"], error=problem.message)
            accounts.refresh_later(self._db, account, instant(now_s + _AGAIN_S))
        except Refusal as problem:
            log.warning("token.not_refreshed", account=account["id"], code=problem.code, error=problem.message)
            refusals = accounts.refuse_token(self._db, account, instant(now_s + DAY_S))
            if problem.code.startswith("token_") and self._is_dead(account):
                todo = problem.hint.replace("ACCOUNT", account["id"])
                self._stop(account, problem.code, f"Instagram does not renew the access token, {problem.code}: {todo}")
            elif refusals >= accounts.REFUSED_OFTEN:
                self._tell(account, problem)
        else:
            expires_at = instant(now_s + fresh.lasts_s)
            # The next one well before this one ends, however short-lived it is.
            due = instant(now_s + min(_WEEK_S, fresh.lasts_s / 2))
            sealed = accounts.seal(self._vault, account["instagram_id"], fresh.token)
            if accounts.renew_token(self._db, account, sealed, expires_at=expires_at, refresh_at=due):
                log.info("token.refreshed", account=account["id"], expires_at=expires_at)
                for kind in ("token_expiring", "token_not_renewed"):
                    self._alarm.clear(kind, account=account["id"])
                if account["status"] != "error":  # one that was stopped still waits for a person
                    self._alarm.clear("token_dead", account=account["id"])

    def _is_dead(self, account: Row) -> bool:
        """Tell whether the token is refused for other calls, too: why a refreshing is refused is not documented."""
        try:
            self._client.whoami(accounts.token(self._vault, account))
        except Invalid as problem:
            return problem.code.startswith("token_")
        except Unavailable:
            pass
        return False

    def _stop(self, account: Row, code: str, reason: str) -> None:
        self._db.write_last(lambda tx: accounts.stop(tx, account, code, reason))
        self._alarm.alert("token_dead", reason, account=account["id"])

    def _tell(self, account: Row, problem: Refusal) -> None:
        """Tell of a token that is good and not renewed, until when it is, and what ends that."""
        end = reading.token_end(account)
        until = f"; it ends {end.said()}" if end else ""
        todo = kind_of("token_not_renewed").todo + (f", by {end.at[:10]}" if end else "")
        if "new token" not in problem.hint:
            todo = f"{problem.hint}; else {todo}"
        message = f"Instagram refuses to renew the access token, {problem.code}{until}"
        todo = todo.replace("ACCOUNT", account["id"])
        self._alarm.alert("token_not_renewed", message, account=account["id"], todo=todo)
