"""Reads again what Instagram may have told while nobody listened: the conversations of the time since then."""

from collections.abc import Callable, Iterator

from crmbridge import log
from crmbridge.errors import BridgeError
from crmbridge.events import Wake, epoch_s, instant, new_id
from crmbridge.instagram import reading
from crmbridge.instagram.client import Client, Refusal
from crmbridge.store import accounts, endpoints, inbound, questions, vitals
from crmbridge.store.database import Database, Row
from crmbridge.vault import Vault

OUTAGE_S = 300.0  # shorter ones are covered by Meta's own repetitions
UNSUBSCRIBED_S = 3600.0  # after such an outage Meta may have ended the subscription
_LISTENING = "listening"
_BEAT_S = 60.0
_EARLIER_S = 300.0  # what was told just before may not have been stored
_PAGES = 40
_AGAIN_S = (60.0, 300.0, 900.0, 3600.0)
_GIVE_UP_S = 86_400.0


class Backfill:
    """Notices gaps, and fills them from the Conversations API."""

    def __init__(
        self,
        db: Database,
        client: Client,
        vault: Vault,
        wake: Wake,
        *,
        clock: Callable[[], float],
        pause: Callable[[float], None],
        is_stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        self._db = db
        self._client = client
        self._vault = vault
        self._wake = wake
        self._clock = clock
        self._pause = pause
        self._is_stopping = is_stopping
        self._beaten_s = 0.0

    def notice(self) -> float:
        """Note that webhooks are taken now; return for how long none were, 0 for no gap, and ask for what was missed.

        Nothing is taken while the disk is full.
        """
        if self._db.is_full:
            return 0.0
        now_s, last = self._clock(), vitals.last_beat(self._db, _LISTENING)
        gap_s = now_s - epoch_s(last) if last else 0.0
        if last and gap_s > OUTAGE_S:
            log.warning("backfill.gap", since=last, seconds=round(gap_s))
            for account in accounts.everyone(self._db):
                questions.ask_backfill(self._db, account["id"], last)
        self._beat()
        return gap_s if gap_s > OUTAGE_S else 0.0

    def _beat(self) -> None:
        self._beaten_s = self._clock()
        vitals.beat(self._db, _LISTENING, self._beaten_s)

    def fill(self) -> None:
        """Work off the backfills that are due."""
        for backfill in questions.backfills(self._db, instant(self._clock())):
            account = accounts.find(self._db, backfill["account_id"])
            if account is None:
                questions.end_backfill(self._db, backfill)
            elif endpoints.locked(self._db, account["id"], "instagram") is None:
                self._fill(backfill, account)
            if self._is_stopping():
                return

    def _fill(self, backfill: Row, account: Row) -> None:
        now_s = self._clock()
        try:
            found = [
                self._read(account, conversation, backfill) for conversation in self._conversations(account, backfill)
            ]
        except BridgeError as problem:  # also a token that does not open: it is not to stop the other accounts
            is_over = now_s - epoch_s(backfill["asked_at"]) > _GIVE_UP_S
            write = log.error if is_over else log.warning
            write("backfill.failed", account=account["id"], since=backfill["since"], error=problem.message)
            if is_over:
                questions.end_backfill(self._db, backfill)
                return
            wait_s = _AGAIN_S[min(backfill["tries"], len(_AGAIN_S) - 1)]
            questions.backfill_later(self._db, backfill, instant(now_s + wait_s))
            return
        if self._is_stopping():
            return  # the next start begins anew; what is stored already stays single
        questions.end_backfill(self._db, backfill)
        log.info(
            "backfill.done",
            account=account["id"],
            since=backfill["since"],
            conversations=len(found),
            recovered=sum(told for told, _ in found),
            incomplete=sum(more for _, more in found),
        )

    def _conversations(self, account: Row, backfill: Row) -> Iterator[reading.Listed]:
        """Yield the conversations in which something was said since then."""
        token, cursor = accounts.token(self._vault, account), None
        since_s = epoch_s(backfill["since"]) - _EARLIER_S
        for _ in range(_PAGES):
            if self._is_stopping():
                return
            self._take_turn(account)
            page, cursor = reading.conversations(self._client, token, account["instagram_account_id"], cursor)
            recent = [listed for listed in page if listed.updated_s >= since_s]
            yield from recent
            if cursor is None or not recent:
                return
        log.warning("backfill.too_many", account=account["id"], conversations=_PAGES)

    def _read(self, account: Row, conversation: reading.Listed, backfill: Row) -> tuple[int, bool]:
        """Keep what a conversation tells since then; return how many events are news, and whether more was said."""
        if self._is_stopping():
            return 0, False
        self._take_turn(account)
        token, now_s = accounts.token(self._vault, account), self._clock()
        try:
            told = reading.messages(self._client, token, conversation)
        except Refusal as problem:
            if problem.of_account:
                raise
            # One that Instagram does not tell, such as one that was deleted meanwhile, sinks no other.
            log.warning("backfill.untold", account=account["id"], conversation=conversation.id, code=problem.code)
            return 0, True
        since_s = epoch_s(backfill["since"]) - _EARLIER_S
        missed = [entry for entry in told if reading.told_s(entry) >= since_s]
        events = reading.events(missed, account, instant(now_s))
        kept = inbound.keep(self._db, events, correlation_id=new_id("req"))
        news = sum(one.state == "forwarded" for one in kept)
        if news:
            self._wake({account["id"]})
        is_incomplete = len(missed) == len(told) >= reading.SHOWN_AT_MOST
        if is_incomplete:
            contact = next((event.contact for event in events if event.contact), None)
            log.warning("backfill.incomplete", account=account["id"], contact=contact, since=backfill["since"])
        return news, is_incomplete

    def _take_turn(self, account: Row) -> None:
        self._client.conversations.wait_last(account["id"], self._pause, self._is_stopping)
        if self._clock() - self._beaten_s > _BEAT_S and not self._db.is_full:  # a long backfill is no gap
            self._beat()
