"""Puts the rooms together, and serves: what a server needs, a worker and a web application made of it."""

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from crmbridge import __version__, config, crm, log, net, vault
from crmbridge.alerts import Alerts, telling
from crmbridge.connecting import Connector
from crmbridge.errors import BridgeError, Misconfigured, Refused, Unclear
from crmbridge.events import Thread, Wake, epoch_s
from crmbridge.instagram.client import Client
from crmbridge.store import accounts, database, messages, vitals
from crmbridge.store.database import Row
from crmbridge.store.deliveries import Claimed, Outcome, Patience

_NAME_TIMEOUT_S = 10.0
_M_ARENA_MAX = -8  # from malloc.h
_PROBED = 20  # accounts whose secrets are opened at a start


@dataclass
class Rooms:
    """What the web server and the worker share."""

    settings: config.Settings
    db: database.Database
    vault: vault.Vault
    client: Client
    crm: net.Session
    reach: net.Reach
    alerts: Alerts
    patience: Patience


def open_rooms(settings: config.Settings) -> Rooms:
    """Open the database and the vault. Raises Misconfigured when that cannot be."""
    db = database.open_existing(settings.store.path, settings.vault.key_file)
    db.require_schema()
    keys_of_secrets = vault.load(settings.vault.key_file)
    for account in accounts.everyone(db)[:_PROBED]:
        if account["access_token_sealed"]:
            accounts.token(keys_of_secrets, account)
    return Rooms(
        settings=settings,
        db=db,
        vault=keys_of_secrets,
        client=open_client(settings),
        crm=crm.open_session(settings.crm, connections=settings.delivery.slots_per_endpoint),
        reach=crm.reach(settings.crm),
        alerts=Alerts(
            db,
            command=settings.alerts.command,
            url=settings.alerts.url,
            repeat_after_s=settings.alerts.repeat_after_s,
            session=telling.open_session(),
        ),
        patience=Patience(
            settings.delivery.crm_give_up_s, settings.delivery.instagram_give_up_s, settings.instagram.profile_wait_s
        ),
    )


def open_client(settings: config.Settings) -> Client:
    """Return what calls Instagram."""
    session = net.Session(
        net.Reach(any_address=True, http=True),  # named in the configuration itself
        connect_timeout_s=settings.instagram.connect_timeout_s,
        timeout_s=settings.instagram.timeout_s,
        connections=settings.delivery.senders,
        read_bytes=512 * 1024,  # a conversation's newest twenty messages
    )
    return Client(session, settings.instagram.graph_url, _more_fields(settings.instagram))


def make_connector(rooms: Rooms, wake: Wake) -> Connector:
    """Return what connects accounts and changes them."""
    return Connector(rooms.db, rooms.vault, rooms.client, rooms.reach, wake=wake, ask_s=rooms.patience.ask_s)


def _more_fields(settings: config.Instagram) -> tuple[str, ...]:
    """Return the webhook fields beyond those of conversations that accounts are subscribed to."""
    comments = ("comments", "live_comments") if settings.comments else ()
    return (*comments, "mentions") if settings.mentions else comments


def make_senders(rooms: Rooms) -> dict[str, Callable[[Claimed], Outcome]]:
    """Return the functions that make one call each, by target and kind. Raises Misconfigured."""

    def to_crm(claimed: Claimed) -> Outcome:
        now_s = time.time()
        posted = crm.post(
            rooms.crm,
            url=claimed.account["crm_webhook_url"],
            secrets=accounts.webhook_secrets(rooms.vault, claimed.account, now_s),
            event_id=claimed.event_id or claimed.id,
            body=claimed.body.encode(),
            correlation_id=claimed.correlation_id,
            now_s=now_s,
        )
        return Outcome("done", http_status=posted.http_status)

    def to_instagram(claimed: Claimed) -> Outcome:
        token = accounts.token(rooms.vault, claimed.account)
        content = json.loads(claimed.body)
        sent = rooms.client.send(token, claimed.account["instagram_account_id"], claimed.contact, content)
        return Outcome(
            "done", http_status=sent.http_status, external_id=sent.external_id, contact=sent.contact, rest_s=sent.rest_s
        )

    read: dict[tuple[str, str], tuple[float, Thread]] = {}  # the last thread that was read answers all doubts in it

    def look_up(claimed: Claimed) -> Outcome:
        token, content = accounts.token(rooms.vault, claimed.account), json.loads(claimed.body)
        contact = content.get("comment_author") if "comment_id" in content else claimed.contact
        if contact is None:
            raise Refused("nobody knows whose conversation a private reply would be in", code="in_doubt")
        key, now_s = (claimed.account_id, contact), rooms.client.clock()
        read_s, thread = read.get(key, (0.0, None))
        if thread is None or read_s < epoch_s(claimed.was_due):
            thread = rooms.client.look_up(token, claimed.account["instagram_account_id"], contact, claimed.account_id)
            read.clear()
            read[key] = now_s, thread
        found = messages.match(rooms.db, claimed, thread)
        if found.kind == "several":
            raise Refused(found.why, code="in_doubt")
        if found.kind == "unclear":
            raise Unclear(found.why, code="unclear")
        if found.kind == "absent":
            return Outcome("absent", "absent", found.why)
        return Outcome("done", "found", external_id=found.external_id)

    return {"crm": to_crm, "instagram": to_instagram, "look_up": look_up}


