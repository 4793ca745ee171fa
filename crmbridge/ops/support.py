"""``crmbridge support-bundle``: what helps somebody else to find a fault, without secrets, texts and names.

The log is let through word by word, by what is known to be harmless; customers' ids become a hash that stays the same
in every bundle of this installation. Knows what to strike out, not what to look for: that is `doctor`.
"""

import contextlib
import hashlib
import hmac
import importlib.metadata
import io
import json
import os
import platform
import re
import secrets
import sqlite3
import ssl
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from crmbridge import __version__, config, log, terminal
from crmbridge.errors import BridgeError
from crmbridge.ops import check, doctor, machine
from crmbridge.store import alerts, overview
from crmbridge.store.database import Database

_LINES, _CALLS = 2000, 300
_ABOUT = """What this is: the state of a crmbridge, for whoever looks for a fault in it. Struck out are tokens, secrets,
message texts, names, free text and the paths of URLs; long numbers, such as customers' ids, are a hash. Host names
stay. Look through it before you give it away.
"""
_URL = re.compile(r"\b([a-z][a-z0-9+.-]*)://([^\s\"'<>\\]*)", re.IGNORECASE)
_ADDRESS = re.compile(r"[\w.+-]+@[\w-]+(\.[\w-]+)+")
_NUMBER = re.compile(r"(?<![0-9A-Za-z])\d{12,}(?![0-9A-Za-z])")
_LINE = re.compile(r"(\d{4}-\d\d-\d\dT[\d:.]+Z) (debug|info|warning|error|alert|critical) ([a-z_.]+)(.*)")
_FACT = re.compile(r" ([a-z_][a-z_.0-9]*)=(\"(?:[^\"\\]|\\.)*\"|\S*)")
_HARMLESS = re.compile(
    r"-?\d{1,10}(\.\d+)?|true|false|\d{4}-\d\d-\d\dT[\d:.]+Z|(acc|cnv|dlv|era|evt|key|msg|req)_[0-9a-z]{12,26}"
)
_WORDS = ("cause", "code", "event", "kind", "method", "mode", "outcome", "schema", "signal", "state", "target")
_WORD = re.compile(r"[A-Za-z_.]{1,40}")
_CODE = ("exception", "python", "route", "sqlite", "trace", "version")
_PATH = re.compile(
    r"|v1|accounts|admin|api|deauthorize|deletion|dlq|docs|events|explain|health|instagram|live|messages|pause|privacy"
    r"|resume|retry|send|stats|status|webhooks"
)
_OUR_CODE = re.compile(r"[\w.@:<> /\"-]+")
_FRAME = re.compile(r'Traceback \(most recent call last\):|\s+File "[^"]+", line \d+, in [\w<>]+')


class Redaction:
    """Strikes out by form what our own texts may hold: credentials, addresses, paths of URLs, long numbers.

    Words of others are left out where the text is made (`check.theirs`): to look for them would tell a short one by the
    gaps that it leaves.
    """

    def __init__(self, key: bytes) -> None:
        self._key = key

    def text(self, text: str) -> str:
        """Return a text of our own without what it quotes."""
        text = _ADDRESS.sub("[address]", _URL.sub(_bare, log.struck(text)))
        return _NUMBER.sub(lambda found: self.hash(found[0]), text)

    def hash(self, word: str) -> str:
        """Return what stands for an id, here and in every other bundle."""
        return "id-" + hmac.new(self._key, word.encode(), hashlib.sha256).hexdigest()[:12]

    def value(self, value: Any) -> Any:
        """Redact every text in a value made of lists and dictionaries."""
        if isinstance(value, dict):
            return {name: self.value(inner) for name, inner in value.items()}
        if isinstance(value, list):
            return [self.value(inner) for inner in value]
        return self.text(value) if isinstance(value, str) else value

    def line(self, line: str) -> str:
        """Return a line of the log with only those facts that cannot hold anything of anybody's."""
        found = _LINE.fullmatch(line)
        if found is None:
            return line if _FRAME.fullmatch(line) else f"[{len(line)} characters]"
        facts = [f"{fact[1]}={self._fact(fact[1], fact[2])}" for fact in _FACT.finditer(found[4])]
        return " ".join([found[1], found[2], found[3], *facts])

    def _fact(self, name: str, value: str) -> str:
        if _HARMLESS.fullmatch(value) or (name in _WORDS and _WORD.fullmatch(value)):
            return value
        if name in _CODE and _OUR_CODE.fullmatch(value) and not _NUMBER.search(value):
            return value
        if name == "path":
            return "/".join(
                part if _PATH.fullmatch(part) or _HARMLESS.fullmatch(part) else "…" for part in value.split("/")
            )
        return self.hash(value) if _NUMBER.fullmatch(value) else "[…]"


def _bare(found: re.Match[str]) -> str:
    """Leave of a URL its scheme and host."""
    with contextlib.suppress(ValueError):
        parts = urlsplit(found[0])
        if parts.hostname:
            rest = "/…" if parts.path.strip("/") or parts.query or parts.fragment else ""
            return f"{parts.scheme}://{parts.hostname}" + (f":{parts.port}" if parts.port else "") + rest
    return f"{found[1]}://…"


