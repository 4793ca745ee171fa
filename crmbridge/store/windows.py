"""Until when a customer may be written to: the channel closes its window some time after their last act.

`contacts.last_wrote_at` is the last act that opens it for sure, `contacts.window_until` how long it may be open beyond
its usual length. Where the channel's rule is not clear the later end counts: the channel refuses what it does not take.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from crmbridge.events import Opens, epoch_s, instant
from crmbridge.store import contacts
from crmbridge.store.contacts import Act
from crmbridge.store.database import Reads, Row

OPEN_S = 86_400  # a customer may be answered this long (Meta: "24-hour standard messaging window")
LONG_S = 7 * OPEN_S  # a person may answer this long ("Human Agent"), and a comment be answered in private
AD_S = 7 * OPEN_S  # the same from the first message after an ad ("up to 7 days from that message")
_AHEAD_S = 60.0  # so much a time may lie after it was told: the channel's clock is not ours


@dataclass(frozen=True, slots=True)
class Window:
    """`ends_at` is None where no end is known. From `tagged_from` on only a person may write, and must say so.

    `contact` is the customer, where a comment's author is known; `warning` a slug.
    """

    ends_at: str | None = None
    tagged_from: str | None = None
    contact: str | None = None
    warning: str | None = None

    def is_closed(self, now: str) -> bool:
        """Tell whether it has ended."""
        return self.ends_at is not None and now >= self.ends_at

    def needs_tag(self, now: str) -> bool:
        """Tell whether only a person may write now."""
        return self.tagged_from is not None and now >= self.tagged_from


def of(
    db: Reads, account: Row, recipient_id: str, content: Mapping[str, Any], known: Mapping[str, Any] | None = None
) -> Window:
    """Return the window of a send; `known` is what is known of its recipient, where that was read before."""
    if "comment_id" in content:
        return _of_comment(db, account, content["comment_id"])
    if recipient_id in (account["instagram_account_id"], account["app_scoped_id"]):
        return Window()  # messages to oneself are exempt
    known = known or contacts.find(db, account["id"], recipient_id)
    last, open_until = known["last_wrote_at"], of_contact(known)
    if open_until is None:
        return Window(warning="recipient_unknown")
    # A sender action travels alone: it cannot say that a person makes it.
    if last and content.get("human") and not content.keys() & {"action", "reaction"}:
        # Beyond the usual length the window may be closed: a tag passes in either case.
        return Window(max(_after(last, LONG_S), open_until), tagged_from=_after(last, OPEN_S))
    return Window(open_until)


def of_contact(contact: Mapping[str, Any]) -> str | None:
    """Return until when a customer may be written to by anyone; None where no act of theirs is known."""
    usual = _after(contact["last_wrote_at"], OPEN_S) if contact["last_wrote_at"] else None
    return max(filter(None, (usual, contact["window_until"])), default=None)


def act(
    account: Row, contact: str, opens: Opens | None, *, acted_at: str, received_at: str, username: str | None = None
) -> Act:
    """Return what an act of a customer tells of them, and how far it opens the window.

    An act is not taken to be later than it was received, whatever its time says.
    """
    if opens is None or contact in ("", account["instagram_account_id"], account["app_scoped_id"]):
        return Act(username=username)
    at = min(acted_at, _after(received_at, _AHEAD_S))
    until = {"ad": _after(at, AD_S), "perhaps": _after(at, OPEN_S)}.get(opens)
    return Act(None if opens == "perhaps" else at, until, username)


def _of_comment(db: Reads, account: Row, comment_id: str) -> Window:
    comment = db.row(
        """
        SELECT contact, occurred_at FROM events
        WHERE account_id = ? AND instagram_message_id = ? AND kind = 'comment.received'""",
        (account["id"], comment_id),
    )
    if comment is None:
        return Window(warning="comment_unknown")
    return Window(_after(comment["occurred_at"], LONG_S), contact=comment["contact"] or None)


def _after(time: str, seconds: float) -> str:
    return instant(epoch_s(time) + seconds)
