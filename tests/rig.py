"""The real rooms on a clock that a test sets: SQLite, the engine, and the sandbox over real HTTP; no server process."""

import contextlib
import io
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from wsgiref.util import setup_testing_defaults

from crmbridge import apikey, bridge, config, net, vault
from crmbridge.alerts import Alerts
from crmbridge.clock import Clock
from crmbridge.delivery import Engine, Schedule
from crmbridge.events import instant
from crmbridge.health import NO_ROOM, Limits, Pace
from crmbridge.instagram import webhook
from crmbridge.instagram.client import CONVERSATIONS_PER_S, MEDIA_PER_S
from crmbridge.sandbox import Sandbox, wire
from crmbridge.sandbox.crm import WEBHOOK_SECRET, Received
from crmbridge.sandbox.demo import ini
from crmbridge.sandbox.meta import APP_SECRET
from crmbridge.store import accounts, database, dead, deliveries, endpoints, inbound, keys, messages, turn
from crmbridge.store.contacts import Target
from crmbridge.store.database import Database, Row
from crmbridge.store.deliveries import Claimed
from crmbridge.store.inbound import Kept
from crmbridge.watch import Watch
from tests import spec
from tests.shop import CUSTOMER, SHOP_ID, TOKEN
from tests.waiting import PATIENCE_S

START_S = 1_800_000_000.0
SCHEDULE = {
    "crm_quick_s": (1.0, 2.0, 4.0, 8.0, 16.0),
    "crm_slow_s": (60.0, 300.0, 900.0, 1800.0, 3600.0),
    "instagram_retry_s": (2.0, 10.0, 60.0),
    "instagram_unavailable_s": (5.0, 15.0, 60.0, 300.0, 900.0),
    "look_up_s": (5.0, 30.0),
    "lease_s": 90.0,
    "senders": 6,
}
LIMITS = Limits(slots=3, for_first_tries=1, probe_s=(5.0, 10.0, 30.0, 60.0), per_s={})


class Recorder(Alerts):
    """The alerts, with every cause taken down as (kind, message), and each all-clear of an open one as its kind."""

    def __init__(self, db: Database, clock: Callable[[], float], **settings: Any) -> None:
        reach = net.Reach(any_address=True, http=True)
        session = net.Session(reach, connect_timeout_s=2, timeout_s=PATIENCE_S)
        given: dict[str, Any] = {"command": "", "url": "", "repeat_after_s": 3600.0, **settings}
        super().__init__(db, session=session, clock=clock, **given)
        self.raised: list[tuple[str, str]] = []
        self.cleared: list[str] = []

    def alert(self, kind: str, message: str, **facts: Any) -> None:
        self.raised.append((kind, message))
        super().alert(kind, message, **facts)

    def clear(self, kind: str, *, account: str | None = None, message: str | None = None) -> None:
        if (account or "") in self.opened(kind):
            self.cleared.append(kind)
        super().clear(kind, account=account, message=message)


