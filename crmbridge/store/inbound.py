"""What a channel told us: keep it once, route it to its account, and owe the CRM what it must hear."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from crmbridge import matching
from crmbridge.events import NOTED, TEST, ChannelEvent, epoch_s, new_id
from crmbridge.store import accounts, bodies, contacts, deliveries, messages, questions, windows
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
        "instagram_message_id": event.external_id,
        "state": "noted" if event.kind in (NOTED, TEST) else "unrouted",
        "payload": None if event.kind in (NOTED, TEST) else _payload(event),
        "occurred_at": event.occurred_at,
        "received_at": tx.now,
        "correlation_id": correlation_id,
    }
    if not tx.insert("events", row, once=True):
        tx.run(
            "INSERT INTO history (subject, at, kind, correlation) SELECT id, ?, 'repeat', ? FROM events"
            " WHERE instagram_account_id = ? AND dedupe_key = ?",
            (tx.now, correlation_id, external_account_id, event.dedupe_key),
        )
        _complete(tx, account, external_account_id, event)
        return Kept("duplicate", event, None, account["id"] if account else None)
    if event.kind == TEST:
        return Kept("noted", event, event_id, None)
    if account is None:
        return Kept("noted" if event.kind == NOTED else "unrouted", event, event_id, None)
    if queues:
        return Kept("queued", event, event_id, account["id"])
    times = {"acted_at": event.occurred_at, "received_at": tx.now}
    act = windows.act(account, event.contact, event.opens, **times, username=event.contact_name)
    return Kept(_apply(tx, account, row, ask_s, act), event, event_id, account["id"])


def _complete(tx: Tx, account: Row | None, external_account_id: str, event: ChannelEvent) -> None:
    """Let a whole message take the place of its mere announcement, as long as no CRM was told of that.

    Only the whole message, if any form of it, tells that an ad led to it.
    """
    if event.kind != "message.received" or event.extra.get("announced"):
        return
    known = tx.row(
        "SELECT id, payload, received_at FROM events WHERE instagram_account_id = ? AND dedupe_key = ?",
        (external_account_id, event.dedupe_key),
    )
    if known is None:
        return
    if account is not None:
        times = {"acted_at": event.occurred_at, "received_at": known["received_at"]}
        contacts.note(tx, account["id"], event.contact, windows.act(account, event.contact, event.opens, **times))
    if '"announced"' not in (known["payload"] or ""):
        return
    unseen = "body IS NULL AND NOT EXISTS (SELECT 1 FROM deliveries WHERE event_id = events.id AND attempts > 0)"
    tx.update("events", {"payload": _payload(event)}, f"id = ? AND {unseen}", [known["id"]])


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
    if kind == NOTED or (kind != "message.echo" and _is_known_otherwise(tx, account, row)):
        state = "noted"
    elif kind == "message.read":
        state = _apply_read(tx, account, row)
    elif kind == "message.echo":
        state = _apply_echo(tx, account, row, act)
    else:
        if kind == "message.deleted":
            _withdraw(tx, account, row)
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


def _is_known_otherwise(tx: Tx, account: Row, row: Row) -> bool:
    """Tell whether an event brings nothing to a CRM: a message that was withdrawn before it came, or the mere
    sign of a new message that is here already."""
    mid = row["instagram_message_id"]
    if mid and row["kind"] in bodies.MESSAGES and not _is_recovered(row) and _was_recovered(tx, account, row):
        return True
    if row["kind"] in ("message.received", "message.echo", "message.edited") and mid:
        withdrawn = _find(tx, account["id"], mid, ("message.deleted",)) is not None
        if withdrawn:
            tx.update("events", {"payload": None}, "id = ?", [row["id"]])
        if withdrawn or not _is_recovered(row):
            return withdrawn
    if row["dedupe_key"] != f"new:{mid}" and not _is_recovered(row):
        return False
    others = [
        known
        for known in _all_about(tx, account["id"], mid, but=row["id"])
        if not _is_announcement(known) or known["contact"].startswith(contacts.ERASED)
    ]
    if row["kind"] == "message.unsupported" and messages.find_external(tx, account["id"], mid) is not None:
        return True
    return bool(others)


def _was_recovered(tx: Tx, account: Row, row: Row) -> bool:
    """Tell whether the CRM has a message already that was found when the channel was asked, maybe as another kind.

    What it has not been told of yet gives way to what the channel tells by itself.
    """
    found = """
        SELECT id, kind, payload FROM events
        WHERE account_id = ? AND instagram_message_id = ? AND id <> ? AND payload IS NOT NULL AND state = 'forwarded'"""
    for known in tx.rows(found, (account["id"], row["instagram_message_id"], row["id"])):
        if known["kind"] not in bodies.MESSAGES or not _is_recovered(known):
            continue
        if _take_back(tx, known["id"]):
            continue
        if known["kind"] != "message.unsupported" or row["kind"] == "message.unsupported":
            return True
    return False


def _is_announcement(row: Row) -> bool:
    """Tell whether an event is the mere sign of a new message, without its content."""
    return bool(row["dedupe_key"] == f"new:{row['instagram_message_id']}")


def _is_recovered(row: Row) -> bool:
    """Tell whether an event was not told by the channel but found when it was asked."""
    payload = row["payload"] or ""
    return '"recovered"' in payload and bool(json.loads(payload).get("extra", {}).get("recovered"))


def _withdraw(tx: Tx, account: Row, row: Row) -> None:
    """Erase what a customer, or the shop, took back: its text and the addresses of its attachments."""
    named = [account["id"], row["instagram_message_id"], row["id"]]
    # An echo that is held may be the only proof that a send arrived; it is erased when it is looked at again.
    where = "account_id = ? AND instagram_message_id = ? AND id <> ? AND state <> 'held'"
    for event in tx.rows(f"SELECT id, payload FROM events WHERE {where} AND payload IS NOT NULL", named):
        left = {key: value for key, value in json.loads(event["payload"]).items() if key not in _SAID_NOTHING}
        if "referral" in left.get("extra", {}):
            left["extra"]["referral"]["ad"] = None  # as it came: nobody knows what else is in it
        withdrawn = json.dumps({**left, "message_type": "deleted"}, ensure_ascii=False)
        tx.update("events", {"payload": withdrawn, "body": None}, "id = ?", [event["id"]])
    sent = "account_id = ? AND instagram_message_id = ? AND status <> 'pending'"
    tx.update("outbound_messages", {"content": None}, sent, named[:2])


def _take_over_edits(tx: Tx, account: Row, row: Row) -> None:
    """Give a message that its own edit overtook the newest text: a CRM shows what has the later sequence."""
    edits = tx.rows(
        """
        SELECT payload, occurred_at FROM events
        WHERE account_id = ? AND instagram_message_id = ? AND kind = 'message.edited' AND payload IS NOT NULL""",
        (account["id"], row["instagram_message_id"]),
    )
    if not edits or row["payload"] is None or _is_recovered(row):
        return
    told = [(edit["occurred_at"], json.loads(edit["payload"])) for edit in edits]
    _, newest = max(told, key=lambda edit: (edit[1].get("extra", {}).get("edit", {}).get("number") or 0, edit[0]))
    if "text" in newest:
        changed = json.dumps({**json.loads(row["payload"]), "text": newest["text"]}, ensure_ascii=False)
        tx.update("events", {"payload": changed}, "id = ?", [row["id"]])


def _find(db: Reads, account_id: str, external_id: str, kinds: Sequence[str], *, but: str = "") -> Row | None:
    # Sorted here: with ORDER BY and LIMIT SQLite reads all of the account's events by their age.
    found = _all_about(db, account_id, external_id, kinds, but=but)
    return min(found, key=lambda row: str(row["received_at"]), default=None)


def _all_about(
    db: Reads, account_id: str, external_id: str, kinds: Sequence[str] = bodies.MESSAGES, *, but: str = ""
) -> list[Row]:
    marks = ", ".join("?" * len(kinds))
    return db.rows(
        f"""
        SELECT id, contact, dedupe_key, instagram_message_id, received_at FROM events
        WHERE account_id = ? AND instagram_message_id = ? AND id <> ? AND kind IN ({marks})""",
        (account_id, external_id, but, *kinds),
    )


def _forward(tx: Tx, account: Row, row: Row, ask_s: float = 0.0, act: Act = contacts.NOTHING) -> str:
    """Owe the CRM an event, the next of its contact."""
    known = contacts.hear(tx, account["id"], row["contact"], act)
    if row["kind"] in ("message.received", "message.echo") and row["instagram_message_id"]:
        _take_over_edits(tx, account, row)
    wait_s = ask_s if _ask(tx, account, row, known) else 0.0
    debt = Debt("crm", account["id"], row["contact"], row["kind"], row["correlation_id"], event_id=row["id"])
    push = account["crm_webhook_url"] is not None
    deliveries.owe(tx, debt, push=push, wait_s=wait_s)
    told: Row = {"state": "forwarded", "account_id": account["id"], "sequence": known["crm_sequence"]}
    if "position" not in row:  # it is new
        tx.update("events", told, "id = ?", [row["id"]])
    else:  # a CRM that reads on must not have read past it: it gets the last place
        told = {**_found(tx, row["id"]), **told}
        del told["position"]
        tx.run("DELETE FROM events WHERE id = ?", (row["id"],))
        tx.insert("events", told)
    return "forwarded"


def _ask(tx: Tx, account: Row, row: Row, known: Row) -> bool:
    """Have the channel asked for what an event does not tell; return whether the answer is worth a short wait."""
    answers = account["status"] == "active" and (account["ask_again_at"] or "") <= tx.now
    if _is_announcement(row):
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
    elif _is_open(deliveries.tried_send(tx, account["id"], row["contact"])):
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
    send = deliveries.tried_send(tx, account["id"], row["contact"])
    if _is_in_flight(send):
        return "held"
    # An error can follow a delivery: a send that waits for its retry is proven by its echo just as one in doubt.
    doubtful = [send] if send else deliveries.given_up_in_doubt(tx, account["id"], row["contact"])
    doubtful += deliveries.tried_behind(tx, account["id"], row["contact"])
    possible = [entry for entry in doubtful if _shows(tx, row, entry)]
    if not possible:
        possible = [entry for entry in deliveries.doubtful_replies(tx, account["id"]) if _shows(tx, row, entry)]
        if any(_is_in_flight(entry) for entry in possible):
            return "held"
    if len(possible) == 1:
        message = messages.found(tx, possible[0]["message_id"])
        messages.confirm(tx, message, external_id, row["contact"], at=at)
        deliveries.end(tx, possible[0], "done", "echo", None)
        tx.update("events", {"state": "noted"}, "id = ?", [row["id"]])
        release_held(tx, account["id"], possible[0]["contact"])
        return "noted"
    is_open = any(_is_open(entry) for entry in (send, *possible))
    if is_open:
        return "held"
    return "noted" if _is_known_otherwise(tx, account, row) else _forward(tx, account, row, act=act)


def _is_in_flight(send: Row | None) -> bool:
    return send is not None and send["claim_id"] is not None and not send["in_doubt"]


def _is_open(send: Row | None) -> bool:
    """Tell whether a send is in flight or in doubt, so that nobody knows yet what it became."""
    return send is not None and (send["claim_id"] is not None or bool(send["in_doubt"]))


def _shows(db: Reads, echo: Row, send: Row) -> bool:
    """Tell whether an echo can be a send in doubt."""
    message = messages.found(db, send["message_id"])
    if message["recipient_id"] not in (echo["contact"], send["contact"]):
        return False  # a private reply to somebody else
    shown = json.loads(echo["payload"] or "{}")
    kinds = [entry["type"] for entry in shown.get("attachments", ())]
    is_since = messages.is_since(send["tried_at"], epoch_s(echo["occurred_at"]))
    text, sent = shown.get("text") or "", messages.content(db, message["id"])
    return is_since and matching.likeness(sent, text, kinds, is_echo=True) == "same"


def replace_announcement(db: Database, account_id: str, external_id: str) -> None:
    """Take back the mere sign of a message, now that the message itself is told, unless the CRM has seen it."""

    def job(tx: Tx) -> None:
        known = _all_about(tx, account_id, external_id)
        signs = [row for row in known if _is_announcement(row)]
        if len(known) == len(signs):
            return
        for row in signs:
            _take_back(tx, row["id"])

    db.write(job)


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
    for row in waiting:
        is_ours = row["instagram_account_id"] == named
        if not is_ours and _is_here(tx, named, row["dedupe_key"]):  # it came again since the account is known
            tx.update("events", {"state": "dropped", "payload": None}, "id = ?", [row["id"]])
            continue
        if not is_ours:
            tx.update("events", {"instagram_account_id": named}, "id = ?", [row["id"]])
        opens = json.loads(row["payload"] or "{}").get("opens")
        times = {"acted_at": row["occurred_at"], "received_at": row["received_at"]}
        _apply(tx, account, row, ask_s, windows.act(account, row["contact"], opens, **times))
    return len(waiting)


_UNROUTED = "SELECT * FROM events WHERE state = 'unrouted' AND instagram_account_id = ?"
_UNROUTED_PARTY = "SELECT * FROM events WHERE state = 'unrouted' AND party = ?"


def _waits(db: Reads, account: Row) -> bool:
    named = account["instagram_account_id"]
    return bool(db.value(f"SELECT EXISTS ({_UNROUTED}) OR EXISTS ({_UNROUTED_PARTY})", (named, named)))


def _is_here(db: Reads, external_account_id: str, dedupe_key: str) -> bool:
    sql = "SELECT 1 FROM events WHERE instagram_account_id = ? AND dedupe_key = ?"
    return db.value(sql, (external_account_id, dedupe_key)) is not None


def _found(db: Reads, event_id: str) -> Row:
    row = db.row("SELECT * FROM events WHERE id = ?", (event_id,))
    if row is None:
        raise LookupError(event_id)
    return row
