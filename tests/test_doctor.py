"""``crmbridge doctor`` on a shop over real HTTPS: nothing to tell of a healthy one, and each planted fault is found."""

import contextlib
import datetime
import json
import os
import re
import shutil
import socket
import sqlite3
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import requests
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from crmbridge import config
from crmbridge.errors import Unavailable
from crmbridge.events import instant
from crmbridge.ops import doctor, machine
from crmbridge.sandbox import Sandbox, wire
from crmbridge.sandbox.meta import VERIFY_TOKEN
from crmbridge.store import accounts, database, sqlite, vitals
from tests.needs import require
from tests.shop import CUSTOMER, OTHER_TOKEN, SHOP_ID, Shop
from tests.test_cli import run
from tests.waiting import PATIENCE_S, free_port, until

NAME = "localhost"
APP_SECRET = "0123456789abcdef0123456789abcdef"
SCHEMA = {
    "type": "object",
    "additionalProperties": False,
    "required": ["schema", "version", "at", "status", "counts", "figures", "findings"],
    "properties": {
        "schema": {"const": 1},
        "version": {"type": "string"},
        "at": {"type": "string"},
        "status": {"enum": [0, 1, 2, 3]},
        "counts": {"type": "object", "additionalProperties": {"type": "integer"}},
        "figures": {"type": "object"},
        "findings": {
            "type": "array",
            "items": {
                "type": "object",
                "additionalProperties": False,
                "required": ["level", "slug", "what", "why", "todo", "account_id"],
                "properties": {
                    "level": {"enum": ["error", "blind", "warning", "note", "ok"]},
                    "slug": {"type": "string", "pattern": "^[a-z_ ]+$"},
                    "what": {"type": "string", "minLength": 3},
                    "why": {"type": "string"},
                    "todo": {"type": "string"},
                    "account_id": {"type": ["string", "null"]},
                },
            },
        },
    },
}


