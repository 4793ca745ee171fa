"""Looks for what no single delivery shows: a disk that fills, an account fallen silent, a token that ends; and for
alerts whose cause is gone. Every job is safe to run at any time."""

import contextlib
import itertools
import time
from collections.abc import Callable, Sequence

from crmbridge.alerts import Alarm
from crmbridge.alerts.kinds import KINDS
from crmbridge.config import Alerts
from crmbridge.errors import Unavailable
from crmbridge.events import epoch_s, instant
from crmbridge.instagram import codes, reading
from crmbridge.store import accounts, copies, endpoints, vitals
from crmbridge.store import alerts as record
from crmbridge.store.database import Database, Row

_HOUR_S, _DAY_S = 3600, 86_400
_MB = 1_000_000
_USUAL_DAYS, _TALKING_DAYS, _TIMES_LONGEST = 14, 7, 3
_TOKEN_DAYS = (1, 7, 14)
_LONG_HOLD_DAYS = 7
_BACKUP_DAYS = 2
_UNPROVEN = "nothing waits any more; it was not seen to recover"
_ENDS = {"crm_down": _UNPROVEN, "instagram_down": _UNPROVEN}


class Watch:
    """The jobs, with the database, the limits of ``[alerts]`` and the clock they work by."""

    def __init__(self, db: Database, limits: Alerts, alarm: Alarm, *, clock: Callable[[], float] = time.time) -> None:
        self._db = db
        self._limits = limits
        self._alarm = alarm
        self._clock = clock

    def disk(self) -> None:
        """Tell of a disk that is full or nearly, and of one that has space again."""
        if self._db.is_full:  # only a write finds out that there is space again, and none may come
            with contextlib.suppress(Unavailable):
                vitals.probe(self._db)
        if self._db.is_full:
            self._alarm.alert("disk_full", "the disk is full: nothing new is taken until there is space")
        else:
            self._alarm.clear("disk_full")
        free_mb = self._db.sizes()["disk_free_bytes"] / _MB
        if free_mb < self._limits.disk_free_mb:
            problem = f"{free_mb:.0f} MB are free on the disk of {self._db.path}"
            self._alarm.alert("disk_nearly_full", problem)
        elif free_mb >= self._limits.disk_free_mb * 1.25:
            self._alarm.clear("disk_nearly_full", message=f"{free_mb:.0f} MB are free")

    def backups(self) -> None:
        """Tell of a backup that failed, and of a database that has been without one for two days."""
        good, tried = copies.last(self._db), copies.last(self._db, good=False)
        safe_s = epoch_s(good["began_at"]) if good else copies.made_s(self._db)
        had = f"the last good backup is of {good['began_at'][:16]}Z" if good else "there is no good backup"
        if tried is not None and tried["error"] is not None:
            self._alarm.alert("backup_old", f"the backup of {tried['began_at'][:16]}Z failed: {tried['error']}; {had}")
        elif self._clock() - safe_s > _BACKUP_DAYS * _DAY_S:
            self._alarm.alert("backup_old", had)
        else:
            self._alarm.clear("backup_old")

    def look(self) -> None:
        """Give the all-clear for alerts whose cause is gone, and see to it that whatever is dead is told of."""
        for one in accounts.everyone(self._db):
            self._count_dead(one["id"])
        for kind in KINDS:
            for account_id, since in self._alarm.opened(kind).items():
                account = accounts.find(self._db, account_id) if account_id else None
                if account_id and account is None:
                    self._alarm.clear(kind, account=account_id, message="the account was deleted")
                elif kind == "meta_trouble":
                    self._weigh_trouble()
                elif account is not None and self._is_over(kind, account, since):
                    self._alarm.clear(kind, account=account_id, message=_ENDS.get(kind))

    def _count_dead(self, account_id: str) -> None:
        number, oldest = record.dead_letters(self._db, account_id)
        if oldest is None:
            return
        are, oldest_of = (
            ("deliveries to the CRM are", ", the oldest") if number > 1 else ("delivery to the CRM is", ":")
        )
        since = f"{oldest['id']}, since {oldest['finished_at']}: {oldest['last_error']}"
        causes = 0 if account_id in self._alarm.opened("dead_letter") else number
        self._alarm.alert("dead_letter", f"{number} {are} dead{oldest_of} {since}", account=account_id, causes=causes)

    def _is_over(self, kind: str, account: Row, since: str) -> bool:
        if kind == "dead_letter":
            return not record.has_dead(self._db, "crm", account["id"])
        if kind == "in_doubt":
            return not record.has_dead(self._db, "instagram", account["id"])
        if kind == "crm_down":
            return not record.has_pending(self._db, "crm", account["id"])
        if kind == "instagram_down":
            return not record.has_pending(self._db, "instagram", account["id"])
        if kind == "silence":
            return account["status"] != "active" or (record.last_heard(self._db, account["id"]) or "") > since
        if kind in ("crm_gone", "crm_unauthorized"):
            end = endpoints.find(self._db, account["id"], "crm")
            is_held = end is not None and end["held_by"] in ("gone", "unauthorized")
            return not is_held and (kind == "crm_gone" or not record.has_pending(self._db, "crm", account["id"]))
        if kind == "held_long":
            return not self._held_long(account)
        if kind == "token_not_renewed":
            return not account["access_token_sealed"] or account["token_refusals"] < accounts.REFUSED_OFTEN
        if kind in ("account_error", "token_dead"):
            is_well = account["status"] != "error" and not self._has_ended(account)
            return is_well and not record.has_pending(self._db, "instagram", account["id"])
        return False

    def _weigh_trouble(self) -> None:
        """End what was taken for trouble at Meta when at most one account is left of it: that one has its own."""
        since = self._alarm.opened("meta_trouble").get("")
        if since is None:
            return
        began = instant(epoch_s(since) - endpoints.TOGETHER_S)
        stopped = [
            one for one in accounts.everyone(self._db) if one["status"] == "error" and one["status_since"] >= began
        ]
        if len(stopped) <= 1:
            self._alarm.clear("meta_trouble")
            for one in stopped:
                end = endpoints.find(self._db, one["id"], "instagram")
                kind = "token_dead" if end and end["held_code"] in codes.TOKEN_SLUGS else "account_error"
                self._alarm.alert(kind, one["status_reason"] or "", account=one["id"])

    def listen(self) -> None:
        """Tell of accounts that have fallen silent and of tokens that end."""
        for account in accounts.everyone(self._db):
            if account["status"] == "active":
                self._listen_to(account)
            self._watch_token(account)
            held = self._held_long(account)
            if held:
                self._alarm.alert("held_long", held, account=account["id"])

    def _held_long(self, account: Row) -> str:
        """Say what an operator holds back without an end in sight, if something has waited for a day; or nothing."""
        now_s, found = self._clock(), []
        for what, target in endpoints.WHAT.items():
            held = endpoints.locked(self._db, account["id"], target)
            if held is None or held["cause"] in ("gone", "unauthorized", "error"):
                continue  # these have alerts of their own
            since_s, end = epoch_s(held["since"]), held["until"]
            has_no_end = end is None or epoch_s(end) - since_s > _LONG_HOLD_DAYS * _DAY_S
            a_day_ago = instant(now_s - _DAY_S)
            waits = held["since"] < a_day_ago and record.has_pending(self._db, target, account["id"], a_day_ago)
            if has_no_end and waits:
                found.append(f"{what} held since {held['since']}: {held['reason'] or 'no reason given'}")
        return "; ".join(found)

    def _listen_to(self, account: Row) -> None:
        last, now_s = record.last_heard(self._db, account["id"]), self._clock()
        if last is None or not self._limits.silence_hours:
            return
        if now_s - epoch_s(last) < self._limits.silence_hours * _HOUR_S:
            return
        hours = record.active_hours(self._db, account["id"], instant(epoch_s(last) - _USUAL_DAYS * _DAY_S))
        pause_h = usual_pause_h(hours)
        if pause_h is not None and now_s - epoch_s(last) > pause_h * _TIMES_LONGEST * _HOUR_S:
            problem = (
                f"nothing has come from Instagram since {last[:16]}Z; until then no pause was over {pause_h} hours"
            )
            self._alarm.alert("silence", problem, account=account["id"])

    def _watch_token(self, account: Row) -> None:
        end = reading.token_end(account)
        left_s = epoch_s(end.at) - self._clock() if end else float("inf")
        step = next((days for days in _TOKEN_DAYS if left_s <= days * _DAY_S), None)
        if end is None or step is None:
            self._alarm.clear("token_expiring", account=account["id"])
        elif left_s > 0:
            problem = f"the access token ends {end.said()}, in less than {step} day{'s' if step > 1 else ''}"
            self._alarm.alert("token_expiring", problem, account=account["id"])
        elif end.known:
            self._alarm.alert("token_dead", f"the access token ended {end.said()}", account=account["id"])
        else:  # Instagram has not said so
            problem = f"the access token was to end {end.said()}, and was never renewed"
            self._alarm.alert("token_expiring", problem, account=account["id"])

    def _has_ended(self, account: Row) -> bool:
        end = reading.token_end(account)
        return end is not None and end.known and epoch_s(end.at) <= self._clock()


def usual_pause_h(hours: Sequence[int]) -> int | None:
    """Return an account's longest pause between active hours, in hours; None when it was active on too few days."""
    if len({hour // 24 for hour in hours}) < _TALKING_DAYS:
        return None
    return max(later - earlier for earlier, later in itertools.pairwise(hours))
