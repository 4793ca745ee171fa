"""What a channel told us: keep it once, route it to its account, and owe the CRM what it must hear."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from crmbridge import matching
from crmbridge.events import (
    ANNOUNCED,
    AWAITED,
    NOTED,
    RECOVERED,
    TEST,
    WITHDRAWN,
    ChannelEvent,
    Opens,
    epoch_s,
    message_key,
    new_id,
)
from crmbridge.matching import Tried
from crmbridge.store import accounts, bodies, contacts, deliveries, history, messages, questions, windows
from crmbridge.store.contacts import Act
from crmbridge.store.database import Database, Reads, Row, Tx
from crmbridge.store.deliveries import Debt

_ADOPT_AT_ONCE = 200
_BY_A_PERSON = ("message.received", "message.postback", "message.referral")  # Instagram names who wrote or tapped
_SAID_NOTHING = ("text", "attachments", "reply_to", "others", "raw")  # what goes when a message is taken back


@dataclass(frozen=True)
class Kept:
    """What became of one event: forwarded, noted, held, unrouted or duplicate."""

    state: str
    event: ChannelEvent
    event_id: str | None
    account_id: str | None


def keep(db: Database, events: Sequence[ChannelEvent], *, correlation_id: str, ask_s: float = 0.0) -> list[Kept]:
    """Store events in the order in which they happened, in one commit; a repeated fact is stored once.

    The first message of a customer waits up to `ask_s` for their name.
    """
    ordered = sorted(events, key=lambda event: event.occurred_at)

    def job(tx: Tx) -> list[Kept]:
        routes: dict[tuple[str, str], Row | None] = {}
        queues: set[str] = set()
        for event in ordered:
            named = event.external_account_id, event.party
            if named not in routes:
                routes[named] = account = _account_of(tx, event)
                # What came before the account goes first; where that is too much for one write, this queues behind it.
                if account is not None and _waits(tx, account):
                    _adopt_some(tx, account, ask_s)
                    queues |= {account["id"]} if _waits(tx, account) else set()
        return [
            _keep_one(
                tx,
                event,
                account := routes[event.external_account_id, event.party],
                correlation_id,
                ask_s,
                queues=account is not None and account["id"] in queues,
            )
            for event in ordered
        ]

    return db.write(job)


def _account_of(db: Reads, event: ChannelEvent) -> Row | None:
    """Return the account that the envelope names, else the one that the item itself names, else nobody's."""
    account = accounts.find_external(db, event.external_account_id)
    return accounts.find_external(db, event.party) if account is None and event.party else account


def _keep_one(
    tx: Tx,
    event: ChannelEvent,
    account: Row | None,
    correlation_id: str,
    ask_s: float,
    *,
    queues: bool,
) -> Kept:
    event_id = new_id("evt")
    external_account_id = account["instagram_account_id"] if account else event.external_account_id
    row: Row = {
        "id": event_id,
        "account_id": account["id"] if account and not queues else None,
        "instagram_account_id": external_account_id,
        "party": (event.party or None) if account is None else None,
        "contact": event.contact,
        "kind": event.kind,
        "dedupe_key": event.dedupe_key,
        "rank": event.rank,
        "instagram_message_id": event.external_id,
        "state": "noted" if event.kind in (NOTED, TEST) else "unrouted",
        "payload": None if event.kind in (NOTED, TEST) else _payload(event),
        "occurred_at": event.occurred_at,
        "received_at": tx.now,
        "correlation_id": correlation_id,
    }
    is_whole = event.kind == "message.received" and event.rank != ANNOUNCED
    opens = event.opens if is_whole else None
    if not tx.insert("events", row, once=True):
        if not _takes_its_place(tx, account, row, opens):
            return Kept("duplicate", event, None, account["id"] if account else None)
        row = _found(tx, event_id)
    if event.kind == TEST:
        return Kept("noted", event, event_id, None)
    if account is None:
        return Kept("noted" if event.kind == NOTED else "unrouted", event, event_id, None)
    if queues:
        return Kept("queued", event, event_id, account["id"])
    times = {"acted_at": event.occurred_at, "received_at": tx.now}
    act = windows.act(account, event.contact, event.opens, **times, username=event.contact_name)
    return Kept(_apply(tx, account, row, ask_s, act), event, event_id, account["id"])


