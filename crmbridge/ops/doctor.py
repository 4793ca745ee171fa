"""``crmbridge doctor``: all that `check` looks at and all that is live; what is wrong, why it matters, what to type.

Changes nothing; calls Instagram, the CRMs and the bridge itself, each within seconds.
"""

import contextlib
import http.client
import ipaddress
import json
import os
import queue
import re
import secrets
import shlex
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

from crmbridge import __version__, answers, config, crm, log, net, terminal
from crmbridge.alerts import telling
from crmbridge.alerts.kinds import kind_of
from crmbridge.errors import BridgeError, Invalid, Misconfigured, Refused, Retry, Unavailable
from crmbridge.events import epoch_s, instant
from crmbridge.instagram.client import Client, Refusal
from crmbridge.ops import check, health, machine, owner
from crmbridge.ops.check import Finding
from crmbridge.store import accounts, database, endpoints, overview, vitals
from crmbridge.store.database import Row

LOG = Path("/var/log/crmbridge/crmbridge.log")
SCHEMA = 1  # of the JSON
_ORDER = ("error", "blind", "warning", "note", "ok")
_NAMED = {"error": "BROKEN", "blind": "NOT SEEN", "warning": "WARNING", "note": "note", "ok": "ok"}
_CALL_S, _ALL_CALLS_S, _AT_ONCE = 10.0, 40.0, 8
_PROBED_S = 2.0  # /health remembers for a second
_OLD_S, _SLOW_MS, _CLOCK_OFF_S = 900, 5000, 30
_EXPIRES_DAYS, _EXPIRES_NOW_DAYS = 14, 3
_SHOWN = ("level", "slug", "what", "why", "todo", "account_id")
# A warning to `check`, as the bridge may be about to be set up or started, and broken where it should run.
_WORSE = ("deliveries_held", "disk_full", "token_missing", "worker_dead")
_IN_INI = ("app_secret_odd", "app_secret_short", "app_secrets_empty", "look_up_short", "verify_token_empty")
_WHY = {
    "account_held": "what is held waits, in its order, and does not age",
    "alerts_unheard": "at night nobody looks into the log",
    "app_secret_odd": "a secret that is not Meta's matches no signature, and every webhook is refused",
    "app_secret_short": "a forged webhook goes to the CRM, signed by the bridge; a forged request deletes an account",
    "app_secrets_empty": "nothing that customers write gets in, and after an hour of it Meta ends the subscription",
    "ca_file": "the service does not start",
    "cannot_shrink": "the disk space that old rows took is used again, but never given back",
    "database": "the service does not start",
    "dead_letters": "they are tried no more; with their texts they are kept for [retention] text_days",
    "deliveries_held": "the CRM hears nothing; what waits is kept, in its order, and does not age",
    "deliveries_paused": "the CRM hears nothing; what waits is kept, in its order, and does not age",
    "disk_full": "Meta and the CRM get 503 and repeat; after an hour of it Meta ends the subscription",
    "folder_closed": "the service cannot store anything",
    "key_file": "without it tokens and webhook secrets in the database cannot be opened",
    "look_up_short": "a customer gets the same message twice",
    "not_subscribed": "nothing of this account's customers is told",
    "sends_paused": "customers get no answers; what waits is kept, in its order, and does not age",
    "token_expiring": "it is renewed each week, and that has failed for weeks; once it has ended nothing can be sent",
    "token_not_renewed": "it is renewed each week as long as it is good; once it has ended nothing can be sent",
    "token_missing": "nothing can be sent or asked for this account",
    "unrouted": "they are kept for [retention] unrouted_days and go to the account once it is connected",
    "verify_token_empty": "Meta's console refuses the webhook address",
    "worker_dead": "what comes is stored, but nothing goes out",
}
_SET = "${EDITOR:-nano} %s, then: rc-service crmbridge restart"


