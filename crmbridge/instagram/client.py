"""Calls to Instagram's Graph API with an account's token: who am I, subscribe, send."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from crmbridge import __version__, net
from crmbridge.errors import AttemptFailed, InDoubt, Invalid, Refused, Retry, Unavailable
from crmbridge.events import Shown, Thread, epoch_s
from crmbridge.instagram import codes, outgoing

_SHOWN_AT_MOST = 20
_KINDS = {
    "image_data": "image",
    "video_data": "video",
    "file_url": "file",
    "generic_template": "template",
    "template": "template",
}
# Percent of what an account may call, and what we do about it: calling on while limited prolongs the block.
_NEARLY_USED_UP, _NEARLY_REST_S = 90.0, 5.0
_USED_UP, _USED_UP_REST_S = 100.0, 60.0
_ABSURD = 1e6
_LONG_WORD = re.compile(r"\S{40,}")  # "Malformed access token IGAA…": errors quote tokens
_TOKEN_LEAST = 16
_VERSION = re.compile(r"/v\d+\.\d+\Z")
# Webhook fields that carry a conversation (Instagram Platform, "Webhooks": subscribed_fields).
_FIELDS = (
    "messages",
    "message_echoes",
    "message_reactions",
    "message_edit",
    "messaging_postbacks",
    "messaging_seen",
    "messaging_referral",
    "messaging_handover",
    "standby",
)


@dataclass(frozen=True)
class Identity:
    """Who a token belongs to. `user_id` is what webhooks call the account; `app_scoped_id` is not."""

    user_id: str
    app_scoped_id: str
    username: str | None


@dataclass(frozen=True)
class Sent:
    """Instagram's acceptance of a message; `rest_s` is how long the account should be left alone now.

    A sender action has no `external_id`. `contact` is whom it reached, where Instagram says so.
    """

    external_id: str | None
    contact: str | None
    http_status: int
    rest_s: float


class Refusal(Invalid):
    """Instagram refuses what was asked; `of_account` tells that the account or its token is why, `hint` what to do."""

    def __init__(self, named: str, sentence: str, meaning: codes.Meaning) -> None:
        said = f"{named}: {sentence}"
        detail = {"field": "access_token", "problem": said}
        message = f"Instagram refuses the access token: {said}."
        super().__init__(message, code=meaning.slug, details=[detail], quoted=sentence)
        self.hint = meaning.hint
        self.of_account = meaning.kind in ("account", "alert")


class Client:
    """One Graph address; the token comes with each call."""

    def __init__(self, session: net.Session, graph_url: str, more_fields: Sequence[str] = ()) -> None:
        self.fields = (*_FIELDS, *more_fields)
        self._session = session
        self._graph_url = graph_url
        self._origin = _VERSION.sub("", graph_url)

    def whoami(self, token: str) -> Identity:
        """Check a token. Raises Invalid when Instagram refuses it, Unavailable when it cannot be asked."""
        status, answer = self.ask("GET", "/me", token, [("fields", "user_id,username,id,name,account_type")])
        # Meta documents {"data": [{…}]}; a flat object is what comes.
        data = answer.get("data")
        found = data[0] if isinstance(data, list) and data and isinstance(data[0], dict) else answer
        user_id, scoped = str(found.get("user_id") or ""), str(found.get("id") or "")
        if status != 200 or not user_id:
            raise Unavailable(f"Instagram's answer about the token cannot be read (HTTP {status}).", after_s=30)
        username = found.get("username")
        return Identity(user_id, scoped, username if isinstance(username, str) else None)

    def subscribe(self, token: str, user_id: str) -> str | None:
        """Subscribe the account to its webhooks; return the problem in a sentence, or None."""
        query = [("subscribed_fields", ",".join(self.fields))]
        try:
            _, answer = self.ask("POST", f"/{user_id}/subscribed_apps", token, query)
        except (Invalid, Unavailable) as error:
            return error.message
        return None if answer.get("success") is True else "Instagram did not confirm the subscription."

    def unsubscribe(self, token: str, user_id: str) -> None:
        """Stop the account's webhooks. Raises Invalid or Unavailable."""
        self.ask("DELETE", f"/{user_id}/subscribed_apps", token, ())

    def ask(
        self, method: str, path: str, token: str, query: Sequence[tuple[str, str]], *, versioned: bool = True
    ) -> tuple[int, dict[str, Any]]:
        """Make a call that sends nothing; return the HTTP status and the object.

        Raises Refusal, or Unavailable with how long to wait when there is no clear answer.
        """
        url = (self._graph_url if versioned else self._origin) + path
        try:
            answer = self._session.call(method, url, headers=_headers(token), query=query)
        except net.CallFailed as failure:
            raise Unavailable(
                f"Instagram cannot be asked now: {failure.message}.", code="instagram_unavailable", after_s=30
            ) from None
        found = _object(answer.body)
        error = found.get("error")
        if isinstance(error, dict):
            meaning = codes.classify(answer.status, error)
            named, sentence = _named(error, meaning), _sentence(error, token)
            if meaning.kind in ("account", "final", "alert"):
                raise Refusal(named, sentence, meaning)
            after_s, message = int(_wait_s(answer.headers) or 30), f"Instagram cannot answer now: {named}: {sentence}."
            raise Unavailable(message, code="instagram_unavailable", after_s=after_s, quoted=sentence)
        if answer.status >= 400:
            raise Unavailable(f"Instagram answered HTTP {answer.status}.", code="instagram_unavailable", after_s=30)
        return answer.status, found

    def look_up(self, token: str, user_id: str, contact: str) -> Thread:
        """Return what the shop wrote to a contact, as the Conversations API shows it.

        It tells the newest 20 messages of both sides and no more (Conversations API, "Limitations").

        Raises Retry when it cannot be asked.
        """
        try:
            query = [("platform", "instagram"), ("user_id", contact)]
            _, found = self.ask("GET", f"/{user_id}/conversations", token, query)
            conversations = [entry.get("id") for entry in _list(found.get("data"))]
            if not conversations:
                return Thread((), 0)
            fields = "messages{id,created_time,from,to,message,attachments,shares}"
            _, thread = self.ask("GET", f"/{conversations[0]}", token, [("fields", fields)])
        except (Invalid, Unavailable) as error:
            raise Retry(error.message, code="look_up_failed", counts=False) from None
        messages = thread.get("messages")
        listed = _list(messages.get("data") if isinstance(messages, dict) else None)
        try:
            times = [epoch_s(entry["created_time"]) for entry in listed]
            shown = tuple(
                Shown(str(entry["id"]), str(entry.get("message") or ""), at_s, _kinds(entry))
                for entry, at_s in zip(listed, times, strict=True)
                if _from(entry) != contact
            )
            return Thread(shown, min(times) if len(times) >= _SHOWN_AT_MOST else 0)
        except (KeyError, TypeError, ValueError):
            raise Retry("the conversation cannot be read", code="look_up_failed", counts=False) from None

    def send(self, token: str, user_id: str, recipient_id: str, content: Mapping[str, Any]) -> Sent:
        """Send one message or action. Raises Retry, Refused or InDoubt; only Sent means that Instagram took it.

        An action is never in doubt: made twice it is the same.
        """
        try:
            return self._send(token, user_id, content, recipient_id)
        except InDoubt as doubt:
            if outgoing.is_action(content):
                raise Retry(doubt.message, code=doubt.code, http_status=doubt.http_status) from None
            raise

    def _send(self, token: str, user_id: str, content: Mapping[str, Any], recipient_id: str) -> Sent:
        body = outgoing.body(content, recipient_id)
        encoded = json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
        headers = {**_headers(token), "Content-Type": "application/json"}
        try:
            answer = self._session.call("POST", f"{self._graph_url}/{user_id}/messages", headers=headers, body=encoded)
        except net.CallFailed as failure:
            if failure.sent:
                raise InDoubt(failure.message, code=failure.code) from None
            raise Retry(failure.message, code=failure.code, counts=False) from None
        found = _object(answer.body)
        error = found.get("error")
        if isinstance(error, dict):
            raise _failure(answer, error)
        mid, contact = found.get("message_id"), found.get("recipient_id")
        known = contact if isinstance(contact, str) and contact else None
        if 200 <= answer.status < 300 and isinstance(mid, str) and mid:
            return Sent(mid, known, answer.status, _rest_s(answer.headers))
        if 200 <= answer.status < 300 and known and outgoing.is_action(content):
            return Sent(None, known, answer.status, _rest_s(answer.headers))
        if 200 <= answer.status < 300:
            raise InDoubt("Instagram answered without a message id", code="answer_lost", http_status=answer.status)
        hint = _wait_s(answer.headers)
        if answer.status == 429:
            raise Retry("Instagram limits the rate", code="rate_limited", http_status=429, after_s=hint, counts=False)
        if answer.status >= 500:
            raise Retry(
                f"Instagram answered HTTP {answer.status} without an error object",
                code="instagram_unavailable",
                http_status=answer.status,
                after_s=hint,
                counts=False,
            )
        raise Refused(
            f"Instagram answered HTTP {answer.status} without an error object",
            code="instagram_refused",
            http_status=answer.status,
        )