def _takes_its_place(tx: Tx, account: Row | None, row: Row, opens: Opens | None) -> bool:
    """Meet what has an event's key: store the event if it tells more, and tell whether it is to be applied.

    What a CRM has seen, or may have, stays; beside that goes only what has content where it had none.
    """
    known = _of_key(tx, row["instagram_account_id"], row["dedupe_key"])
    if opens and account is not None:  # only the whole message, if any form of it, tells that an ad led to it
        times = {"acted_at": row["occurred_at"], "received_at": known["received_at"]}
        contacts.note(tx, account["id"], row["contact"], windows.act(account, row["contact"], opens, **times))
    is_seen = known["state"] == "forwarded" and _is_seen(tx, known)
    if not _tells_more(row, known) or (is_seen and _has_content(known) >= _has_content(row)):
        history.note(tx, known["id"], "repeat", correlation=row["correlation_id"])
        return False
    is_alike = (known["kind"], known["contact"]) == (row["kind"], row["contact"])
    if not is_seen and is_alike and known["state"] in ("forwarded", "held", "unrouted"):
        _complete(tx, account, known, row)
        return False
    if is_seen:
        tx.update("events", {"dedupe_key": f"{known['dedupe_key']}:{known['id']}"}, "id = ?", [known["id"]])
    else:
        row |= {"received_at": known["received_at"]}  # of the message there was a word then
        row |= {"rank": WITHDRAWN} if known["rank"] == WITHDRAWN else {}
        deliveries.take_back(tx, known["id"])
        _forget(tx, known["id"])
    tx.insert("events", row)
    return True


def _complete(tx: Tx, account: Row | None, known: Row, row: Row) -> None:
    """Let a form of a message have the place that another one of its kind has, of which no CRM has heard."""
    payload = row["payload"] if account is None else _edited(tx, account["id"], row)
    tx.update("events", {"payload": payload, "rank": row["rank"]}, "id = ?", [known["id"]])
    if known["state"] == "held" and account is not None:
        _apply(tx, account, _found(tx, known["id"]))


def _forget(tx: Tx, event_id: str) -> None:
    history.forget(tx, [event_id])
    tx.run("DELETE FROM events WHERE id = ?", (event_id,))


def _tells_more(row: Row, known: Row) -> bool:
    """Tell whether a form of a message tells more than what is known of it: content first, then rank."""
    if row["rank"] is None:
        return False
    if known["rank"] == WITHDRAWN:  # yet an echo may be the proof that a send arrived
        return bool(row["kind"] == "message.echo" and known["kind"] == NOTED)
    return (_has_content(row), row["rank"]) > (_has_content(known), known["rank"])


def _has_content(row: Row) -> bool:
    return row["kind"] not in ("message.unsupported", NOTED)


def _of_key(db: Reads, external_account_id: str, dedupe_key: str) -> Row:
    """Return the event with a key; nothing where there is none."""
    sql = "SELECT * FROM events WHERE instagram_account_id = ? AND dedupe_key = ?"
    return db.row(sql, (external_account_id, dedupe_key)) or {}


def _is_seen(db: Reads, known: Row) -> bool:
    """Tell whether a CRM has seen an event, or may have, or will not any more."""
    return known["body"] is not None or bool(known["gone"]) or deliveries.unseen(db, known["id"]) is None


def _payload(event: ChannelEvent) -> str:
    content: dict[str, Any] = {
        "text": event.text,
        "message_type": event.message_type,
        "attachments": [asdict(attachment) for attachment in event.attachments],
        "reply_to": asdict(event.reply_to) if event.reply_to else None,
        "from_account": event.from_account,
        "extra": dict(event.extra),
        "others": dict(event.others),
        "opens": event.opens,
        "raw": event.raw,
    }
    return json.dumps({key: value for key, value in content.items() if value}, ensure_ascii=False)


def _apply(tx: Tx, account: Row, row: Row, ask_s: float = 0.0, act: Act = contacts.NOTHING) -> str:
    """Do what an event asks for and return its new state."""
    if not row["contact"] and row["instagram_message_id"]:
        row = _with_contact(tx, account, row)
    kind = row["kind"]
    if kind == NOTED or (kind != "message.echo" and _brings_nothing(tx, account, row)):
        state = "noted"
    elif kind == "message.read":
        state = _apply_read(tx, account, row)
    elif kind == "message.echo":
        state = _apply_echo(tx, account, row, act)
    else:
        if kind == "message.deleted":
            _withdraw(tx, account, row)
        elif kind == "message.edited":
            _expect(tx, account, row, AWAITED)
        state = _forward(tx, account, row, ask_s, act)
    if state != "forwarded":
        contacts.note(tx, account["id"], row["contact"], act)
        changed: Row = {"state": state, "account_id": account["id"]}
        if state == "noted":  # nobody is owed its content
            changed["payload"] = None
        tx.update("events", changed, "id = ?", [row["id"]])
    return state


