"""``crmbridge explain ID``: what became of a message, what comes next, and what to type. Never what it says."""

import time
from dataclasses import asdict, dataclass, field
from typing import Any

from crmbridge import log, terminal
from crmbridge.events import epoch_s, instant
from crmbridge.instagram import reading
from crmbridge.store import accounts, alerts, dead, endpoints, overview, story
from crmbridge.store.contacts import Target
from crmbridge.store.database import Database, Row
from crmbridge.store.deliveries import Patience
from crmbridge.store.story import Kind, Life, Owed

_SHOWN_AT_ONCE = 3
_PAST_HOLDS = 10
UNKNOWN = "Nothing here has this id. What was refused, or only read, is in the log alone, by its correlation id."
_PULLED = "none: the CRM reads its events when it asks"
_FAR_SIDE = {"crm": "the CRM", "instagram": "Instagram"}
_WHAT = {"crm": "deliveries", "instagram": "sends"}
_CAME_TO = {
    "done": "done",
    "retry": "failed",
    "refused": "refused for good",
    "in_doubt": "nobody said whether it was taken",
    "fault": "we failed ourselves",
    "abandoned": "broken off: the worker stopped, or something else settled it",
    "absent": "the conversation does not show it",
    "unclear": "the conversation does not tell",
    None: "no answer yet",
}
_HOW = {"delivered": "Instagram's echo showed it in the conversation", "pending": "accepted, to be sent"}


@dataclass(frozen=True)
class Step:
    """Something that happened: `step` is a stable word for it."""

    at: str
    step: str
    text: str


@dataclass
class Story:
    """All that is known of one thing, in order of time; what comes next; the commands that may help."""

    kind: Kind
    id: str
    facts: dict[str, str | int | None]
    steps: list[Step] = field(default_factory=list)
    next: list[str] = field(default_factory=list)
    to_type: list[str] = field(default_factory=list)

    def tell(self, at: str | None, step: str, text: str) -> None:
        """Add a step."""
        if at is not None:
            self.steps.append(Step(at, step, text))

    def advise(self, command: str) -> None:
        """Add a command, once."""
        if command not in self.to_type:
            self.to_type.append(command)


def run(db: Database, given: str, patience: Patience) -> int:
    """Print what an id means; return 0, or 1 when nothing here has it."""
    found = explain(db, given, time.time(), patience)
    if not found["stories"] and not found["others"]:
        terminal.say(
            f"nothing here has the id {given}: it may be mistyped, of another server, or gone by retention",
            f"what was refused, or only read, is in the log alone, by its correlation id: grep {given} LOG",
        )
        return 1
    if found["others"]:
        terminal.say(f"{given} means several things; choose one:")
        terminal.say(*(f"  {other['to_type']}" for other in found["others"]))
    terminal.say(*"\n\n".join(_lines(one) for one in found["stories"]).split("\n"))
    return 0


def explain(db: Database, given: str, now_s: float, patience: Patience) -> dict[str, Any]:
    """Return the stories of an id, or where it means many things, `others`: each with the command that tells it."""
    meanings = story.meanings(db, given)
    if len(meanings) > _SHOWN_AT_ONCE:
        others = [{"kind": kind, "id": known, "to_type": f"crmbridge explain {known}"} for kind, known in meanings]
        return {"id": given, "stories": [], "others": others}
    stories = [asdict(_tell(db, *meaning, instant(now_s), patience)) for meaning in meanings]
    return {"id": given, "stories": stories, "others": []}


def _tell(db: Database, kind: Kind, known: str, now: str, patience: Patience) -> Story:
    if kind == "account":
        return _account(db, known, now)
    if kind == "conversation":
        return _conversation(db, known)
    if kind == "message":
        found = _message(story.of_message(db, known, now), now, patience)
    else:
        found = _event(story.of_event(db, known, now), now, patience)
    found.steps.sort(key=lambda step: step.at)  # stable: what happened at once stays in order of cause
    return found


