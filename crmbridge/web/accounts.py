"""Connecting Instagram accounts: ``/api/v1/accounts…``."""

from typing import Any

from crmbridge import contract, log
from crmbridge.connecting import Connected, Connector
from crmbridge.events import Wake
from crmbridge.instagram import reading
from crmbridge.store import accounts, dead, endpoints
from crmbridge.store.contacts import Target
from crmbridge.store.database import Database, Row
from crmbridge.web.app import Call, Reply, Route


def routes(connector: Connector, wake: Wake) -> list[Route]:
    """Return the routes; `wake` is called after something may go on."""

    def page(call: Call) -> Reply:
        limit = call.limit()
        assert call.key is not None  # noqa: S101
        only = None if call.key["admin"] else call.key["accounts"]
        found = accounts.page(call.db, after=call.query.get("cursor", ""), limit=limit + 1, only=only)
        shown, more = found[:limit], len(found) > limit
        cursor = shown[-1]["id"] if more else None
        listed = [_shown(call.db, row) for row in shown]
        return Reply({"accounts": listed, "next_cursor": cursor, "has_more": more})

    def show(call: Call) -> Reply:
        return _answer(call, call.account(call.path["account_id"]))

    def create(call: Call) -> Reply:
        request = call.read(contract.AccountCreate)
        done = connector.add(
            request.instagram_account_id,
            token=request.access_token,
            url=request.crm_webhook_url,
            secret=request.webhook_secret,
            username=request.username,
            now_s=call.now_s,
        )
        row = done.account
        log.info("account.created", account=row["id"], instagram_account_id=row["instagram_account_id"])
        if done.adopted:
            log.info("account.adopted", account=row["id"], events=done.adopted)
        _log_subscription(row)
        return _answer(call, row, 201, {"Location": f"/api/v1/accounts/{row['id']}"}, done)

    def update(call: Call) -> Reply:
        row = call.account(call.path["account_id"])
        given = call.read(contract.AccountUpdate).model_dump(exclude_unset=True)
        done = connector.change(row, given, call.now_s)
        log.info("account.updated", account=row["id"], fields=",".join(sorted(given)) or None)
        _log_release(call, row, "crm", done.released)
        if "access_token" in given:
            _log_subscription(done.account)
        return _answer(call, done.account, done=done)

    def pause(call: Call) -> Reply:
        row = call.account(call.path["account_id"])
        request = call.read(contract.PauseRequest)
        endpoints.pause(call.db, row["id"], request.what, reason=request.reason, until=request.until)
        facts = {"what": ",".join(request.what), "until": request.until, "reason": request.reason}
        log.info("account.paused", account=row["id"], **facts, by=call.key_id())
        return _answer(call, row)

    def resume(call: Call) -> Reply:
        row = call.account(call.path["account_id"])
        request = call.read(contract.ResumeRequest)
        for what in request.what:
            target = endpoints.WHAT[what]
            was_paused = endpoints.resume(call.db, row["id"], target)
            if request.held or not was_paused:
                _log_release(call, row, target, dead.release(call.db, row, target))
        log.info("account.resumed", account=row["id"], what=",".join(request.what), by=call.key_id())
        wake({row["id"]})
        return _answer(call, accounts.found(call.db, row["id"]))

    def delete(call: Call) -> Reply:
        row = call.account(call.path["account_id"])
        problem = connector.remove(row)
        if problem:
            log.warning("account.unsubscribe_failed", account=row["id"], code=problem.code, error=problem.message)
        log.info("account.deleted", account=row["id"])
        return Reply({"account_id": row["id"], "deleted": True})

    one = "/api/v1/accounts/<account_id>"
    return [
        Route("GET", "/api/v1/accounts", page, "accounts:read", query=frozenset(("cursor", "limit"))),
        Route("POST", "/api/v1/accounts", create, "admin"),
        Route("GET", one, show, "accounts:read"),
        Route("PUT", one, update, "accounts:write"),
        Route("DELETE", one, delete, "admin"),
        Route("POST", f"{one}/pause", pause, "accounts:write"),
        Route("POST", f"{one}/resume", resume, "accounts:write"),
    ]


def _log_release(call: Call, row: Row, target: Target, released: tuple[bool, int]) -> None:
    was_held, again = released
    if was_held or again:
        log.info("account.released", account=row["id"], target=target, sent_again=again, by=call.key_id())


def _answer(
    call: Call,
    row: Row,
    status: int = 200,
    headers: dict[str, str] | None = None,
    done: Connected | None = None,
) -> Reply:
    """Show an account; with what was done to it, its warnings and, this once, a secret that was made here."""
    shown = _shown(call.db, row)
    if done is not None:
        shown |= {"warnings": done.warnings} | ({"webhook_secret": done.made} if done.made else {})
    return Reply(shown, status, headers or {})


def _log_subscription(row: Row) -> None:
    if not row["subscription_ok"]:
        log.warning("account.subscription_failed", account=row["id"], error=row["subscription_error"])


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