@dataclass
class Report:
    """What was found, the worst first, with the numbers."""

    found: list[Finding] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    settings: config.Settings | None = None
    look: check.Look = field(default_factory=check.Look)

    @property
    def status(self) -> int:
        """The exit status: 0 all well, 1 warnings, 2 something is broken, 3 something could not be looked at."""
        levels = {one.level for one in self.found}
        return 2 if "error" in levels else 3 if "blind" in levels else 1 if "warning" in levels else 0

    def shown(self) -> dict[str, Any]:
        """Return it as ``--json`` prints it."""
        counts = {level: sum(one.level == level for one in self.found) for level in _ORDER}
        head = {"schema": SCHEMA, "version": __version__, "at": instant(time.time()), "status": self.status}
        shown = [{name: getattr(one, name) for name in _SHOWN} for one in self.found]
        return {**head, "counts": counts, "figures": self.figures, "findings": shown}

    def add(self, name: str, probe: Callable[[], Iterable[Finding]]) -> None:
        """Take a probe's findings; one that fails is a finding of its own."""
        try:
            for one in probe():
                self.found.append(one)
        except Exception as error:  # noqa: BLE001 - also what a far side makes up
            # Their words alone are known to quote nothing: a library's may hold a URL, and what it was called with.
            said = check.message(error) if isinstance(error, BridgeError) else type(error).__name__
            said += f": {error.strerror}" if isinstance(error, OSError) and error.strerror else ""
            todo = "run it as root" if isinstance(error, PermissionError) and os.geteuid() else ""
            slug, account = f"unseen_{name.split(maxsplit=1)[0].lower()}", re.search(r"acc_\w+", name)
            text = f"could not look at {name}: {said}"
            self.found.append(Finding("blind", slug, text, todo=todo, account_id=account[0] if account else None))


def run(path: Path, *, as_json: bool, verbose: bool, calls: bool, only: str | None, log_path: Path) -> int:
    """Look at everything, print what was found and return the exit status."""
    began = time.monotonic()
    report = examine(path, calls=calls, only=only, log_path=log_path)
    if report.look.db is not None:
        report.look.db.close()
    if as_json:
        # ASCII alone, so that it is good on every terminal; DEL is what json leaves as it is.
        terminal.say(*json.dumps(report.shown(), indent=2).replace("\x7f", "\\u007f").split("\n"))
    else:
        terminal.say(*told(report, time.monotonic() - began, verbose=verbose).split("\n"))
    return report.status


def examine(path: Path, *, calls: bool, only: str | None, log_path: Path) -> Report:
    """Look at everything, with the calls and for one account only if so told. As root, become the data's owner."""
    report = Report()
    report.add("versions", machine.versions)
    path = path.absolute()
    try:
        given = report.settings = config.load(path)
    except Misconfigured as error:
        report.found.append(_no_ini(path, check.message(error)))
        return _without_data(report, log_path)
    place = given.store.path
    if _is_strange(place.parent):
        text = f"this user is neither root nor the owner of {place.parent}: what is in there is not seen"
        report.found.append(Finding("blind", "other_user", text, todo="run it as root"))
        return _without_data(report, log_path)
    seen = machine.processes(place)
    service = [one for one in seen if one.serves]
    listener = machine.holder(given.web.port) if given.web.port else None
    report.add("supervisor", lambda: machine.supervised(service))
    report.add("memory", lambda: machine.memory(service))  # as root: others' memory is shown to nobody else
    with contextlib.suppress(OSError):
        owner.become(owner.of(place), place.parent)
    rows = _checked(report, given, path)
    if only and only not in {row["id"] for row in rows}:
        text = f"there is no account {only}"
        report.found.append(Finding("blind", "account_unknown", text, todo="crmbridge account list"))
    _resting(report, given, path, log_path, seen, rows)
    if calls:
        stranger = listener if service and listener and not any(one.pid == listener.pid for one in service) else None
        chosen = [row for row in rows if only in (None, row["id"])]
        report.add("calls", lambda: _calls(report, chosen, stranger))
    else:
        report.found.append(Finding("note", "no_calls", "nobody was called: Instagram, CRMs and the bridge itself"))
    return _sorted(report)


