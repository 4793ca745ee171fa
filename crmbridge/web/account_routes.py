"""Connecting Instagram accounts: ``/api/v1/accounts…``."""

from collections.abc import Sequence
from typing import Any

from crmbridge import contract, log, net, signing
from crmbridge.alerts import Alarm
from crmbridge.errors import BridgeError, Conflict, Invalid, Misconfigured
from crmbridge.events import Wake, instant
from crmbridge.instagram import reading
from crmbridge.instagram.client import Client, Identity
from crmbridge.store import accounts, dead, endpoints, inbound, turn
from crmbridge.store.contacts import Target
from crmbridge.store.database import Database, Row
from crmbridge.vault import Vault
from crmbridge.web.app import Call, Reply, Route

_TOO_YOUNG_S = 86_400
_OVERLAP_S = 86_400.0  # the old webhook secret signs beside the new one


class AccountRoutes:
    """The handlers, with what they need: the vault, Instagram, and where CRM URLs may lead."""

    def __init__(
        self,
        vault: Vault,
        client: Client,
        reach: net.Reach,
        alarm: Alarm,
        wake: Wake,
        ask_s: float,
    ) -> None:
        self._vault = vault
        self._client = client
        self._reach = reach
        self._alarm = alarm
        self._wake = wake
        self._ask_s = ask_s

    def routes(self) -> list[Route]:
        """Return the routes."""
        one = "/api/v1/accounts/<account_id>"
        return [
            Route("GET", "/api/v1/accounts", self.page, "accounts:read", query=frozenset(("cursor", "limit"))),
            Route("POST", "/api/v1/accounts", self.create, "admin"),
            Route("GET", one, self.show, "accounts:read"),
            Route("PUT", one, self.update, "accounts:write"),
            Route("DELETE", one, self.delete, "admin"),
            Route("POST", f"{one}/pause", self.pause, "accounts:write"),
            Route("POST", f"{one}/resume", self.resume, "accounts:write"),
        ]

    def page(self, call: Call) -> Reply:
        """List the accounts that the key is bound to."""
        limit = call.limit()
        assert call.key is not None  # noqa: S101
        only = None if call.key["admin"] else call.key["accounts"]
        found = accounts.page(call.db, after=call.query.get("cursor", ""), limit=limit + 1, only=only)
        shown, more = found[:limit], len(found) > limit
        cursor = shown[-1]["id"] if more else None
        listed = [_shown(call.db, row) for row in shown]
        return Reply({"accounts": listed, "next_cursor": cursor, "has_more": more})

    def show(self, call: Call) -> Reply:
        """Show an account, never a credential."""
        return self._answer(call, call.account(call.path["account_id"]))

    def create(self, call: Call) -> Reply:
        """Check the token, store the account, subscribe it to its webhooks, and route what already came for it."""
        request = call.read(contract.AccountCreate)
        made = signing.make_secret() if request.crm_webhook_url and request.webhook_secret is None else None
        secret = request.webhook_secret or made
        warnings = self._check_target(request.crm_webhook_url, secret)
        # Whether it exists can be told without asking Instagram.
        known = accounts.find_external(call.db, request.instagram_account_id)
        if known:
            raise Conflict(f"This Instagram account is already here, as {known['id']}.", code="account_exists")
        identity = self._identify(request.access_token, {request.instagram_account_id})
        values = {
            "instagram_account_id": identity.user_id,
            "app_scoped_id": identity.app_scoped_id,
            "username": identity.username or request.username,
            "token_checked_at": instant(call.now_s),
            "token_refresh_at": _refresh_at(call.now_s),
        }
        where: dict[str, Any] = {"url": request.crm_webhook_url, "secret": secret}
        row = accounts.create(call.db, self._vault, values, token=request.access_token, **where)
        log.info("account.created", account=row["id"], instagram_account_id=identity.user_id)
        adopted = inbound.adopt(call.db, row, self._ask_s)
        if adopted:
            log.info("account.adopted", account=row["id"], events=adopted)
            self._wake({row["id"]})
        row = self._subscribe(call, row, request.access_token)
        headers = {"Location": f"/api/v1/accounts/{row['id']}"}
        return self._answer(call, row, 201, headers, made=made, warnings=warnings)

    def update(self, call: Call) -> Reply:
        """Change what the request names; a new token must belong to the same Instagram account."""
        row = call.account(call.path["account_id"])
        request = call.read(contract.AccountUpdate)
        given = request.model_fields_set
        status = request.status if "status" in given else None
        crm, made, warnings = self._with_crm(row, request, call.now_s)
        if status == "active" and not row["access_token_sealed"] and "access_token" not in given:
            raise Conflict("The account has no access token: send a new one.", code="token_missing")
        values, instagram = (
            self._with_token(row, request.access_token, call.now_s) if "access_token" in given else ({}, {})
        )
        if "access_token" in given and row["status"] == "error" and status is None:
            status = "active"
        row = accounts.update(call.db, row["id"], values, ends={"crm": crm, "instagram": instagram}, status=status)
        if row["crm_webhook_url"] is None:  # the CRM reads the rest when it asks
            turn.end_leftovers(call.db)
        if row["crm_webhook_url"] and given & {"crm_webhook_url", "webhook_secret"}:
            self._release(call, row, "crm")
        log.info("account.updated", account=row["id"], fields=",".join(sorted(given)) or None)
        if "access_token" in given:
            row = self._subscribe(call, row, request.access_token)
        self._wake({row["id"]})
        return self._answer(call, row, made=made, warnings=warnings)

    def _with_crm(self, row: Row, request: contract.AccountUpdate, now_s: float) -> tuple[Row, str | None, list[str]]:
        """Return what changes of the CRM's endpoint, the secret that was made for it, and the warnings."""
        given = request.model_fields_set
        changes: Row = {}
        warnings: list[str] = []
        url = request.crm_webhook_url if "crm_webhook_url" in given else row["crm_webhook_url"]
        made = signing.make_secret() if _lacks_secret(row, request, url) else None
        secret = request.webhook_secret if "webhook_secret" in given else made
        if given & {"crm_webhook_url", "webhook_secret"}:
            has_secret = row["webhook_secret_sealed"] and "webhook_secret" not in given
            warnings = self._check_target(url, secret, has_secret=has_secret)
        if "crm_webhook_url" in given:
            changes["url"] = url
        if "webhook_secret" in given or made:
            changes |= self._rotated(row, secret, now_s)
        return changes, made, warnings

    def _with_token(self, row: Row, token: str, now_s: float) -> tuple[Row, Row]:
        """Return what a new token changes of the account and of its endpoint, once Instagram says whose it is."""
        identity = self._identify(token, {row["instagram_account_id"]})
        account = {
            "app_scoped_id": identity.app_scoped_id,
            "username": identity.username or row["username"],
            "token_checked_at": instant(now_s),
            "token_expires_at": None,
            "token_refresh_at": _refresh_at(now_s),
            "token_refusals": 0,
        }
        return account, {"secret_sealed": accounts.seal(self._vault, row["instagram_id"], token)}

    def _release(self, call: Call, row: Row, target: Target) -> None:
        """End what a far side's answer holds back, as this caller says that it is mended."""
        was_held, again = dead.release(call.db, row, target)
        if was_held or again:
            log.info("account.released", account=row["id"], target=target, sent_again=again, by=call.key_id())

    def _rotated(self, row: Row, secret: str | None, now_s: float) -> dict[str, Any]:
        """Return the columns for a new secret; the old one signs beside it for a day, so that nothing is refused."""
        if not secret:
            return {"secret_sealed": None, "old_secret_sealed": None, "old_secret_until": None}
        try:
            before = accounts.webhook_secret(self._vault, row)
        except Misconfigured:  # it opens with no key: a new one is the remedy
            before = None
        if before == secret:
            return {}
        sealed = {"secret_sealed": accounts.seal(self._vault, row["crm_id"], secret)}
        old = accounts.seal(self._vault, row["crm_id"], before, "old_secret_sealed") if before else None
        return {**sealed, "old_secret_sealed": old, "old_secret_until": instant(now_s + _OVERLAP_S) if old else None}

    def pause(self, call: Call) -> Reply:
        """Hold the account's deliveries or sends back; the same again changes only the end and the reason."""
        row = call.account(call.path["account_id"])
        request = call.read(contract.PauseRequest)
        endpoints.pause(call.db, row["id"], request.what, reason=request.reason, until=request.until)
        facts = {"what": ",".join(request.what), "until": request.until, "reason": request.reason}
        log.info("account.paused", account=row["id"], **facts, by=call.key_id())
        return self._answer(call, row)

    def resume(self, call: Call) -> Reply:
        """Let what was paused go on; where nothing was, or if asked, also what a far side's answer holds back."""
        row = call.account(call.path["account_id"])
        request = call.read(contract.ResumeRequest)
        for what in request.what:
            target = endpoints.WHAT[what]
            was_paused = endpoints.resume(call.db, row["id"], target)
            if request.held or not was_paused:
                self._release(call, row, target)
        log.info("account.resumed", account=row["id"], what=",".join(request.what), by=call.key_id())
        self._wake({row["id"]})
        return self._answer(call, accounts.found(call.db, row["id"]))

    def delete(self, call: Call) -> Reply:
        """Erase the account's secrets and end what it still owes."""
        row = call.account(call.path["account_id"])
        try:
            self._client.unsubscribe(accounts.token(self._vault, row), row["instagram_account_id"])
        except BridgeError as error:
            # The account goes all the same: a dead token is a common reason to delete it.
            log.warning("account.unsubscribe_failed", account=row["id"], code=error.code, error=error.message)
        turn.delete_account(call.db, row["id"])
        log.info("account.deleted", account=row["id"])
        return Reply({"account_id": row["id"], "deleted": True})

    def _answer(
        self,
        call: Call,
        row: Row,
        status: int = 200,
        headers: dict[str, str] | None = None,
        *,
        made: str | None = None,
        warnings: Sequence[str] | None = None,
    ) -> Reply:
        """Show an account; a secret that was `made` here is shown this once, and `warnings` where it was changed."""
        shown = _shown(call.db, row)
        shown |= {} if warnings is None else {"warnings": list(warnings)}
        return Reply(shown | ({"webhook_secret": made} if made else {}), status, headers or {})

    def _identify(self, token: str, wanted: set[str]) -> Identity:
        identity = self._client.whoami(token)
        if not wanted & {identity.user_id, identity.app_scoped_id}:
            problem = f"the token belongs to user_id {identity.user_id} (app-scoped id {identity.app_scoped_id})"
            detail = {"field": "instagram_account_id", "problem": problem}
            raise Invalid(
                f"{', '.join(wanted)} is not the token's account: {problem}.", code="account_mismatch", details=[detail]
            )
        return identity

    def _subscribe(self, call: Call, row: Row, token: str) -> Row:
        problem = self._client.subscribe(token, row["instagram_account_id"])
        if problem:
            log.warning("account.subscription_failed", account=row["id"], error=problem)
        values = {"subscription_ok": int(problem is None), "subscription_error": problem}
        return accounts.update(call.db, row["id"], values)

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


