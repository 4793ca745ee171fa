"""The shapes of the API and of what CRMs receive, as Pydantic models; api-spec.yaml says the same in OpenAPI.

Requests are strict: no unknown field, no silent conversion. Knows no database and no channel.
"""

import codecs
import json
from collections.abc import Collection, Iterator
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from crmbridge.errors import Invalid
from crmbridge.events import read_instant

AccountId = Annotated[str, Field(pattern=r"^acc_[0-9a-z]{26}$")]
MessageId = Annotated[str, Field(pattern=r"^msg_[0-9a-z]{26}$")]
DeliveryId = Annotated[str, Field(pattern=r"^dlv_[0-9a-z]{26}$")]
EventId = Annotated[str, Field(pattern=r"^evt_[0-9a-z]{26}$")]
ExternalId = Annotated[str, Field(pattern=r"^[0-9A-Za-z_.:-]{1,128}$")]
Timestamp = Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$")]
Printable = Annotated[str, Field(min_length=1, max_length=255, pattern=r"^[^\x00-\x1f\x7f-\x9f]+$")]
Secret = Annotated[str, Field(min_length=1, max_length=2048, pattern=r"^[\x21-\x7e]+$")]
SigningSecret = Annotated[str, Field(min_length=8, max_length=512, pattern=r"^[^\x00-\x1f\x7f-\x9f]+$")]
Url = Annotated[str, Field(min_length=8, max_length=2048, pattern=r"^https?://[\x21-\x7e]+$")]
CrmUrl = Annotated[str, Field(min_length=8, max_length=2048, pattern=r"^https?://[^\x00-\x20\x7f]+$")]

MessageStatusName = Literal["pending", "sent", "delivered", "read", "failed"]
AccountStatusName = Literal["active", "inactive", "error"]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    one_of: ClassVar[tuple[tuple[str, ...], ...]] = ()  # of each of these exactly one field is given, and not null


class _Answer(BaseModel):
    # Built when first used: most answers are only held to by tests, and each model costs memory.
    model_config = ConfigDict(extra="forbid", defer_build=True)


# --- requests ---


def _finite(value: dict[str, Any] | None) -> dict[str, Any] | None:
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        raise ValueError("must hold no NaN or Infinity: they are no JSON") from None
    return value


def _said(value: str) -> str:
    if not value.strip():
        raise ValueError("must not be blank")
    return value


_LEFT_OUT: Any = None  # for a field that may be left out but not be null; model_fields_set tells which were given
Words = Annotated[
    str,
    Field(min_length=1, max_length=1000, json_schema_extra={"pattern": r"\S"}),
    AfterValidator(_said),
]
Reference = Annotated[str, Field(pattern=r"^(msg|evt)_[0-9a-z]{26}$")]


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
    force: bool = False


# --- answers ---


class ErrorDetail(_Answer):
    field: str
    problem: str


class ErrorAnswer(_Answer):
    error: str
    message: str
    details: list[ErrorDetail]
    correlation_id: str
    timestamp: Timestamp


SendWarning = Literal["recipient_unknown", "comment_unknown", "sends_paused", "account_error", "quick_reply_title_cut"]


class SendAccepted(_Answer):
    message_id: MessageId
    status: MessageStatusName
    created_at: Timestamp
    window_expires_at: Timestamp | None
    warnings: list[SendWarning]


class SendChecked(_Answer):
    dry_run: bool
    window_expires_at: Timestamp | None
    warnings: list[SendWarning]


class MessageError(_Answer):
    code: str
    message: str
    retryable: bool


class StatusTransition(_Answer):
    status: MessageStatusName
    timestamp: Timestamp


class Attempt(_Answer):
    kind: Literal["call", "look_up"]
    number: int
    started_at: Timestamp
    finished_at: Timestamp | None
    outcome: Literal["done", "retry", "refused", "in_doubt", "fault", "abandoned", "absent", "unclear"] | None
    code: str | None
    http_status: int | None
    error: str | None