def _checked(report: Report, given: config.Settings, path: Path) -> list[Row]:
    """Look at what `check` looks at; return the accounts."""
    report.look = look = check.look(given)
    report.found += [_explained(one, path, report) for one in look.found]
    if look.db is not None and any(one.slug == "database" and one.level != "ok" for one in look.found):
        look.db.close()
        look.db = None
    return accounts.everyone(look.db) if look.db is not None else []


def _resting(
    report: Report, given: config.Settings, path: Path, log_path: Path, seen: list[machine.Process], rows: list[Row]
) -> None:
    """Look at all for which nobody is called."""
    db, urls = report.look.db, [row["crm_webhook_url"] for row in rows if row["crm_webhook_url"]]
    foreign = [one for one in seen if not any("crmbridge" in word for word in one.words)]
    report.add("sqlite", lambda: machine.wal_reset(foreign))
    report.add("clock", lambda: machine.clock(db))
    report.add("disk", lambda: machine.disk(given, db))
    report.add("files", lambda: machine.files(given, path))
    report.add("configuration", lambda: machine.settings(given, path, urls))
    report.add("backups", lambda: machine.backups(given, db))
    report.add("log", lambda: machine.logged(log_path))
    report.add("queues", lambda: _queues(report))
    report.add("figures", lambda: _figures(report, [one for one in seen if one.serves]))


def _no_ini(path: Path, said: str) -> Finding:
    if os.access(path, os.R_OK):
        return Finding("error", "ini_broken", said, "the service does not start with it", _SET % path)
    todo = "run it as root, or name the file: crmbridge doctor --config FILE"
    return Finding("blind", "ini_unseen", said, "all else is told there", todo)


def _without_data(report: Report, log_path: Path) -> Report:
    report.add("clock", lambda: machine.clock(None))
    report.add("memory", lambda: machine.memory([]))
    report.add("log", lambda: machine.logged(log_path))
    return _sorted(report)


def _is_strange(folder: Path) -> bool:
    try:
        return os.geteuid() not in (0, folder.stat().st_uid)
    except FileNotFoundError:
        return False
    except PermissionError:
        return True


def _explained(one: Finding, path: Path, report: Report) -> Finding:
    """Add to a finding of `check` why it matters, and what a running installation makes of it."""
    why = kind_of(one.slug.removeprefix("alert_")).cause if one.slug.startswith("alert_") else _WHY.get(one.slug, "")
    todo = one.todo or (_SET % path if one.slug in _IN_INI else "")
    if one.slug == "worker_dead":
        todo = check.to_start()
    if one.slug == "database" and one.what.startswith("no database at ") and report.look.keys is not None:
        todo = database.IS_IT_MOUNTED
    elif one.slug in ("database", "key_file") and one.level == "error":
        todo = one.what.rpartition(": ")[2]  # their sentences end with it
        if "cannot be read" in one.what and report.settings is not None:
            key, whose = report.settings.vault.key_file, report.settings.store.path.parent.stat()
            todo = f"chown {whose.st_uid}:{whose.st_gid} {key} && chmod 600 {key}"
    is_worse = one.slug in _WORSE or (one.slug == "account_held" and " is error since " in one.what)
    return replace(one, level="error" if is_worse else one.level, why="" if one.level == "ok" else why, todo=todo)


def _sorted(report: Report) -> Report:
    """Put the worst first, and tell each thing once."""

    def typed(todo: str) -> str:
        return todo if check.is_installed() else todo.replace("rc-service crmbridge restart", "restart crmbridge serve")

    ordered = sorted(report.found, key=lambda one: _ORDER.index(one.level))
    told_of: set[tuple[str, str | None]] = set()
    report.found = []
    for one in ordered:
        if one.level == "ok" or (one.slug, one.account_id) not in told_of:
            told_of.add((one.slug, one.account_id))
            report.found.append(replace(one, what=log.struck(one.what), todo=typed(one.todo)))
    return report


