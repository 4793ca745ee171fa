"""The promise as rules over a history: pure functions from what was seen to what was broken."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from tests.chaos.history import CrmCall, History, Kill, Order, SendCall, Webhook, grouped
from tests.chaos.weather import TIMEOUT_S

_RECORDED_S = 1.0  # an answer is on disk by then: a kill later than this cannot excuse a repetition
_ARRIVED_S = 0.5  # what a killed process had sent is read by then, though a busy sandbox reads it late
_REACH = 20  # messages that a look-up is shown
_GONE_OUT = ("sent", "delivered", "read")


@dataclass(frozen=True)
class Violation:
    """A broken rule; `names` are the ids under which the history tells more."""

    rule: str
    problem: str
    names: tuple[str, ...] = ()


@dataclass
class Seen:
    """A finished run: its history, each acknowledged send's status from the API, and what the database still owes."""

    history: History
    statuses: dict[str, dict[str, Any]]
    owed: list[str]
    quick_tries: int  # calls to a CRM before a message steps aside
    counts: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.webhooks = self.history.of(Webhook)
        self.crm_calls = self.history.of(CrmCall)
        self.calls = self.history.of(SendCall)
        self.orders = self.history.of(Order)
        self.kills = self.history.of(Kill)
        self.effects = sorted((call for call in self.calls if call.mid), key=lambda call: call.position)
        self.by_event = grouped(self.crm_calls, lambda call: call.event_id)
        self.acknowledged: dict[tuple[str, str], Webhook] = {}
        for webhook in self.webhooks:
            if webhook.status == 200:
                for item in webhook.items:
                    self.acknowledged.setdefault((item.kind, item.mid), webhook)

    def killed_between(self, begin: float, end: float) -> bool:
        """Tell whether whoever calls the far sides was killed in that time."""
        return any(kill.at <= end and kill.until + _ARRIVED_S >= begin for kill in self.kills)


Rule = Callable[[Seen], Iterator[Violation]]


def nothing_is_left(seen: Seen) -> Iterator[Violation]:
    """After the quiet phase nothing is owed."""
    for owed in seen.owed:
        yield Violation("nothing is left", owed, tuple(owed.split()))


def answers_are_known(seen: Seen) -> Iterator[Violation]:
    """The bridge takes what is right, or says that it cannot now; it never fails and never refuses."""
    asked: tuple[tuple[str, int, Sequence[Webhook | Order]], ...] = (
        ("webhooks", 200, seen.webhooks),
        ("sends asked", 202, seen.orders),
    )
    for what, good, facts in asked:
        for fact in facts:
            seen.counts[f"{what} answered {fact.status or 'not at all'}"] += 1
            if fact.status not in (0, good, 503):
                yield Violation("answers", f"answered {fact.status}: {fact.told()}", tuple(fact.names()))


def acknowledged_events_arrive(seen: Seen) -> Iterator[Violation]:
    """Every message that was answered 200 reached the CRM with a 2xx that the bridge could hear, as one event."""
    received = grouped((call for call in seen.crm_calls if call.event == "message.received"), lambda call: call.subject)
    for kind, mid in seen.acknowledged:
        if kind != "message":
            continue
        seen.counts["messages acknowledged"] += 1
        calls = received.get(mid, [])
        if not any(call.heard for call in calls):
            yield Violation("acknowledged is delivered", f"{mid} was answered 200 and never taken by the CRM", (mid,))
        if len({call.event_id for call in calls}) > 1:
            yield Violation("one event", f"{mid} came to the CRM as several events", (mid,))


def events_are_stable(seen: Seen) -> Iterator[Violation]:
    """Repetitions carry the same bytes, id and sequence, and are signed; numbers of a lane are used once."""
    used: dict[tuple[str, int], str] = {}
    for event_id, calls in seen.by_event.items():
        if not all(call.genuine for call in calls):
            yield Violation("signature", f"{event_id} came with a wrong signature or id", (event_id,))
        if len({(call.digest, call.sequence, call.contact) for call in calls}) > 1:
            yield Violation("stable events", f"{event_id} changed between repetitions", (event_id,))
        other = used.setdefault((calls[0].contact, calls[0].sequence), event_id)
        if other != event_id:
            problem = f"{event_id} and {other} both have sequence {calls[0].sequence} of {calls[0].contact}"
            yield Violation("sequence", problem, (event_id, other))