class Held(_Answer):
    since: Timestamp
    until: Timestamp | None
    reason: str | None


class MessageStatus(_Answer):
    message_id: MessageId
    status: MessageStatusName
    account_id: AccountId
    recipient_id: str
    instagram_message_id: str | None
    created_at: Timestamp
    sent_at: Timestamp | None
    delivered_at: Timestamp | None
    read_at: Timestamp | None
    retry_count: int
    attempt_count: int
    next_attempt_at: Timestamp | None
    held: Held | None
    status_history: list[StatusTransition]
    attempts: list[Attempt]
    error: MessageError | None
    metadata: dict[str, Any] | None


class Subscription(_Answer):
    ok: bool | None
    error: str | None


class Pauses(_Answer):
    deliveries: Held | None
    sends: Held | None


class Hold(_Answer):
    by: Literal["inactive", "error", "gone", "unauthorized"]
    since: Timestamp
    reason: str | None
    asked_again_at: Timestamp | None


class Holds(_Answer):
    deliveries: Hold | None
    sends: Hold | None


class Account(_Answer):
    account_id: AccountId
    instagram_account_id: str
    username: str | None
    status: AccountStatusName
    status_reason: str | None
    crm_webhook_url: str | None
    subscription: Subscription
    paused: Pauses
    held: Holds
    token_checked_at: Timestamp | None
    token_expires_at: Timestamp | None
    created_at: Timestamp
    updated_at: Timestamp


class AccountChanged(Account):
    warnings: list[str]
    webhook_secret: str = _LEFT_OUT


class AccountList(_Answer):
    accounts: list[Account]
    next_cursor: str | None
    has_more: bool


class AccountDeleted(_Answer):
    account_id: AccountId
    deleted: bool


class Storage(_Answer):
    database_bytes: int
    wal_bytes: int
    free_bytes: int
    disk_free_bytes: int


class WorkerState(_Answer):
    last_beat_at: Timestamp | None


class RequestTimes(_Answer):
    count: int
    slow: int
    p50_ms: float | None
    p95_ms: float | None
    p99_ms: float | None


class OpenAlert(_Answer):
    alert: str
    account_id: AccountId | None
    since: Timestamp
    last_at: Timestamp
    count: int
    message: str


class Latency(_Answer):
    count: int
    p50_ms: int
    p95_ms: int
    p99_ms: int
    max_ms: int


class LatencyByWay(_Answer):
    webhooks: Latency | None
    sends: Latency | None


class PausedSince(_Answer):
    deliveries: Timestamp | None
    sends: Timestamp | None


class AccountStats(_Answer):
    account_id: AccountId
    username: str | None
    status: AccountStatusName
    status_reason: str | None
    paused_since: PausedSince
    pending_webhooks: int
    oldest_pending_webhook_at: Timestamp | None
    dead_webhooks: int
    pending_sends: int
    oldest_pending_send_at: Timestamp | None
    dead_sends: int
    last_event_at: Timestamp | None
    latency: LatencyByWay


class Stats(_Answer):
    timestamp: Timestamp
    version: str
    uptime_s: int
    storage: Storage
    worker: WorkerState
    requests: RequestTimes
    unrouted_events: int
    alerts: list[OpenAlert]
    accounts: list[AccountStats]


StoryKind = Literal["message", "event", "account", "conversation"]


class StoryStep(_Answer):
    at: Timestamp
    step: str
    text: str


class Story(_Answer):
    kind: StoryKind
    id: str
    facts: dict[str, str | int | None]
    steps: list[StoryStep]
    next: list[str]
    to_type: list[str]


class OtherMeaning(_Answer):
    kind: StoryKind
    id: str
    to_type: str


class Explanation(_Answer):
    id: str
    stories: list[Story]
    others: list[OtherMeaning]


NotRetryable = Literal["account_deleted", "content_gone", "in_doubt", "not_pushed"]


