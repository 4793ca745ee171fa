"""The bodies of the API's requests, as Pydantic models; api-spec.yaml alone describes answers and what CRMs receive.

Requests are strict: no unknown field, no silent conversion. Knows no database and no channel.
"""

import codecs
import json
import re
from collections.abc import Collection, Iterator
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from crmbridge.errors import Invalid
from crmbridge.events import read_instant

_SHAPES = {  # what a text looks like, and how that is said
    r"^[0-9A-Za-z_.:-]{1,128}$": "must be an id of Instagram's: 1 to 128 letters, digits and any of _ . : -",
    r"^[^\x00-\x1f\x7f-\x9f]+$": "must be without control characters, such as line ends",
    r"^[\x21-\x7e]+$": "must hold visible ASCII characters alone, without blanks",
    r"^https?://[\x21-\x7e]+$": "must begin with http:// or https://, and go on in visible ASCII characters",
    r"^https?://[^\x00-\x20\x7f]+$": "must begin with http:// or https://, and go on without blanks",
    r"^(msg|evt)_[0-9a-z]{26}$": "must be a message_id (msg_…) or an event_id (evt_…) of the bridge",
}
_ID, _PLAIN, _ASCII, _ASCII_URL, _URL, _REFERENCE = _SHAPES
ExternalId = Annotated[str, Field(pattern=_ID)]
Printable = Annotated[str, Field(min_length=1, max_length=255, pattern=_PLAIN)]
Secret = Annotated[str, Field(min_length=1, max_length=2048, pattern=_ASCII)]
SigningSecret = Annotated[str, Field(min_length=8, max_length=512, pattern=_PLAIN)]
Url = Annotated[str, Field(min_length=8, max_length=2048, pattern=_ASCII_URL)]
CrmUrl = Annotated[str, Field(min_length=8, max_length=2048, pattern=_URL)]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    one_of: ClassVar[tuple[tuple[str, ...], ...]] = ()  # of each of these exactly one field is given, and not null


def _finite(value: dict[str, Any] | None) -> dict[str, Any] | None:
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        raise ValueError("must hold no NaN or Infinity: they are no JSON") from None
    return value


def _not_blank(value: str) -> str:
    if not value.strip():
        raise ValueError("must not be blank")
    return value


_LEFT_OUT: Any = None  # for a field that may be left out but not be null; model_fields_set tells which were given
Words = Annotated[
    str,
    Field(min_length=1, max_length=1000, json_schema_extra={"pattern": r"\S"}),
    AfterValidator(_not_blank),
]
Reference = Annotated[str, Field(pattern=_REFERENCE)]


class SendAttachment(_Request):
    type: Literal["image", "video", "audio", "file", "like_heart"]
    url: Url | None = None


class SendReaction(_Request):
    message_id: Reference
    action: Annotated[Literal["react", "unreact"] | None, AfterValidator(lambda given: given or "react")] = "react"
    emoji: Annotated[str, Field(min_length=1, max_length=32)] | None = None


class QuickReply(_Request):
    title: Words
    payload: Words


class TemplateButton(_Request):
    type: Literal["web_url", "postback"]
    url: Url | None = None
    title: Words
    payload: Words | None = None


class TemplateElement(_Request):
    title: Words
    subtitle: Words | None = None
    image_url: Url | None = None
    buttons: Annotated[list[TemplateButton], Field(min_length=1)] | None = None


class Template(_Request):
    template_type: Literal["generic", "button"]
    text: Words | None = None
    elements: Annotated[list[TemplateElement], Field(min_length=1)] | None = None
    buttons: Annotated[list[TemplateButton], Field(min_length=1)] | None = None


class Author(_Request):
    type: Literal["human", "bot"]


_RECIPIENTS = ("recipient_id", "comment_id")
_FORMS = ("message", "attachments", "reaction", "action", "template")
_Moment = Annotated[str, AfterValidator(read_instant), Field(max_length=40, json_schema_extra={"format": "date-time"})]


class SendRequest(_Request):
    one_of = (_RECIPIENTS, _FORMS)

    account_id: Annotated[str, Field(min_length=1, max_length=64)]
    recipient_id: ExternalId | None = None
    comment_id: ExternalId | None = None
    message: Words | None = None
    attachments: Annotated[list[SendAttachment], Field(min_length=1)] | None = None
    reaction: SendReaction | None = None
    action: Literal["typing_on", "typing_off", "mark_seen"] | None = None
    template: Template | None = None
    quick_replies: Annotated[list[QuickReply], Field(min_length=1)] | None = None
    reply_to: Reference | None = None
    author: Author | None = None
    send_before: _Moment | None = None
    dry_run: bool | None = False
    idempotency_key: Printable
    metadata: Annotated[dict[str, Any] | None, AfterValidator(_finite)] = None


class AccountCreate(_Request):
    instagram_account_id: ExternalId
    username: Printable | None = None
    access_token: Secret
    crm_webhook_url: CrmUrl | None = None
    webhook_secret: SigningSecret | None = None


