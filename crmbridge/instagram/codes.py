"""Meta's error codes, as data: what a refusal means, what the bridge does about it and what a person must do.

Sources: Messenger Platform "Error codes" and Graph API "Handling errors", with implementers' reports.
"""

from dataclasses import dataclass
from typing import Any, Literal

Class = Literal["retry", "open", "once", "limit", "final", "alert", "account", "unknown"]
Part = int | Literal["*"] | None

# What happens to the send, in words; docs/instagram.md has them.
HAPPENS: dict[Class, str] = {
    "retry": "tried again, up to 3 times",
    "open": "in doubt where the answer leaves that open: looked for, and sent again if it is not there, up to 3 times",
    "once": "tried again once",
    "limit": "waits, as long as Instagram says",
    "final": "fails",
    "alert": "fails, with an alert",
    "account": "held, with all sends of the account; an alert",
    "unknown": "in doubt: looked for before it is sent again",
}


@dataclass(frozen=True)
class Meaning:
    """`hint` is what the operator, or who writes the CRM, should do; ACCOUNT in it stands for the account's id.

    `codes` are written as code/subcode. A code alone comes without a subcode, ``/*`` stands for any subcode or none,
    ``*/`` for a number that comes as the one or the other. `says` is a part of the sentence that tells it from others
    with the same codes.
    """

    kind: Class
    slug: str
    codes: str
    hint: str
    says: str = ""

    @property
    def retryable(self) -> bool:
        """Whether the same send can succeed later: by itself, or once somebody has acted on the account."""
        return self.kind not in ("final", "alert")


_RENEW = "make a new token in Meta's console, then: crmbridge account set ACCOUNT --token -"
_REVIEW = "see in Meta's console that the app is Live and has the permission by App Review"
_SUPPORT = "look at the account's status and support inbox at Instagram, and wait or appeal"
_OTHER_APP = "make this app the default in the Page's or account's conversation routing"
_STATUS = "look at https://metastatus.com if it goes on"

MEANINGS = (
    Meaning("open", "instagram_fault", "1/*", _STATUS),
    Meaning("open", "instagram_unavailable", "2/*", _STATUS + "; it also comes when the customer blocked the shop"),
    Meaning("retry", "thread_controlled_elsewhere", "*/2018300", _OTHER_APP),
    Meaning("retry", "automated_flow_running", "*/2018321", "wait until Instagram's automated questions are over"),
    Meaning("once", "media_unreachable", "100/2018008", "the file's url must be public, quick and without a redirect"),
    Meaning("once", "media_timeout", "100/2018294", "put the video where it loads faster, or make it smaller"),
    Meaning("limit", "rate_limited", "4/* 17/* 32/* 341/* 613/* 80001/* 80002/* 80006/*", "send less, or wait"),
    Meaning("limit", "rate_uneven", "613/1996", "spread the sends more evenly"),
    Meaning("final", "too_many_requests_to_person", "9/2018352", "ask this person less often"),
    Meaning(
        "final", "window_closed", "10/2534022 10/2018278 10/2018065",
        "wait until the customer writes; a person may answer for up to 7 days, with author: human",
    ),
    Meaning("final", "recipient_unavailable", "10/2018108 200/1545041 551/* 10904/*", "the person takes no messages"),
    Meaning("final", "recipient_unknown", "100/2018001 100/2534014", "use the sender_id of an event of this account"),
    Meaning("final", "recipient_restricted", "10903/*", "Instagram lets nobody answer this comment privately"),
    Meaning("final", "invalid_parameter", "100/*", "report it with the log's line: Instagram does not take the call"),
    Meaning("final", "invalid_path", "2500/*", "see that [instagram] graph_url is right"),
    Meaning("final", "invalid_message", "100/2534015", "correct the message's content"),
    Meaning("final", "media_rejected", "100/2018047", "send a type of file that Instagram takes"),
    Meaning("final", "media_too_large", "100/2018109 36000/2207004", "send a smaller file"),
    Meaning("final", "attachment_invalid", "100/2018074", "send the file by its url"),
    Meaning("final", "multi_image_off", "*/2534068", "send the images one by one"),
    Meaning("final", "comment_invalid", "100/2534025", "the comment is older than 7 days, answered already or gone"),
    Meaning("final", "comment_already_answered", "10900/*", "a comment can be answered privately once"),
    Meaning("final", "thread_controlled_elsewhere", "100/2534037", _OTHER_APP),
    Meaning(
        "final", "conversation_routing_off", "27/*",
        "switch Conversation Routing on for the Page or account: without it no app can take a conversation over",
    ),
    Meaning("final", "thread_gone", "*/2534001", "the conversation was deleted or archived in Instagram"),
    Meaning("final", "message_gone", "9000001/*", "the message was deleted, or is not among the newest 20"),
    Meaning("final", "duplicate_message", "506/*", "change the text: Instagram takes it for a repetition"),
    Meaning("final", "consent_missing", "230/*", "wait until the person has written"),
    Meaning("final", "instagram_refused", "", "look the codes up in Meta's documentation"),
    Meaning(
        "alert", "human_agent_not_approved", "10",
        "apply for the Human Agent feature in App Review, or answer within 24 h",
        says="Human Agent",
    ),
    Meaning("alert", "tag_abuse", "613/2018338", "let only people, not programs, answer with author: human"),
    Meaning(
        "alert", "private_reply_not_allowed", "200/2534066",
        "make a token that also has the permission for comments",
    ),
    Meaning("account", "permission_missing", "1/99 10 200", _REVIEW),
    Meaning("account", "capability_missing", "3", _REVIEW),
    Meaning("account", "terms_not_accepted", "2/2018344", "accept the contact terms in the Page's settings"),
    Meaning("account", "account_unverified", "10/2534077", "link the account to its Page again and confirm two-factor"),
    Meaning("account", "account_restricted", "10/1893063 368/* 2022/*", _SUPPORT),
    Meaning("account", "account_blocked", "100/2534029", _SUPPORT),
    Meaning("account", "account_not_linked", "100/2534013", "link the Page to the Instagram account"),
    Meaning(
        "account", "account_not_authorised", "100",
        "let the account accept the app's Instagram Tester role in a desktop browser; see that the app is Live",
        says="Unsupported request - method type",
    ),
    Meaning(
        "account", "account_unreachable", "100/33",
        "see in Meta's console that the app has the account and its permissions; also in outages of Meta",
    ),
    Meaning("account", "account_not_eligible", "36103/*", "wait until Meta opens its API to the account, or ask Meta"),
    Meaning(
        "account", "message_access_off", "200/2534041",
        "allow access in Instagram: Settings > Messages > Connected tools",
    ),
    Meaning("account", "login_required", "190/459 190/464", "the owner must log in to Instagram, confirm, then resume"),
    Meaning("account", "access_removed", "190/458", "the owner removed the app; connect it again: " + _RENEW),
    Meaning("account", "token_expired", "190/463", _RENEW),
    Meaning("account", "token_invalid", "190/*", _RENEW),
    Meaning("unknown", "answer_lost", "1/1357046 1200/*", "nothing: the bridge finds out"),
)  # fmt: skip
# What 100/33 says of a call that names another object than the account, such as a reply or a question about a message.
OBJECT_MISSING = Meaning("final", "object_missing", "100/33", "see that what it refers to still exists at Instagram")