def _lacks_secret(row: Row, request: contract.AccountUpdate, url: str | None) -> bool:
    """Tell whether an account gets a URL and nobody has said what signs its events."""
    return bool(url) and "webhook_secret" not in request.model_fields_set and not row["webhook_secret_sealed"]


def _refresh_at(now_s: float) -> str:
    """Return when to ask for a fresh token: Instagram gives none for one that is younger than 24 hours."""
    return instant(now_s + _TOO_YOUNG_S)


def _shown(db: Database, row: Row) -> dict[str, Any]:
    ok, end = row["subscription_ok"], reading.token_end(row)
    ends = {one["kind"]: one for one in endpoints.of_accounts(db, [row["id"]])}
    return {
        "account_id": row["id"],
        **{name: row[name] for name in ("instagram_account_id", "username", "status", "status_reason")},
        "crm_webhook_url": row["crm_webhook_url"],
        "subscription": {"ok": None if ok is None else bool(ok), "error": row["subscription_error"]},
        "paused": {what: _paused(ends.get(kind)) for what, kind in endpoints.WHAT.items()},
        "held": {what: _held(ends.get(kind)) for what, kind in endpoints.WHAT.items()},
        "token_expires_at": end.at if end else None,
        **{name: row[name] for name in ("token_checked_at", "created_at", "updated_at")},
    }


def _paused(end: Row | None) -> dict[str, Any] | None:
    if end is None or end["paused_at"] is None:
        return None
    return {"since": end["paused_at"], "until": end["paused_until"], "reason": end["paused_reason"]}


def _held(end: Row | None) -> dict[str, Any] | None:
    """Return what holds an endpoint back beside a person's pause. Who is paused is not asked."""
    if end is None or end["held_by"] is None:
        return None
    asked = end["ask_at"] if end["paused_at"] is None else None
    return {"by": end["held_by"], "since": end["held_at"], "reason": end["held_reason"], "asked_again_at": asked}
