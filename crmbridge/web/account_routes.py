"""Connecting Instagram accounts: ``/api/v1/accounts…``."""

from collections.abc import Callable, Sequence
from typing import Any

from crmbridge import contract, log, net, signing
from crmbridge.alerts import Alarm
from crmbridge.errors import BridgeError, Conflict, Invalid
from crmbridge.events import instant
from crmbridge.instagram import reading
from crmbridge.instagram.client import Client, Identity
from crmbridge.store import accounts, dead, holds, inbound, pauses, turn
from crmbridge.store.contacts import Target
from crmbridge.store.database import Row
from crmbridge.store.deliveries import Patience
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
        wake: Callable[[], None],
        patience: Patience,
    ) -> None:
        self._vault = vault
        self._client = client
        self._reach = reach
        self._alarm = alarm
        self._wake = wake
        self._patience = patience

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
        paused, held = pauses.everyone(call.db), holds.everyone(call.db)
        listed = [_shown(row, paused, held) for row in shown]
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
        now = instant(call.now_s)
        values = {
            "instagram_account_id": identity.user_id,
            "app_scoped_id": identity.app_scoped_id,
            "username": identity.username or request.username,
            "access_token_sealed": self._vault.seal(request.access_token),
            "webhook_secret_sealed": self._vault.seal(secret) if secret else None,
            "crm_webhook_url": request.crm_webhook_url,
            "token_checked_at": now,
            "token_refresh_at": _refresh_at(call.now_s),
        }
        row = accounts.create(call.db, values, now)
        log.info("account.created", account=row["id"], instagram_account_id=identity.user_id)
        adopted = inbound.adopt(call.db, row, call.now_s, self._patience)
        if adopted:
            log.info("account.adopted", account=row["id"], events=adopted)
            self._wake()
        row = self._subscribe(call, row, request.access_token)
        headers = {"Location": f"/api/v1/accounts/{row['id']}"}
        return self._answer(call, row, 201, headers, made=made, warnings=warnings)

    def update(self, call: Call) -> Reply:
        """Change what the request names; a new token must belong to the same Instagram account."""
        row = call.account(call.path["account_id"])
        request = call.read(contract.AccountUpdate)
        given = request.model_fields_set
        values: dict[str, Any] = {}
        url = request.crm_webhook_url if "crm_webhook_url" in given else row["crm_webhook_url"]
        made = signing.make_secret() if _lacks_secret(row, request, url) else None
        secret = request.webhook_secret if "webhook_secret" in given else made
        warnings: list[str] = []
        if given & {"crm_webhook_url", "webhook_secret"}:
            warnings = self._check_target(
                url, secret, has_secret=row["webhook_secret_sealed"] and not given & {"webhook_secret"}
            )
        if "crm_webhook_url" in given:
            values["crm_webhook_url"] = request.crm_webhook_url
        if "webhook_secret" in given or made:
            values |= self._rotated(row, secret, call.now_s)
        if "status" in given:
            if request.status == "active" and not row["access_token_sealed"] and "access_token" not in given:
                raise Conflict("The account has no access token: send a new one.", code="token_missing")
            values["status"], values["status_reason"] = request.status, None
        if "access_token" in given:
            identity = self._identify(request.access_token, {row["instagram_account_id"]})
            values |= {
                "access_token_sealed": self._vault.seal(request.access_token),
                "app_scoped_id": identity.app_scoped_id,
                "username": identity.username or row["username"],
                "token_checked_at": instant(call.now_s),
                "token_expires_at": None,
                "token_refresh_at": _refresh_at(call.now_s),
                "token_refusals": 0,
            }
            if row["status"] == "error" and "status" not in given:
                values["status"], values["status_reason"] = "active", None
        now = instant(call.now_s)
        row = accounts.update(call.db, row["id"], values, now, self._patience)
        if row["crm_webhook_url"] is None:  # the CRM reads the rest when it asks
            turn.end_leftovers(call.db, call.now_s)
        if url and given & {"crm_webhook_url", "webhook_secret"}:
            self._release(call, row, "crm")
        log.info("account.updated", account=row["id"], fields=",".join(sorted(given)) or None)
        if "access_token" in given:
            row = self._subscribe(call, row, request.access_token)
        self._wake()
        return self._answer(call, row, made=made, warnings=warnings)

    def _release(self, call: Call, row: Row, target: Target) -> None:
        """End what a far side's answer holds back, as this caller says that it is mended."""
        was_held, again = dead.release(call.db, row, target, call.now_s, self._patience)
        if was_held or again:
            log.info("account.released", account=row["id"], target=target, sent_again=again, by=call.key_id())

    def _rotated(self, row: Row, secret: str | None, now_s: float) -> dict[str, Any]:
        """Return the columns for a new secret; the old one signs beside it for a day, so that nothing is refused."""
        before, sealed = row["webhook_secret_sealed"], self._vault.seal(secret) if secret else None
        if before and secret and self._vault.open(before) == secret:
            return {}
        kept = before if secret else None
        until = instant(now_s + _OVERLAP_S) if kept else None
        return {
            "webhook_secret_sealed": sealed, "old_webhook_secret_sealed": kept, "old_webhook_secret_until": until,
        }  # fmt: skip

    def pause(self, call: Call) -> Reply:
        """Hold the account's deliveries or sends back; the same again changes only the end and the reason."""
        row = call.account(call.path["account_id"])
        request = call.read(contract.PauseRequest)
        now = instant(call.now_s)
        pauses.stop(call.db, row["id"], request.what, reason=request.reason, until=request.until, now=now)
        facts = {"what": ",".join(request.what), "until": request.until, "reason": request.reason}
        log.info("account.paused", account=row["id"], **facts, by=call.key_id())
        return self._answer(call, row)

    def resume(self, call: Call) -> Reply:
        """Let what was paused go on; where nothing was, or if asked, also what a far side's answer holds back."""
        row = call.account(call.path["account_id"])
        request = call.read(contract.ResumeRequest)
        now = instant(call.now_s)
        for what in request.what:
            target = pauses.WHAT[what]
            was_paused = pauses.resume(call.db, row["id"], target, now=now, patience=self._patience)
            if request.held or not was_paused:
                self._release(call, row, target)
        log.info("account.resumed", account=row["id"], what=",".join(request.what), by=call.key_id())
        self._wake()
        return self._answer(call, accounts.found(call.db, row["id"]))

    def delete(self, call: Call) -> Reply:
        """Erase the account's secrets and end what it still owes."""
        row = call.account(call.path["account_id"])
        try:
            self._client.unsubscribe(self._vault.open(row["access_token_sealed"]), row["instagram_account_id"])
        except BridgeError as error:
            # The account goes all the same: a dead token is a common reason to delete it.
            log.warning("account.unsubscribe_failed", account=row["id"], code=error.code, error=error.message)
        turn.delete_account(call.db, row["id"], call.now_s)
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
        shown = _shown(row, pauses.everyone(call.db), holds.everyone(call.db))
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
        return accounts.update(call.db, row["id"], values, instant(call.now_s), self._patience)

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