def _with_contact(tx: Tx, account: Row, row: Row) -> Row:
    """Find the customer of an event that names only a message, such as an edit without its parties."""
    known = _find(tx, account["id"], row["instagram_message_id"], bodies.MESSAGES)
    sent = messages.find_external(tx, account["id"], row["instagram_message_id"])
    contact = known["contact"] if known else sent["recipient_id"] if sent else ""
    tx.update("events", {"contact": contact}, "id = ?", [row["id"]])
    return {**row, "contact": contact}


def _brings_nothing(tx: Tx, account: Row, row: Row) -> bool:
    """Tell whether an event brings nothing to a CRM: its message was withdrawn, or is here as something else."""
    mid, kind, rank = row["instagram_message_id"], row["kind"], row["rank"]
    if not mid:
        return False
    key = account["instagram_account_id"], message_key(mid)
    if kind == "message.postback":  # it has a key of its own
        known = _of_key(tx, *key)
        if known.get("rank") == WITHDRAWN:
            return True
        is_here = known.get("rank") == RECOVERED and known["kind"] != "message.unsupported"
        return is_here and not _take_back(tx, known["id"])
    if kind == "message.edited":
        rank = _of_key(tx, *key).get("rank")
    if rank in (ANNOUNCED, RECOVERED):
        if kind == "message.unsupported" and messages.find_external(tx, account["id"], mid) is not None:
            return True
        return _find(tx, account["id"], mid, ("message.postback",)) is not None
    return bool(rank == WITHDRAWN)


def _withdraw(tx: Tx, account: Row, row: Row) -> None:
    """Erase what a customer, or the shop, took back: its text and the addresses of its attachments."""
    named = [account["id"], row["instagram_message_id"], row["id"]]
    # An echo that is held may be the only proof that a send arrived; it is erased when it is looked at again.
    where = "account_id = ? AND instagram_message_id = ? AND id <> ? AND state <> 'held'"
    for event in tx.rows(f"SELECT id, kind, payload, body FROM events WHERE {where} AND payload IS NOT NULL", named):
        left = {key: value for key, value in json.loads(event["payload"]).items() if key not in _SAID_NOTHING}
        if "referral" in left.get("extra", {}):
            left["extra"]["referral"]["ad"] = None  # as it came: nobody knows what else is in it
        if event["kind"] in bodies.MESSAGES:
            left["message_type"] = "deleted"
            extra = left.get("extra", {})
            left["extra"] = extra | {name: dict.fromkeys(extra[name]) for name in bodies.TAPPED if extra.get(name)}
        body = bodies.withdrawn(event["kind"], event["body"]) if event["body"] is not None else None
        tx.update("events", {"payload": json.dumps(left, ensure_ascii=False), "body": body}, "id = ?", [event["id"]])
    sent = "account_id = ? AND instagram_message_id = ? AND status <> 'pending'"
    tx.update("outbound_messages", {"content": None}, sent, named[:2])
    if not _expect(tx, account, row, WITHDRAWN):
        key = [account["instagram_account_id"], message_key(row["instagram_message_id"])]
        tx.update("events", {"rank": WITHDRAWN}, "instagram_account_id = ? AND dedupe_key = ?", key)


def _expect(tx: Tx, account: Row, row: Row, rank: int) -> bool:
    """Keep a place for the message that an event is about; False when it is here."""
    place: Row = {"kind": NOTED, "state": "noted", "rank": rank, "dedupe_key": message_key(row["instagram_message_id"])}
    place |= {"id": new_id("evt"), "account_id": account["id"], "received_at": tx.now}
    place |= {"instagram_account_id": account["instagram_account_id"]}
    place |= {name: row[name] for name in ("contact", "occurred_at", "correlation_id")}
    return tx.insert("events", place, once=True)


def _edited(db: Reads, account_id: str, row: Row) -> str | None:
    """Return a message's payload with the newest text, if an edit overtook it: a CRM shows what comes later."""
    payload: str | None = row["payload"]
    is_editable = row["kind"] in ("message.received", "message.echo") and row["rank"] != RECOVERED
    if payload is None or not is_editable or not row["instagram_message_id"]:
        return payload
    edits = db.rows(
        """
        SELECT payload, occurred_at FROM events
        WHERE account_id = ? AND instagram_message_id = ? AND kind = 'message.edited' AND payload IS NOT NULL""",
        (account_id, row["instagram_message_id"]),
    )
    if not edits:
        return payload
    told = [(edit["occurred_at"], json.loads(edit["payload"])) for edit in edits]
    _, newest = max(told, key=lambda edit: (edit[1].get("extra", {}).get("edit", {}).get("number") or 0, edit[0]))
    if "text" not in newest:
        return payload
    return json.dumps({**json.loads(payload), "text": newest["text"]}, ensure_ascii=False)