def told(report: Report, seconds: float, *, verbose: bool) -> str:
    """Render the findings for a person at two in the morning."""
    counts = [(_NAMED[level], sum(one.level == level for one in report.found)) for level in _ORDER]
    lines = [f"crmbridge {__version__} on {socket.gethostname()}, {instant(time.time())[:19]}Z, took {seconds:.1f} s"]
    lines.append(", ".join(f"{number} {name}" for name, number in counts if number))
    lines += [line for one in report.found if one.level != "ok" for line in _shown(one)]
    good = [one for one in report.found if one.level == "ok"]
    whole = [one for one in good if verbose or one.slug in ("memory", "sizes")]
    lines += ["", *(line for one in whole for line in terminal.wrapped("ok  ", one.what))]
    if not verbose:
        slugs = dict.fromkeys(one.slug for one in good if one not in whole)
        lines += terminal.wrapped("ok  ", ", ".join(slugs) + "  (--verbose tells them all)")
    return "\n".join(map(terminal.escaped, lines))


def _shown(one: Finding) -> list[str]:
    lines = ["", *terminal.wrapped(f"{_NAMED[one.level]}  ", f"{one.what}  [{one.slug}]")]
    lines += terminal.wrapped("  why:  ", one.why) if one.why else []
    return lines + (["  type: " + one.todo] if one.todo else [])


def _figures(report: Report, service: list[machine.Process]) -> tuple[()]:
    report.figures = machine.figures(report.settings, report.look.db, service)
    return ()


def _queues(report: Report) -> Iterator[Finding]:
    """Look for what has waited for long though nothing holds it, and for slow deliveries."""
    db = report.look.db
    if db is None or report.settings is None:
        return
    tried = report.settings.delivery
    for row in overview.accounts(db):
        one = row["account_id"]
        for target, name in overview.NAMES.items():
            oldest, late = row[f"oldest_pending_{name.removesuffix('s')}_at"], row["latency"][name]
            age_s = time.time() - epoch_s(oldest) if oldest else 0
            if age_s > _OLD_S and endpoints.locked(db, one, target) is None:
                far = "the CRM" if target == "crm" else "Instagram"
                lives_s = tried.crm_give_up_s if target == "crm" else tried.instagram_give_up_s
                yield Finding("warning", f"{name}_wait", f"{one}: {name} to {far} wait for {age_s / 60:.0f} min",
                              f"what waits for {telling.span(lives_s)} is given up and dies",
                              f"crmbridge explain {one}", one)  # fmt: skip
            if late and late["p95_ms"] > _SLOW_MS:
                yield Finding("warning", f"{name}_slow", f"{one}: {name} of the last hour: {overview.said(late)}",
                              "customers wait for it", f"crmbridge explain {one}", one)  # fmt: skip


# --- calls ---


class _Dated(net.Session):
    """A session that remembers how far the far side's clock was off."""

    off_s: float | None = None

    def call(self, *words: Any, **more: Any) -> net.Answer:
        """Make the call, and compare the answer's Date."""
        answer = super().call(*words, **more)
        with contextlib.suppress(ValueError, TypeError):
            said_s = parsedate_to_datetime(answer.headers["Date"] or "").timestamp()
            self.off_s = time.time() - said_s - answer.ms / 2000
        return answer


