"""Calls to Instagram's Graph API with an account's token: who am I, subscribe, send."""

import contextlib
import json
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

from crmbridge import __version__, net
from crmbridge.errors import AttemptFailed, InDoubt, Invalid, Refused, Retry, Unavailable
from crmbridge.events import Shown, Thread, epoch_s
from crmbridge.health import Pace
from crmbridge.instagram import codes, outgoing

# Calls a second for one account, by Instagram's limits ("Rate limits").
CONVERSATIONS_PER_S, MEDIA_PER_S = 2.0, 10.0
_REMEMBERED = 1000
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
        self.meaning = meaning
        self.hint = meaning.hint
        self.of_account = meaning.kind in ("account", "alert")


class Client:
    """One Graph address; the token comes with each call.

    `conversations` and `media` space out the calls of the Conversations API by the account's id here, and the sends of
    audio and video.
    """

    def __init__(
        self,
        session: net.Session,
        graph_url: str,
        more_fields: Sequence[str] = (),
        *,
        conversations: Pace | None = None,
        clock: Callable[[], float] = time.time,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self.fields = (*_FIELDS, *more_fields)
        self.conversations = conversations or Pace(CONVERSATIONS_PER_S)
        self.media = Pace(MEDIA_PER_S)
        self.clock, self.pause = clock, pause
        self._session = session
        self._graph_url = graph_url
        self._origin = _VERSION.sub("", graph_url)
        self._threads: OrderedDict[tuple[str, str], str] = OrderedDict()  # user id and contact → conversation

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
        self,
        method: str,
        path: str,
        token: str,
        query: Sequence[tuple[str, str]],
        *,
        versioned: bool = True,
        names_object: bool = False,
    ) -> tuple[int, dict[str, Any]]:
        """Make a call that sends nothing; return the HTTP status and the object.

        Raises Refusal, or Unavailable with how long to wait when there is no clear answer. `names_object` tells that
        the path is not the account's.
        """
        answer, found = self._ask(method, path, token, query, versioned=versioned, names_object=names_object)
        return answer.status, found

    def _ask(
        self,
        method: str,
        path: str,
        token: str,
        query: Sequence[tuple[str, str]],
        *,
        versioned: bool = True,
        names_object: bool = False,
    ) -> tuple[net.Answer, dict[str, Any]]:
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
            meaning = codes.classify(answer.status, error, names_object=names_object)
            named, sentence = _named(error, meaning), _sentence(error, token)
            if meaning.kind in ("account", "final", "alert"):
                raise Refusal(named, sentence, meaning)
            after_s, message = int(_wait_s(answer.headers) or 30), f"Instagram cannot answer now: {named}: {sentence}."
            raise Unavailable(message, code="instagram_unavailable", after_s=after_s, quoted=sentence)
        if answer.status >= 400:
            raise Unavailable(f"Instagram answered HTTP {answer.status}.", code="instagram_unavailable", after_s=30)
        return answer, found

    def may_write(self, token: str, user_id: str, account_id: str) -> None:
        """Make a call that needs the permission for messages. Raises Refusal, or Unavailable for no clear answer."""
        self.pause(self.conversations.take(account_id))
        self.ask("GET", f"/{user_id}/conversations", token, [("platform", "instagram"), ("limit", "1")])

    def look_up(self, token: str, user_id: str, contact: str, account_id: str) -> Thread:
        """Return the newest messages to and from a contact, as the Conversations API shows them.

        It tells the newest 20 and no more (Conversations API, "Limitations"), at two calls a second ("Rate limits").
        Which conversation is a contact's is remembered.

        Raises Retry when it cannot be asked.
        """
        try:
            conversation = self._threads.get((user_id, contact))
            if conversation is None:
                self.pause(self.conversations.take(account_id))
                conversation = self._find_thread(token, user_id, contact)
            if conversation is None:
                return Thread(())
            self.pause(self.conversations.take(account_id))
            fields = [("fields", "messages{id,created_time,from,to,message,attachments,shares}")]
            answer, thread = self._ask("GET", f"/{conversation}", token, fields, names_object=True)
        except Refusal as refusal:
            self._threads.pop((user_id, contact), None)
            stops = _stops(refusal.meaning)
            raise Retry(refusal.message, code="look_up_failed", counts=False, stops=stops) from None
        except (Invalid, Unavailable) as error:
            raise Retry(error.message, code="look_up_failed", counts=False) from None
        # An edge without entries is left out of an object.
        messages = thread.get("messages", {"data": []} if "id" in thread else None)
        listed = messages.get("data") if isinstance(messages, dict) else None
        if not isinstance(listed, list):
            raise Retry("the conversation cannot be read", code="look_up_failed", counts=False)
        shown = []
        for entry in _list(listed):
            # What is older than the newest 20, or was deleted, is listed without its details.
            with contextlib.suppress(KeyError, TypeError, ValueError):
                at_s, text = epoch_s(entry["created_time"]), str(entry.get("message") or "")
                shown.append(Shown(str(entry["id"]), text, at_s, _from(entry) != contact, _kinds(entry)))
        return Thread(tuple(shown), self._ahead_s(answer))

    def _find_thread(self, token: str, user_id: str, contact: str) -> str | None:
        query = [("platform", "instagram"), ("user_id", contact)]
        _, found = self.ask("GET", f"/{user_id}/conversations", token, query)
        if not isinstance(found.get("data"), list):
            raise Unavailable(
                "Instagram's list of conversations cannot be read.", code="instagram_unavailable", after_s=30
            )
        names: list[str] = [entry["id"] for entry in _list(found.get("data")) if isinstance(entry.get("id"), str)]
        if not names:
            return None
        self._threads[user_id, contact] = names[0]
        while len(self._threads) > _REMEMBERED:
            self._threads.popitem(last=False)
        return names[0]

    def _ahead_s(self, answer: net.Answer) -> float:
        """Return by how much our clock is ahead of Instagram's, in seconds, as far as its answer's Date is right."""
        try:
            return self.clock() - parsedate_to_datetime(answer.headers.get("Date") or "").timestamp()
        except (ValueError, TypeError, OverflowError):
            return 0.0

    def send(self, token: str, user_id: str, recipient_id: str, content: Mapping[str, Any]) -> Sent:
        """Send one message or action. Raises Retry, Refused or InDoubt; only Sent means that Instagram took it.

        An action is never in doubt: made twice it is the same.
        """
        try:
            return self._send(token, user_id, content, recipient_id)
        except InDoubt as doubt:
            if outgoing.is_action(content):
                known = {"code": doubt.code, "http_status": doubt.http_status, "after_s": doubt.after_s}
                raise Retry(doubt.message, **known, counts=(doubt.http_status or 0) < 500) from None  # type: ignore[arg-type]
            raise

    def _send(self, token: str, user_id: str, content: Mapping[str, Any], recipient_id: str) -> Sent:
        body = outgoing.body(content, recipient_id)
        encoded = json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
        headers = {**_headers(token), "Content-Type": "application/json"}
        if outgoing.is_sound_or_film(content):
            self.pause(self.media.take(user_id))
        try:
            answer = self._session.call("POST", f"{self._graph_url}/{user_id}/messages", headers=headers, body=encoded)
        except net.CallFailed as failure:
            if failure.sent:
                raise InDoubt(failure.message, code=failure.code) from None
            raise Retry(failure.message, code=failure.code, counts=False) from None
        found, is_good = _object(answer.body), 200 <= answer.status < 300
        mid, contact, error = found.get("message_id"), found.get("recipient_id"), found.get("error")
        known = contact if isinstance(contact, str) and contact else None
        if is_good and isinstance(mid, str) and mid:
            return Sent(mid, known, answer.status, _rest_s(answer.headers))
        if isinstance(error, dict):
            raise _failure(answer, error, names_object=outgoing.names_object(content))
        if is_good and known and outgoing.is_action(content):
            return Sent(None, known, answer.status, _rest_s(answer.headers))
        if is_good:
            raise InDoubt("Instagram answered without a message id", code="answer_lost", http_status=answer.status)
        said, hint = f"Instagram answered HTTP {answer.status} without an error object", _wait_s(answer.headers)
        if answer.status == 429:
            raise Retry("Instagram limits the rate", code="rate_limited", http_status=429, after_s=hint, counts=False)
        if answer.status >= 500 or answer.status == 408:
            raise InDoubt(said, code="instagram_unavailable", http_status=answer.status, after_s=hint)
        raise Refused(said, code="instagram_refused", http_status=answer.status)


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


def _failure(answer: net.Answer, error: dict[str, Any], *, names_object: bool) -> AttemptFailed:
    meaning, status = codes.classify(answer.status, error, names_object=names_object), answer.status
    said, after_s = f"Instagram answered {_named(error, meaning)}", _wait_s(answer.headers)
    if codes.leaves_open(status, error, meaning):
        return InDoubt(said, code=meaning.slug, http_status=status, after_s=after_s)
    if meaning.kind not in ("retry", "open", "limit"):  # those are over by themselves
        said = f"{said}: {meaning.hint}"
    if meaning.kind in ("final", "alert"):
        alert = "send_refused" if meaning.kind == "alert" else None
        return Refused(said, code=meaning.slug, http_status=status, alert=alert)
    return Retry(
        said,
        code=meaning.slug,
        http_status=status,
        after_s=after_s,
        counts=meaning.kind in ("retry", "open", "once"),
        at_most=1 if meaning.kind == "once" else None,
        stops=_stops(meaning),
    )


def _stops(meaning: codes.Meaning) -> str | None:
    """Return the alert of an account that can send nothing any more; None where the meaning is another."""
    if meaning.kind != "account":
        return None
    return "token_dead" if meaning.slug in codes.TOKEN_SLUGS else "account_error"


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