def _find(db: Reads, account_id: str, external_id: str, kinds: Sequence[str]) -> Row | None:
    # Sorted here: with ORDER BY and LIMIT SQLite reads all of the account's events by their age.
    found = db.rows(
        f"""
        SELECT contact, received_at FROM events
        WHERE account_id = ? AND instagram_message_id = ? AND kind IN ({", ".join("?" * len(kinds))})""",
        (account_id, external_id, *kinds),
    )
    return min(found, key=lambda row: str(row["received_at"]), default=None)


def _forward(tx: Tx, account: Row, row: Row, ask_s: float = 0.0, act: Act = contacts.NOTHING) -> str:
    """Owe the CRM an event, the next of its contact."""
    known = contacts.hear(tx, account["id"], row["contact"], act)
    wait_s = ask_s if _ask(tx, account, row, known) else 0.0
    debt = Debt("crm", account["id"], row["contact"], row["kind"], row["correlation_id"], event_id=row["id"])
    deliveries.owe(tx, debt, push=known["crm_url"] is not None, wait_s=wait_s)
    told: Row = {"state": "forwarded", "account_id": account["id"], "sequence": known["crm_sequence"]}
    if "position" not in row:  # it is new
        tx.update("events", told, "id = ?", [row["id"]])
    else:  # a CRM that reads on must not have read past it: it gets the last place
        told = {**_found(tx, row["id"]), **told, "position": None}
        tx.run("DELETE FROM events WHERE id = ?", (row["id"],))
        tx.insert("events", {**told, "payload": _edited(tx, account["id"], told)})
    return "forwarded"


def _ask(tx: Tx, account: Row, row: Row, known: Row) -> bool:
    """Have the channel asked for what an event does not tell; return whether the answer is worth a short wait."""
    answers = account["status"] == "active" and (account["ask_again_at"] or "") <= tx.now
    if row["rank"] == ANNOUNCED and row["kind"] == "message.unsupported":
        return questions.ask(tx, account["id"], "message", row["instagram_message_id"]) and answers
    if row["kind"] not in _BY_A_PERSON or not answers:
        return False  # the next message asks: nothing piles up meanwhile
    if (known["profile_due"] or "") > tx.now:
        return False
    is_new = questions.ask(tx, account["id"], "profile", row["contact"])
    return is_new and known["profile_checked_at"] is None


def _apply_read(tx: Tx, account: Row, row: Row) -> str:
    external_id = row["instagram_message_id"]
    message = messages.find_external(tx, account["id"], external_id) if external_id else None
    if message is not None:
        sent_until = message["sent_at"]
    elif external_id is None:  # Messenger's form tells a time
        sent_until = json.loads(row["payload"] or "{}").get("extra", {}).get("read_until")
    elif any(one.is_first and one.is_open for one, _ in _tried(tx, account, row["contact"]) if not one.is_reply):
        return "held"
    else:
        # A reply typed elsewhere, known by its echo: everything sent before it was read too.
        sent_until = tx.value(
            "SELECT occurred_at FROM events WHERE account_id = ? AND instagram_message_id = ? AND kind = ?",
            (account["id"], external_id, "message.echo"),
        )
    if sent_until:
        at = row["occurred_at"]
        messages.confirm_read(tx, account["id"], row["contact"], sent_until, at=at)
    return "noted"


def _apply_echo(tx: Tx, account: Row, row: Row, act: Act) -> str:
    external_id, at = row["instagram_message_id"], row["occurred_at"]
    message = messages.find_external(tx, account["id"], external_id)
    if message is not None:
        messages.confirm(tx, message, external_id, row["contact"], at=at)
        return "noted"
    shown, sends = json.loads(row["payload"] or "{}"), _tried(tx, account, row["contact"])
    kinds = [entry["type"] for entry in shown.get("attachments", ())]
    found = matching.whose([tried for tried, _ in sends], shown.get("text") or "", kinds, epoch_s(at))
    if found == "open":
        return "held"
    if isinstance(found, Tried):
        send = next(one for tried, one in sends if tried is found)
        messages.confirm(tx, messages.found(tx, send["message_id"]), external_id, row["contact"], at=at)
        deliveries.end(tx, send, "done", "echo", None)
        tx.update("events", {"state": "noted"}, "id = ?", [row["id"]])
        release_held(tx, account["id"], send["contact"])
        return "noted"
    return "noted" if _brings_nothing(tx, account, row) else _forward(tx, account, row, act=act)


