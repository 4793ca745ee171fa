"""Asks Instagram what messages do not tell: who a new customer is, and what was only announced."""

import threading
from collections.abc import Callable
from dataclasses import dataclass

from crmbridge import log
from crmbridge.errors import Unavailable
from crmbridge.events import Wake, epoch_s, instant, new_id
from crmbridge.instagram import reading
from crmbridge.instagram.client import Client, Refusal
from crmbridge.store import accounts, endpoints, inbound, questions
from crmbridge.store.database import Database, Row
from crmbridge.vault import Vault

THREADS = 3
_OF_ONE_ACCOUNT = 2  # calls at a time: one account's slow answers leave a thread to the others
_PACE_S = 0.02  # between two calls for one account
_REST_S = 900.0  # after a refusal of the account itself
_AGAIN_S = (5.0, 30.0, 120.0)  # for a message that was only announced
_HELD_LOOK_S = 60.0


@dataclass
class _State:
    """One account: calls that are being made, and when the next may begin."""

    calls: int = 0
    next_s: float = 0.0


class Names:
    """Finds what is to be asked and asks it on a few threads; `run` starts a call on one of them."""

    def __init__(
        self,
        db: Database,
        client: Client,
        vault: Vault,
        ask_s: float,
        wake: Wake,
        run: Callable[[Callable[[], None]], object],
        *,
        tell: Callable[[], None] = lambda: None,
        clock: Callable[[], float],
    ) -> None:
        self._db = db
        self._client = client
        self._vault = vault
        self._ask_s = ask_s
        self._wake = wake
        self._run = run
        self._tell = tell
        self._clock = clock
        self._lock = threading.Lock()
        self._states: dict[str, _State] = {}
        self._asking: set[tuple[str, str, str]] = set()

    def look(self) -> float | None:
        """Begin the calls that may be made now; return the seconds until there is something to do, or None."""
        now_s = self._clock()
        now = instant(now_s)
        while True:
            with self._lock:
                asking = set(self._asking)
                busy = {
                    account
                    for account, state in self._states.items()
                    if state.next_s > now_s or state.calls >= _OF_ONE_ACCOUNT
                }
            if len(asking) >= THREADS:
                break  # whichever ends first has us look again
            found = questions.due(self._db, now, but=busy, limit=len(asking) + 1)
            question = next((row for row in found if _key(row) not in asking), None)
            if question is None:
                break
            if self._is_held(question["account_id"]):
                self._rest(question["account_id"], now_s + _HELD_LOOK_S)
            else:
                self._begin(question, now_s)
        with self._lock:
            times = [state.next_s for state in self._states.values() if state.next_s > now_s]
        if due := questions.next_due(self._db, now):
            times.append(epoch_s(due))
        return max(min(times) - now_s, 0.0) if times else None

    def _is_held(self, account_id: str) -> bool:
        return endpoints.locked(self._db, account_id, "instagram") is not None

    def _begin(self, question: Row, now_s: float) -> None:
        with self._lock:
            state = self._states.setdefault(question["account_id"], _State())
            state.calls += 1
            state.next_s = max(state.next_s, now_s + _PACE_S)
            self._asking.add(_key(question))
        self._run(lambda: self._ask(question))

    def _rest(self, account_id: str, until_s: float) -> None:
        with self._lock:
            state = self._states.setdefault(account_id, _State())
            state.next_s = max(state.next_s, until_s)

    def _ask(self, question: Row) -> None:
        try:
            account = accounts.find(self._db, question["account_id"])
            if account is None:
                questions.drop(self._db, question)
            elif question["kind"] == "profile":
                self._ask_profile(question, account)
            else:
                self._ask_message(question, account)
        except Exception:  # noqa: BLE001 - a thread of a pool has nobody above it
            log.exception("question.fault", account=question["account_id"], kind=question["kind"])
            self._rest(question["account_id"], self._clock() + _HELD_LOOK_S)
        finally:
            self._db.close_thread()
            with self._lock:
                self._asking.discard(_key(question))
                self._states[question["account_id"]].calls -= 1
            self._tell()

    def _ask_profile(self, question: Row, account: Row) -> None:
        token = accounts.token(self._vault, account)
        try:
            found = reading.profile(self._client, token, question["subject"])
        except (Refusal, Unavailable) as problem:
            refused = isinstance(problem, Refusal) and not problem.of_account
            self._note(question, problem)
            if problem.code == "consent_missing":
                questions.keep_reticence(self._db, question)
            else:
                questions.keep_silence(self._db, question, self._clock(), refused=refused)
        else:
            questions.keep_profile(self._db, question, found.username, found.name, self._clock())
        self._wake({question["account_id"]})

    def _ask_message(self, question: Row, account: Row) -> None:
        """Have the message told that an event only announced; what cannot be read stays announced."""
        self._client.conversations.wait_last(account["id"], self._client.pause)
        token, now_s = accounts.token(self._vault, account), self._clock()
        try:
            told = reading.message(self._client, token, question["subject"])
        except (Refusal, Unavailable) as problem:
            self._note(question, problem)
            if isinstance(problem, Refusal) or question["tries"] >= len(_AGAIN_S):
                questions.drop(self._db, question)
            else:
                questions.later(self._db, question, instant(now_s + _AGAIN_S[question["tries"]]))
            self._wake({question["account_id"]})
            return
        events = reading.events([told], account, instant(now_s))
        kept = inbound.keep(self._db, events, correlation_id=new_id("req"), ask_s=self._ask_s)
        questions.drop(self._db, question)
        log.info("message.recovered", account=account["id"], events=sum(one.state == "forwarded" for one in kept))
        self._wake({question["account_id"]})

    def _note(self, question: Row, problem: Refusal | Unavailable) -> None:
        account = question["account_id"]
        log.info("question.unanswered", account=account, kind=question["kind"], code=problem.code)
        rest_s = _REST_S if isinstance(problem, Refusal) and problem.of_account else 0.0
        if isinstance(problem, Unavailable):
            rest_s = problem.after_s
        if rest_s:
            until_s = self._clock() + rest_s
            self._rest(account, until_s)
            accounts.ask_no_more(self._db, account, instant(until_s))

    def forget(self) -> None:
        """Drop what has not been asked within an hour, or for an announced message within a day."""
        now_s = self._clock()
        questions.forget(self._db, instant(now_s - 3600), instant(now_s - 86_400))


def _key(question: Row) -> tuple[str, str, str]:
    return question["account_id"], question["kind"], question["subject"]
