"""Until when a customer may be written to: the channel closes its window some time after they last wrote."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from crmbridge.events import epoch_s, instant
from crmbridge.store import contacts
from crmbridge.store.database import Database, Row

OPEN_S = 86_400  # a customer may be answered this long (Meta: "24-hour standard messaging window")
LONG_S = 7 * OPEN_S  # a person may answer this long ("Human Agent"), and a comment be answered in private


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


def of(db: Database, account: Row, recipient_id: str, content: Mapping[str, Any]) -> Window:
    """Return the window of a send."""
    if "comment_id" in content:
        return _of_comment(db, account, content["comment_id"])
    if recipient_id in (account["instagram_account_id"], account["app_scoped_id"]):
        return Window()  # messages to oneself are exempt
    last = contacts.find(db, account["id"], recipient_id)["last_wrote_at"]
    if last is None:
        return Window(warning="recipient_unknown")
    open_until = ends_at(last)
    # A sender action travels alone: it cannot say that a person makes it.
    if content.get("human") and not content.keys() & {"action", "reaction"}:
        return Window(ends_at(last, LONG_S), tagged_from=open_until)
    return Window(open_until)


def _of_comment(db: Database, account: Row, comment_id: str) -> Window:
    comment = db.row(
        """
        SELECT contact, occurred_at FROM inbound_events
        WHERE account_id = ? AND instagram_message_id = ? AND kind = 'comment.received'""",
        (account["id"], comment_id),
    )
    if comment is None:
        return Window(warning="comment_unknown")
    return Window(ends_at(comment["occurred_at"], LONG_S), contact=comment["contact"] or None)


def ends_at(last: str, lasts_s: float = OPEN_S) -> str:
    """Return when the window ends that a customer's message opened."""
    return instant(epoch_s(last) + lasts_s)