def codes_of(meaning: Meaning) -> list[tuple[Part, Part]]:
    """Return the codes and subcodes of a meaning."""
    pairs = [entry.partition("/") for entry in meaning.codes.split()]
    return [(_part(code) or "*", _part(subcode)) for code, _, subcode in pairs]


def table() -> list[str]:
    """Return the lines of a table in Markdown: each refusal, its code, what happens and what to do."""
    lines = ["| Meta's code/subcode | code | what happens | what to do |", "| --- | --- | --- | --- |"]
    for one in MEANINGS:
        listed = " ".join(f"`{entry}`" for entry in one.codes.split()) or "any other"
        said = f' "{one.says}"' if one.says else ""
        lines.append(f"| {listed}{said} | `{one.slug}` | {HAPPENS[one.kind]} | {one.hint} |")
    return lines


def _part(text: str) -> Part:
    return "*" if text == "*" else int(text) if text else None


_SAID = [meaning for meaning in MEANINGS if meaning.says]
_TABLE = {pair: meaning for meaning in MEANINGS if not meaning.says for pair in codes_of(meaning)}
# These end with a new token.
TOKEN_SLUGS = ("token_invalid", "token_expired", "access_removed")
_BY_SLUG = {meaning.slug: meaning for meaning in MEANINGS}
_UNLISTED = "instagram_refused"


def classify(http_status: int, error: dict[str, Any], *, names_object: bool = False) -> Meaning:
    """Return what an error object means; codes that are not in the table go by HTTP status and transience.

    `names_object` tells that the call named another object than the account.
    """
    meaning = _meaning(http_status, error)
    if meaning.slug == "account_unreachable" and names_object:
        return OBJECT_MISSING
    return _BY_SLUG["rate_limited"] if http_status == 429 and meaning.kind == "open" else meaning


def leaves_open(http_status: int, error: dict[str, Any], meaning: Meaning) -> bool:
    """Tell whether an answer to a send leaves it open that the message was taken.

    Meta reports code 1 after deliveries, and answers 5xx with messages delivered (implementers' reports). Code 2 with
    is_transient false is a refusal (observed with 2/2018344).
    """
    if http_status < 300 and meaning.slug == _UNLISTED:
        return True  # it says both that the call went well and that it did not
    if meaning.kind in ("account", "final", "alert", "limit"):
        return False
    if meaning.kind == "unknown" or error.get("is_transient") is True:
        return True
    is_refusal = _number(error.get("code")) == 2 and error.get("is_transient") is False
    return meaning.kind == "open" and not (is_refusal and 400 <= http_status < 500)


def _meaning(http_status: int, error: dict[str, Any]) -> Meaning:
    code, subcode = _number(error.get("code")), _number(error.get("error_subcode")) or None  # 0 says: none
    for meaning in _SAID:
        if (code, subcode) in codes_of(meaning) and meaning.says in str(error.get("message")):
            return meaning
    keys: tuple[tuple[Part, Part], ...] = ((code, subcode), ("*", subcode), (code, "*"), ("*", code))
    for key in keys:
        if key in _TABLE:
            return _TABLE[key]
    if error.get("is_transient") is True or http_status >= 500:
        return _BY_SLUG["instagram_fault"]
    return _BY_SLUG["rate_limited" if http_status == 429 else _UNLISTED]


def _number(value: object) -> int | None:
    if isinstance(value, str) and value.isascii() and value.isdigit():
        return int(value[:12])
    return value if isinstance(value, int) else None