class _Dead(_Answer):
    delivery_id: DeliveryId
    account_id: AccountId
    sequence: int
    code: str | None
    http_status: int | None
    error: str | None
    attempts: int
    accepted_at: Timestamp
    dead_at: Timestamp
    retry_asked_at: Timestamp | None
    retryable: bool
    not_retryable_because: NotRetryable | None
    correlation_id: str


class DeadWebhook(_Dead):
    contact: str
    event: str
    event_id: EventId
    message_id: MessageId | None


class DeadWebhookList(_Answer):
    deliveries: list[DeadWebhook]
    next_cursor: str | None
    has_more: bool


class DeadSend(_Dead):
    recipient_id: str
    message_id: MessageId
    in_doubt: bool


class DeadSendList(_Answer):
    deliveries: list[DeadSend]
    next_cursor: str | None
    has_more: bool


class Revived(_Answer):
    delivery_id: DeliveryId
    account_id: AccountId
    event_id: EventId | None
    message_id: MessageId | None
    state: Literal["pending"]


class LeftOut(_Answer):
    account_deleted: int
    content_gone: int
    in_doubt: int
    not_pushed: int


class RetryCount(_Answer):
    matching: int
    asked: int
    already_asked: int
    left_out: LeftOut
    preview: bool


class Health(_Answer):
    status: Literal["healthy", "unhealthy"]
    timestamp: Timestamp
    reasons: list[str]


class Liveness(_Answer):
    status: Literal["alive"]
    timestamp: Timestamp


class WebhookAccepted(_Answer):
    status: Literal["accepted"]


class DeletionAccepted(_Answer):
    url: str
    confirmation_code: str


# --- what a CRM receives ---


class _CrmEvent(BaseModel):
    model_config = ConfigDict(defer_build=True)

    event_id: EventId
    sequence: int
    account_id: AccountId
    timestamp: Timestamp


class Attachment(_Answer):
    type: str
    url: str | None
    title: str | None
    instagram_id: str | None
    payload: dict[str, Any] | None


# `other` holds the channel's keys that have no field of their own, as they came.
class StoryReference(_Answer):
    id: str | None
    url: str | None
    other: dict[str, Any] | None


class ReplyReference(_Answer):
    message_id: str | None
    instagram_message_id: str | None
    story: StoryReference | None
    other: dict[str, Any] | None


class QuickReplyChoice(_Answer):
    payload: str | None
    other: dict[str, Any] | None


class Referral(_Answer):
    ref: str | None
    source: str | None
    type: str | None
    ad_id: str | None
    product_id: str | None
    ad: dict[str, Any] | None
    other: dict[str, Any] | None


class Reaction(_Answer):
    action: str
    name: str | None
    emoji: str | None
    other: dict[str, Any] | None


class Postback(_Answer):
    title: str | None
    payload: str | None
    other: dict[str, Any] | None


class Edit(_Answer):
    number: int | None
    other: dict[str, Any] | None


class Comment(_Answer):
    id: str
    parent_id: str | None
    username: str | None
    media_id: str | None
    media_type: str | None
    ad_id: str | None
    other: dict[str, Any] | None


class Mention(_Answer):
    media_id: str | None
    comment_id: str | None
    other: dict[str, Any] | None


class _CrmInbound(_CrmEvent):
    """What every event of the channel has; `message_id` names the message that the event is or is about."""

    message_id: MessageId | None
    sender_id: str | None
    sender_username: str | None
    sender_name: str | None
    recipient_id: str | None
    message: str | None
    message_type: str
    instagram_message_id: str | None
    conversation_id: str | None
    attachments: list[Attachment]
    window_expires_at: Timestamp | None
    recovered: bool
    other: dict[str, Any] | None


class _CrmMessage(_CrmInbound):
    message_id: MessageId
    sender_id: str
    recipient_id: str
    conversation_id: str
    reply_to: ReplyReference | None
    quick_reply: QuickReplyChoice | None
    referral: Referral | None
    is_self: bool


class MessageReceived(_CrmMessage):
    event: Literal["message.received"]