def make_askers(rooms: Rooms) -> dict[str, Callable[[Row], None]]:
    """Return the functions that ask a far side, by target, whether it takes an account's calls."""

    def ask_crm(account: Row) -> None:
        now_s = time.time()
        secrets = accounts.webhook_secrets(rooms.vault, account, now_s)
        url, account_id = account["crm_webhook_url"], account["id"]
        crm.test(rooms.crm, url=url, secrets=secrets, account_id=account_id, now_s=now_s)

    def ask_instagram(account: Row) -> None:
        token = accounts.token(rooms.vault, account)
        rooms.client.may_write(token, account["instagram_account_id"], account["id"])

    return {"crm": ask_crm, "instagram": ask_instagram}


def make_worker(rooms: Rooms) -> Any:
    """Return the one worker of this database, with what an earlier one left taken back."""
    from crmbridge.clock import Clock
    from crmbridge.delivery import Engine, Schedule
    from crmbridge.health import Limits
    from crmbridge.upkeep import Upkeep
    from crmbridge.watch import Watch
    from crmbridge.worker import Job, Worker

    if not rooms.db.be_the_only_one():
        raise Misconfigured(f"another crmbridge is running on {rooms.settings.store.path}")
    delivery = rooms.settings.delivery
    longest_s = max(rooms.settings.crm.timeout_s, rooms.settings.instagram.timeout_s)
    schedule = Schedule(
        crm_quick_s=delivery.crm_quick_s,
        crm_slow_s=delivery.crm_slow_s,
        instagram_retry_s=delivery.instagram_retry_s,
        instagram_unavailable_s=delivery.instagram_unavailable_s,
        look_up_s=delivery.look_up_s,
        lease_s=longest_s + 60,  # name resolution has no deadline of its own
        senders=delivery.senders,
        patience=rooms.patience,
    )
    limits = Limits(
        slots=delivery.slots_per_endpoint,
        for_first_tries=1,
        probe_s=delivery.probe_s,
        per_s={"instagram": delivery.instagram_sends_per_s},
    )
    clock = Clock()
    engine = Engine(
        rooms.db,
        make_senders(rooms),
        schedule,
        limits,
        rooms.alerts,
        askers=make_askers(rooms),
        conversations=rooms.client.conversations,
        clock=clock,
        down_after_s=rooms.settings.alerts.endpoint_down_after_s,
    )
    recovered = engine.recover()
    if recovered:
        log.warning("worker.recovered", deliveries=recovered)
    upkeep = Upkeep(rooms.db, rooms.settings.retention, rooms.patience, rooms.alerts, clock=clock)
    watch = Watch(rooms.db, rooms.settings.alerts, rooms.alerts)
    worker: Worker

    def ring() -> None:
        worker.ring()

    def listen() -> None:
        if clock.is_trusted():
            watch.listen()

    def backups() -> None:
        if clock.is_trusted():
            watch.backups()

    def resume() -> None:
        if upkeep.resume():
            worker.wake()

    jobs = [
        Job("ring", 5, ring),
        Job("beat", 10, upkeep.beat),
        Job("disk", 10, watch.disk),
        Job("resume", 10, resume),
        Job("sweep", 60, upkeep.sweep),
        Job("expire", 60, upkeep.expire),
        Job("look", 60, watch.look),
        Job("listen", 3600, listen),
        Job("backups", 600, backups),
        Job("prune", 60, upkeep.prune),
        Job("checkpoint", 60, upkeep.checkpoint),
        Job("erase", 60, upkeep.erase),
    ]

    def wake(accounts: Collection[str] | None) -> None:
        worker.wake(accounts)

    helpers = make_helpers(rooms, wake)
    worker = Worker(
        engine,
        rooms.settings.store.queue_path,
        jobs,
        helpers=helpers,
        on_wake=helpers[0].tell,
        alert=rooms.alerts.alert,
        on_thread=rooms.db.checkpoint_here,
        on_thread_end=rooms.db.close_thread,
    )
    upkeep.beat()
    upkeep.sweep()
    return worker


