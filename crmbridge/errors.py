"""Every error of the bridge, sorted by what its receiver does next.

A `code` is a stable slug; a message is for a person and never carries a secret or a customer's text.
"""

from collections.abc import Sequence


class BridgeError(Exception):
    """Base of the tree. `details` are ``{"field": …, "problem": …}`` entries.

    `quoted` is the part of the message that is not in our words: a far side said it, or it was read.
    """

    code = "error"

    def __init__(
        self, message: str, *, code: str | None = None, details: Sequence[dict[str, str]] = (), quoted: str = ""
    ) -> None:
        super().__init__(message)
        self.message = message
        self.quoted = quoted
        self.code = code or type(self).code
        self.details = list(details)


# --- the caller's side: mend the request, the key or the id -----------------------------------


class Invalid(BridgeError):
    """The request cannot be understood or accepted as it is."""

    code = "invalid_request"


class TooLarge(Invalid):
    """The body is over the route's limit."""

    code = "body_too_large"


class UnsupportedMedia(Invalid):
    """The body is not in a form this route reads."""

    code = "unsupported_media_type"


class Unauthorized(BridgeError):
    """No credential, or a wrong one."""

    code = "unauthorized"


class Forbidden(BridgeError):
    """A good credential that may not do this."""

    code = "forbidden"


class NotFound(BridgeError):
    """There is no such thing, or not for this caller."""

    code = "not_found"


class Conflict(BridgeError):
    """The request contradicts what is already stored."""

    code = "conflict"


class Unavailable(BridgeError):
    """The bridge cannot take this now; the caller repeats it after `after_s` seconds."""

    code = "unavailable"

    def __init__(self, message: str, *, code: str | None = None, after_s: int = 1, quoted: str = "") -> None:
        super().__init__(message, code=code, quoted=quoted)
        self.after_s = after_s


class TooMany(Unavailable):
    """This caller, or all like it, asks too much at once; again after `after_s` seconds."""

    code = "too_many_requests"


# --- the engine's side: what one delivery attempt came to --------------------------------------


class AttemptFailed(BridgeError):
    """Base of what a sender raises. `http_status` is the far side's answer, if there was one."""

    def __init__(self, message: str, *, code: str, http_status: int | None = None) -> None:
        super().__init__(message, code=code)
        self.http_status = http_status


class Retry(AttemptFailed):
    """Worth another try: after `after_s` seconds if the far side said so.

    `counts` is false where the far side is unavailable as a whole, so that the try does not use up
    one of a message's few retries, of which this one is worth `at_most`. `stops` names the alert where no other
    call for this account can succeed either, before a person has acted.
    """

    def __init__(
        self,
        message: str,
        *,
        code: str,
        http_status: int | None = None,
        after_s: float | None = None,
        counts: bool = True,
        stops: str | None = None,
        at_most: int | None = None,
    ) -> None:
        super().__init__(message, code=code, http_status=http_status)
        self.after_s = after_s
        self.counts = counts
        self.stops = stops
        self.at_most = at_most


class Refused(AttemptFailed):
    """Final: no repetition of the same call can succeed. `alert` names the alert where a person must act.

    `stops` names it where no other call to this far side can succeed either.
    """

    def __init__(
        self,
        message: str,
        *,
        code: str,
        http_status: int | None = None,
        alert: str | None = None,
        stops: str | None = None,
    ) -> None:
        super().__init__(message, code=code, http_status=http_status)
        self.alert = alert
        self.stops = stops


class Unclear(AttemptFailed):
    """The far side was asked whether a call took effect, and what it tells does not say so."""


class InDoubt(AttemptFailed):
    """The call may or may not have taken effect; it must not simply be repeated.

    The far side wants to be left alone for `after_s` seconds, if it said so.
    """

    def __init__(
        self, message: str, *, code: str, http_status: int | None = None, after_s: float | None = None
    ) -> None:
        super().__init__(message, code=code, http_status=http_status)
        self.after_s = after_s


# --- the operator's side ------------------------------------------------------------------------


class Misconfigured(BridgeError):
    """The installation is not fit to run; the message says what to change."""

    code = "misconfigured"