def _lines(found: dict[str, Any]) -> str:
    lines = [f"{found['kind']} {found['id']}"]
    lines += [f"  {name.replace('_', ' '):21} {value}" for name, value in found["facts"].items() if value is not None]
    if found["steps"]:
        lines.append("")
    for step in found["steps"]:
        lines += terminal.wrapped(f"{step['at']}  ", step["text"])
    if found["next"] or found["to_type"]:
        lines.append("")
    for text in found["next"]:
        lines += terminal.wrapped("next: ", text)
    lines += [f"type: {command}" for command in found["to_type"]]
    return "\n".join(map(terminal.escaped, lines))


# --- messages and events ---


def _message(life: Life, now: str, patience: Patience) -> Story:
    message = life.message
    assert message is not None  # noqa: S101
    found = Story(
        "message",
        message["id"],
        {
            "what": "a message that the CRM sent",
            "status": message["status"],
            **_parties(life, message["recipient_id"]),
            "instagram_message_id": message["instagram_message_id"],
            "idempotency_key": message["idempotency_key"],
            "correlation_id": message["correlation_id"],
            "error": _problem(message["error_code"], message["error_message"]),
        },
    )
    found.tell(message["created_at"], "accepted", f"accepted from the CRM and stored; {message['correlation_id']}")
    for heard in life.heard:
        what = "showed it in the conversation (echo)" if heard["kind"] == "message.echo" else f"told {heard['kind']}"
        found.tell(heard["received_at"], "heard", f"Instagram {what}: {heard['id']}, {heard['state']}{_repeats(heard)}")
    for owed in life.owed:
        if owed.row["target"] == "instagram":
            _deliver(found, owed, now, patience)
    for change in life.changes:
        if change["text"] != "revived":  # told with the delivery
            found.tell(change["at"], "status", f"status {change['code']}: {_how(life, change)}")
    for owed in life.owed:
        if owed.row["target"] == "crm":
            _deliver(found, owed, now, patience)
    if message["content"] is None:
        found.next.append("its text is gone by retention")
    return found


def _event(life: Life, now: str, patience: Patience) -> Story:
    event = life.event
    assert event is not None  # noqa: S101
    found = Story(
        "event",
        event["id"],
        {
            "what": f"{event['kind']}, told by Instagram",
            "state": event["state"],
            "message_id": "msg_" + event["id"].removeprefix("evt_"),
            **_parties(life, event["contact"]),
            "instagram_account_id": event["instagram_account_id"],
            "instagram_message_id": event["instagram_message_id"],
            "correlation_id": event["correlation_id"],
        },
    )
    found.tell(event["occurred_at"], "occurred", "it happened, by Instagram's clock")
    found.tell(event["received_at"], "received", f"received by webhook, verified and stored; {event['correlation_id']}")
    if event["repeats"]:
        text = f"Instagram told it again: {event['repeats']} time(s) by then, each dropped as a repetition"
        found.tell(event["repeated_at"], "repeated", text)
    for heard in life.heard:
        text = f"Instagram told {heard['kind']} about it: {heard['id']}, {heard['state']}"
        found.tell(heard["received_at"], "heard", text)
    if event["state"] == "unrouted":
        found.next.append(
            f"no account here has the Instagram account id {event['instagram_account_id']}; it is delivered once that"
            " account is connected"
        )
        found.advise("crmbridge account add --token -")
    elif event["state"] == "held":
        found.next.append("it waits until a send to this contact is settled, which it may be the echo or receipt of")
        found.advise(f"crmbridge explain {life.conversation_id}")
    elif event["state"] == "noted":
        found.next.append("nothing: it changed the status of what was sent, and the CRM was told of that")
        if event["instagram_message_id"]:
            found.advise(f"crmbridge explain {event['instagram_message_id']}")
    elif event["state"] == "dropped":
        found.next.append("it came for an account that is not connected here, and was given up by retention")
    elif event["payload"] is None:
        found.next.append("its text is gone by retention")
    for owed in life.owed:
        _deliver(found, owed, now, patience)
    return found


def _parties(life: Life, contact: str) -> dict[str, str | int | None]:
    name = life.account["username"] if life.account else None
    return {
        "account": f"{life.account['id']}{f' ({name})' if name else ''}" if life.account else None,
        "contact": contact or None,
        "conversation": life.conversation_id,
    }