def _list(value: Any) -> list[dict[str, Any]]:
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


def _from(entry: dict[str, Any]) -> str:
    sender = entry.get("from")
    return str(sender.get("id")) if isinstance(sender, dict) else ""


def _kinds(entry: dict[str, Any]) -> tuple[str, ...]:
    """Return the types of what a message of the Conversations API came with; it names them by their keys."""
    kinds = []
    for edge in ("attachments", "shares"):
        found = entry.get(edge)
        for one in _list(found.get("data") if isinstance(found, dict) else None):
            named = {kind for key, kind in _KINDS.items() if one.get(key)}
            kinds.append(named.pop() if len(named) == 1 else "unknown")
    return tuple(kinds)


def _failure(answer: net.Answer, error: dict[str, Any]) -> AttemptFailed:
    meaning = codes.classify(answer.status, error)
    said = f"Instagram answered {_named(error, meaning)}"
    if meaning.kind not in ("retry", "limit", "unknown"):  # those are over by themselves
        said = f"{said}: {meaning.hint}"
    if meaning.kind == "unknown" or answer.status < 300:
        return InDoubt(said, code=meaning.slug, http_status=answer.status)
    if meaning.kind in ("final", "alert"):
        alert = "send_refused" if meaning.kind == "alert" else None
        return Refused(said, code=meaning.slug, http_status=answer.status, alert=alert)
    stops = None
    if meaning.kind == "account":
        stops = "token_dead" if meaning.slug in codes.TOKEN_SLUGS else "account_error"
    return Retry(
        said,
        code=meaning.slug,
        http_status=answer.status,
        after_s=_wait_s(answer.headers),
        counts=meaning.kind in ("retry", "once"),
        at_most=1 if meaning.kind == "once" else None,
        stops=stops,
    )