def repetitions_were_unavoidable(seen: Seen) -> Iterator[Violation]:
    """The CRM gets an event again only when its answer was lost on the way or with a killed process."""
    seen.counts["CRM calls"] += len(seen.crm_calls)
    seen.counts["CRM events"] += len(seen.by_event)
    for event_id, calls in seen.by_event.items():
        for first, second in pairwise(calls):
            cut_off = first.fault.startswith("timeout") or first.until - first.at > 0.7 * TIMEOUT_S
            if second.at < first.until and not cut_off and not seen.killed_between(first.at, second.at):
                yield Violation("one call at a time", f"{event_id} was called twice at once", (event_id,))
        taken = [call for call in calls if call.taken]
        for first, second in pairwise(taken):
            later = calls[calls.index(first) + 1]
            if not first.heard:
                seen.counts["CRM duplicates, answer lost"] += 1
            elif seen.killed_between(first.at, min(later.at, first.until + _RECORDED_S)):
                seen.counts["CRM duplicates, in flight at a kill"] += 1
            else:
                wait = second.at - first.until
                problem = f"{event_id} came again {wait:.3f} s after its 2xx, without a kill or a lost answer"
                yield Violation("no needless repetition", problem, (event_id,))


def lanes_keep_their_order(seen: Seen) -> Iterator[Violation]:
    """Each contact's events are first taken by the CRM in `sequence`, save behind one that stepped aside.

    It may do so when its quick tries are used up and the CRM takes others, or when the bridge's breaker is open and
    the row behind the one that just failed gets through: then the CRM works, and refuses this one.
    """
    finished = sorted((call for call in seen.crm_calls if call.until), key=lambda call: call.until)
    for contact, calls in grouped(seen.crm_calls, lambda call: call.contact).items():
        first_taken: dict[int, CrmCall] = {}
        for call in calls:
            if call.taken:
                first_taken.setdefault(call.sequence, call)
        latest: CrmCall | None = None
        overtaken_by: dict[int, CrmCall] = {}
        arrived = list(first_taken.values())
        for call in arrived:
            if latest is not None and call.sequence < latest.sequence:
                later = [other for other in arrived[: arrived.index(call)] if other.sequence > call.sequence]
                overtaken_by[call.sequence] = later[0]
            elif latest is None or call.sequence > latest.sequence:
                latest = call
        for sequence, overtaker in overtaken_by.items():
            mine = [call for call in calls if call.sequence == sequence]
            how = _stepped_aside(seen, mine, overtaker, finished)
            if how is None:
                problem = f"sequence {sequence} of {contact} was overtaken by {overtaker.sequence}"
                yield Violation("order at the CRM", problem, (mine[0].event_id, overtaker.event_id))
            else:
                seen.counts[f"CRM events that stepped aside, {how}"] += 1


def _stepped_aside(seen: Seen, mine: Sequence[CrmCall], overtaker: CrmCall, finished: Sequence[CrmCall]) -> str | None:
    """Tell by which right an event was overtaken, or None."""
    failed = [call for call in mine if call.until and call.at < overtaker.at and not call.heard]
    if not failed:
        return None
    others = [call for call in finished if call.heard and call.event_id != mine[0].event_id]
    if len(failed) >= seen.quick_tries:
        since = failed[-2].at if len(failed) > 1 else failed[-1].at
        # What is taken before the one that overtakes proves that the CRM worked; else that one was the proof itself.
        worked = any(since <= call.until <= overtaker.at for call in others)
        return "worn out while others passed" if worked else "worn out, and the next passed"
    # The breaker: nothing got through since a success or a start, and of this lane it was this one that failed last.
    before = [call for call in finished if call.until <= overtaker.at]
    row: list[CrmCall] = []
    for call in reversed(before):
        if call.heard or any(call.until < kill.at < overtaker.at for kill in seen.kills):
            break
        row.append(call)
    tries = Counter(call.event_id for call in seen.crm_calls if call.at < overtaker.at and not call.heard)
    is_open = len(row) >= 10 or any(tries[call.event_id] >= seen.quick_tries for call in row)
    lane = [call for call in row if call.contact == overtaker.contact]
    if is_open and lane and lane[0].event_id == mine[0].event_id:
        return "early, while the breaker was open"
    return None