def _how(life: Life, change: Row) -> str:
    """Tell how we know of a change of status."""
    status = change["code"]
    if status == "sent":
        send = next((owed for owed in life.owed if owed.row["target"] == "instagram"), None)
        last = send.calls[-1] if send and send.calls else None
        if last and last["kind"] == "look_up" and last["outcome"] == "done":
            return "it was found in Instagram's conversation"
        proven = send is not None and send.row["last_code"] == "echo"
        return "its echo proved it" if proven else "Instagram accepted it"
    if status == "read":
        seen = any(heard["kind"] == "message.read" for heard in life.heard)
        return "Instagram's receipt for it" if seen else "inferred: the customer has read a later message"
    return str(change["text"] or _HOW.get(status, "?"))


def _problem(code: str | None, text: str | None) -> str | None:
    if code is None or text is None:
        return code
    return text if f", {code}" in text else f"{code}: {text}"


def _repeats(heard: Row) -> str:
    return f"; told again {heard['repeats']} time(s)" if heard["repeats"] else ""


# --- deliveries ---

_BY_A_PERSON = {
    "revived": "a person had it tried again (dlq retry{who})",
    "restored": "a backup was put back, after which it may have gone out: it is looked for first",
    "discarded": "a person wants it no more (dlq discard{who})",
}


def _deliver(found: Story, owed: Owed, now: str, patience: Patience) -> None:
    """Tell a delivery: when it was owed, each call, what befell it between them, and what comes next."""
    row, to = owed.row, _FAR_SIDE[owed.row["target"]]
    is_send = row["target"] == "instagram"
    name = "send" if is_send else row["event"]
    text = f"{name} owed to {to}: {row['id']}"
    found.tell(
        row["accepted_at"], "owed", text if is_send else f"{text}, {row['event_id']}, sequence {row['sequence']}"
    )
    for befell in owed.befell:
        kind, who = befell["kind"], befell["text"]
        if kind == "revived" and who == dead.MENDED:
            found.tell(
                befell["at"], kind, f"{name} to {to}: tried again, as a person mended what the CRM's 401 was about"
            )
        elif kind in _BY_A_PERSON:
            by = f", by {who}" if who else ""
            found.tell(befell["at"], kind, f"{name} to {to}: {_BY_A_PERSON[kind].format(who=by)}")
    for hold in owed.held:
        _tell_held(found, hold, f"{name} to {to}", row["accepted_at"])
    for call in owed.calls:
        found.tell(call["started_at"], call["kind"], f"{name} to {to}, {_call(call, row['target'])}")
    for befell in owed.befell:
        kind = befell["kind"]
        if kind == "stepped_aside":
            text = f"{name} to {to} stepped aside: later events of this conversation may overtake it"
            found.tell(befell["at"], kind, text)
        elif kind in ("done", "dead"):
            ended = {
                "echo": "settled by its echo", "not_pushed": "not pushed any more: the CRM reads it when it asks",
                "account_deleted": "given up: the account was deleted",
            }.get(befell["code"], f"given up: {befell['code']}")  # fmt: skip
            found.tell(befell["at"], kind, f"{name} to {to} {ended}")
    _foresee(found, owed, name, now, patience)


def _call(call: Row, target: str) -> str:
    is_call = call["kind"] == "call"
    head = f"attempt {call['number']}" if is_call else f"looking for what attempt {call['number']} sent"
    parts = [_CAME_TO.get(call["outcome"], str(call["outcome"]))]
    if call["http_status"] is not None:
        parts.insert(0, f"HTTP {call['http_status']}")
    if call["duration_ms"] is not None:
        parts.append(f"{call['duration_ms']} ms")
    # What a CRM's status means is told by its code.
    text = None if target == "crm" and call["http_status"] is not None else call["error"]
    is_told = call["outcome"] in ("done", "absent", None)
    return f"{head}: {', '.join(parts)}" + ("" if is_told else f" ({_problem(call['code'], text)})")