class AccountUpdate(_Request):
    access_token: Secret = _LEFT_OUT
    crm_webhook_url: CrmUrl | None = None
    webhook_secret: SigningSecret | None = None
    status: Literal["active", "inactive"] = _LEFT_OUT


What = list[Literal["deliveries", "sends"]]
_BOTH: Any = Field(default=["deliveries", "sends"], min_length=1, max_length=2)
_Time = Annotated[str, Field(max_length=40, json_schema_extra={"format": "date-time"}), AfterValidator(read_instant)]


class PauseRequest(_Request):
    what: What = _BOTH
    until: _Time | None = None
    reason: Printable | None = None


class ResumeRequest(_Request):
    what: What = _BOTH
    held: bool = False


class RetryOne(_Request):
    force: bool = False


class RetryMany(_Request):
    account_id: Annotated[str, Field(max_length=64)] | None = None
    event: Annotated[str, Field(max_length=64)] | None = None
    code: Annotated[str, Field(max_length=64)] | None = None
    dead_after: _Time | None = None
    dead_before: _Time | None = None
    preview: bool = False


# --- reading a request ---

_Request_T = TypeVar("_Request_T", bound=_Request)
_NAMED_MOST = 3
# Pydantic's kinds of errors in our words, which follow a field's name; {…} is what it tells of the limit.
_SAID = {
    "missing": "is required",
    "extra_forbidden": "is not a field of this request",
    "string_type": "must be text",
    "bool_type": "must be true or false",
    "list_type": "must be a list",
    "dict_type": "must be an object",
    "model_type": "must be an object",
    "literal_error": "must be {expected}",
    "string_too_short": "must have at least {min_length} characters",
    "string_too_long": "must have at most {max_length} characters",
    "too_long": "must have at most {max_length} entries",
    "value_error": "{error}",
}


def read(model: type[_Request_T], body: bytes) -> _Request_T:
    """Return the request in a body. Raises Invalid that names every field at fault at once."""
    body = _utf_8(body)
    details: list[dict[str, str]] = []
    given: set[str] | None
    try:
        made = model.model_validate_json(body)
        given = {name for name in made.model_fields_set if getattr(made, name) is not None}
    except ValidationError as error:
        problems = error.errors(include_url=False, include_input=False)
        if problems[0]["type"] == "json_invalid":
            raise _no_json(str(problems[0]["ctx"]["error"])) from None
        details = [
            {"field": ".".join(str(step)[:64] for step in problem["loc"]) or "(body)", "problem": _said(problem)}
            for problem in problems[:50]
        ]
        given = _names(body)
    except RecursionError:
        raise _no_json("recursion") from None
    if given is not None:
        details += _unmet(model, given)
    if not details:
        return made
    named = "; ".join(f"{one['field']} {one['problem']}" for one in details[:_NAMED_MOST]).replace("(body)", "The body")
    more = len(details) - _NAMED_MOST
    raise Invalid(named + (f"; and {more} more in details." if more > 0 else "."), details=details)


def _said(problem: Any) -> str:
    told = {name: str(value).replace("'", "") for name, value in problem.get("ctx", {}).items()}
    if told.get("min_length") == "1":
        return "must not be empty"
    if problem["type"] == "string_pattern_mismatch":
        return _SHAPES[told["pattern"]]
    return _SAID.get(problem["type"], "is not as the API's specification describes it").format(**told)


def _no_json(said: str) -> Invalid:
    if "recursion" in said:
        return Invalid("The body is nested too deeply.", code="malformed_json")
    place = re.search(r"line (\d+) column (\d+)", said)
    where = f": look at line {place[1]}, character {place[2]}" if place else ""
    return Invalid(f"The body is not valid JSON{where}.", code="malformed_json")


_BLANKS = b" \t\r\n"


def _utf_8(body: bytes) -> bytes:
    """Return a body without the byte order marks that some editors and languages write. Raises Invalid for no UTF-8."""
    encoding = json.detect_encoding(body)  # by the mark, or by where the zeros of the first characters stand
    if not encoding.startswith("utf-8"):
        raise Invalid(f"The body is {encoding[:6].upper()}; send JSON as UTF-8.", code="malformed_json")
    try:
        body.decode()
    except UnicodeDecodeError as error:
        where = f"byte {error.start} is 0x{body[error.start]:02x}"
        raise Invalid(f"The body is not UTF-8 ({where}); send JSON as UTF-8.", code="malformed_json") from None
    while (bare := body.lstrip(_BLANKS).removeprefix(codecs.BOM_UTF8)) != body:
        body = bare
    if not body:
        raise Invalid("The body is empty; send a JSON object.", code="malformed_json")
    return body


def _unmet(model: type[_Request], given: Collection[str]) -> Iterator[dict[str, str]]:
    for names in model.one_of:
        here = [name for name in names if name in given]
        if len(here) != 1:
            wanted = f"exactly one of {', '.join(names)} is required"
            yield from ({"field": name, "problem": wanted} for name in here or names[:1])


def _names(body: bytes) -> set[str] | None:
    """Return the names in a body that is no good, but those of null, or None where they cannot be told."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return {name for name, value in found.items() if value is not None} if isinstance(found, dict) else None
