"""The local Meta's control API under /sandbox: be the customer, script faults, look inside, all without Python."""

import re
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import bottle

from crmbridge.sandbox import server, shapes, wire

if TYPE_CHECKING:
    from crmbridge.sandbox.meta import Meta

_SHOWN = 500
_FAULT = ("times", "status", "body", "headers", "delay_s", "after_effect", "drop", "error")


def add_routes(app: bottle.Bottle, meta: "Meta") -> None:
    """Add the control routes to Meta's app."""

    def state() -> dict[str, Any]:
        return {
            "settings": _settings(meta),
            "accounts": [
                {"user_id": one.user_id, "username": one.username, "subscribed": one.subscribed}
                for one in list(meta.accounts.values())
            ],
            "messages": meta.messages[-_SHOWN:],
            "sent": [
                {"user_id": one.user_id, "recipient_id": one.recipient_id, "mid": one.mid, "at": one.at} | one.payload
                for one in meta.sent[-_SHOWN:]
            ],
            "calls": [asdict(one) for one in meta.calls[-_SHOWN:]],
            "undelivered": meta.undelivered[-_SHOWN:],
        }

    def says(igsid: str) -> dict[str, Any]:
        optional = ("user_id", "text", "attachments", "reply_to", "mid", "timestamp_ms", "told", "username", "name")
        given = server.read_object(optional=optional)
        user_id = _account(meta, given.pop("user_id", None))
        meta.add_customer(igsid, username=given.pop("username", None), name=given.pop("name", None))
        return asdict(meta.customer_says(user_id, igsid, given.pop("text", None), **given))

    def shop_says(igsid: str) -> dict[str, Any]:
        given = server.read_object(required=["text"], optional=["user_id", "told"])
        user_id = _account(meta, given.get("user_id"))
        return asdict(meta.shop_says(user_id, igsid, given["text"], told=given.get("told", True)))

    def reads(igsid: str) -> dict[str, Any]:
        given = server.read_object(required=["mid"], optional=["user_id"])
        return asdict(meta.customer_reads(_account(meta, given.get("user_id")), igsid, given["mid"]))

    def shape(igsid: str, name: str) -> dict[str, Any]:
        given = server.read_object(optional=["user_id", "mid", "text", "url", "times"])
        user_id, times = _account(meta, given.pop("user_id", None)), given.pop("times", 1)
        if not isinstance(times, int) or not 1 <= times <= 100:
            raise ValueError("times must be a whole number from 1 to 100")
        body = shapes.payload(name, user_id, igsid, meta.now_ms(), **given)
        if lasts_s := shapes.opens_for_s(name):
            meta.customer_acted(user_id, igsid, meta.now_ms(), lasts_s)
        if shapes.is_writing(name):
            meta.add_customer(igsid)
        for _ in range(times):  # Meta repeats a fact with another time of sending
            posted = meta.post(body)
            body["entry"][0]["time"] += 18_700
        return asdict(posted)

    def webhook() -> dict[str, Any]:
        query = bottle.request.query
        body = bottle.request.body.read()
        return asdict(meta.post(body, secret=query.secret or None, signature=query.signature or "good"))

    def handshake() -> dict[str, Any]:
        return asdict(meta.verify_handshake(**server.read_object(optional=["verify_token", "challenge"])))

    def privacy() -> dict[str, Any]:
        given = server.read_object(required=["what"], optional=["user_id"])
        return asdict(meta.owner_asks(given["what"], _account(meta, given.get("user_id"))))

    def fault() -> dict[str, Any]:
        given = server.read_object(required=["path"], optional=_FAULT)
        if "error" in given:
            given = {"status": 400, "body": _error(given.pop("error")), **given}
        meta.fault(given.pop("path"), **given)
        return {"scripted": True}

    def no_faults() -> dict[str, Any]:
        meta.clear_faults()
        return {"scripted": False}

    def settings() -> dict[str, Any]:
        meta.configure(**server.read_object(optional=_settings(meta)))
        return _settings(meta)

    def account() -> dict[str, Any]:
        optional = ["app_scoped_id", "token_age_s"]
        given = server.read_object(required=["user_id", "token", "username"], optional=optional)
        user_id = str(given.pop("user_id"))
        meta.add_account(user_id, **{"app_scoped_id": wire.digits_of(user_id, 17)} | given)
        return {"user_id": user_id}

    def subscription(user_id: str) -> dict[str, Any]:
        given = server.read_object(required=["fields"])
        meta.subscribe(_account(meta, user_id), given["fields"])
        return {"user_id": user_id, "subscribed": meta.accounts[user_id].subscribed}

    def tokens(user_id: str) -> dict[str, Any]:
        meta.accounts[_account(meta, user_id)].tokens.clear()
        return {"user_id": user_id, "tokens": 0}

    def reset() -> dict[str, Any]:
        meta.reset()
        return {"reset": True}

    def nothing(path: str) -> bottle.HTTPResponse:
        return server.answer({"error": f"there is no {bottle.request.method} /sandbox/{path}"}, 404)

    for method, path, handler in (
        ("GET", "state", state),
        ("POST", "customers/<igsid>/messages", says),
        ("POST", "customers/<igsid>/replies", shop_says),
        ("POST", "customers/<igsid>/reads", reads),
        ("POST", "customers/<igsid>/shapes/<name>", shape),
        ("GET", "shapes", lambda: {"shapes": list(shapes.NAMES)}),
        ("POST", "webhooks", webhook),
        ("POST", "handshake", handshake),
        ("POST", "privacy", privacy),
        ("POST", "faults", fault),
        ("DELETE", "faults", no_faults),
        ("PUT", "settings", settings),
        ("POST", "accounts", account),
        ("PUT", "accounts/<user_id>/subscription", subscription),
        ("DELETE", "accounts/<user_id>/tokens", tokens),
        ("POST", "reset", reset),
    ):
        app.route(f"/sandbox/{path}", method, server.control(handler))
    app.route("/sandbox/<path:path>", ["GET", "POST", "PUT", "DELETE"], nothing)


def _settings(meta: "Meta") -> dict[str, Any]:
    names = "callback_url echo echo_delay_s auto_read me_form window human_agent media profile profile_delay_s"
    return {name: getattr(meta, name) for name in [*names.split(), "conversations_page"]}


def _error(named: Any) -> dict[str, Any]:
    """Build Meta's error object from a code, or code/subcode, as text."""
    found = re.fullmatch(r"(\d{1,9})(?:/(\d{1,9}))?", named) if isinstance(named, str) else None
    if found is None:
        raise ValueError(f'an error is a code or code/subcode such as "190/463", not {named!r}')
    return wire.error_body(int(found[1]), subcode=int(found[2]) if found[2] else None)


def _account(meta: "Meta", user_id: str | None) -> str:
    """Return the account meant: the only one when none is named."""
    known = list(meta.accounts)
    if user_id is None and known:
        return known[0]
    if user_id not in known:
        raise ValueError(f"no account {user_id!r}; there are: {', '.join(known) or 'none'}")
    return user_id
