"""Is this what we sent? Holds a send whose outcome nobody told against what the channel shows. Pure; knows no rows."""

import unicodedata
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from crmbridge.events import Thread

Likeness = Literal["same", "near", "other"]

SKEW_S = 5.0  # the channel may note a message a little before our call began, and tells whole seconds
_PREFIX = 20  # so many equal characters at the beginning are no chance
_PICTURES = frozenset(("image", "video"))
# Marks that nobody sees, beyond those of Unicode's class Cf: joiners, fillers, blanks that are letters by class.
_INVISIBLE = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0")


@dataclass(frozen=True)
class Match:
    """What a thread tells of a send: it is there (``found``), it is not (``absent``), or that cannot be told.

    ``several`` messages may be it, and nobody but a person can choose; ``unclear`` may be clear at another look.
    """

    kind: Literal["found", "absent", "several", "unclear"]
    why: str = ""
    external_id: str | None = None


def which(
    sent: Mapping[str, Any], thread: Thread, *, began_s: float, known: Collection[str], settled: Collection[str]
) -> Match:
    """Find a send in its thread. `began_s` is when its call began, by our clock.

    `known` are the ids of messages that were stored here before the call, `settled` those of messages that are
    something else. It is absent only where the thread shows a known one: so it is the right thread, and reaches back
    far enough.
    """
    since_s = began_s - thread.ahead_s - SKEW_S
    # A Date that runs ahead of the channel's own times would make everything old.
    at_least_s = min(since_s, began_s - SKEW_S)
    found, is_near = [], False
    for entry in thread.shown:
        if entry.is_ours and entry.external_id not in settled and entry.at_s >= at_least_s:
            like = likeness(sent, entry.text, entry.kinds, is_echo=False)
            is_after = entry.at_s >= since_s
            found += [entry.external_id] if like == "same" and is_after else []
            is_near = is_near or like == "near" or (like == "same" and not is_after)
    if len(found) > 1:
        return Match("several", "the conversation shows more than one message that it may be")
    if found:
        return Match("found", external_id=found[0])
    if is_near:
        return Match("unclear", "the conversation shows a message that is nearly it")
    if not any(entry.external_id in known for entry in thread.shown):
        return Match("unclear", "the conversation shows no message that is known from before the call")
    return Match("absent", "Instagram's conversation does not show it")


@dataclass(frozen=True, slots=True)
class Tried:
    """A send that was tried, and whose end is open or was in doubt: to the echo's customer, or a private reply.

    `is_calling`: its call is under way. `is_open`: that, or it is being looked for.
    """

    sent: Mapping[str, Any]
    began_s: float | None
    is_first: bool  # of its lane, so that it is the one being tried
    is_given_up: bool
    is_calling: bool
    is_open: bool
    is_reply: bool


def whose(tried: Sequence[Tried], text: str, kinds: Sequence[str], at_s: float) -> Tried | Literal["open", "nobody's"]:
    """Tell which send an echo shows; ``open`` where that cannot be told yet.

    An error can follow a delivery: a send that waits for its retry is proven by its echo just as one in doubt. One that
    was given up is thought of only where no other is being tried.
    """

    def shown(sends: Sequence[Tried]) -> list[Tried]:
        since = [one for one in sends if one.began_s is not None and at_s >= one.began_s - SKEW_S]
        return [one for one in since if likeness(one.sent, text, kinds, is_echo=True) == "same"]

    own, replies = ([one for one in tried if one.is_reply == is_reply] for is_reply in (False, True))
    first = next((one for one in own if one.is_first), None)
    if first is not None and first.is_calling:
        return "open"
    possible = shown([one for one in own if first is None or not one.is_given_up])
    if not possible:
        possible = shown(replies)
        if any(one.is_calling for one in possible):
            return "open"
    if len(possible) == 1:
        return possible[0]
    return "open" if any(one.is_open for one in (*filter(None, [first]), *possible)) else "nobody's"


def likeness(sent: Mapping[str, Any], text: str, kinds: Sequence[str], *, is_echo: bool) -> Likeness:
    """Tell how near a message in the thread comes to what was sent, by its words or the types of its media.

    An echo names the types of media exactly; the conversation does not.
    """
    if "text" in sent:
        if kinds and not folded(text):  # a link alone may be shown as what it leads to
            return "near" if "://" in sent["text"] and not is_echo else "other"
        return _words(sent["text"], text)
    if "template" in sent:
        wanted, said = ["template"], sent["template"].get("text", "")
        kinds = sorted(set(kinds))  # each of its elements may be shown as one
    else:
        wanted, said = sorted(one["type"] for one in sent.get("attachments", ())), ""
    if not wanted:
        return "other"
    if folded(text):
        return _words(said, text) if said else "other"
    if sorted(kinds) == wanted or (not is_echo and wanted == ["audio"] and list(kinds) == ["file"]):
        return "same"
    # Only pictures and films are sure to be shown as what they are.
    is_other = bool(kinds) and _PICTURES.issuperset([*kinds, *wanted]) and not set(kinds) & set(wanted)
    return "other" if is_echo or is_other else "near"


def _words(sent: str, shown: str) -> Likeness:
    """Compare texts as a reader would; what differs in marks alone, or is cut short, is near."""
    ours, theirs = folded(sent), folded(shown)
    if not ours or not theirs:
        return "near"
    if ours == theirs:
        return "same"
    if _letters(ours) == _letters(theirs):
        return "near"
    for one, other in ((ours, theirs), (_letters(ours), _letters(theirs))):
        short, long = sorted((one, other), key=len)
        if len(short) >= _PREFIX and long.startswith(short):
            return "near"
    return "other"


def folded(text: str) -> str:
    """Return a text without what changes on the way unseen: line ends, blanks, composition, invisible marks."""
    composed = unicodedata.normalize("NFC", text)
    return " ".join("".join(mark for mark in composed if not _is_invisible(mark)).split())


def _is_invisible(mark: str) -> bool:
    if mark.isspace():
        return False
    is_selector = "\ufe00" <= mark <= "\ufe0f" or "\U000e0100" <= mark <= "\U000e01ef"
    return is_selector or mark in _INVISIBLE or unicodedata.category(mark) in ("Cf", "Cc")


def _letters(text: str) -> str:
    """Return the letters, digits and emoji of a text: no marks, no skin tones, no case."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    return "".join(mark for mark in plain if unicodedata.category(mark).startswith(("L", "N", "So")))