def _calls(report: Report, rows: list[Row], stranger: machine.Listener | None) -> Iterator[Finding]:
    """Make all calls, several at a time, and tell which did not end in time."""
    given, db = report.settings, report.look.db
    assert given is not None  # noqa: S101
    graph = _Dated(net.Reach(any_address=True, http=True), connect_timeout_s=5, timeout_s=_CALL_S, connections=_AT_ONCE,
                   read_bytes=512 * 1024)  # fmt: skip
    client = Client(graph, given.instagram.graph_url)
    jobs: dict[str, Callable[[], Iterable[Finding]]] = {}
    asked = threading.Event()  # the bridge at its public address: it notes when it is asked, so that has to come first
    jobs["public_url"] = lambda: _public(given, lambda: _last_probe(report), asked)
    jobs["bridge"] = lambda: _bridge(given, stranger, asked)
    for row in rows:
        held = endpoints.locked(db, row["id"], "crm") if db is not None else None
        keys = report.look.keys
        if keys is None:
            break
        with contextlib.suppress(BridgeError):  # `check` told that it does not open
            token = accounts.token(keys, row) if row["access_token_sealed"] else ""
            secret = accounts.webhook_secret(keys, row)
            if token and row["status"] != "inactive":
                jobs[f"Instagram for {row['id']}"] = _with(_instagram, given, client, row, token)
            jobs[f"CRM of {row['id']}"] = _with(_crm, given, row, secret, held)
    told: queue.SimpleQueue[tuple[str, list[Finding]]] = queue.SimpleQueue()
    waiting: queue.SimpleQueue[tuple[str, Callable[[], Iterable[Finding]]]] = queue.SimpleQueue()
    for entry in jobs.items():
        waiting.put(entry)

    def work() -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                name, probe = waiting.get_nowait()
                part = Report()
                part.add(name, probe)
                told.put((name, part.found))

    for _ in range(min(_AT_ONCE, len(jobs))):  # daemons: a name that does not resolve holds nobody up
        threading.Thread(target=work, daemon=True).start()
    ends_s = time.monotonic() + _ALL_CALLS_S
    while jobs:
        try:
            name, found = told.get(timeout=max(ends_s - time.monotonic(), 0))
        except queue.Empty:
            break
        del jobs[name]
        yield from found
    if jobs:
        text = f"no answer within {_ALL_CALLS_S:g} s from: {', '.join(jobs)}"
        yield Finding("blind", "calls_unfinished", text, todo="crmbridge doctor --account ID looks at one alone")
    if graph.off_s is not None and abs(graph.off_s) > _CLOCK_OFF_S:
        text = f"the clock is {abs(graph.off_s):.0f} s {'ahead of' if graph.off_s > 0 else 'behind'} Instagram's"
        yield Finding("warning", "clock_off", text,
                      "a CRM that checks webhook-timestamp refuses events; reply windows are counted wrongly",
                      "chronyd -q 'pool pool.ntp.org iburst'")  # fmt: skip


def _with(probe: Callable[..., Iterable[Finding]], *words: Any) -> Callable[[], Iterable[Finding]]:
    return lambda: probe(*words)


def _local(given: config.Settings) -> str:
    host = health.HERE.get(given.web.host, given.web.host)
    return f"http://[{host}]:{given.web.port}" if ":" in host else f"http://{host}:{given.web.port}"


def _get(base: str, path: str, context: ssl.SSLContext | None = None) -> tuple[int, bytes]:
    """Ask a bridge, by whatever way leads to it; redirects are not followed."""
    url = urlsplit(base)
    made: http.client.HTTPConnection
    if url.scheme == "https":
        made = http.client.HTTPSConnection(url.hostname or "", url.port, timeout=_CALL_S, context=context)
    else:
        made = http.client.HTTPConnection(url.hostname or "", url.port, timeout=_CALL_S)
    headers = {"User-Agent": f"crmbridge/{__version__}"}
    return answers.get(made, url.path.rstrip("/") + path, timeout_s=_CALL_S, headers=headers)


def _is_alive(status: int, body: bytes) -> bool:
    with contextlib.suppress(ValueError, AttributeError):
        return status == 200 and json.loads(body).get("status") == "alive"
    return False


def _bridge(given: config.Settings, stranger: machine.Listener | None, asked: threading.Event) -> Iterator[Finding]:
    """Ask the bridge itself whether it is there and can work."""
    if not given.web.port:
        yield Finding("note", "port_any", "[web] port is 0: nobody knows on which port the bridge listens")
        return
    url = _local(given)
    try:
        alive = _is_alive(*_get(url, "/health/live"))
    except (OSError, http.client.HTTPException) as error:
        yield Finding("error", "not_serving", f"nothing answers at {url}: {check.theirs(str(error))}",
                      "Meta's webhooks are refused; after an hour of it Meta ends the subscription",
                      f"{check.to_start()}; tail -n 50 {LOG}")  # fmt: skip
        return
    if not alive or stranger:
        who = f"{stranger.name} (pid {stranger.pid})" if stranger else "what answers"
        yield Finding("error", "port_taken", f"{who} at {url} is not this bridge",
                      "the bridge cannot listen there; what Meta posts goes to the other program",
                      f"fuser -v {given.web.port}/tcp; end it, or set another [web] port; then {check.to_start()}"
                      )  # fmt: skip
        return
    asked.wait(_ALL_CALLS_S / 4)
    status, body = _get(url, "/health")
    if status == 200:
        yield Finding("ok", "health", f"{url}/health says healthy")
    else:
        with contextlib.suppress(ValueError):
            reasons = "; ".join(json.loads(body).get("reasons", ()))
            yield Finding("error", "unhealthy", f"{url}/health says: {reasons}", "the bridge cannot do its work",
                          f"tail -n 50 {LOG}")  # fmt: skip