def certificate(folder: Path, name: str, *, days: float, host: str = NAME) -> Path:
    """Make a certificate that signs itself, with its key in one file; whoever names it as trusted trusts it."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host)])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=90))
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem, kind = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    path = folder / f"{name}.pem"
    path.write_bytes(key.private_bytes(pem, kind, serialization.NoEncryption()) + made.public_bytes(pem))
    return path


class Proxy(ThreadingHTTPServer):
    """A reverse proxy with TLS in front; `target` is where it leads."""

    def __init__(self, certificate: Path, target: str) -> None:
        self.target = target
        self.canned: dict[str, bytes] = {}
        self.interim = b""
        self.use(certificate)
        super().__init__(("127.0.0.1", 0), _Forward)
        self.port = self.server_address[1]
        self._thread = threading.Thread(target=self.serve_forever, daemon=True)
        self._thread.start()

    def use(self, certificate: Path) -> None:
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(certificate)

    def get_request(self) -> Any:
        plain, address = self.socket.accept()
        return self.context.wrap_socket(plain, server_side=True, do_handshake_on_connect=False), address

    def handle_error(self, *_: Any) -> None:
        """Callers that do not like the certificate go away."""

    def close(self) -> None:
        self.shutdown()
        self._thread.join(PATIENCE_S)
        self.server_close()


class _Forward(BaseHTTPRequestHandler):
    server: Proxy

    def do_GET(self) -> None:
        body, status = self.server.canned.get(self.path, b""), 200
        if not body:
            try:
                answer = requests.get(self.server.target + self.path, timeout=PATIENCE_S)
                status, body = answer.status_code, answer.content
            except requests.RequestException:
                status, body = 502, b"bad gateway"
        self.wfile.write(self.server.interim)
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


class Stage:
    """A healthy installation, what stands around it, and `doctor` itself."""

    def __init__(self, folder: Path, sandbox: Sandbox) -> None:
        port = free_port()
        self.folder = folder
        self.good = certificate(folder, "good", days=60)
        self.proxy = Proxy(self.good, f"http://127.0.0.1:{port}")
        self.shop = Shop(folder, sandbox)
        self.ini = folder / "crmbridge.ini"
        self.log = folder / "bridge.log"
        values = {
            "port": port,
            "public_url": f"https://{NAME}:{self.proxy.port}",
            "trusted_proxy": "127.0.0.1",
            "graph_url": sandbox.graph_url,
            "app_secrets": APP_SECRET,
            "verify_token": VERIFY_TOKEN,
            "allow_http": "true",
            "allow_networks": "127.0.0.0/8",
            "disk_free_mb": 1,
            "url": f"{sandbox.url}/hook?key=alert-url-secret",
        }
        self.ini.write_text(changed(config.SHIPPED_INI.read_text(), **values))
        self.ini.chmod(0o640)
        self.shop.start()
        self.shop.open()
        self.account_id = self.shop.account_id
        self.shop.bridge.command("backup", str(folder / "var" / "backups") + "/")
        (self.backup,) = (folder / "var" / "backups").iterdir()
        self.shop.wait_rows("SELECT COUNT(*) FROM heartbeats WHERE name IN ('worker', 'listening')", [(2,)])

    def look(self, ini: Path | None = None, **more: Any) -> dict[str, Any]:
        """Return what ``doctor --json`` prints."""
        given = {"calls": True, "only": None, "log_path": self.log, **more}
        report = doctor.examine(ini or self.ini, **given)
        if report.look.db is not None:
            report.look.db.close()
        shown = report.shown()
        jsonschema.validate(shown, SCHEMA)
        return shown

    def with_ini(self, **values: Any) -> Path:
        """Return a configuration with other values, beside the one that the server runs with."""
        planted = self.folder / "planted.ini"
        planted.write_text(changed(self.ini.read_text(), **values))
        planted.chmod(0o640)
        return planted

    def meant(self, column: str, value: Any) -> Callable[[], None]:
        """Change a column of the account, or of an endpoint (``crm.column``); return what changes it back."""
        table, _, column = column.rpartition(".")
        table, kind = ("accounts", "") if not table else ("endpoints", f" WHERE kind = '{table}'")
        ((before,),) = self.shop.rows(f"SELECT {column} FROM {table}{kind}")
        self.execute(f"UPDATE {table} SET {column} = ?{kind}", value)
        return lambda: self.execute(f"UPDATE {table} SET {column} = ?{kind}", before)

    def execute(self, sql: str, *values: Any) -> None:
        with contextlib.closing(sqlite3.connect(self.shop.database, timeout=PATIENCE_S)) as connection, connection:
            connection.execute(sql, values)

    def delivery(self, place: str, **values: Any) -> Callable[[], None]:
        """Write a delivery to the CRM; return what takes it away."""
        now, later = instant(time.time()), instant(time.time() + 80_000)
        row = {
            "id": "dlv_planted", "target": "crm", "account_id": self.account_id, "contact": CUSTOMER,
            "event": "message.received", "place": place, "due": later, "correlation_id": "test",
            "accepted_at": now, "aged_from": now, **values,
        }  # fmt: skip
        marks = ", ".join("?" * len(row))
        self.execute(f"INSERT INTO deliveries ({', '.join(row)}) VALUES ({marks})", *row.values())
        return lambda: self.execute("DELETE FROM deliveries WHERE id = 'dlv_planted'")

    def close(self) -> None:
        self.shop.close()
        self.proxy.close()


def changed(ini: str, **values: Any) -> str:
    for name, value in values.items():
        assert len(re.findall(rf"(?m)^{name} =", ini)) == 1, name
        ini = re.sub(rf"(?m)^{name} =.*$", f"{name} = {value}".replace("\\", r"\\"), ini)
    return ini


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    folder = tmp_path_factory.mktemp("stage")
    with pytest.MonkeyPatch.context() as patch, Sandbox(app_secret=APP_SECRET) as sandbox:
        stage = Stage(folder, sandbox)
        patch.setenv("SSL_CERT_FILE", str(stage.good))
        patch.setattr(sqlite, "BUSY_TIMEOUT_S", 15.0)  # a slow disk may keep the service's lock for longer than usual
        stage.shop.bridge.environ["SSL_CERT_FILE"] = str(stage.good)
        try:
            yield stage
        finally:
            stage.close()


@pytest.fixture
def undo() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


def test_a_healthy_installation_has_nothing_to_be_told(stage: Stage) -> None:
    shown = stage.look()
    told = [one for one in shown["findings"] if one["level"] != "ok"]
    # What depends on this machine and on the sandbox's addresses.
    here = ("sqlite_wal_reset", "clock_unkept", "public_private", "code_writable", "oom_killed")
    assert [one for one in told if one["slug"] not in here] == []
    assert shown["status"] == 0
    assert {
        "health",
        "public",
        "tls",
        "handshake",
        "token",
        "permissions",
        "subscription",
        "crm",
        "memory",
        "backup",
    } <= {one["slug"] for one in shown["findings"]}
    (test,) = [one for one in stage.shop.crm.received if one.event["event"] == "webhook.test"]
    assert test.verified
    assert test.event["account_id"] == stage.account_id
    assert shown["figures"]["processes"][0]["mb"] > 10
    assert shown["figures"]["wal_bytes"] >= 0


def test_interim_answers_of_a_proxy_are_no_answers(stage: Stage, undo: contextlib.ExitStack) -> None:
    undo.callback(setattr, stage.proxy, "interim", b"")
    stage.proxy.interim = b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" * 2
    slugs = {one["slug"] for one in stage.look()["findings"] if one["level"] == "ok"}
    assert {"public", "handshake"} <= slugs


# What is planted, what must be told of it, its level, and words of what to type.
Plant = Callable[[Stage, contextlib.ExitStack], Path | None]
FAULTS: list[tuple[str, str, str, Plant]] = []


def fault(slug: str, level: str, todo: str = "") -> Callable[[Plant], Plant]:
    def add(plant: Plant) -> Plant:
        FAULTS.append((slug, level, todo, plant))
        return plant

    return add


def in_ini(slug: str, level: str, todo: str, **values: Any) -> None:
    def plant(stage: Stage, _: contextlib.ExitStack) -> Path:
        return stage.with_ini(**values)

    FAULTS.append((slug, level, todo, plant))


def in_account(slug: str, level: str, todo: str, column: str, value: Any) -> None:
    def plant(stage: Stage, undo: contextlib.ExitStack) -> None:
        undo.callback(stage.meant(column, value))

    FAULTS.append((slug, level, todo, plant))


def in_crm(slug: str, level: str, todo: str, status: int) -> None:
    def plant(stage: Stage, undo: contextlib.ExitStack) -> None:
        stage.shop.crm.answer_always(status)
        undo.callback(stage.shop.crm.answer_always, None)

    FAULTS.append((slug, level, todo, plant))


DEAD = "http://127.0.0.1:9"
in_ini("app_secrets_empty", "error", "restart crmbridge serve", app_secrets="")
in_ini("verify_token_empty", "warning", "restart crmbridge serve", verify_token="")
in_ini("alerts_unheard", "warning", "crmbridge alert test", url="")
in_ini("look_up_short", "warning", "restart crmbridge serve", look_up_s="4 5")
in_ini("app_secret_odd", "warning", "restart", app_secrets='"not-a-secret"')
in_ini("verify_token_odd", "warning", "openssl rand", verify_token="short")
in_ini("networks_wide", "warning", "CRM's network", allow_networks="0.0.0.0/0")
in_ini("disk_low", "warning", "du -xh", disk_free_mb=1_000_000)
in_ini("public_url_empty", "warning", "public_url =", public_url="")
in_ini("public_http", "error", "reverse proxy", public_url=f"http://{NAME}:9")
in_ini("public_dns", "error", "getent ahosts", public_url="https://nowhere.invalid")
in_ini("public_unreached", "error", "curl -i", public_url=f"https://{NAME}:9")
in_ini("handshake", "error", "restart", verify_token="another-token")
in_ini("proxy_unnamed", "warning", "trusted_proxy = 127.0.0.1", trusted_proxy="")
in_ini("proxy_wrong", "warning", "trusted_proxy = 127.0.0.1", trusted_proxy="10.0.0.1")
in_ini("not_serving", "error", "crmbridge", port=9)
in_ini("instagram_unreached", "error", "metastatus.com", graph_url=f"{DEAD}/v27.0")
in_ini("crm_address_refused", "error", "allow_networks", allow_networks="")
in_account("token_missing", "error", "", "instagram.secret_sealed", None)
in_account("account_held", "warning", "--active", "instagram.held_by", "inactive")
in_account("account_held", "error", "--token - (a new access token)", "instagram.held_by", "error")
in_account("token_expiring", "warning", "account set acc_", "token_expires_at", instant(time.time() + 5 * 86_400))
in_account("http_unneeded", "note", "allow_http = false", "crm.url", "https://crm.invalid/hook")
in_account("crm_dns_failed", "error", "getent ahosts crm.invalid", "crm.url", "https://crm.invalid/hook")
in_account("crm_connect_failed", "error", "CRM's log", "crm.url", f"{DEAD}/hook")
in_crm("crm_unauthorized", "error", "--secret - (the secret that the CRM has)", 401)
in_crm("crm_not_found", "error", "correct the path", 404)
in_crm("crm_gone", "error", "--url URL", 410)
in_crm("crm_redirect", "error", "no redirect is followed", 302)
in_crm("crm_rate_limited", "warning", "or wait", 429)
in_crm("crm_error", "error", "CRM's log", 500)


@fault("ini_broken", "error", "planted.ini")
def unknown_key(stage: Stage, _: contextlib.ExitStack) -> Path:
    planted = stage.with_ini()
    planted.write_text(planted.read_text() + "\nno_such_key = 1\n")
    return planted


@fault("ini_unseen", "blind", "--config")
def no_ini(stage: Stage, _: contextlib.ExitStack) -> Path:
    return stage.folder / "nowhere.ini"


@fault("ini_keys_new", "note", "crmbridge init")
def old_ini(stage: Stage, _: contextlib.ExitStack) -> Path:
    planted = stage.with_ini()
    planted.write_text(planted.read_text().replace("silence_hours = 24\n", ""))
    return planted


@fault("ini_open", "warning", "chmod 640")
def open_ini(stage: Stage, undo: contextlib.ExitStack) -> None:
    stage.ini.chmod(0o644)
    undo.callback(stage.ini.chmod, 0o640)


@fault("key_file", "error", "chmod 600")
def open_key(stage: Stage, undo: contextlib.ExitStack) -> None:
    key = stage.folder / "var" / "crmbridge.key"
    key.chmod(0o644)
    undo.callback(key.chmod, 0o600)


@fault("key_file", "error", "put the saved one back")
def no_key(stage: Stage, _: contextlib.ExitStack) -> Path:
    return stage.with_ini(key_file="var/lost.key")


@fault("database", "error", "crmbridge restore FILE")
def no_database(stage: Stage, _: contextlib.ExitStack) -> Path:
    return stage.with_ini(path="var/lost.db")


@fault("database", "error", "fuser -v ")
def locked(stage: Stage, undo: contextlib.ExitStack) -> Path:
    held = undo.enter_context(contextlib.closing(sqlite3.connect(stage.folder / "var" / "locked.db")))
    held.execute("PRAGMA locking_mode = EXCLUSIVE")
    held.execute("CREATE TABLE IF NOT EXISTS something (id)")
    held.execute("BEGIN EXCLUSIVE")
    return stage.with_ini(path="var/locked.db")


@fault("database", "error", "put a backup back")
def no_sqlite(stage: Stage, undo: contextlib.ExitStack) -> Path:
    broken = stage.folder / "var" / "broken.db"
    broken.write_text("no database " * 1000)
    broken.chmod(0o600)
    undo.callback(broken.unlink)
    return stage.with_ini(path="var/broken.db")


@fault("database", "error", "put a backup back")
def of_another_program(stage: Stage, undo: contextlib.ExitStack) -> None:
    stage.execute("INSERT INTO schema_migration (name, applied) VALUES ('0001_other', '2030-01-01')")
    undo.callback(stage.execute, "DELETE FROM schema_migration WHERE name = '0001_other'")


@fault("data_open", "warning", "chmod -R o-rwx")
def open_data(stage: Stage, undo: contextlib.ExitStack) -> None:
    stage.shop.database.chmod(0o604)
    undo.callback(stage.shop.database.chmod, 0o600)


@fault("data_open", "warning", "/var/backups")
def open_backup(stage: Stage, undo: contextlib.ExitStack) -> None:
    stage.backup.chmod(0o604)
    undo.callback(stage.backup.chmod, 0o600)


@fault("folder_open", "warning", "chmod o-w")
def open_folder(stage: Stage, undo: contextlib.ExitStack) -> None:
    stage.shop.database.parent.chmod(0o707)
    undo.callback(stage.shop.database.parent.chmod, 0o700)


@fault("wrong_owner", "error", "chown -hR")
def foreign_file(stage: Stage, undo: contextlib.ExitStack) -> None:
    require(os.geteuid() == 0, "needs root")
    os.chown(stage.backup, 12345, 12345)
    undo.callback(os.chown, stage.backup, os.geteuid(), os.getegid())


@fault("backup_none", "note", "crmbridge backup")
def no_backup_yet(stage: Stage, undo: contextlib.ExitStack) -> None:
    undo.callback(stage.execute, "UPDATE backups SET error = NULL")
    stage.execute("UPDATE backups SET error = 'planted'")


@fault("backup_none", "warning", "crmbridge backup")
def no_backup(stage: Stage, undo: contextlib.ExitStack) -> None:
    undo.callback(stage.meant("created_at", "2026-01-15T08:00:00.000Z"))
    no_backup_yet(stage, undo)


@fault("backup_old", "warning", "crmbridge backup")
def old_backup(stage: Stage, undo: contextlib.ExitStack) -> None:
    undo.callback(stage.execute, "UPDATE backups SET began_at = ?", instant(time.time()))
    stage.execute("UPDATE backups SET began_at = '2026-01-15T08:00:00.000Z'")


@fault("backup_failed", "warning", "crmbridge backup")
def failed_backup(stage: Stage, undo: contextlib.ExitStack) -> None:
    undo.callback(stage.execute, "DELETE FROM backups WHERE error IS NOT NULL")
    stage.execute("INSERT INTO backups (began_at, ended_at, file, error) SELECT began_at, ended_at, file, 'disk full' "
                  "FROM backups")  # fmt: skip


@fault("disk_full", "error", "df -h")
@fault("unhealthy", "error", "tail -n 50")
def full_disk(stage: Stage, undo: contextlib.ExitStack) -> None:
    reserve = stage.shop.database.with_name("bridge.db.reserve")
    reserve.unlink()
    reserve.symlink_to("/nowhere/at/all")  # it cannot be taken again
    undo.callback(wait_health, stage, 200)
    undo.callback(reserve.unlink)
    wait_health(stage, 503)


def wait_health(stage: Stage, status: int) -> None:
    """Wait until /health says so; it remembers for a second."""
    until(lambda: requests.get(f"{stage.shop.url}/health", timeout=PATIENCE_S).status_code, lambda said: said == status)


@fault("port_taken", "error", "fuser -v")
def other_server(stage: Stage, _: contextlib.ExitStack) -> Path:
    return stage.with_ini(port=stage.shop.sandbox.url.rpartition(":")[2])


@fault("public_unreached", "error", "curl -i")
def lost_proxy(stage: Stage, undo: contextlib.ExitStack) -> None:
    undo.callback(setattr, stage.proxy, "target", stage.proxy.target)
    stage.proxy.target = DEAD


@fault("public_other", "error", "let the proxy lead")
def other_bridge(stage: Stage, undo: contextlib.ExitStack) -> None:
    undo.callback(stage.proxy.canned.clear)
    stage.proxy.canned |= {"/health/live": b'{"status": "alive"}', "/health": b'{"status": "healthy"}'}
    stage.execute("UPDATE heartbeats SET at = '2020-01-01T00:00:00.000Z' WHERE name = 'probe'")


def _shown(stage: Stage, undo: contextlib.ExitStack, made: Path, *, trusted: bool) -> None:
    undo.callback(stage.proxy.use, stage.good)
    stage.proxy.use(made)
    if trusted:
        undo.callback(os.environ.__setitem__, "SSL_CERT_FILE", str(stage.good))
        os.environ["SSL_CERT_FILE"] = str(made)


@fault("tls_untrusted", "error", "openssl s_client")
def self_signed(stage: Stage, undo: contextlib.ExitStack) -> None:
    _shown(stage, undo, certificate(stage.folder, "self", days=60), trusted=False)


@fault("tls_untrusted", "error", "openssl s_client")
def expired(stage: Stage, undo: contextlib.ExitStack) -> None:
    _shown(stage, undo, certificate(stage.folder, "expired", days=-1), trusted=True)


@fault("tls_untrusted", "error", "openssl s_client")
def other_name(stage: Stage, undo: contextlib.ExitStack) -> None:
    _shown(stage, undo, certificate(stage.folder, "other", days=60, host="elsewhere.example"), trusted=True)


@fault("tls_expiring", "warning", "certbot renew")
def soon(stage: Stage, undo: contextlib.ExitStack) -> None:
    _shown(stage, undo, certificate(stage.folder, "soon", days=10), trusted=True)


@fault("tls_expiring", "error", "certbot renew")
def very_soon(stage: Stage, undo: contextlib.ExitStack) -> None:
    _shown(stage, undo, certificate(stage.folder, "now", days=1), trusted=True)


@fault("tls_failed", "error", "openssl s_client")
def no_tls(stage: Stage, undo: contextlib.ExitStack) -> Path:
    plain = undo.enter_context(socket.create_server(("127.0.0.1", 0)))

    def answer() -> None:
        taken, _ = plain.accept()
        with taken:
            taken.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    threading.Thread(target=answer, daemon=True).start()
    return stage.with_ini(public_url=f"https://{NAME}:{plain.getsockname()[1]}")


@fault("clock_behind", "error", "date -u")
def future_beat(stage: Stage, undo: contextlib.ExitStack) -> None:
    beat = "UPDATE heartbeats SET at = ? WHERE name = 'listening'"
    undo.callback(stage.execute, beat, instant(time.time()))
    # the service's own next beat must not take it back
    stage.execute("CREATE TRIGGER planted BEFORE UPDATE ON heartbeats WHEN new.at < old.at "
                  "BEGIN SELECT RAISE(IGNORE); END")  # fmt: skip
    undo.callback(stage.execute, "DROP TRIGGER planted")
    stage.execute(beat, instant(time.time() + 7200))


@fault("clock_off", "warning", "chronyd")
def other_clock(stage: Stage, undo: contextlib.ExitStack) -> None:
    body = {"user_id": SHOP_ID, "username": "your_shop", "id": "24000000000000001"}
    late = {"Date": "Fri, 15 Jan 2021 08:00:00 GMT"}
    for path in ("me", "conversations", "subscribed_apps"):
        stage.shop.meta.fault(path, status=200, body=body, headers=late)
    undo.callback(stage.shop.meta.clear_faults)


@fault("token_refused", "error", "make a new token")
def dead_token(stage: Stage, undo: contextlib.ExitStack) -> None:
    shop = stage.shop.meta.accounts[SHOP_ID]
    undo.callback(setattr, shop, "tokens", shop.tokens)
    shop.tokens = {}


@fault("token_of_another", "error", "make a new token")
def other_token(stage: Stage, undo: contextlib.ExitStack) -> None:
    from crmbridge import vault

    ((end,),) = stage.shop.rows("SELECT id FROM endpoints WHERE kind = 'instagram'")
    sealed = accounts.seal(vault.load(stage.folder / "var" / "crmbridge.key"), end, OTHER_TOKEN)
    undo.callback(stage.meant("instagram.secret_sealed", sealed))


@fault("permission_refused", "error", "App Review")
def no_permission(stage: Stage, undo: contextlib.ExitStack) -> None:
    body = wire.error_body(10, "Application does not have permission for this action")
    stage.shop.meta.fault("conversations", status=403, body=body)
    undo.callback(stage.shop.meta.clear_faults)


@fault("not_subscribed", "error", "six hours")
def unsubscribed(stage: Stage, undo: contextlib.ExitStack) -> None:
    meta = stage.shop.meta
    undo.callback(meta.subscribe, SHOP_ID, meta.accounts[SHOP_ID].subscribed)
    meta.subscribe(SHOP_ID, [])


@fault("crm_timeout", "error", "within 0.5 s")
def slow_crm(stage: Stage, undo: contextlib.ExitStack) -> Path:
    stage.shop.crm.answer_always(200, delay_s=2)
    undo.callback(stage.shop.crm.answer_always, None)
    planted = stage.with_ini()
    planted.write_text(planted.read_text().replace("timeout_s = 15", "timeout_s = 0.5"))
    return planted


@fault("crm_tls_failed", "error", "CRM's certificate")
def crm_certificate(stage: Stage, undo: contextlib.ExitStack) -> None:
    undo.callback(stage.meant("crm.url", f"https://{NAME}:{stage.proxy.port}/hook"))


@fault("crm_unasked", "note")
@fault("deliveries_paused", "warning", "crmbridge account resume")
def paused(stage: Stage, undo: contextlib.ExitStack) -> None:
    stage.shop.bridge.command("account", "pause", stage.account_id, "--deliveries")
    undo.callback(stage.shop.bridge.command, "account", "resume", stage.account_id)


@fault("sends_paused", "warning", "crmbridge account resume")
def sends_paused(stage: Stage, undo: contextlib.ExitStack) -> None:
    stage.shop.bridge.command("account", "pause", stage.account_id, "--sends")
    undo.callback(stage.shop.bridge.command, "account", "resume", stage.account_id)


@fault("webhooks_wait", "warning", "crmbridge explain")
def waiting(stage: Stage, undo: contextlib.ExitStack) -> None:
    undo.callback(stage.delivery("head", accepted_at=instant(time.time() - 7200)))


@fault("webhooks_slow", "warning", "crmbridge explain")
def slow(stage: Stage, undo: contextlib.ExitStack) -> None:
    undo.callback(stage.delivery("done", finished_at=instant(time.time()), latency_ms=9000))


@fault("dead_letters", "warning", "crmbridge dlq list")
def dead(stage: Stage, undo: contextlib.ExitStack) -> None:
    undo.callback(stage.delivery("dead", finished_at=instant(time.time()), last_code="expired"))


@fault("unrouted", "warning", "crmbridge account add --token -")
def unrouted(stage: Stage, undo: contextlib.ExitStack) -> None:
    undo.callback(stage.execute, "DELETE FROM events WHERE state = 'unrouted'")
    entry = wire.envelope("17841499999999999", 1, {"sender": {"id": CUSTOMER}, "recipient": {"id": "17841499999999999"},
                          "timestamp": 1, "message": {"mid": "m", "text": "hello"}})  # fmt: skip
    assert stage.shop.meta.post(entry).status == 200


@fault("alert_crm_down", "warning", "look at the CRM's server")
def alert(stage: Stage, undo: contextlib.ExitStack) -> None:
    values = f"'crm_down', '{stage.account_id}', '2027-01-15T08:00:00.000Z', '', 1, 'it fails', 1, '', 1, 0, NULL"
    stage.execute(f"INSERT INTO alerts VALUES ({values})")
    undo.callback(stage.execute, "DELETE FROM alerts")


@fault("log_large", "warning", "logrotate -f")
def large_log(stage: Stage, undo: contextlib.ExitStack) -> None:
    size = stage.log.stat().st_size
    os.truncate(stage.log, 200 * 2**20)
    undo.callback(os.truncate, stage.log, size)


def _said(stage: Stage, undo: contextlib.ExitStack, line: str) -> None:
    undo.callback(os.truncate, stage.log, stage.log.stat().st_size)
    with stage.log.open("a") as file:
        file.write(f"{instant(time.time())} {line}\n" * 5)


@fault("signatures_wrong", "warning", "app_secrets")
def wrong_signatures(stage: Stage, undo: contextlib.ExitStack) -> None:
    _said(stage, undo, "warning webhook.refused code=signature_mismatch remote=10.0.0.1 bytes=12")


@fault("restarts", "warning", "grep -B 20")
def restarts(stage: Stage, undo: contextlib.ExitStack) -> None:
    _said(stage, undo, "info start version=1.0.0 mode=serve")


@fault("memory_over_budget", "warning", "crmbridge support-bundle")
def much_memory(_: Stage, undo: contextlib.ExitStack) -> None:
    undo.callback(setattr, machine, "LOADED_MB", machine.LOADED_MB)
    machine.LOADED_MB = 1


@fault("wal_large", "warning", "fuser -v")
def large_wal(_: Stage, undo: contextlib.ExitStack) -> None:
    undo.callback(setattr, machine, "_LARGE_WAL_BYTES", machine._LARGE_WAL_BYTES)
    machine._LARGE_WAL_BYTES = -1


@pytest.mark.parametrize(
    ("slug", "level", "todo", "plant"), FAULTS, ids=[f"{row[0]}-{row[3].__name__}" for row in FAULTS]
)
def test_a_planted_fault_is_found_with_what_to_type(
    stage: Stage, undo: contextlib.ExitStack, slug: str, level: str, todo: str, plant: Plant
) -> None:
    shown = stage.look(plant(stage, undo))
    found = [one for one in shown["findings"] if one["slug"] == slug]
    assert found, [one for one in shown["findings"] if one["level"] != "ok"]
    assert found[0]["level"] == level
    assert todo in found[0]["todo"]
    assert found[0]["todo"] or slug == "crm_unasked"
    assert found[0]["why"] or level in ("note", "blind")
    levels = {one["level"] for one in shown["findings"]}
    assert shown["status"] == (2 if "error" in levels else 3 if "blind" in levels else 1 if "warning" in levels else 0)
    for secret in (APP_SECRET, VERIFY_TOKEN, "IGAAtoken", "alert-url-secret", "sandbox-webhook-secret"):
        assert secret not in json.dumps(shown).replace("another-token", "")


# --- as a program ---


def program(stage: Stage, *words: str, ini: Path | None = None, **environ: str) -> subprocess.CompletedProcess[str]:
    given = {"SSL_CERT_FILE": str(stage.good), **environ}
    return run(stage.folder, "doctor", "--config", str(ini or stage.ini), "--log", str(stage.log), *words, **given)


def test_the_program_tells_by_its_exit_status_what_it_found(stage: Stage) -> None:
    well = program(stage)
    assert (well.returncode, well.stderr) == (0, ""), well.stdout
    assert "BROKEN" not in well.stdout
    assert re.search(
        r"^ok  pid \d+ takes \d+ MB \(PSS\); the budget is 52 MB idle and 64 MB", well.stdout, re.MULTILINE
    )
    assert "the token may read and write messages" in program(stage, "--verbose").stdout
    warned = program(stage, "--json", ini=stage.with_ini(url=""))
    assert warned.returncode == json.loads(warned.stdout)["status"] == 1
    broken = program(stage, ini=stage.with_ini(app_secrets=""))
    assert broken.returncode == 2
    assert broken.stdout.splitlines()[1].startswith("1 BROKEN")
    assert broken.stdout.splitlines()[3].startswith("BROKEN  [instagram] app_secrets is empty")
    assert program(stage, ini=stage.folder / "nowhere.ini").returncode == 3


def test_nobody_is_called_when_that_is_not_wanted_and_only_the_account_that_is_named(stage: Stage) -> None:
    stage.shop.crm.reset()
    stage.shop.meta.calls.clear()
    # the running service may tell of an alert meanwhile, at /hook; doctor would call another address
    ini = stage.with_ini(url=f"{stage.shop.sandbox.url}/doctor-alerts")
    quiet = json.loads(program(stage, "--json", "--no-calls", ini=ini).stdout)
    assert {"no_calls"} == {one["slug"] for one in quiet["findings"] if "called" in one["what"]}
    called = [call for call in stage.shop.meta.calls if call.path != "/hook"]
    assert (stage.shop.crm.received, called) == ([], [])
    unknown = program(stage, "--account", "acc_none")
    assert unknown.returncode == 3
    assert "there is no account acc_none" in unknown.stdout
    assert program(stage, "--account", stage.account_id).returncode == 0
    assert [one.event["event"] for one in stage.shop.crm.received] == ["webhook.test"]


def test_what_answers_never_is_not_waited_for(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_ALL_CALLS_S", 8.0)  # all others answer within that
    with socket.create_server(("127.0.0.1", 0)) as mute:
        shown = stage.look(stage.with_ini(public_url=f"https://{NAME}:{mute.getsockname()[1]}"))
    (found,) = [one for one in shown["findings"] if one["level"] == "blind"]
    assert found["what"] == "no answer within 8 s from: public_url"
    assert shown["status"] == 3


def test_an_answer_that_makes_no_sense_is_a_finding(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = {"user_id": SHOP_ID, "data": [{"user_id": SHOP_ID, "subscribed_fields": [["a customer's words"]]}]}
    monkeypatch.setattr("crmbridge.instagram.client.Client.ask", lambda *_: (200, odd))
    (found,) = [one for one in stage.look()["findings"] if one["level"] == "blind"]
    assert (found["slug"], found["account_id"]) == ("unseen_instagram", stage.account_id)
    assert found["what"] == f"could not look at Instagram for {stage.account_id}: TypeError"


def test_what_is_not_ours_in_a_shared_folder_is_left_alone(stage: Stage, undo: contextlib.ExitStack) -> None:
    folder = stage.shop.database.parent
    (folder / "others").write_text("")
    (folder / "others").chmod(0o666)
    undo.callback((folder / "others").unlink)
    if not os.geteuid():
        os.chown(folder / "others", 12345, 12345)
    folder.chmod(0o1777)
    undo.callback(folder.chmod, 0o700)
    found = {one["slug"] for one in stage.look(calls=False)["findings"]}
    assert not {"wrong_owner", "data_open", "folder_open"} & found


def test_code_that_others_may_change_is_found(stage: Stage) -> None:
    code = stage.folder / "code"
    shutil.copytree(config.ROOT / "crmbridge", code / "crmbridge", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(config.SHIPPED_INI, code)
    (code / "crmbridge" / "vault.py").chmod(0o666)
    shown = json.loads(program(stage, "--json", "--no-calls", PYTHONPATH=str(code)).stdout)
    (found,) = [one for one in shown["findings"] if one["slug"] == "code_writable"]
    assert found["level"] == "warning"
    assert "vault.py" in found["what"]
    assert found["todo"] == f"chown -R root:root {code} && chmod -R go-w {code}"


@pytest.mark.parametrize("words", [("serve",), ()], ids=["killed", "stopped"])
def test_a_service_that_is_down_is_found_and_all_else_is_told(fresh_shop: Shop, words: tuple[str, ...]) -> None:
    shop = fresh_shop
    shop.wait_rows("SELECT COUNT(*) FROM heartbeats WHERE name = 'worker'", [(1,)])
    if words:
        shop.kill()
        shop.change("UPDATE heartbeats SET at = '2027-01-15T08:00:00.000Z' WHERE at < '2027'")
        shop.change("UPDATE heartbeats SET at = '2026-01-15T08:00:00.000Z'")
    else:
        shop.close()
    ini = shop.database.parent.parent / "crmbridge.ini"
    text = ini.read_text().replace("port = 0", "port = 9")
    ini.write_text(text)
    done = run(ini.parent, "doctor", "--json")
    assert done.returncode == 2
    found = {one["slug"]: one for one in json.loads(done.stdout)["findings"]}
    assert found["worker_dead"]["level"] == found["not_serving"]["level"] == "error"
    assert found["worker_dead"]["todo"] == "crmbridge serve"
    assert {"token", "crm", "disk", "backup_none"} <= set(found)


def normal(text: str) -> str:
    """Leave out what differs from run to run and from machine to machine, and where lines break."""
    text = re.sub(r"acc_[0-9a-z]{26}", "ACC", text)
    text = re.sub(r"https?://[^\s/;]+", "URL", text)
    text = re.sub(r"\b(localhost|bridge\.example\.com)\b", "HOST", text)
    text = text.replace("rc-service crmbridge restart", "restart crmbridge serve")
    text = text.replace("apt install --only-upgrade libsqlite3-0", "emerge -u dev-db/sqlite")
    return " ".join(re.sub(r"\b\d+(\.\d+)?\b", "N", text).split())


def test_the_document_shows_what_doctor_prints(stage: Stage, undo: contextlib.ExitStack) -> None:
    soon(stage, undo)
    stage.shop.crm.answer_always(401)
    undo.callback(stage.shop.crm.answer_always, None)
    report = doctor.examine(stage.ini, calls=True, only=None, log_path=stage.log)
    assert report.look.db is not None
    report.look.db.close()
    printed = doctor.told(report, 2.1, verbose=False)
    old = doctor.Report([*machine.wal_reset([], (3, 40, 1))])
    told = {normal(block) for block in [*printed.split("\n\n"), *doctor.told(old, 0, verbose=False).split("\n\n")]}
    document = (config.ROOT / "docs" / "operate.md").read_text()
    shown = re.search(r"```\n# crmbridge doctor\n(.*?)```", document, re.DOTALL)
    assert shown is not None
    head, *blocks = shown[1].strip().split("\n\n")
    assert re.fullmatch(r"crmbridge \S+ on \S+, \S+, took \S+ s\n1 BROKEN, 1 WARNING, 1 note, \d+ ok", head)
    found = [block for block in blocks if not block.startswith("ok  ")]
    assert len(found) == 3
    for block in found:
        assert normal(block) in told
    assert f"the budget is {machine.IDLE_MB} MB idle and {machine.LOADED_MB} MB under load" in " ".join(
        shown[1].split()
    )


# --- the WAL-reset bug, and what is claimed of it ---


@pytest.mark.parametrize(
    ("version", "has_it"),
    [
        ((3, 6, 23), False),
        ((3, 40, 1), True),
        ((3, 44, 5), True),
        ((3, 44, 6), False),
        ((3, 45, 0), True),
        ((3, 50, 6), True),
        ((3, 50, 7), False),
        ((3, 51, 2), True),
        ((3, 51, 3), False),
        ((3, 53, 1), False),
    ],
)
def test_versions_of_sqlite_with_the_wal_reset_bug_are_known(version: tuple[int, ...], has_it: bool) -> None:
    assert machine.has_wal_reset(version) == has_it
    assert bool(list(machine.wal_reset([], version))) == has_it


def test_another_program_at_the_database_makes_the_bug_a_warning(stage: Stage) -> None:
    code = "import sqlite3, sys; db = sqlite3.connect(sys.argv[1]); db.execute('SELECT 1 FROM accounts')"
    code += "; print(flush=True); input()"
    words = [sys.executable, "-c", code, str(stage.shop.database)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        (seen,) = [one for one in machine.processes(stage.shop.database) if one.pid == other.pid]
        assert not seen.serves
        (found,) = machine.wal_reset([seen], (3, 40, 1))
        slugs = {one["slug"]: one["level"] for one in stage.look(calls=False)["findings"]}
        other.communicate(b"\n")
    assert (found.level, found.slug) == ("warning", "sqlite_wal_reset")
    assert f"(pid {other.pid}) has the database open, too" in found.what
    assert slugs.get("sqlite_wal_reset", "warning") == "warning"


def test_no_commit_and_no_checkpoint_begins_while_another_process_holds_the_lock(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What doctor claims: commits, with their automatic checkpoints, and checkpoints queue at the .lock file."""
    monkeypatch.setattr(sqlite, "BUSY_TIMEOUT_S", 0.05)
    path = stage.folder / "alone.db"
    with contextlib.closing(database.create(path)) as db:
        db.migrate()
        other = sqlite.FileLock(path.with_name("alone.db.lock"))
        with other.held():
            for job in (db.checkpoint, lambda: vitals.beat(db, "worker", 1), lambda: db.shrink(1)):
                with pytest.raises(Unavailable, match="another process keeps the"):
                    job()
        other.close()
        vitals.beat(db, "worker", 1)
        assert db.checkpoint()