def _foresee(found: Story, owed: Owed, name: str, now: str, patience: Patience) -> None:
    row = owed.row
    if row["state"] == "dead":
        _say_dead(found, owed, name, now)
        return
    if row["state"] == "done":
        if row["last_code"] == "not_pushed":
            found.next.append(
                f"{name}: it was not pushed, for want of a crm_webhook_url; GET /api/v1/events gives the CRM the event"
            )
        return
    if owed.hold is not None:
        _say_held(found, owed.hold, f"{name} is", row["account_id"], row["target"])
    elif row["claim_id"] is not None:
        found.next.append(f"{name}: a call is in flight since {row['tried_at']}; it is taken back at {row['due']}")
    elif owed.head is not None:
        about = owed.head["message_id"] or owed.head["event_id"]
        when = "its call is in flight" if owed.head["claim_id"] else f"whose next try is at {owed.head['due']}"
        found.next.append(f"{name} waits behind {owed.head['id']} ({about}) of the same conversation, {when}")
        found.advise(f"crmbridge explain {owed.head['id']}")
    elif row["in_doubt"]:
        found.next.append(f"{name}: look-up {row['look_ups'] + 1} in Instagram's conversation at {row['due']}")
    else:
        overdue = row["due"] < now
        ends_at = instant(epoch_s(owed.aged_from) + patience.of(row["target"]))
        ends_at = min(ends_at, owed.send_before or ends_at)
        text = f"{name}: attempt {row['attempts'] + 1} at {row['due']}, given up after {ends_at}"
        found.next.append(text + ("; due, but its endpoint rests or is busy, or no worker runs" if overdue else ""))
        if overdue:
            found.advise("crmbridge check")


def _tell_held(found: Story, hold: Row, what: str, begin: str) -> None:
    since = f", since {hold['since']}" if hold["since"] < begin else ""
    reason = endpoints.why_held(hold["cause"], hold["reason"]) or "no reason given"
    text = f"{what} held until {hold['ended_at']}{since}: {reason}"
    found.tell(max(hold["since"], begin), "held", text)


def _say_held(found: Story, hold: Row, what: str, account_id: str, target: Target) -> None:
    until = f" until {hold['until']}" if hold["until"] else ""
    found.next.append(
        f"{what} held since {hold['since']}{until}, without ageing: {hold['reason'] or 'no reason given'}"
    )
    if hold["cause"] not in ("inactive", "error"):
        found.advise(endpoints.to_type(account_id, target, hold["cause"]))
    elif (todo := f"to let it go on: {endpoints.to_type(account_id, target, hold['cause'])}") not in found.next:
        found.next.append(todo)


_NO_MORE = {
    "account_deleted": "its account was deleted",
    "content_gone": "its content is gone by retention",
    "not_pushed": "the account has no crm_webhook_url; GET /api/v1/events gives the CRM the event",
    "expired": "its send_before has passed; the CRM may send it anew, with another idempotency_key",
}


def _say_dead(found: Story, owed: Owed, name: str, now: str) -> None:
    row, why = owed.row, owed.obstacle
    found.next.append(f"{name} is dead since {row['finished_at']}: nothing happens by itself")
    if why in _NO_MORE:
        found.next.append(f"it cannot be tried again: {_NO_MORE[why]}")
        return
    if why == "window_closed":
        _say_window(found, owed, now)
        return
    if why == "in_doubt":
        found.next.append("it may have arrived: look into Instagram before it is sent again")
    if row["last_code"] == "crm_unauthorized":
        found.advise(endpoints.to_type(row["account_id"], "crm", "unauthorized"))
        return
    if owed.hold is not None:
        _say_held(found, owed.hold, f"{_WHAT[row['target']]} are", row["account_id"], row["target"])
    found.advise(f"crmbridge dlq retry {row['id']}" + (" --force" if why == "in_doubt" else ""))


def _say_window(found: Story, owed: Owed, now: str) -> None:
    """Tell what can be done about a send whose window is closed, which another try would not open."""
    if owed.row["contact"].startswith("comment:"):
        found.next.append("nothing can be done: Instagram takes a private reply until 7 days after the comment")
        return
    found.next.append(
        "Instagram takes it only once the customer has written again; another try before that fails like this one; "
        f"after it: crmbridge dlq retry {owed.row['id']}"
    )
    if owed.tagged_until is not None and now < owed.tagged_until:
        found.next.append(
            f"a person's answer is taken until {owed.tagged_until}: the CRM sends it anew, with author: human and "
            "another idempotency_key, if Meta has approved the app's Human Agent feature"
        )