class MessageEcho(_CrmMessage):
    event: Literal["message.echo"]


class MessageReaction(_CrmInbound):
    event: Literal["message.reaction"]
    reaction: Reaction


class MessagePostback(_CrmInbound):
    event: Literal["message.postback"]
    postback: Postback
    referral: Referral | None
    is_self: bool


class MessageEdited(_CrmInbound):
    event: Literal["message.edited"]
    edit: Edit


class MessageDeleted(_CrmInbound):
    event: Literal["message.deleted"]


class MessageReferral(_CrmInbound):
    event: Literal["message.referral"]
    referral: Referral


class CommentReceived(_CrmInbound):
    event: Literal["comment.received"]
    comment: Comment
    referral: Referral | None


class MentionReceived(_CrmInbound):
    event: Literal["mention.received"]
    mention: Mention


class MessageUnsupported(_CrmInbound):
    event: Literal["message.unsupported"]
    raw: Any


class MessageStatusEvent(_CrmEvent):
    event: Literal["message.sent", "message.delivered", "message.read", "message.failed"]
    message_id: MessageId
    recipient_id: str
    status: MessageStatusName
    instagram_message_id: str | None
    error: MessageError | None
    metadata: dict[str, Any] | None


CRM_EVENTS: dict[str, type[_CrmEvent]] = {
    "message.received": MessageReceived,
    "message.echo": MessageEcho,
    "message.reaction": MessageReaction,
    "message.postback": MessagePostback,
    "message.edited": MessageEdited,
    "message.deleted": MessageDeleted,
    "message.referral": MessageReferral,
    "message.unsupported": MessageUnsupported,
    "comment.received": CommentReceived,
    "mention.received": MentionReceived,
    "message.sent": MessageStatusEvent,
    "message.delivered": MessageStatusEvent,
    "message.read": MessageStatusEvent,
    "message.failed": MessageStatusEvent,
}


class WebhookTest(BaseModel):
    model_config = ConfigDict(defer_build=True)

    event: Literal["webhook.test"]
    event_id: EventId
    sequence: None
    account_id: AccountId
    timestamp: Timestamp
    test: Literal[True]


class EventPage(_Answer):
    events: list[
        MessageReceived
        | MessageEcho
        | MessageReaction
        | MessagePostback
        | MessageEdited
        | MessageDeleted
        | MessageReferral
        | MessageUnsupported
        | CommentReceived
        | MentionReceived
        | MessageStatusEvent
    ]
    next_cursor: str | None
    has_more: bool
    expired: int


def crm_body(event: str, fields: dict[str, Any]) -> str:
    """Render the body that a CRM receives; the text is stored, and its UTF-8 bytes are what is signed."""
    return CRM_EVENTS[event].model_validate({"event": event, **fields}).model_dump_json()


# --- reading a request ---

_Request_T = TypeVar("_Request_T", bound=_Request)
_SAID = {
    "missing": "is required",
    "extra_forbidden": "is not a field of this request",
    "string_type": "must be text",
    "dict_type": "must be an object",
    "model_type": "must be an object",
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
        problems = error.errors(include_url=False, include_context=False, include_input=False)
        if problems[0]["type"] == "json_invalid":
            said = problems[0]["msg"].removeprefix("Invalid JSON: ")
            raise Invalid(f"The body is not valid JSON: {said}", code="malformed_json") from None
        details = [
            {
                "field": ".".join(str(step)[:64] for step in problem["loc"]) or "(body)",
                "problem": _SAID.get(problem["type"], problem["msg"].removeprefix("Value error, ")),
            }
            for problem in problems[:50]
        ]
        given = _names(body)
    except RecursionError:
        raise Invalid("The body is nested too deeply.", code="malformed_json") from None
    if given is not None:
        details += _unmet(model, given)
    if not details:
        return made
    named = ", ".join(entry["field"] for entry in details)
    raise Invalid(f"The request has {len(details)} problem(s), in: {named}.", details=details)


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
