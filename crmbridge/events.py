"""Channel-neutral values: what happened, when, and under which id.

Knows no channel, no database and no HTTP.
"""

import re
import secrets
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"


class _Numbers:
    """Hands out rising 128-bit numbers: 48 bits of milliseconds, then chance."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last = 0

    def next(self) -> int:
        with self._lock:
            number = (time.time_ns() // 1_000_000 << 80) | secrets.randbits(80)
            if number <= self._last:
                number = self._last + 1 + secrets.randbits(32)
            self._last = number
            return number


_numbers = _Numbers()


def new_id(prefix: str) -> str:
    """Return a new id such as ``msg_01k…``; ids made later in one process sort later."""
    value, letters = _numbers.next(), []
    for _ in range(26):
        value, index = divmod(value, 32)
        letters.append(_ALPHABET[index])
    return f"{prefix}_{''.join(reversed(letters))}"


def instant(epoch_s: float) -> str:
    """Render seconds since the epoch as UTC ISO-8601 text with milliseconds and ``Z``.

    Times outside the years 1970 to 9999 are pulled to the nearer end, so that the text always sorts.
    """
    millis = min(max(int(epoch_s * 1000 + 0.5), 0), 253_402_300_799_999)
    return f"{datetime.fromtimestamp(millis // 1000, UTC).isoformat()[:19]}.{millis % 1000:03d}Z"


def epoch_s(text: str) -> float:
    """Read a time that `instant` rendered back into seconds since the epoch."""
    return datetime.fromisoformat(text).timestamp()


_RFC_3339 = re.compile(r"\d{4}-\d\d-\d\d[Tt]\d\d:\d\d:\d\d(\.\d{1,9})?([Zz]|[+-]\d\d:\d\d)\Z", re.ASCII)
_SPAN = re.compile(r"(\d{1,6})([smhd])\Z", re.ASCII)
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


def read_instant(text: str) -> str:
    """Return a time that a person or a program wrote by RFC 3339, with its offset, as `instant` renders it.

    Raises ValueError, with a message that completes "it …".
    """
    try:
        if _RFC_3339.match(text):
            return instant(epoch_s(text.upper()))
    except ValueError:
        pass
    raise ValueError("must be a time with its offset, such as 2027-01-15T08:00:00Z")


def read_span(text: str) -> float:
    """Return the seconds of a duration such as ``30m``, ``2h`` or ``3d``.

    Raises ValueError, with a message that completes "it …".
    """
    found = _SPAN.match(text)
    if found is None:
        raise ValueError("must be a duration, such as 30m, 2h or 3d")
    return float(found[1]) * _SECONDS[found[2]]


CORRELATION_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}\Z")


@dataclass(frozen=True, slots=True)
class Attachment:
    """One thing that came with a message. `url` is a bearer secret: never logged.

    `payload` holds what else the channel said of it, as it came.
    """

    type: str
    url: str | None = None
    title: str | None = None
    external_id: str | None = None
    payload: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class ReplyTo:
    """What a message answers: an earlier message (by its channel's id) or a story."""

    external_id: str | None = None
    story_id: str | None = None
    story_url: str | None = None


@dataclass(frozen=True, slots=True)
class Shown:
    """A message as the channel shows it in a thread, made at `at_s` seconds since the epoch by the channel's clock.

    `is_ours` tells that the shop wrote it, `kinds` are the types of what came with it, ``unknown`` where the channel
    does not tell.
    """

    external_id: str
    text: str
    at_s: float
    is_ours: bool
    kinds: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Thread:
    """The newest messages of a thread as the channel shows them; our clock is `ahead_s` ahead of the channel's."""

    shown: tuple[Shown, ...]
    ahead_s: float = 0.0


# How much is known of a message by its id: something about it came first; that there is one; what the channel told when
# it was asked; what it told by itself; that it was taken back, or erased. More takes the place of less.
AWAITED, ANNOUNCED, RECOVERED, TOLD, WITHDRAWN = range(5)
NOTED = "channel.noted"  # kept, and no CRM is told
TEST = "channel.test"  # a test of the channel's own console; belongs to no account
Wake = Callable[[Collection[str] | None], None]  # have something new of these accounts, or of any, looked at
# What an act of a customer does to the window in which the shop may answer: opens it, opens it for longer because an ad
# led to it, or perhaps opens it, for the channel does not say.
Opens = Literal["window", "ad", "perhaps"]


@dataclass(frozen=True, slots=True)
class ChannelEvent:
    """One thing a channel told us, already verified and read.

    `kind` is the name of the CRM event it becomes, ``message.read`` for a receipt, or ``channel.…`` for what
    is only kept. `external_account_id` is the account's id at the channel, `contact` the customer's, empty when
    the channel did not say; `from_account` tells that the account acted, not the customer.
    `dedupe_key` is the same for every repetition of the same fact within one account; a message's is its id's, whatever
    form it comes in, and `rank` tells how much of it this form is. None for what is no message, or has no id.
    `external_id` names the message that the event is or is about.
    `extra` holds what only some kinds have: reaction, postback, quick_reply, referral, edit, comment, mention.
    `others` is what the channel told besides, as it came, by the object it stood in; ``event`` for the whole.
    `opens` is None for what is no act of a customer, or one that opens no window.
    `party` is the business as the item itself names it, where that is another id than the account's.
    `raw` is the item as it came, kept only where we did not understand it.
    """

    kind: str
    external_account_id: str
    contact: str
    occurred_at: str
    dedupe_key: str
    external_id: str | None = None
    rank: int | None = None
    text: str | None = None
    message_type: str | None = None
    attachments: tuple[Attachment, ...] = ()
    reply_to: ReplyTo | None = None
    from_account: bool = False
    party: str = ""
    contact_name: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    others: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    opens: Opens | None = None
    raw: Any = None


def message_key(external_id: str) -> str:
    """Return the `dedupe_key` of a message by its id at the channel."""
    return f"msg:{external_id}"