def acceptance_is_the_order(seen: Seen) -> Iterator[Violation]:
    """What was answered before the next was posted has the lower sequence; items of a new batch go by their time."""
    sequence = {call.subject: call.sequence for call in seen.crm_calls if call.event == "message.received"}
    firsts: dict[str, Webhook] = {}
    for webhook in seen.webhooks:
        for item in webhook.items:
            if item.kind == "message":
                firsts.setdefault(item.mid, webhook)
    times = {item.mid: (item.contact, item.at_ms) for webhook in firsts.values() for item in webhook.items}
    lanes: dict[str, list[str]] = {}
    for mid in firsts:
        if mid in sequence:
            lanes.setdefault(times[mid][0], []).append(mid)
    for lane in lanes.values():
        lane.sort(key=lambda mid: sequence[mid])
        for earlier, later in pairwise(lane):
            if firsts[earlier].batch == firsts[later].batch and times[earlier][1] > times[later][1]:
                yield Violation("order of a batch", f"{earlier} is younger than {later}", (earlier, later))
        youngest = lane[0]
        for mid in lane:
            acknowledged = seen.acknowledged.get(("message", mid))
            if acknowledged is not None and acknowledged.until < firsts[youngest].at:
                problem = f"{mid} was acknowledged before {youngest} came, and has a higher sequence"
                yield Violation("order of acceptance", problem, (mid, youngest))
            youngest = max(youngest, mid, key=lambda one: firsts[one].at)


def keys_make_one_message(seen: Seen) -> Iterator[Violation]:
    """However often a client repeats a call, its key stands for one message."""
    for key, orders in grouped(seen.orders, lambda order: order.key).items():
        ids = {order.message_id for order in orders if order.status == 202}
        seen.counts["sends acknowledged"] += bool(ids)
        if len(ids) > 1:
            yield Violation("idempotency", f"{key} stands for {len(ids)} messages", (key, *ids))


def sends_take_effect_once(seen: Seen) -> Iterator[Violation]:
    """A message that went out took effect once; a failed one did not, unless it says that nobody could tell.

    Messages with the same text to the same contact are told apart by the id that Instagram gave them.
    """
    texts = {order.message_id: (order.contact, order.text) for order in seen.orders if order.message_id}
    claimed: dict[str, str] = {}
    for message_id, status in seen.statuses.items():
        state, mid = status["status"], status["instagram_message_id"]
        code = (status["error"] or {}).get("code")
        seen.counts[f"sends {state}" + (f", {code}" if state == "failed" else "")] += 1
        if state in _GONE_OUT:
            effect = next((call for call in seen.effects if call.mid == mid), None)
            if effect is None or (effect.contact, effect.text) != texts[message_id]:
                yield Violation(
                    "true status", f"{message_id} is {state} as {mid}, which is not it", (message_id, mid or "")
                )
            elif claimed.setdefault(str(mid), message_id) != message_id:
                yield Violation(
                    "true status", f"{message_id} and {claimed[str(mid)]} are both {mid}", (message_id, mid)
                )
        elif state != "failed":
            yield Violation("final status", f"{message_id} is still {state}", (message_id,))
    doubtful = Counter(
        texts[message_id]
        for message_id, status in seen.statuses.items()
        if status["status"] == "failed" and status["error"]["code"] == "in_doubt"
    )
    for call in seen.effects:
        subject = (call.contact, str(call.text))
        if call.mid in claimed:
            continue
        if doubtful[subject]:
            doubtful[subject] -= 1
            seen.counts["effects of sends in doubt"] += 1
            continue
        who = tuple(message_id for message_id, text in texts.items() if text == subject)
        hidden = _behind(seen, call)
        problem = f"{call.text!r} to {call.contact} took effect too often, as {call.mid}; {hidden} messages came after"
        beyond = " (beyond what a look-up shows)" if hidden >= _REACH else ""
        yield Violation("one effect", problem + beyond, (call.contact, str(call.mid), *who))
    seen.counts["effects at Instagram"] += len(seen.effects)


def _behind(seen: Seen, call: SendCall) -> int:
    """Count what came into a conversation between an effect and the next one of the same text."""
    again = next(
        (
            later.at
            for later in seen.effects
            if later.position > call.position and (later.contact, later.text) == (call.contact, call.text)
        ),
        call.until,
    )
    mids = {
        item.mid
        for webhook in seen.webhooks
        if call.at <= webhook.at <= again
        for item in webhook.items
        if item.kind == "message" and item.contact == call.contact
    }
    return len(mids)