def run(path: Path, target: Path | None, *, calls: bool, log_path: Path) -> int:
    """Write the bundle, readable by its maker alone, and print where it is."""
    target = (target or Path(time.strftime("crmbridge-support-%Y%m%d-%H%M%S.tar.gz", time.gmtime()))).absolute()
    # Made before root becomes the data's owner, who may not write here.
    handle = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(handle, "wb") as file:
        report = doctor.examine(path, calls=calls, only=None, log_path=log_path)
        redaction = Redaction(_key(report))
        now_s = int(time.time())
        with tarfile.open(fileobj=file, mode="w:gz") as bundle:
            for name, make in _parts(report, redaction, log_path).items():
                try:
                    content = make()
                except (BridgeError, OSError, ValueError) as error:
                    content = redaction.text(f"could not be made: {type(error).__name__}: {error}\n")
                entry = tarfile.TarInfo(f"crmbridge-support/{name}")
                entry.size, entry.mtime, entry.mode = len(content.encode()), now_s, 0o600
                bundle.addfile(entry, io.BytesIO(content.encode()))
        size = file.tell()
    if report.look.db is not None:
        report.look.db.close()
    terminal.say(
        f"made     {target}, {size} bytes",
        "Secrets, texts, names and customers' ids are struck out; look through it before you give it away.",
    )
    return 0


def _key(report: doctor.Report) -> bytes:
    """Return the key of the hashes: this installation's own, where it has one."""
    if report.settings is not None:
        with contextlib.suppress(OSError):
            return hashlib.sha256(report.settings.vault.key_file.read_bytes()).digest()
    return secrets.token_bytes(32)


def _parts(report: doctor.Report, redaction: Redaction, log_path: Path) -> dict[str, Callable[[], str]]:
    """Return what makes each file of the bundle."""
    settings, db = report.settings, report.look.db

    def outside(one: check.Finding) -> check.Finding:
        return replace(one, what=redaction.text(one.public), todo=redaction.text(one.todo))

    found = doctor.Report([outside(one) for one in report.found], report.figures)

    def told(value: Any) -> str:
        return json.dumps(redaction.value(value), indent=1) + "\n"

    parts = {
        "README.txt": lambda: _ABOUT,
        "doctor.json": lambda: told(found.shown()),
        "doctor.txt": lambda: doctor.told(found, 0, verbose=True) + "\n",
        "versions.txt": _versions,
        "log.txt": lambda: "\n".join(redaction.line(line) for line in machine.tail(log_path)[-_LINES:]) + "\n",
    }
    if settings is not None:
        place = settings.store.path
        parts["configuration.json"] = lambda: told(config.shown(settings))
        parts["check.txt"] = lambda: "".join(
            f"{terminal.escaped(check.line(outside(one)))}\n" for one in report.look.found
        )
        parts["machine.txt"] = lambda: redaction.text(_machine(place))
    if db is not None:
        parts |= {name: _with(told, make, db) for name, make in _TABLES.items()}
    return parts


def _with(told: Callable[[Any], str], make: Callable[[Database], Any], db: Database) -> Callable[[], str]:
    return lambda: told(make(db))


def _alerts(db: Database) -> list[dict[str, Any]]:
    return [{**row, "message": "[…]"} for row in alerts.everything(db) if row["cleared_at"] is None]


def _calls(db: Database) -> list[dict[str, Any]]:
    return overview.calls(db, _CALLS)


_TABLES: dict[str, Callable[[Database], Any]] = {
    "alerts.json": _alerts,
    "calls.json": _calls,
    "schema.json": overview.schema,
    "tables.json": overview.tables,
}


def _versions() -> str:
    lines = [
        f"crmbridge {__version__}",
        f"Python {sys.version}",
        f"SQLite {sqlite3.sqlite_version}",
        ssl.OPENSSL_VERSION,
    ]
    lines.append(f"{platform.system()} {platform.release()} {platform.machine()}")
    for name in ("bcrypt", "bottle", "cryptography", "huey", "peewee", "pydantic", "requests", "urllib3", "waitress"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            lines.append(f"{name} {importlib.metadata.version(name)}")
    with contextlib.suppress(OSError):
        lines.append(Path("/etc/os-release").read_text())
    return "\n".join(lines) + "\n"


def _machine(path: Path) -> str:
    """Tell of memory, space, files and the processes that have the database open."""
    lines = [Path("/proc/meminfo").read_text(), Path("/proc/loadavg").read_text()]
    disk = os.statvfs(path.parent)
    lines.append(f"disk: {disk.f_bavail * disk.f_frsize // 2**20} of {disk.f_blocks * disk.f_frsize // 2**20} MB free")
    for file in sorted(path.parent.iterdir()):
        found = file.lstat()
        lines.append(f"{oct(found.st_mode)} {found.st_uid}:{found.st_gid} {found.st_size:>11} {file.name}")
    for one in machine.processes(path):
        lines.append(f"\npid {one.pid}: {Path(one.words[0]).name}, memory cgroup {machine.cgroup(one.pid)}")
        for name in ("status", "smaps_rollup", "limits"):
            with contextlib.suppress(OSError):
                lines.append(Path(f"/proc/{one.pid}/{name}").read_text())
    return "\n".join(lines) + "\n"