def _headers(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}", "User-Agent": f"crmbridge/{__version__}", "Accept": "application/json"}


def _object(body: bytes) -> dict[str, Any]:
    try:
        found = json.loads(body)
        if b"\\ud" in body.lower():
            # An escaped half of a surrogate pair is no text: SQLite could not take it.
            found = json.loads(json.dumps(found, ensure_ascii=False).encode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _named(error: Mapping[str, Any], meaning: codes.Meaning) -> str:
    """Name an error by its codes alone: Meta's own sentence is localised and may quote what was sent."""
    code, subcode, trace = error.get("code"), error.get("error_subcode"), error.get("fbtrace_id")
    named = f"code {code}" + (f"/{subcode}" if subcode else "")
    return f"{named}, {meaning.slug}" + (f" (trace {trace})" if isinstance(trace, str) else "")


def _sentence(error: Mapping[str, Any], token: str) -> str:
    """Return Meta's own sentence, for calls that carry no customer's words, without the token that was sent."""
    said = " ".join(str(error.get("message") or "").split())
    if token and token in said:
        # Where a short one was struck out, the gaps in the words would tell it.
        said = said.replace(token, "[…]") if len(token) >= _TOKEN_LEAST else "[…]"
    return _LONG_WORD.sub("[…]", said)[:200]


def _wait_s(headers: Mapping[str, str]) -> float | None:
    """Return how long Meta asks to wait after a refusal: Retry-After in seconds, or the usage header's minutes."""
    given = (headers.get("Retry-After") or "").strip()
    if given.isascii() and given.isdigit() and len(given) < 10:
        return float(given)
    _, regain_s = _usage(headers)
    return regain_s or None


def _rest_s(headers: Mapping[str, str]) -> float:
    """Return how long to leave an account alone that has used up, or nearly, what it may."""
    percent, regain_s = _usage(headers)
    if percent >= _USED_UP:
        return max(regain_s, _USED_UP_REST_S)
    return _NEARLY_REST_S if percent >= _NEARLY_USED_UP else 0


def _usage(headers: Mapping[str, str]) -> tuple[float, float]:
    """Read Meta's usage headers: the highest percentage, and the seconds until access comes back.

    X-App-Usage is an object of percentages, X-Business-Use-Case-Usage an object of lists of such objects with
    estimated_time_to_regain_access in minutes (Graph API, "Rate Limits").
    """
    percent = regain_s = 0.0
    for name in ("X-App-Usage", "X-Business-Use-Case-Usage"):
        found = _object((headers.get(name) or "").encode())
        for entry in [found, *(one for value in found.values() for one in _list(value))]:
            for key, value in entry.items():
                if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < _ABSURD:
                    continue
                if key == "estimated_time_to_regain_access":
                    regain_s = max(regain_s, value * 60.0)
                elif key in ("call_count", "total_time", "total_cputime"):
                    percent = max(percent, value)
    return percent, regain_s
