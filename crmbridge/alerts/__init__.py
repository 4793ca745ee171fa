"""What an administrator must know: each alert from its first cause to its all-clear, told a few times, never forgotten.

The rooms above raise and clear; a thread of its own keeps the record and tells the command and the URL.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from crmbridge import log, net
from crmbridge.alerts import telling
from crmbridge.alerts.kinds import kind_of
from crmbridge.errors import BridgeError
from crmbridge.events import epoch_s, instant
from crmbridge.store import accounts
from crmbridge.store import alerts as record
from crmbridge.store.database import Database, Row

_DAY_S = 86_400.0
_TRY_AGAIN_S = (5.0, 30.0)
_SAVE_EVERY_S = 10.0
_SAVE_AGAIN_S = 60.0
_LOOK_EVERY_S = 60.0  # the clock may be set meanwhile
_CLOCK_SET_S = 30.0


class Alarm(Protocol):
    """What the other rooms see of the alerts. All may be called from any thread, often, and hold nobody up."""

    def alert(
        self,
        kind: str,
        message: str,
        *,
        account: str | None = None,
        todo: str | None = None,
        causes: int = 1,
        **facts: Any,
    ) -> None:
        """Raise an alert of a kind, or count more causes of the one that is open; `todo` is what to type.

        With no `causes` the open one only gets the new message.
        """

    def clear(self, kind: str, *, account: str | None = None, message: str | None = None) -> None:
        """Give the all-clear, if such an alert is open."""

    def withdraw(self, kind: str, *, account: str | None = None) -> None:
        """End an open alert that nobody was told of yet, without a word: another one tells of it."""

    def opened(self, kind: str) -> Mapping[str, str]:
        """Return the open alerts of a kind: account id, or an empty text, → since when."""


_Key = tuple[str, str]  # kind, account id or an empty text


@dataclass
class _Alert:
    """One alert, open or the last that was. `quiet_s` is when its all-clear was asked for, in the words of `ending`."""

    message: str
    since_s: float
    last_s: float
    todo: str | None = None
    count: int = 1
    told: int = 0
    told_s: float | None = None
    told_count: int = 0
    reopened: bool = False
    quiet_s: float | None = None
    ending: str | None = None
    cleared_s: float | None = None


@dataclass
class _Telling:
    """Something that is being told of an alert, `to` those who have not taken it; the next try is at `next_s`."""

    alert: _Alert
    state: telling.State
    message: str
    count: int
    more: int
    to: list[str]
    next_s: float
    tries: int = 0


class Alerts:
    """The alerts of the service.

    Nothing is stored or told before `start`, unless `pass_on` is called.
    """

    def __init__(
        self,
        db: Database,
        *,
        command: str,
        url: str,
        repeat_after_s: float,
        session: net.Session,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._db = db
        self._command = command
        self._url = url
        self._repeat_after_s = repeat_after_s
        self._session = session
        self._clock = clock
        self._changed = threading.Condition()
        self._alerts = {(row["kind"], row["account_id"]): _read(row) for row in record.everything(db)}
        self._tellings: dict[_Key, _Telling] = {}
        self._unsaved: set[_Key] = set()
        self._save_s = float("inf")  # when what is unsaved is to be stored
        self._seen_s = clock()
        self._news = False
        self._stopping = False
        self._thread: threading.Thread | None = None

    # --- raising: memory and the log, nothing else ---

    def alert(
        self,
        kind: str,
        message: str,
        *,
        account: str | None = None,
        todo: str | None = None,
        causes: int = 1,
        **facts: Any,
    ) -> None:
        """Raise an alert, or count more causes of the one that is open."""
        key, now_s = (kind, account or ""), self._clock()
        with self._changed:
            known = self._alerts.get(key)
            if known is not None and known.cleared_s is None:
                known.quiet_s, known.todo = None, todo
                if causes:
                    known.last_s = now_s
                if (kind_of(kind).once or not causes) and known.message == message:
                    return
                known.count, known.message = known.count + causes, message
                self._note(key, now_s + _SAVE_EVERY_S)
                return
            reopened = known is not None and now_s - (known.cleared_s or 0) < self._repeat_after_s
            self._alerts[key] = _Alert(message, now_s, now_s, todo, causes, reopened=reopened)
            self._note(key, now_s)
            self._wake()
        log.alert(f"alert.{kind}", state="raised", message=message, account=account, todo=todo, **facts)

    def clear(self, kind: str, *, account: str | None = None, message: str | None = None) -> None:
        """Give the all-clear, if such an alert is open; one that came back at once has to stay away for a while."""
        known = self._alerts.get((kind, account or ""))
        if known is None or known.cleared_s is not None or known.quiet_s is not None:
            return
        with self._changed:
            known.quiet_s, known.ending = self._clock(), message
            self._wake()

    def withdraw(self, kind: str, *, account: str | None = None) -> None:
        """End an open alert that nobody was told of yet, without a word: another one tells of it."""
        key = (kind, account or "")
        with self._changed:
            known = self._alerts.get(key)
            if known is not None and known.cleared_s is None and known.told_s is None:
                known.cleared_s = self._clock()
                self._note(key, known.cleared_s)

    def opened(self, kind: str) -> Mapping[str, str]:
        """Return the open alerts of a kind: account id, or an empty text, → since when."""
        with self._changed:
            return {
                account: instant(alert.since_s)
                for (name, account), alert in self._alerts.items()
                if name == kind and alert.cleared_s is None and alert.quiet_s is None
            }

    def _note(self, key: _Key, by_s: float) -> None:
        self._unsaved.add(key)
        self._save_s = min(self._save_s, by_s)

    def _wake(self) -> None:
        self._news = True
        self._changed.notify()

    # --- the thread that keeps the record and tells ---

    def start(self) -> None:
        """Begin to store and to tell, in a thread of its own."""
        self._thread = threading.Thread(target=self._run, name="alerts", daemon=True)
        self._thread.start()

    def stop(self, grace_s: float) -> None:
        """Tell what was not told yet, and end the thread; a call that takes longer than the grace is left to itself."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(grace_s)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._news, last, next_s = False, self._stopping, None
            try:
                next_s = self.pass_on(last=last)
            except Exception:  # noqa: BLE001 - this thread is the one that would tell of it
                log.exception("alert.fault")
            finally:
                self._db.close_thread()
            if last:
                return
            with self._changed:
                if not self._news and not self._stopping:
                    wait_s = _LOOK_EVERY_S if next_s is None else next_s - self._clock()
                    self._changed.wait(min(max(wait_s, 0.1), _LOOK_EVERY_S))

    def pass_on(self, *, last: bool = False) -> float | None:
        """Store and tell what is due; return when something is due next, in seconds since the epoch."""
        done: list[_Telling] = []
        while True:
            now_s = self._clock()
            with self._changed:
                self._follow_clock(now_s)
                for key, alert in self._alerts.items():
                    self._settle(key, alert, now_s)
                due_now = [item for item in self._tellings.items() if now_s >= item[1].next_s]
            waiting = [item for item in due_now if not any(item[1] is one for one in done)]
            self._save(now_s)  # each time: a command may take half a minute, and there may be hundreds to tell
            if not waiting:
                break
            # What is about the whole bridge first, and what was not tried before.
            key, due = min(waiting, key=lambda item: (item[1].tries, item[0][1] != "", item[1].next_s))
            done.append(due)
            self._tell(key, due)
        self._save(float("inf") if last else self._clock())
        with self._changed:
            times = [self._save_s, *(due.next_s for due in self._tellings.values())]
            times += [min(_times(self._next_s(key, alert))) for key, alert in self._alerts.items()]
        return min(times) if min(times) < float("inf") else None

    def _follow_clock(self, now_s: float) -> None:
        """When the clock was set back, move all times along, or nothing would be told until it is there again."""
        jump_s, self._seen_s = now_s - self._seen_s, now_s
        if jump_s > -_CLOCK_SET_S:
            return
        for alert in self._alerts.values():
            for name in ("since_s", "last_s", "told_s", "quiet_s", "cleared_s"):
                if (at_s := getattr(alert, name)) is not None:
                    setattr(alert, name, at_s + jump_s)
        for due in self._tellings.values():
            due.next_s += jump_s
        self._save_s += jump_s

    def _settle(self, key: _Key, alert: _Alert, now_s: float) -> None:
        """Find out whether an open alert is over, or is to be told now."""
        kind, account = key[0], key[1] or None
        tell_s, end_s = self._next_s(key, alert)
        if end_s is not None and now_s >= end_s:
            message = (alert.ending if alert.quiet_s is not None else None) or kind_of(kind).ends
            message = message.replace("ACCOUNT", key[1])
            lasted_s = round((alert.quiet_s or alert.last_s) - alert.since_s)
            log.alert(
                f"alert.{kind}", state="cleared", message=message, account=account, lasted_s=lasted_s, count=alert.count
            )
            alert.cleared_s = now_s
            told = self._tellings.pop(key, None)
            if alert.told or (told is not None and told.tries):
                self._tellings[key] = _Telling(alert, "cleared", message, alert.count, 0, self._channels(), now_s)
            self._note(key, now_s)
        elif tell_s is not None and now_s >= tell_s:
            state: telling.State = "repeated" if alert.told else "raised"
            if alert.told_s is not None:
                log.alert(f"alert.{kind}", state=state, message=alert.message, account=account, count=alert.count)
            more = alert.count - alert.told_count
            self._tellings[key] = _Telling(alert, state, alert.message, alert.count, more, self._channels(), now_s)
            alert.told_s = now_s
            self._note(key, now_s)

    def _next_s(self, key: _Key, alert: _Alert) -> tuple[float | None, float | None]:
        """Return when an open alert is next to be told, and when it ends by itself."""
        tell_s = end_s = None
        if alert.cleared_s is not None:
            return None, None
        ends_s = kind_of(key[0]).quiet_s
        if alert.quiet_s is not None:
            end_s = alert.quiet_s + (self._repeat_after_s if alert.reopened else 0.0)
        elif ends_s is not None:
            end_s = alert.last_s + ends_s
        if alert.quiet_s is None and alert.count > alert.told_count and key not in self._tellings:
            pause_s = min(self._repeat_after_s * 2 ** max(alert.told - 1, 0), max(_DAY_S, self._repeat_after_s))
            first_s = alert.since_s + kind_of(key[0]).wait_s
            tell_s = first_s if alert.told_s is None else alert.told_s + pause_s
        return tell_s, end_s

    def _channels(self) -> list[str]:
        return [name for name, value in (("command", self._command), ("url", self._url)) if value]

    def _tell(self, key: _Key, told: _Telling) -> None:
        """Tell those who have not taken it; whoever does not take it now gets it later."""
        news = self._news_of(key, told)
        for channel in list(told.to):
            problem = self.tell(channel, news)
            if problem is None:
                told.to.remove(channel)
            else:
                log.error(f"alert.{channel}_failed", kind=news.kind, state=news.state, error=problem)
        with self._changed:
            told.tries += 1
            if told.to:
                pause_s = _TRY_AGAIN_S[told.tries - 1] if told.tries <= len(_TRY_AGAIN_S) else self._repeat_after_s
                told.next_s = self._clock() + pause_s
                return
            if self._tellings.get(key) is told:
                del self._tellings[key]
            if told.state != "cleared":
                told.alert.told, told.alert.told_count = told.alert.told + 1, told.count
            self._note(key, self._clock())

    def tell(self, channel: str, news: telling.News) -> str | None:
        """Tell the ``command`` or the ``url`` now; return what went wrong, or None."""
        if channel == "command":
            return telling.run_command(self._command, news)
        return telling.post(self._session, self._url, news)

    def _news_of(self, key: _Key, told: _Telling) -> telling.News:
        kind, account_id = key
        account = None
        if account_id:
            with contextlib.suppress(BridgeError):
                account = accounts.find(self._db, account_id)
        return telling.News(
            kind=kind,
            state=told.state,
            message=told.message,
            todo=(told.alert.todo or kind_of(kind).todo).replace("ACCOUNT", account_id),
            account_id=account_id,
            account_name=account["username"] if account else None,
            since_s=told.alert.since_s,
            now_s=told.alert.quiet_s or told.alert.last_s,
            count=told.count,
            more=told.more,
        )

    def _save(self, by_s: float) -> None:
        """Store what is to be stored by then; while the database cannot be written, it is tried again."""
        with self._changed:
            if self._save_s > by_s:
                return
            # An all-clear that nobody has heard yet is none: the next start has to give it again.
            told = {key for key in self._unsaved if not (self._alerts[key].cleared_s and key in self._tellings)}
            rows = [_row(*key, self._alerts[key]) for key in sorted(told)]
            self._unsaved -= told
            self._save_s = float("inf")
        try:
            if rows:
                record.save(self._db, rows)
        except (BridgeError, OSError) as error:
            log.error("alert.unsaved", error=str(error))
            with self._changed:
                self._unsaved |= told
                self._save_s = self._clock() + _SAVE_AGAIN_S


def _times(times: tuple[float | None, ...]) -> list[float]:
    return [float("inf"), *(time for time in times if time is not None)]


def _read(row: Row) -> _Alert:
    def seconds(name: str) -> float | None:
        return None if row[name] is None else epoch_s(row[name])

    return _Alert(
        message=row["message"],
        since_s=epoch_s(row["since"]),
        last_s=epoch_s(row["last_at"]),
        count=row["count"],
        told=row["told"],
        told_s=seconds("told_at"),
        told_count=row["told_count"],
        reopened=bool(row["reopened"]),
        cleared_s=seconds("cleared_at"),
    )


def _row(kind: str, account_id: str, alert: _Alert) -> Row:
    return {
        "kind": kind,
        "account_id": account_id,
        "since": instant(alert.since_s),
        "last_at": instant(alert.last_s),
        "count": alert.count,
        "message": alert.message,
        "told": alert.told,
        "told_at": None if alert.told_s is None else instant(alert.told_s),
        "told_count": alert.told_count,
        "reopened": int(alert.reopened),
        "cleared_at": None if alert.cleared_s is None else instant(alert.cleared_s),
    }