def _shown(row: Row, paused: dict[tuple[str, str], Row], held: dict[tuple[str, str], Row]) -> dict[str, Any]:
    ok, end = row["subscription_ok"], reading.token_end(row)

    def shown(target: str) -> dict[str, Any] | None:
        found = paused.get((target, row["id"]))
        return {name: found[name] for name in ("since", "until", "reason")} if found else None

    return {
        "account_id": row["id"],
        **{name: row[name] for name in ("instagram_account_id", "username", "status", "status_reason")},
        "crm_webhook_url": row["crm_webhook_url"],
        "subscription": {"ok": None if ok is None else bool(ok), "error": row["subscription_error"]},
        "paused": {what: shown(target) for what, target in pauses.WHAT.items()},
        "held": {
            what: _held(row, target, held.get((target, row["id"])), is_paused=(target, row["id"]) in paused)
            for what, target in pauses.WHAT.items()
        },
        "token_expires_at": end.at if end else None,
        **{name: row[name] for name in ("token_checked_at", "created_at", "updated_at")},
    }


def _held(row: Row, target: Target, found: Row | None, *, is_paused: bool) -> dict[str, Any] | None:
    """Return what holds an endpoint back beside a person's pause: its account's status, or what its CRM answered.

    Who is paused is not asked.
    """
    asked = found["ask_at"] if found and found["trial_since"] is None and not is_paused else None
    if pauses.blocks(row["status"], target):
        by_status = {"by": row["status"], "since": row["status_since"], "reason": row["status_reason"]}
        return {**by_status, "asked_again_at": asked if row["status"] == "error" else None}
    if found is None or found["trial_since"] is not None or target != "crm":
        return None
    return {"by": found["cause"], "since": found["since"], "reason": found["reason"], "asked_again_at": asked}
