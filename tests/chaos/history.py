"""What happened in a run, as Meta, the CRM and the clients saw it.

Knows nothing of the bridge's insides, and no rules.
"""

import threading
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import TypeVar

Record = TypeVar("Record", bound="Fact")


@dataclass(slots=True)
class Fact:
    """Something that began `at` and ended at `until`, in seconds since the epoch; 0 while it has not ended."""

    at: float
    until: float

    def names(self) -> Collection[str]:
        """Return the ids by which this is found."""
        return ()

    def told(self) -> str:
        """Describe this in one line."""
        return ""


@dataclass(frozen=True, slots=True)
class Item:
    """One item of a webhook: a customer's `message`, an `echo` or a `read` receipt."""

    kind: str
    mid: str
    contact: str
    at_ms: int


@dataclass(slots=True)
class Webhook(Fact):
    """Meta posted items; `status` is what the bridge answered, 0 for no answer. `batch` is kept by a repetition."""

    items: tuple[Item, ...]
    status: int
    batch: bytes

    def names(self) -> Collection[str]:
        return [item.mid for item in self.items] + [item.contact for item in self.items]

    def told(self) -> str:
        shown = " ".join(f"{item.kind}:{item.mid[-24:]}({item.contact})" for item in self.items)
        return f"meta → bridge    {self.status:3} {shown}"


@dataclass(slots=True)
class CrmCall(Fact):
    """The bridge called the CRM. `taken`: the CRM kept the event; `heard`: its 2xx was sent in time."""

    event: str
    event_id: str
    sequence: int
    contact: str
    subject: str  # the mid or the message_id that it is about
    digest: str  # of the exact body
    genuine: bool  # signature and webhook-id fit
    fault: str
    taken: bool
    heard: bool

    def names(self) -> Collection[str]:
        return self.event_id, self.subject, self.contact

    def told(self) -> str:
        what = "taken" if self.taken else "refused"
        return (
            f"bridge → crm     {self.fault:14} {what}{'' if self.heard == self.taken else ', unheard'} {self.event}"
            f" seq={self.sequence} {self.event_id} {self.subject[-30:]} ({self.contact})"
        )


@dataclass(slots=True)
class SendCall(Fact):
    """The bridge called the Send API, or looked into a conversation. `mid` is set when the send took effect."""

    contact: str
    text: str | None  # None for a look-up
    fault: str
    mid: str | None = None
    position: int = 0  # of the effect among all effects

    def names(self) -> Collection[str]:
        return [self.contact, *([self.mid] if self.mid else [])]

    def told(self) -> str:
        call = "look-up" if self.text is None else f"send {self.text!r}"
        return f"bridge → meta    {self.fault:14} {call} ({self.contact}) effect={self.mid and self.mid[-24:]}"


@dataclass(slots=True)
class Order(Fact):
    """A client asked for a send; `status` 0 is no answer."""

    key: str
    contact: str
    text: str
    status: int = 0
    message_id: str = ""

    def names(self) -> Collection[str]:
        return self.key, self.contact, *([self.message_id] if self.message_id else [])

    def told(self) -> str:
        return f"client → bridge  {self.status:3} {self.key} {self.text!r} ({self.contact}) {self.message_id}"


@dataclass(slots=True)
class Kill(Fact):
    """The bridge was killed."""

    def told(self) -> str:
        return "KILL"


@dataclass(slots=True)
class Note(Fact):
    """Something that helps to read the rest."""

    text: str

    def told(self) -> str:
        return f"                 {self.text}"


@dataclass
class History:
    """All facts of a run in the order in which they began; safe for threads."""

    facts: list[Fact] = field(default_factory=list)
    _settled: set[str] = field(default_factory=set)
    _waiting: set[str] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, fact: Record) -> Record:
        with self._lock:
            self.facts.append(fact)
        return fact

    def owe(self, mids: Iterable[str]) -> None:
        """Note what the bridge acknowledged."""
        with self._lock:
            self._waiting |= set(mids) - self._settled

    def settle(self, mid: str) -> None:
        """Note what the CRM took."""
        with self._lock:
            self._settled.add(mid)
            self._waiting.discard(mid)

    def waiting(self) -> int:
        """Count what is acknowledged and not delivered: the load holds back, so that a run can come to its end."""
        return len(self._waiting)

    def acknowledged(self) -> set[str]:
        """Return the customers' messages that the bridge said 200 to."""
        return {
            item.mid for webhook in self.of(Webhook) if webhook.status == 200
            for item in webhook.items if item.kind == "message"
        }  # fmt: skip

    def accepted(self) -> set[str]:
        """Return the keys of the sends that the bridge said 202 to."""
        return {order.key for order in self.of(Order) if order.status == 202}

    def of(self, kind: type[Record]) -> list[Record]:
        return [fact for fact in self.facts if isinstance(fact, kind)]

    def around(self, names: Collection[str], most: int = 40) -> list[str]:
        """Tell what concerns these names, with the kills in between."""
        wanted = {name for name in names if name}
        mine = [fact for fact in self.facts if wanted.intersection(fact.names())]
        if not mine:
            return []
        begin, end = min(fact.at for fact in mine), max(fact.until for fact in mine)
        shown = [*mine, *(fact for fact in self.facts if isinstance(fact, Kill) and begin - 1 <= fact.at <= end + 1)]
        return lines(sorted(shown, key=lambda fact: fact.at)[:most], begin)


def lines(facts: Iterable[Fact], begin: float) -> list[str]:
    """Tell facts with their times in seconds since `begin`."""
    return [f"{fact.at - begin:9.3f} {max(fact.until - fact.at, 0):6.3f}s {fact.told()}" for fact in facts]


def grouped(facts: Iterable[Record], key: Callable[[Record], str]) -> dict[str, list[Record]]:
    """Sort facts into lists by a name."""
    found: dict[str, list[Record]] = {}
    for fact in facts:
        found.setdefault(key(fact), []).append(fact)
    return found