def _last_probe(report: Report) -> str | None:
    """Return when a bridge last looked whether it can write into our database."""
    db = report.look.db
    if db is None:
        return None
    try:
        return vitals.last_beat(db, "probe")
    finally:
        db.close_thread()


def _public(given: config.Settings, last_probe: Callable[[], str | None], asked: threading.Event) -> Iterator[Finding]:
    """Go the way that Meta goes: name, certificate, proxy, this very bridge, and the webhook's handshake."""
    try:
        yield from _way_in(given, last_probe)
    finally:
        asked.set()


def _way_in(given: config.Settings, last_probe: Callable[[], str | None]) -> Iterator[Finding]:
    url = urlsplit(given.web.public_url)
    if not url.hostname:
        yield Finding("warning", "public_url_empty", "[web] public_url is empty: the way from outside is not looked at",
                      "Meta reaches the bridge by it, and owners the page about their data's deletion",
                      "public_url = https://YOUR.NAME under [web], then restart")  # fmt: skip
        return
    host, port = url.hostname, url.port or (443 if url.scheme == "https" else 80)
    base, place = f"{url.scheme}://{host}:{port}{url.path}", f"{host}:{port}"
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM)}
    except (socket.gaierror, UnicodeError):
        yield Finding("error", "public_dns", f"the name {host} does not resolve", "Meta cannot find the bridge",
                      f"getent ahosts {host}; set its A or AAAA record at your registrar")  # fmt: skip
        return
    if not any(ipaddress.ip_address(one.partition("%")[0]).is_global for one in found):
        yield Finding("note", "public_private", f"{host} leads to {', '.join(sorted(found))} here, no public address",
                      "if it does so elsewhere, too, Meta cannot reach it", f"dig @9.9.9.9 {host}")  # fmt: skip
    context: ssl.SSLContext | None = None
    if url.scheme == "http":
        yield Finding("error", "public_http", "[web] public_url is plain http", "Meta posts to HTTPS alone",
                      "set up a reverse proxy (docs/operate.md, Reverse proxy), and public_url = https://…"
                      )  # fmt: skip
    else:
        context = ssl.create_default_context()
        trusted = False
        for one in _certificate(host, port, context):
            trusted |= one.level == "ok" or one.slug == "tls_expiring"
            yield one
        if not trusted:
            return
    try:
        status, body = _get(base, "/health/live", context)
        if not _is_alive(status, body):
            raise ValueError(f"HTTP {status}")
    except (OSError, ValueError, http.client.HTTPException) as error:
        said = check.theirs(str(error))
        yield Finding("error", "public_unreached", f"{base}/health/live does not lead to the bridge: {said}",
                      "what Meta posts does not arrive; after an hour of it Meta ends the subscription",
                      f"curl -i {base}/health/live; the proxy must lead to {_local(given)} (docs/operate.md, "
                      "Reverse proxy)"
                      )  # fmt: skip
        return
    began_s = time.time()
    status, body = _get(base, "/health", context)
    last = last_probe() if status == 200 else None
    if last is not None and epoch_s(last) < began_s - _PROBED_S:
        yield Finding("error", "public_other", f"a bridge answers at {base}, but not this one",
                      "what Meta posts goes to another installation",
                      f"let the proxy lead to {_local(given)} on this machine")  # fmt: skip
        return
    yield Finding("ok", "public", f"{base} leads to this bridge")
    if given.instagram.verify_token:
        yield from _handshake(given, base, context, place)