def make_helpers(rooms: Rooms, wake: Wake) -> list[Any]:
    """Return the threads that ask Instagram of themselves; the first one asks for what messages do not tell."""
    from concurrent.futures import ThreadPoolExecutor

    from crmbridge.tending import Aside, Rounds
    from crmbridge.tending.backfill import UNSUBSCRIBED_S, Backfill
    from crmbridge.tending.names import THREADS, Names
    from crmbridge.tending.subscriptions import Subscriptions
    from crmbridge.tending.tokens import Tokens

    db, alerts, instagram = rooms.db, rooms.alerts, rooms.settings.instagram
    session = net.Session(
        net.Reach(any_address=True, http=True),
        connect_timeout_s=instagram.connect_timeout_s,
        timeout_s=min(instagram.timeout_s, _NAME_TIMEOUT_S),
        connections=THREADS,
    )
    asker = Client(session, instagram.graph_url, conversations=rooms.client.conversations)
    pool = ThreadPoolExecutor(THREADS, thread_name_prefix="names")
    asking, tending = Aside("asking", db, alerts), Aside("tending", db, alerts)
    names = Names(db, asker, rooms.vault, rooms.patience.ask_s, wake, pool.submit, tell=asking.tell, clock=time.time)
    common = (db, rooms.client, rooms.vault)
    tokens = Tokens(*common, alerts, clock=time.time)
    subscriptions = Subscriptions(*common, alerts, clock=time.time)
    backfill = Backfill(
        *common,
        wake,
        clock=time.time,
        pause=tending.pause,
        is_stopping=tending.is_stopping,
    )

    def listen() -> None:
        if backfill.notice() > UNSUBSCRIBED_S:
            subscriptions.check(renew=True)

    rounds = Rounds(
        [
            (60, listen),
            (10, backfill.fill),
            (6 * 3600, subscriptions.check),
            (3600, tokens.refresh),
            (3600, names.forget),
        ],
        time.monotonic,
    )
    asking.work, tending.work = names.look, rounds.go
    return [asking, tending]


def make_app(rooms: Rooms, wake: Wake, **clocks: Any) -> Any:
    """Return the web application; `wake` rings the worker, and `clocks` are those that it is to go by."""
    from crmbridge.web import accounts as web_accounts
    from crmbridge.web import admin, public, webhooks
    from crmbridge.web import messages as web_messages
    from crmbridge.web.app import App, Timings

    settings, timings = rooms.settings, Timings()
    secrets, public_url = settings.instagram.app_secrets, settings.web.public_url
    return App(
        rooms.db,
        [
            *public.documents(config.ROOT),
            *public.health(),
            *public.callbacks(secrets, public_url, rooms.alerts, wake),
            *webhooks.routes(settings.instagram, wake, rooms.patience.ask_s, rooms.alerts),
            *web_messages.routes(wake),
            *web_accounts.routes(make_connector(rooms, wake), wake),
            *admin.routes(timings, rooms.patience, wake),
        ],
        alarm=rooms.alerts,
        timings=timings,
        **clocks,
    )


# --- serving ---


def serve(settings: config.Settings) -> None:
    """Run the bridge until a signal ends it. Raises Misconfigured when it cannot begin."""
    _bound_memory()
    log.setup(settings.log.level)
    _say_start(settings)
    rooms = open_rooms(settings)
    worker = make_worker(rooms)
    from crmbridge.web.server import Server

    try:
        server = Server(make_app(rooms, worker.wake), settings.web)
    except (OSError, ValueError) as error:
        where = f"{settings.web.host}:{settings.web.port}"
        raise Misconfigured(f"cannot listen on {where}: {getattr(error, 'strerror', None) or error}") from None
    _stop_on_signals()
    rooms.alerts.start()
    worker.start()
    _say_health(rooms)
    public_url = log.origin(settings.web.public_url) if settings.web.public_url else None
    log.info("serve.ready", url=server.url, public_url=public_url)
    server.run()
    log.info("serve.stopping")
    server.close()
    clean = worker.stop(settings.delivery.stop_grace_s)
    with contextlib.suppress(BridgeError):
        vitals.end(rooms.db, "worker")
    rooms.alerts.stop(5)
    log.info("stopped", calls_left=not clean)
    if not clean:
        # Threads are still inside calls; their leases are looked at by the next start.
        sys.stderr.flush()
        os._exit(0)


def _bound_memory() -> None:
    """Let all threads share two of glibc's heaps: one for each thread costs megabytes and brings nothing here."""
    import ctypes

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none, and need none
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 2)


def _stop_on_signals() -> None:
    def stop(number: int, _frame: object) -> None:
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, signal.SIG_IGN)
        log.info("signal", signal=signal.Signals(number).name)
        raise SystemExit(0)

    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, stop)


def _say_start(settings: config.Settings) -> None:
    import sqlite3

    log.info("start", version=__version__, python=sys.version.split()[0], sqlite=sqlite3.sqlite_version)
    log.info("config", **config.shown(settings))
    for doubt in config.doubts(settings):
        write = log.error if doubt.level == "error" else log.warning
        write("config.doubtful", problem=doubt.problem)


def _say_health(rooms: Any) -> None:
    from crmbridge.store import turn

    log.info(
        "health",
        schema="ok",
        key_file="ok",
        accounts=len(accounts.everyone(rooms.db)),
        **rooms.db.sizes(),
        **{f"pending_{target}": number for target, number in turn.counts(rooms.db).items()},
    )