def _tried(db: Reads, account: Row, contact: str) -> list[tuple[Tried, Row]]:
    """Return the sends that an echo or a receipt of a contact can be about, each with its delivery."""
    return [
        (
            Tried(
                sent=json.loads(send["content"] or "{}"),
                began_s=epoch_s(send["tried_at"]) if send["tried_at"] else None,
                is_first=send["place"] == "head",
                is_given_up=send["place"] == "dead",
                is_calling=send["claim_id"] is not None and not send["in_doubt"],
                is_open=send["claim_id"] is not None or bool(send["in_doubt"]),
                is_reply=send["contact"].startswith(deliveries.COMMENT_LANE),
            ),
            send,
        )
        for send in deliveries.unsettled(db, account["id"], contact)
    ]


def _take_back(tx: Tx, event_id: str) -> bool:
    """Have an event not be told that no CRM has seen yet; tell whether that was so."""
    if not deliveries.take_back(tx, event_id):
        return False
    tx.update("events", {"state": "noted", "payload": None, "sequence": None}, "id = ?", [event_id])
    return True


def release_held(tx: Tx, account_id: str, contact: str) -> None:
    """Look again at the echoes and receipts that waited for a send to be settled; runs inside a write."""
    waiting, parameters = "state = 'held' AND account_id = ?", [account_id]
    if not contact.startswith(deliveries.COMMENT_LANE):  # for a private reply anyone's echo may have waited
        waiting, parameters = f"{waiting} AND contact = ?", [account_id, contact]
    held = tx.rows(f"SELECT * FROM events WHERE {waiting} ORDER BY occurred_at, id", parameters)
    account = accounts.find(tx, account_id) if held else None
    if account is None:
        return
    for row in held:
        if _found(tx, row["id"])["state"] == "held":  # one before it may have settled a send, and released it
            _apply(tx, account, row)


def drop_held(tx: Tx, account_id: str) -> None:
    """Note what waited for the sends of an account that is being deleted; runs inside a write."""
    noted = {"state": "noted", "payload": None}
    tx.update("events", noted, "state = 'held' AND account_id = ?", [account_id])


def adopt(db: Database, account: Row, ask_s: float = 0.0) -> int:
    """Route what came for an account before it was configured here; return how many events there were."""
    pages = iter(lambda: _waiting(db, account, 1), [])
    return db.in_steps(pages, lambda tx, _: _adopt_some(tx, account, ask_s))


def _waiting(db: Reads, account: Row, limit: int) -> list[Row]:
    named = account["instagram_account_id"]
    sql = f"SELECT * FROM ({_UNROUTED} UNION {_UNROUTED_PARTY}) ORDER BY occurred_at, id LIMIT ?"
    return db.rows(sql, (named, named, limit))


def _adopt_some(tx: Tx, account: Row, ask_s: float) -> int:
    named = account["instagram_account_id"]
    waiting = _waiting(tx, account, _ADOPT_AT_ONCE)
    for one in waiting:
        row = tx.row("SELECT * FROM events WHERE state = 'unrouted' AND id = ?", (one["id"],))
        if row is None:  # one before it took its place
            continue
        opens = json.loads(row["payload"] or "{}").get("opens")
        if row["instagram_account_id"] != named:
            _forget(tx, row["id"])
            row = {**row, "instagram_account_id": named, "position": None}
            if not tx.insert("events", row, once=True) and not _takes_its_place(tx, account, row, opens):
                continue
            row = _found(tx, row["id"])
        times = {"acted_at": row["occurred_at"], "received_at": row["received_at"]}
        _apply(tx, account, row, ask_s, windows.act(account, row["contact"], opens, **times))
    return len(waiting)


_UNROUTED = "SELECT * FROM events WHERE state = 'unrouted' AND instagram_account_id = ?"
_UNROUTED_PARTY = "SELECT * FROM events WHERE state = 'unrouted' AND party = ?"


def _waits(db: Reads, account: Row) -> bool:
    named = account["instagram_account_id"]
    return bool(db.value(f"SELECT EXISTS ({_UNROUTED}) OR EXISTS ({_UNROUTED_PARTY})", (named, named)))


def _found(db: Reads, event_id: str) -> Row:
    row = db.row("SELECT * FROM events WHERE id = ?", (event_id,))
    if row is None:
        raise LookupError(event_id)
    return row