def _certificate(host: str, port: int, context: ssl.SSLContext) -> Iterator[Finding]:
    try:
        raw = socket.create_connection((host, port), timeout=_CALL_S)
    except OSError as error:
        yield Finding("error", "public_unreached", f"no connection to {host}:{port}: {error.strerror or error}",
                      "what Meta posts does not arrive; after an hour of it Meta ends the subscription",
                      f"is the proxy running, the firewall open? From another machine: curl -i https://{host}:{port}/"
                      "health/live")  # fmt: skip
        return
    try:
        with raw, context.wrap_socket(raw, server_hostname=host) as tls:
            ends = str((tls.getpeercert() or {}).get("notAfter"))
    except ssl.SSLCertVerificationError as error:
        yield Finding("error", "tls_untrusted", f"the certificate of {host} is not good: {error.verify_message}",
                      "Meta refuses it, and no webhook arrives",
                      f"openssl s_client -connect {host}:{port} -servername {host} </dev/null | openssl x509 -noout "
                      "-dates -subject -issuer; then renew it, or name the full chain to the proxy")  # fmt: skip
        return
    except OSError as error:
        said = getattr(error, "reason", None) or str(error)
        yield Finding("error", "tls_failed", f"no TLS with {host}:{port}: {said}", "Meta posts to HTTPS alone",
                      f"openssl s_client -connect {host}:{port} -servername {host}")  # fmt: skip
        return
    days = (ssl.cert_time_to_seconds(ends) - time.time()) / 86_400
    if days < _EXPIRES_DAYS:
        level = "error" if days < _EXPIRES_NOW_DAYS else "warning"
        yield Finding(level, "tls_expiring", f"the certificate of {host} ends in {days:.0f} day(s)",  # type: ignore[arg-type]
                      "after that Meta refuses it, and no webhook arrives",
                      "see why it is not renewed: certbot renew --dry-run, or Caddy's log")  # fmt: skip
    else:
        yield Finding("ok", "tls", f"the certificate of {host} is good for {days:.0f} days")


def _handshake(given: config.Settings, base: str, context: ssl.SSLContext | None, place: str) -> Iterator[Finding]:
    challenge = secrets.token_hex(8)
    token = given.instagram.verify_token
    query = urlencode({"hub.mode": "subscribe", "hub.challenge": challenge, "hub.verify_token": token})
    status, body = _get(base, f"/webhooks/instagram?{query}", context)
    if (status, body) == (200, challenge.encode()):
        yield Finding("ok", "handshake", f"{place} gives the answer by which Meta confirms the webhook")
    else:
        yield Finding("error", "handshake", f"{base}/webhooks/instagram does not take the verify token (HTTP {status})",
                      "Meta's console refuses the address; the running bridge has another verify_token, or the proxy "
                      "does not pass the path or the query on", "rc-service crmbridge restart")  # fmt: skip


# --- what is asked for each account ---