# --- accounts and conversations ---


def _account(db: Database, account_id: str, now: str) -> Story:
    row = story.account(db, account_id)
    subscribed = {1: "yes", 0: f"no: {row['subscription_error']}", None: "unknown"}[row["subscription_ok"]]
    live = accounts.find(db, account_id)
    status = row["status"] if live else "deleted"
    end = reading.token_end(live) if live else None
    facts: dict[str, str | int | None] = {
        "instagram_account_id": row["instagram_account_id"],
        "username": row["username"],
        "status": status + (f": {row['status_reason']}" if row["status_reason"] else ""),
        "status_since": row["deleted_at"]
        or (row["status_since"] if row["status"] != "active" else _active_since(db, row)),
        "crm_webhook_url": log.origin(row["crm_webhook_url"]) if row["crm_webhook_url"] else _PULLED,
        "subscribed": subscribed,
        "token_checked_at": row["token_checked_at"],
        "token_expires_at": (end.at + ("" if end.known else " at the latest")) if end else None,
        "deleted_at": row["deleted_at"],
    }
    found = Story("account", account_id, facts)
    found.tell(row["created_at"], "created", "created here")
    found.tell(row["deleted_at"], "deleted", "deleted: its secrets are gone, and what it was owed ended")
    for seen in overview.accounts(db, account_id):
        for target, name in overview.NAMES.items():
            facts[f"pending_{name}"], facts[f"dead_{name}"] = seen[f"pending_{name}"], seen[f"dead_{name}"]
            facts[f"{name}_last_hour"] = overview.said(seen["latency"][name])
            for past in endpoints.past(db, account_id, target, begin="", end="9999")[-_PAST_HOLDS:]:
                _tell_held(found, past, _WHAT[target], "")
            hold = endpoints.locked(db, account_id, target)
            if hold is not None:
                _say_held(found, hold, f"{_WHAT[target]} are", account_id, target)
            if seen[f"dead_{name}"]:
                found.next.append(f"{seen[f'dead_{name}']} dead {name}: nothing happens to them by itself")
                found.advise(f"crmbridge dlq list --{name} --account {account_id}")
        found.tell(seen["last_event_at"], "heard", "Instagram's last word about it came")
    for alert in alerts.everything(db):
        if alert["account_id"] == account_id and alert["cleared_at"] is None:
            found.next.append(f"alert {alert['kind']} is open since {alert['since']}: {alert['message']}")
    for waiting in story.stuck(db, account_id, 5):
        found.next.append(f"stuck since {waiting['since']}: {waiting['event']}, {waiting['why']}")
        found.advise(waiting["to_type"])
    found.steps.sort(key=lambda step: step.at)
    return found


def _active_since(db: Database, account: Row) -> str:
    """Return since when an account is in use, which a pause does not change."""
    past = endpoints.past(db, account["id"], "instagram", begin="", end="9999")
    ended = [hold["ended_at"] for hold in past if hold["cause"] != "operator"]
    return str(max(ended, default=account["created_at"]))


def _conversation(db: Database, conversation_id: str) -> Story:
    contact, rows = story.conversation(db, conversation_id)
    found = Story("conversation", conversation_id, {"account": contact["account_id"], "contact": contact["contact"]})
    if len(rows) == story.NEWEST:
        found.facts["shown"] = f"the newest {story.NEWEST} deliveries"
    for lane in story.waiting(db, contact):
        found.facts[f"pending_{overview.NAMES[lane['target']]}"] = lane["number"]
        if lane["head"]:
            found.advise(f"crmbridge explain {lane['head']}")
    for row in rows:
        name = "send" if row["target"] == "instagram" else row["event"]
        took = f" after {row['latency_ms']} ms" if row["latency_ms"] is not None else ""
        code = f" ({row['last_code']})" if row["state"] != "done" and row["last_code"] else ""
        about = row["message_id"] or row["event_id"]
        text = f"{name} to {_FAR_SIDE[row['target']]}: {row['state']}{took}{code}; {about}"
        found.tell(row["accepted_at"], row["state"], text)
    return found