def sends_keep_their_order(seen: Seen) -> Iterator[Violation]:
    """Effects per contact come in the order in which the messages were accepted, and one call at a time."""
    accepted: dict[str, int] = {}
    for order in seen.orders:
        if order.message_id:
            accepted.setdefault(order.message_id, len(accepted))
    owner = {status["instagram_message_id"]: message_id for message_id, status in seen.statuses.items()}
    for effects in grouped(seen.effects, lambda call: call.contact).values():
        known = [owner[call.mid] for call in effects if call.mid in owner]
        for earlier, later in pairwise(known):
            if accepted[earlier] > accepted[later]:
                yield Violation("order at Instagram", f"{earlier} went out before {later}", (earlier, later))
    sends = [call for call in seen.calls if call.text is not None]
    for calls in grouped(sends, lambda call: call.contact).values():
        for first, second in pairwise(calls):
            cut_off = first.until - first.at > 0.7 * TIMEOUT_S
            if second.at < first.until and not cut_off and not seen.killed_between(first.at, second.at):
                yield Violation("one send at a time", f"two calls at once to {first.contact}", (first.contact,))


def statuses_are_told(seen: Seen) -> Iterator[Violation]:
    """The CRM took exactly the transitions that the API shows, in their order, each as one event."""
    told = grouped(
        (call for call in seen.crm_calls if call.taken and call.event[8:] in (*_GONE_OUT, "failed")),
        lambda call: call.subject,
    )
    for message_id, status in seen.statuses.items():
        shown = [step["status"] for step in status["status_history"]][1:]
        events = {call.event_id: call for call in told.get(message_id, [])}
        heard = [call.event[8:] for call in sorted(events.values(), key=lambda call: call.sequence)]
        if heard != shown or (shown and shown[-1] != status["status"]):
            problem = f"{message_id} is {status['status']} by {shown}, and the CRM was told {heard}"
            yield Violation("told statuses", problem, (message_id,))
        seen.counts["status events"] += len(events)


def receipts_count(seen: Seen) -> Iterator[Violation]:
    """`delivered` and `read` are what Meta's acknowledged echoes and receipts say, no more and no less."""
    owner = {status["instagram_message_id"]: message_id for message_id, status in seen.statuses.items()}
    for told in seen.crm_calls:
        if told.event == "message.echo" and told.subject in owner:
            yield Violation(
                "own echo", f"{owner[told.subject]} came to the CRM as somebody's", (told.subject, told.event_id)
            )
    posted = {(item.kind, item.mid) for webhook in seen.webhooks for item in webhook.items}
    for effects in grouped(seen.effects, lambda call: call.contact).values():
        must_be_read = may_be_read = False
        for call in reversed(effects):
            mid = str(call.mid)
            must_be_read = must_be_read or ("read", mid) in seen.acknowledged
            may_be_read = may_be_read or ("read", mid) in posted  # what got no answer may have been kept
            message_id = owner.get(mid)
            if message_id is None:
                continue
            steps = {step["status"] for step in seen.statuses[message_id]["status_history"]}
            if must_be_read > ("read" in steps) or ("read" in steps) > may_be_read:
                problem = f"{message_id} {'is' if 'read' in steps else 'is not'} read, Meta said otherwise"
                yield Violation("true status", problem, (message_id, mid))
            if "delivered" in steps and ("echo", mid) not in posted:
                yield Violation("true status", f"{message_id} is delivered without an echo", (message_id, mid))
            if ("echo", mid) in seen.acknowledged and not steps & {"delivered", "read"}:
                yield Violation("true status", f"the echo of {message_id} was lost", (message_id, mid))


RULES: tuple[Rule, ...] = (
    answers_are_known,
    nothing_is_left,
    acknowledged_events_arrive,
    events_are_stable,
    repetitions_were_unavoidable,
    lanes_keep_their_order,
    acceptance_is_the_order,
    keys_make_one_message,
    sends_take_effect_once,
    sends_keep_their_order,
    statuses_are_told,
    receipts_count,
)


def check(seen: Seen) -> list[Violation]:
    """Hold a run against every rule; `seen.counts` is filled on the way."""
    return [violation for rule in RULES for violation in rule(seen)]