def _instagram(given: config.Settings, client: Client, row: Row, token: str) -> Iterator[Finding]:
    """Ask Instagram about the token, the permissions and the subscription."""
    one, about, user = row["id"], check.named(row), row["instagram_account_id"]
    change = f"crmbridge account set {one}"
    renew = check.new_token(one)
    nothing = "nothing can be sent for this account, and its webhooks end"

    def refused(slug: str, error: Invalid) -> Finding:
        hint = error.hint.replace("ACCOUNT", one) if isinstance(error, Refusal) else ""
        todo = renew if not hint or "make a new token" in hint else f"{hint}; then: {change} --active"
        return Finding("error", slug, f"{about}: {check.message(error)}", nothing, todo, one)

    try:
        who = client.whoami(token)
    except Invalid as error:
        yield refused("token_refused", error)
        return
    except Unavailable as error:
        yield Finding("error", "instagram_unreached", f"{about}: {check.message(error)}",
                      f"sends wait, and are given up after {telling.span(given.delivery.instagram_give_up_s)}",
                      f"curl -sI {log.origin(given.instagram.graph_url)}; look at https://metastatus.com", one
                      )  # fmt: skip
        return
    if user not in (who.user_id, who.app_scoped_id):
        yield Finding("error", "token_of_another", f"{about}: the token is of user_id {who.user_id}, not of {user}",
                      nothing, renew, one)  # fmt: skip
        return
    yield Finding("ok", "token", f"{about}: Instagram takes the token", account_id=one)
    try:
        client.ask("GET", f"/{user}/conversations", token, [("platform", "instagram")])
        yield Finding("ok", "permissions", f"{about}: the token may read and write messages", account_id=one)
    except Invalid as error:
        yield refused("permission_refused", error)
    except Unavailable as error:
        yield Finding("blind", "permissions_unseen", f"{about}: {check.message(error)}", account_id=one)
    try:
        _, answer = client.ask("GET", f"/{user}/subscribed_apps", token, [])
    except (Invalid, Unavailable) as error:
        yield Finding("blind", "subscription_unseen", f"{about}: {check.message(error)}", account_id=one)
        return
    apps = answer.get("data")
    listed = [app for app in apps if isinstance(app, dict)] if isinstance(apps, list) else []
    fields = {name for app in listed for name in app.get("subscribed_fields") or ()}
    if "messages" in fields:
        yield Finding("ok", "subscription", f"{about}: Instagram sends its webhooks here", account_id=one)
    else:
        yield Finding("error", "not_subscribed", f"{about}: Instagram says that no app is subscribed to its messages",
                      "nothing that customers write is told",
                      "a new subscription is asked for every six hours, and at once by "
                      f"{change} --token -", one)  # fmt: skip


def _crm(given: config.Settings, row: Row, secret: str | None, held: Row | None) -> Iterator[Finding]:
    """Send the account's CRM a signed test, unless deliveries are held."""
    one, about, url = row["id"], check.named(row), row["crm_webhook_url"]
    if not url:
        yield Finding("ok", "crm", f"{about}: its CRM reads the events itself", account_id=one)
        return
    if held is not None:
        yield Finding("note", "crm_unasked", f"{about}: its CRM was not called, as deliveries are held", account_id=one)
        return
    place, crm_url = log.origin(url), f"crmbridge account set {one} --url URL"
    # What is to be typed holds what somebody set.
    host, address = shlex.quote(urlsplit(url).hostname or ""), place.partition("//")[2]
    tls = shlex.quote(address if re.search(r":\d+\Z", address) else f"{address}:443")
    session = crm.open_session(given.crm, connections=1)
    try:
        crm.test(session, url=url, secrets=[secret] if secret else [], account_id=one, now_s=time.time())
    except (Refused, Retry) as error:
        slug = "crm_not_found" if error.http_status in (404, 405) else error.code
        slug = slug if slug.startswith("crm_") else f"crm_{slug}"
        look = f"look into the CRM's log; curl -sI {shlex.quote(place)}"
        todo = {
            "crm_unauthorized": f"crmbridge account set {one} --secret - (the secret that the CRM has)",
            "crm_not_found": f"correct the path: {crm_url}",
            "crm_gone": f"the CRM wants no more at this URL: {crm_url}",
            "crm_redirect": f"no redirect is followed; name the address that it leads to: {crm_url}",
            "crm_address_refused": "name the CRM's network in [crm] allow_networks, if it is yours, and restart; else "
            + crm_url,
            "crm_dns_failed": f"getent ahosts {host}; or {crm_url}",
            "crm_tls_failed": f"openssl s_client -connect {tls} -servername {host}; mend the CRM's certificate, or "
            "name its CA in [crm] ca_file",
            "crm_timeout": f"the CRM must answer within {given.crm.timeout_s:g} s, before it works: {look}",
            "crm_rate_limited": "let the CRM take more calls, or wait",
        }.get(slug, look)
        level = "warning" if slug == "crm_rate_limited" else "error"
        yield Finding(level, slug, f"{about}: the CRM at {place} did not take a signed test event: "  # type: ignore[arg-type]
                      f"{check.message(error)}",
                      "after 401 or 410 all events are held; after anything else they wait, and die after "
                      + telling.span(given.delivery.crm_give_up_s),
                      todo, one)  # fmt: skip
    else:
        yield Finding("ok", "crm", f"{about}: the CRM at {place} took a signed test event", account_id=one)