class Rig:
    """Time stands still between calls of `pass_s`; nothing runs until `drain` is called."""

    def __init__(self, folder: Path, sandbox: Sandbox, settings: str = "") -> None:
        self.now_s = START_S
        self.clock_is_wrong_by_s = 0.0
        self.sandbox = sandbox
        self.meta, self.crm = sandbox.meta, sandbox.crm
        self.meta.echo = "never"
        path = folder / "crmbridge.ini"
        path.write_text(ini(sandbox) + settings)
        self.settings = config.load(path, {})
        vault.create(self.settings.vault.key_file)
        made = database.create(self.settings.store.path)
        made.migrate()
        made.close()
        self._keys = itertools.count()
        self._key = ""
        self.open()
        self.meta.add_account(SHOP_ID, token=TOKEN, app_scoped_id="24000000000000001", username="your_shop")

    def open(self) -> None:
        """Open the rooms on the database as it is now; for who has closed it."""
        self.rooms = bridge.open_rooms(self.settings)
        # Nothing waits for names unless a test asks for them.
        self.rooms.patience = replace(self.rooms.patience, ask_s=0)
        client = self.rooms.client
        client.clock, client.pause = (lambda: self.now_s), (lambda _: None)
        client.conversations = Pace(CONVERSATIONS_PER_S, lambda: self.now_s)
        client.media = Pace(MEDIA_PER_S, lambda: self.now_s)
        self.db, self.patience = self.rooms.db, self.rooms.patience
        self.db.clock = lambda: self.now_s + self.clock_is_wrong_by_s
        self.alarm = Recorder(self.db, lambda: self.now_s)
        self.engine = self.make_engine()
        self._app: Any = None

    @property
    def alerts(self) -> list[tuple[str, str]]:
        """The causes of alerts so far, as (kind, message)."""
        return self.alarm.raised

    @property
    def cleared(self) -> list[str]:
        """The kinds of the all-clears so far."""
        return self.alarm.cleared

    def make_engine(self, limits: Limits = LIMITS, **changes: Any) -> Engine:
        """Return an engine on the rig's clock, with real senders; a second one stands for a second worker."""
        self.clock = Clock(lambda: self.now_s + self.clock_is_wrong_by_s, lambda: self.now_s)
        schedule: dict[str, Any] = {**SCHEDULE, "patience": self.patience, **changes}
        return Engine(
            self.db,
            bridge.make_senders(self.rooms),
            Schedule(**schedule),
            limits,
            self.alarm,
            askers=bridge.make_askers(self.rooms),
            conversations=self.rooms.client.conversations,
            clock=self.clock,
            jitter=lambda: 1.0,
            linger_s=0,
        )

    def watch(self, **limits: Any) -> Watch:
        """Return what looks for trouble, on the rig's clock."""
        return Watch(self.db, replace(self.settings.alerts, **limits), self.alarm, clock=lambda: self.now_s)

    def account(self, instagram_account_id: str = SHOP_ID, **changes: Any) -> dict[str, Any]:
        """Store an account as the API would, without asking Instagram; by name its token, secret, URL and columns."""
        ends = {"token": TOKEN, "secret": WEBHOOK_SECRET, "url": self.sandbox.crm_webhook_url}
        ends |= {name: changes.pop(name) for name in ends.keys() & changes.keys()}
        values = {"instagram_account_id": instagram_account_id, "username": "your_shop", **changes}
        return accounts.create(self.db, self.rooms.vault, values, **ends)

    def change_account(self, account: dict[str, Any], **changes: Any) -> dict[str, Any]:
        """Change an account as a person does, by name its token, secret, URL, status and columns; return it."""
        names = {"secret": "webhook_secret", "token": "access_token", "url": "crm_webhook_url", "status": "status"}
        given = {names[name]: changes.pop(name) for name in names.keys() & changes.keys()}
        return accounts.change(self.db, self.rooms.vault, account["id"], given, changes)[0]

    def fail_account(self, account: dict[str, Any], code: str = "token_expired") -> None:
        """Have Instagram have stopped an account."""
        self.db.write(lambda tx: accounts.stop(tx, account, code, "Instagram refuses it"))

    def pause(
        self, account: dict[str, Any], *what: str, until_s: float | None = None, reason: str | None = "test"
    ) -> None:
        """Hold ``deliveries`` or ``sends`` back, or both, as a person does."""
        until = None if until_s is None else instant(until_s)
        endpoints.pause(self.db, account["id"], what or tuple(endpoints.WHAT), reason=reason, until=until)

    def unpause(self, account: dict[str, Any], *what: str) -> list[bool]:
        """End what a person holds back, of both without a word; tell of each whether there was something."""
        return [endpoints.resume(self.db, account["id"], endpoints.WHAT[one]) for one in what or endpoints.WHAT]

    def break_seal(self, kind: Target) -> None:
        """Have what is sealed for all endpoints of a kind not open."""
        self.by_hand("UPDATE endpoints SET secret_sealed = 'gAAAAABnot-a-seal' WHERE kind = ?", (kind,))

    def settle(self, *finished: turn.Finished) -> turn.Turn:
        """Record what calls came to, and claim nothing."""
        terms = turn.Terms(self.now_s, 90, 5, self.patience)
        return turn.take(self.db, finished, terms, look=(), room=lambda *_: NO_ROOM, senders=0)

    def revive(self, delivery_id: str, *, force: bool = False) -> None:
        """Have a dead delivery tried again."""
        dead.revive(self.db, delivery_id, force=force)

    def expire(self) -> dict[tuple[str, str, str], int]:
        """End what waited past its time."""
        return turn.expire(self.db, self.now_s, self.patience)

    def due(self, kind: Target, account: dict[str, Any]) -> list[Row]:
        """Return what an endpoint could be called for now."""
        one, now = account["id"], instant(self.now_s)
        rows = [row for rank in range(3) for row in deliveries.due(self.db, kind, one, rank, 99)]
        return [row for row in rows if row["due"] <= now]

    def by_hand(self, sql: str, parameters: Sequence[Any] = ()) -> int:
        """Change rows by hand; return how many."""
        return self.db.write_last(lambda tx: tx.run(sql, parameters))

    @property
    def account_id(self) -> str:
        """The id of the one account."""
        return str(self.db.value("SELECT id FROM accounts"))

    def name_customers(self) -> None:
        """Have the channel have told what all customers so far are called."""
        told = {"username": "their_name", "name": "Their Name", "profile_checked_at": instant(self.now_s)}
        values = {**told, "profile_due": instant(self.now_s + 86_400)}
        self.db.write(lambda tx: tx.update("contacts", values, "TRUE", []) and tx.run("DELETE FROM questions"))

    def hear(self, *items: Any, account: str = SHOP_ID) -> list[Kept]:
        """Keep what Meta would post: messaging items in one entry."""
        return self.hear_body(wire.webhook_body(wire.envelope(account, int(self.now_s * 1000), *items)))

    def hear_body(self, body: bytes) -> list[Kept]:
        """Keep a webhook body as the route does."""
        events = webhook.read(body, instant(self.now_s))
        return inbound.keep(self.db, events, correlation_id="test", ask_s=self.patience.ask_s)

    def say(self, text: str, mid: str, *, contact: str = CUSTOMER, at_s: float | None = None) -> list[Kept]:
        """Have a customer write: Instagram's conversation shows it, too."""
        at_ms = int((self.now_s if at_s is None else at_s) * 1000)
        self.meta.customer_says(SHOP_ID, contact, text, mid=mid, timestamp_ms=at_ms, told="never")
        return self.hear(self.item({"message": {"mid": mid, "text": text}}, contact=contact, at_s=at_s))

    def meet(self, *contacts: str) -> None:
        """Have customers write, now a while ago: Instagram's conversations show what is known here, too."""
        for contact in contacts or (CUSTOMER,):
            self.say("hello", f"met-{contact}", contact=contact)
        self.now_s += 60
        self.drain()
        self.crm.received.clear()

    def lose(self, text: str, mid: str, *, contact: str = CUSTOMER) -> None:
        """Have a customer write what the CRM does not take until it is given up; scripted answers are forgotten."""
        self.crm.answer(500, times=1000, containing=f'"{text}"')
        self.say(text, mid, contact=contact)
        self.drain()
        old = "2020-01-01T00:00:00.000Z"
        self.by_hand("UPDATE endpoints SET aged_from = ? WHERE kind = 'crm'", (old,))
        where = "state = 'pending' AND target = 'crm' AND contact = ?"
        self.by_hand(f"UPDATE deliveries SET aged_from = ?, due = ? WHERE {where}", (old, instant(self.now_s), contact))
        self.drain()
        self.crm.clear_answers()

    def resume(self, account: dict[str, Any], *what: str, held: bool = False) -> dict[str, Any]:
        """Let ``deliveries`` or ``sends`` go on, or both, as a person does by the API."""
        body = {"what": list(what or ("deliveries", "sends")), "held": held}
        status, answer = self.call("POST", f"/api/v1/accounts/{account['id']}/resume", body)
        assert status == 200, answer
        return answer

    def change(self, account: dict[str, Any], **fields: Any) -> dict[str, Any]:
        """Change an account as a person does by the API."""
        status, answer = self.call("PUT", f"/api/v1/accounts/{account['id']}", fields)
        assert status == 200, answer
        return answer

    def held(self, account: dict[str, Any]) -> dict[str, Any]:
        """Return what holds an account's deliveries and sends back beside a pause, as the API shows it."""
        status, answer = self.call("GET", f"/api/v1/accounts/{account['id']}")
        assert status == 200, answer
        found: dict[str, Any] = answer["held"]
        return found

    def item(
        self, payload: dict[str, Any], *, contact: str = CUSTOMER, at_s: float | None = None, echo: bool = False
    ) -> dict[str, Any]:
        """Return a messaging item around a payload key."""
        parties = (SHOP_ID, contact) if echo else (contact, SHOP_ID)
        return {
            "sender": {"id": parties[0]},
            "recipient": {"id": parties[1]},
            "timestamp": int((self.now_s if at_s is None else at_s) * 1000),
            **payload,
        }

    def echo(self, text: str, mid: str, *, contact: str = CUSTOMER) -> list[Kept]:
        """Have Meta show a message of the shop in the thread."""
        return self.hear(
            self.item({"message": {"mid": mid, "text": text, "is_echo": True}}, contact=contact, echo=True)
        )

    def send(self, account: dict[str, Any], text: str = "hello", *, contact: str = CUSTOMER) -> str:
        """Accept a send and return its message id."""
        key = f"key-{next(self._keys)}"
        request = messages.Request(account["id"], contact, key, key, {"text": text}, None, "test")
        row, _, _ = messages.accept(self.db, request)
        return str(row["id"])

    def call(self, method: str, path: str, body: Any = None) -> tuple[int, dict[str, Any]]:
        """Call the API on the rig's clock, in this process, as an administrator."""
        if self._app is None:
            self._app = bridge.make_app(self.rooms, lambda _: None, clock=lambda: self.now_s)
            self._key, key_id, secret_hash = apikey.make()
            row = {"id": key_id, "name": "rig", "secret_hash": secret_hash, "admin": 1, "accounts": []}
            keys.create(self.db, {**row, "permissions": [], "created_at": instant(self.now_s)})
        encoded = json.dumps(body).encode() if body is not None else b""
        return self._request(method, path, encoded, {"Authorization": f"Bearer {self._key}"})

    def _request(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, Any]:
        environ: dict[str, Any] = {
            "REQUEST_METHOD": method,
            "PATH_INFO": path,
            "CONTENT_LENGTH": str(len(body)),
            "CONTENT_TYPE": "application/json",
            "wsgi.input": io.BytesIO(body),
            **{f"HTTP_{name.upper().replace('-', '_')}": value for name, value in headers.items()},
        }
        setup_testing_defaults(environ)
        answered: list[tuple[int, str]] = []

        def start(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> None:
            answered.append((int(status[:3]), dict(headers)["Content-Type"]))

        answer = b"".join(self._app(environ, start))
        spec.hold_answer(method, path, *answered[-1], answer)
        return answered[-1][0], json.loads(answer)

    def post_webhook(self, *items: Any, account: str = SHOP_ID) -> None:
        """Have Meta post messaging items in one entry to the route, signed."""
        self.call("GET", "/health/live")  # makes the application
        body = wire.webhook_body(wire.envelope(account, int(self.now_s * 1000), *items))
        status, _ = self._request("POST", "/webhooks/instagram", body, wire.signature_headers(APP_SECRET, body))
        assert status == 200

    def claim(self, row: Row, account: Row) -> Claimed:
        """Claim a due row as a worker does that then makes no call."""
        end, later = endpoints.find(self.db, account["id"], row["target"]), instant(self.now_s + 90)
        assert end is not None
        how: dict[str, Any] = {"lease_until": later, "expires_at": instant(self.now_s + 86_400), "endpoint": end}
        return self.db.write(lambda tx: deliveries.claim(tx, row, account, "{}", **how))

    def drain(self) -> float | None:
        """Work off what is due now; return how many seconds until the next row is due."""
        self.engine.tell()  # as the ring of every five seconds does
        next_s = self.engine.drain()
        return None if next_s is None else next_s - self.now_s

    def pass_s(self, seconds: float) -> float | None:
        """Let time pass, then drain."""
        self.now_s += seconds
        return self.drain()

    def live_through(self, seconds: float) -> int:
        """Drain at each due time for a while, as Huey's schedule would; return how many drains that took."""
        end_s, drains = self.now_s + seconds, 0
        next_s = self.drain()
        while next_s is not None and self.now_s + next_s <= end_s:
            drains += 1
            next_s = self.pass_s(max(next_s, 0.001))
        self.now_s = end_s
        return drains

    def status(self, message_id: str) -> dict[str, Any]:
        """Return what the status route shows."""
        found = messages.status(self.db, message_id)
        assert found is not None
        spec.hold_found(f"/api/v1/messages/{message_id}/status", found)
        return found

    def dead(self) -> list[Row]:
        """Return the dead deliveries, in the order of their death."""
        return self.db.rows("SELECT * FROM deliveries WHERE state = 'dead' ORDER BY finished_at, position")

    def events(self) -> list[str]:
        """Return the names of the events that the CRM took, in order of arrival."""
        return [entry.event["event"] for entry in self.taken()]

    def taken(self) -> list[Received]:
        """Return what the CRM answered with 2xx."""
        return [entry for entry in self.crm.received if 200 <= entry.answered < 300]


@contextlib.contextmanager
def opened(folder: Path, settings: str = "") -> Iterator[Rig]:
    """Yield a rig with its sandbox running."""
    now: list[Rig] = []
    with Sandbox(clock=lambda: now[0].now_s if now else START_S) as sandbox:
        rig = Rig(folder, sandbox, settings)
        now.append(rig)
        try:
            yield rig
        finally:
            rig.engine.stop(0)
            rig.db.close()
