"""Meta's error codes for sends, as data: what a code means and what the sender does about it.

Sources: Messenger Platform "Error codes" and Graph API "Handling errors", with implementers' reports.
"""

from dataclasses import dataclass
from typing import Any, Literal

Class = Literal["retry", "limit", "wait", "final", "account", "unknown"]


@dataclass(frozen=True)
class Meaning:
    """`kind`: retry counts against the message's retries, limit and wait do not, final ends the message,
    unknown means that it may have been delivered. account is about the account alone, never about one person or
    message, and nothing but a person's act ends it; what may be either, or passes by itself, is wait."""

    kind: Class
    slug: str


_TOKEN = 190
_ROWS: tuple[tuple[int, int | None, Class, str], ...] = (
    (1, None, "retry", "instagram_fault"),
    (1, 99, "wait", "permission_missing"),
    (1, 1357046, "unknown", "answer_lost"),
    (2, None, "retry", "instagram_unavailable"),
    (2, 2018344, "account", "terms_not_accepted"),
    (3, None, "account", "capability_missing"),
    (4, None, "limit", "rate_limited"),
    (9, 2018352, "final", "too_many_requests_to_person"),
    (10, None, "wait", "permission_missing"),
    (10, 2534022, "final", "window_closed"),
    (10, 2018278, "final", "window_closed"),
    (10, 2018065, "final", "window_closed"),
    (10, 2018108, "final", "recipient_unavailable"),
    (10, 2018300, "retry", "thread_controlled_elsewhere"),
    (10, 2534077, "account", "account_unverified"),
    (10, 1893063, "account", "account_restricted"),
    (17, None, "limit", "rate_limited"),
    (32, None, "limit", "rate_limited"),
    (80001, None, "limit", "rate_limited"),
    (80002, None, "limit", "rate_limited"),
    (80006, None, "limit", "rate_limited"),
    (100, None, "final", "invalid_parameter"),
    (100, 33, "final", "object_missing"),
    (100, 2018001, "final", "recipient_unknown"),
    (100, 2018008, "retry", "media_unreachable"),
    (100, 2018294, "retry", "media_timeout"),
    (100, 2018047, "final", "media_rejected"),
    (100, 2018109, "final", "media_too_large"),
    (100, 2018074, "final", "attachment_invalid"),
    (100, 2534013, "account", "account_not_linked"),
    (100, 2534014, "final", "recipient_unknown"),
    (100, 2534015, "final", "invalid_message"),
    (100, 2534025, "final", "comment_invalid"),
    (100, 2534029, "account", "account_blocked"),
    (100, 2534037, "final", "thread_controlled_elsewhere"),
    (190, None, "account", "token_invalid"),
    (190, 463, "account", "token_expired"),
    (200, None, "wait", "permission_missing"),
    (200, 1545041, "final", "recipient_unavailable"),
    (200, 2534041, "account", "message_access_off"),
    (200, 2534066, "wait", "permission_missing"),
    (341, None, "limit", "rate_limited"),
    (368, None, "wait", "account_restricted"),
    (506, None, "final", "duplicate_message"),
    (551, None, "final", "recipient_unavailable"),
    (613, None, "limit", "rate_limited"),
    (613, 2018338, "final", "tag_abuse"),
    (1200, None, "unknown", "answer_lost"),
    (2022, None, "wait", "account_restricted"),
    (2500, None, "final", "invalid_path"),
    (10900, None, "final", "comment_already_answered"),
    (10903, None, "final", "recipient_restricted"),
    (10904, None, "final", "recipient_unavailable"),
    (36103, None, "account", "account_not_eligible"),
    (2018300, None, "retry", "thread_controlled_elsewhere"),
    (2018321, None, "retry", "automated_flow_running"),
    (2534001, None, "final", "thread_gone"),
    (2534068, None, "final", "multi_image_off"),
    (9000001, None, "final", "message_gone"),
)
# What a person has to do before an account is served again.
HINTS = {
    "account_blocked": "Instagram has blocked the account from messaging; appeal there",
    "account_not_eligible": "Instagram does not let this account use messaging by API; see its settings there",
    "account_not_linked": "link the Instagram account to its page again",
    "account_restricted": "Instagram restricts the account's messages; look into its support inbox there",
    "account_unverified": "verify the account at Instagram (two-factor log-in, link to its page)",
    "capability_missing": "the Meta app lacks a capability; ask for it in App Review",
    "message_access_off": "switch on 'Allow access to messages' in Instagram's settings",
    "terms_not_accepted": "accept the contact terms at Meta",
    "token_expired": "the access token has expired; give the account a new one",
    "token_invalid": "the access token is refused; give the account a new one",
}
_TABLE: dict[tuple[int | None, int | None], Meaning] = {
    (code, subcode): Meaning(kind, slug) for code, subcode, kind, slug in _ROWS
}


def classify(http_status: int, error: dict[str, Any]) -> Meaning:
    """Return what an error object means; codes that are not in the table go by transience and HTTP status."""
    code, subcode = _number(error.get("code")), _number(error.get("error_subcode"))
    if code == 100 and subcode is None and "Unsupported request - method type" in str(error.get("message")):
        return Meaning("wait", "account_not_authorised")
    for key in ((code, subcode), (subcode, None), (code, None)):
        if key in _TABLE:
            found = _TABLE[key]
            # A subcode that is not listed may be about this person alone; only a token is refused as a whole.
            unsure = found.kind == "account" and key != (code, subcode) and code != _TOKEN
            return Meaning("wait", found.slug) if unsure else found
    if error.get("is_transient") is True or http_status >= 500:
        return Meaning("retry", "instagram_fault")
    if http_status == 429:
        return Meaning("limit", "rate_limited")
    return Meaning("final", "instagram_refused")


def _number(value: object) -> int | None:
    if isinstance(value, str) and value.isascii() and value.isdigit():
        return int(value[:12])
    return value if isinstance(value, int) else None
