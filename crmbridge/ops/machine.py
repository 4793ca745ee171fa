"""What this machine tells about the bridge without calling anybody: versions, clock, files, processes, memory, log."""

import contextlib
import ctypes
import os
import re
import shlex
import sqlite3
import ssl
import stat
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from crmbridge import config
from crmbridge.events import epoch_s, instant
from crmbridge.ops import check, owner
from crmbridge.ops.check import Finding
from crmbridge.store import accounts, copies, database, vitals

IDLE_MB, LOADED_MB = 52, 64  # the budget of one process, PSS; docs/operate.md tells it
_MB = 2**20
_DAY_S = 86_400
_LARGE_WAL_BYTES = 96 * _MB
_LARGE_LOG_BYTES = 100 * _MB
_TAIL_BYTES = 256 * 1024
_PYTHONS = ((3, 11), (3, 14))
_TIME_ERROR = 5  # adjtimex: nobody keeps the clock


@dataclass(frozen=True)
class Process:
    """A process that has the database open; `mb` is its PSS, or its RSS where that cannot be read."""

    pid: int
    words: tuple[str, ...]
    mb: float
    is_pss: bool
    arenas: str | None

    @property
    def serves(self) -> bool:
        """Whether it is the service, or a part of it."""
        return any("crmbridge" in word for word in self.words) and bool({"serve", "worker"} & set(self.words))


def versions() -> Iterator[Finding]:
    """Look at Python, SQLite and OpenSSL."""
    here = sys.version_info[:2]
    if _PYTHONS[0] <= here <= _PYTHONS[1]:
        yield Finding("ok", "python", f"Python {sys.version.split()[0]}")
    else:
        yield Finding("warning", "python", f"Python {sys.version.split()[0]} is none that crmbridge was tested with",
                      "it may break at any place", "install.sh repair, with Python 3.11 to 3.14 installed")  # fmt: skip
    yield Finding("ok", "sqlite", f"SQLite {sqlite3.sqlite_version}")
    number = ssl.OPENSSL_VERSION_INFO[:3]
    if number >= (3, 0, 0) or "OpenSSL" not in ssl.OPENSSL_VERSION:
        yield Finding("ok", "openssl", ssl.OPENSSL_VERSION)
    else:
        yield Finding("warning", "openssl", f"{ssl.OPENSSL_VERSION} gets no security fixes any more",
                      "every call to Instagram and the CRM goes through it",
                      _by_system("emerge -u dev-libs/openssl", "apt install --only-upgrade libssl3"))  # fmt: skip


def _by_system(gentoo: str, debian: str) -> str:
    return debian if os.path.exists("/etc/debian_version") else gentoo


def has_wal_reset(version: tuple[int, ...]) -> bool:
    """Tell whether a SQLite has the WAL-reset bug: from 3.7.0 on, mended in 3.51.3, 3.50.7 and 3.44.6."""
    is_mended = version >= (3, 51, 3) or (3, 50, 7) <= version < (3, 51) or (3, 44, 6) <= version < (3, 45)
    return version >= (3, 7, 0) and not is_mended


def wal_reset(others: list[Process], version: tuple[int, ...] = sqlite3.sqlite_version_info) -> Iterator[Finding]:
    """Look for the WAL-reset bug, and for other programs beside which it could strike."""
    names = ", ".join(f"{Path(one.words[0]).name} (pid {one.pid})" for one in others)
    if not has_wal_reset(version):
        return
    newer = _by_system("emerge -u dev-db/sqlite", "apt install --only-upgrade libsqlite3-0")
    about = "SQLite {}.{}.{} has the WAL-reset bug (mended in 3.51.3, 3.50.7 and 3.44.6)".format(*version)
    bug = (
        "if a commit of another connection starts the write-ahead log anew just when a checkpoint begins, that takes "
        "part of the new log for carried over; a later checkpoint then leaves commits out: they are lost, or the file "
        "is corrupt. "
    )
    ours = (
        "All commits and checkpoints of crmbridge, in every process, go one by one behind one lock "
        "(the .lock file), so none can begin inside another"
    )
    if names:
        yield Finding("warning", "sqlite_wal_reset", f"{about}, and {names} has the database open, too",
                      f"{bug}{ours}; but others do not take that lock, and may commit or checkpoint at any time",
                      f"end that program, or: {newer}, then restart the service")  # fmt: skip
    else:
        yield Finding("note", "sqlite_wal_reset", about,
                      f"{bug}{ours}. Beside the running service let no other program write into the file",
                      f"{newer} when there is a newer one, then restart the service")  # fmt: skip


def clock(db: database.Database | None) -> Iterator[Finding]:
    """Look for a clock that is behind what it wrote earlier, or that nobody keeps."""
    now_s = time.time()
    made_s = (config.ROOT / "crmbridge" / "__init__.py").stat().st_mtime
    seen = {"crmbridge was installed": made_s}
    for name in ("worker", "listening") if db is not None else ():
        last = vitals.last_beat(db, name)  # type: ignore[arg-type]
        if last:
            seen["the service was alive"] = max(epoch_s(last), seen.get("the service was alive", 0))
    ahead = {what: at_s - now_s for what, at_s in seen.items() if at_s - now_s > 60}
    if ahead:
        what, by_s = max(ahead.items(), key=lambda entry: entry[1])
        yield Finding("error", "clock_behind", f"the clock is behind: {what} {by_s:.0f} s in the future",
                      "what is due waits until the clock is there again, and signatures carry a wrong time",
                      "date -u; then set it: chronyd -q 'pool pool.ntp.org iburst'")  # fmt: skip
    else:
        yield Finding("ok", "clock", "the clock is not behind what was written before")
    adjtimex = getattr(ctypes.CDLL(None), "adjtimex", None)
    if adjtimex is not None and adjtimex(ctypes.create_string_buffer(512)) == _TIME_ERROR:
        yield Finding("note", "clock_unkept", "the kernel knows of nobody who keeps the clock right",
                      "it drifts by seconds a day; a CRM that checks webhook-timestamp refuses what is minutes off",
                      _by_system("emerge net-misc/chrony && rc-update add chronyd default && rc-service chronyd start",
                                 "apt install chrony"))  # fmt: skip


def disk(settings: config.Settings, db: database.Database | None) -> Iterator[Finding]:
    """Look at free space, free inodes and the write-ahead log."""
    folder = settings.store.path.parent
    found = os.statvfs(folder)
    free_mb, least_mb = found.f_bavail * found.f_frsize / 1e6, settings.alerts.disk_free_mb
    room = "free space: du -xh / | sort -h | tail shows where it went"
    if free_mb < least_mb:
        yield Finding("warning", "disk_low", f"{free_mb:.0f} MB are free on the disk of {folder}",
                      f"less than [alerts] disk_free_mb = {least_mb}; on a full disk nothing new is taken", room
                      )  # fmt: skip
    else:
        yield Finding("ok", "disk", f"{free_mb:.0f} MB are free on the disk of {folder}")
    if found.f_files and found.f_favail < 1000:
        yield Finding("warning", "inodes_low", f"{found.f_favail} inodes are free on the disk of {folder}",
                      "without one no file can be made, whatever space there is", "df -i")  # fmt: skip
    wal_bytes = db.sizes()["wal_bytes"] if db is not None else 0
    if wal_bytes > _LARGE_WAL_BYTES:
        yield Finding("warning", "wal_large", f"the database's log has grown to {wal_bytes / _MB:.0f} MB",
                      "somebody has been reading the database in one transaction for long, or no worker runs; reads "
                      "get slower, and the disk fills", f"fuser -v {settings.store.path}")  # fmt: skip


def files(settings: config.Settings, source: Path) -> Iterator[Finding]:
    """Look at whose the files are, who may read them and who may write the code."""
    whose = settings.store.path.parent.stat()
    found = [*_data(settings, whose), *_ini(settings, source, whose), *_code(source, whose)]
    yield from found
    if not {one.slug for one in found} & {"wrong_owner", "data_open", "code_writable"}:
        yield Finding("ok", "files", "owners and modes of the files")


def _data(settings: config.Settings, whose: os.stat_result) -> Iterator[Finding]:
    folder = settings.store.path.parent
    # Only what is ours: the folder may be shared, as /tmp or a home is.
    names = (settings.store.path.name, settings.store.queue_path.name)
    own = [path for path in folder.iterdir() if path.name.startswith(names) or path.name == "backups"]
    own = sorted([*own, *folder.glob("backups/*")])
    strange = []
    for path in own:
        with contextlib.suppress(FileNotFoundError):  # they come and go
            if path.lstat().st_uid != whose.st_uid:
                strange.append(path)
    if strange:
        named = ", ".join(path.name for path in strange[:4]) + (" …" if len(strange) > 4 else "")
        yield Finding("error", "wrong_owner", f"{len(strange)} file(s) in {folder} are of another owner: {named}",
                      "the service cannot open them: it does not start, or fails at any time",
                      f"chown -hR {whose.st_uid}:{whose.st_gid} {_named(folder, strange)}")  # fmt: skip
    open_to = [path for path in own if path.name != "backups" and _others_may(path, 0o007)]
    if open_to:
        yield Finding("warning", "data_open", f"{', '.join(str(path) for path in open_to[:3])} is open to every user",
                      "it holds what customers write", f"chmod -R o-rwx {_named(folder, open_to)}")  # fmt: skip
    if stat.S_IMODE(whose.st_mode) & (0o002 | stat.S_ISVTX) == 0o002:
        yield Finding("warning", "folder_open", f"every user may exchange files in {folder}",
                      "whoever does that has the service read theirs", f"chmod o-w {folder}")  # fmt: skip


def _ini(settings: config.Settings, source: Path, whose: os.stat_result) -> Iterator[Finding]:
    has_secrets = bool(settings.instagram.app_secrets or settings.instagram.verify_token or settings.alerts.url)
    if has_secrets and _others_may(source, 0o004):
        yield Finding("warning", "ini_open", f"{source} is open to every user", "it holds the app secret",
                      f"chmod 640 {source}")  # fmt: skip
    if not os.access(source, os.R_OK):
        yield Finding("error", "ini_closed", f"{source} cannot be read by the user of {settings.store.path.parent}",
                      "the service does not start", f"chgrp {whose.st_gid} {source} && chmod 640 {source}")  # fmt: skip


def _code(source: Path, whose: os.stat_result) -> Iterator[Finding]:
    code = config.ROOT / "crmbridge"
    places = [path for path in (code, *code.rglob("*.py")) if "__pycache__" not in path.parts]
    loose = [path for path in places if _may_write(path.stat(), whose.st_uid)]
    if loose:
        level = "warning" if source.parent == config.SYSTEM_INI.parent or _others_may(loose[0], 0o002) else "note"
        yield Finding(level, "code_writable", f"the service's user may change the code: {loose[0]}",  # type: ignore[arg-type]
                      "whoever breaks into the service stays for good",
                      f"chown -R root:root {config.ROOT} && chmod -R go-w {config.ROOT}")  # fmt: skip


def _named(folder: Path, paths: list[Path]) -> str:
    """Return the entries of a folder in which these paths are, as they are typed."""
    return " ".join(dict.fromkeys(shlex.quote(str(folder / path.relative_to(folder).parts[0])) for path in paths))


def _others_may(path: Path, bits: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        found = path.lstat()
        return bool(stat.S_IMODE(found.st_mode) & bits) and not stat.S_ISLNK(found.st_mode)
    return False


def _may_write(found: os.stat_result, uid: int) -> bool:
    return bool(found.st_mode & 0o002) or (uid != 0 and found.st_uid == uid and bool(found.st_mode & 0o200))


# --- processes and memory ---


def processes(path: Path) -> list[Process]:
    """Return who has the database open, as far as this user may see: root sees all, others their own."""
    found, names = [], {os.path.realpath(f"{path}{ending}") for ending in ("", "-wal", "-shm", ".lock")}
    for place in Path("/proc").iterdir():
        if not place.name.isdigit() or place.name == str(os.getpid()):
            continue
        with contextlib.suppress(OSError):
            if not any(_target(handle) in names for handle in (place / "fd").iterdir()):
                continue
            words = tuple(
                word.decode(errors="replace") for word in (place / "cmdline").read_bytes().split(b"\0") if word
            )
            mb, is_pss = _memory_mb(place)
            arenas = re.search(rb"(?:^|\0)MALLOC_ARENA_MAX=(\d+)", (place / "environ").read_bytes())
            found.append(Process(int(place.name), words or ("?",), mb, is_pss, arenas[1].decode() if arenas else None))
    return found


def _target(handle: Path) -> str:
    with contextlib.suppress(OSError):
        return os.readlink(handle)
    return ""


def _memory_mb(place: Path) -> tuple[float, bool]:
    with contextlib.suppress(OSError):
        found = re.search(r"^Pss: +(\d+) kB", (place / "smaps_rollup").read_text(), re.MULTILINE)
        if found:
            return int(found[1]) / 1024, True
    found = re.search(r"^VmRSS:\s+(\d+) kB", (place / "status").read_text(), re.MULTILINE)
    return (int(found[1]) / 1024 if found else 0.0), False


def supervised(service: list[Process]) -> Iterator[Finding]:
    """Look whether somebody starts the service again when it ends."""
    for one in service if check.is_installed() else ():
        found = re.search(r"^PPid:\s+(\d+)", Path(f"/proc/{one.pid}/status").read_text(), re.MULTILINE)
        parent = Path(f"/proc/{found[1] if found else 0}/cmdline")
        if not parent.exists() or b"supervise-daemon" not in parent.read_bytes().partition(b"\0")[0]:
            yield Finding("warning", "unsupervised", f"process {one.pid} has no supervisor",
                          "when it ends or hangs, nobody starts it again", "rc-service crmbridge restart")  # fmt: skip


def memory(service: list[Process]) -> Iterator[Finding]:
    """Hold the service's memory against the budget, and what the machine or its cgroup has left."""
    budget = f"the budget is {IDLE_MB} MB idle and {LOADED_MB} MB under load, a process"
    for one in service:
        kind = "PSS" if one.is_pss else "RSS"
        arenas = f"MALLOC_ARENA_MAX={one.arenas}" if one.arenas else "malloc arenas bounded to 2 by the program itself"
        text = f"pid {one.pid} takes {one.mb:.0f} MB ({kind}); {budget}; {arenas}"
        if one.is_pss and one.mb > LOADED_MB:
            yield Finding("warning", "memory_over_budget", text, "something holds more than it should, or leaks",
                          "crmbridge support-bundle, for a report; then rc-service crmbridge restart")  # fmt: skip
        else:
            yield Finding("ok", "memory", text)
    used, limit, kills = cgroup(service[0].pid if service else os.getpid())
    if limit is not None:
        text = f"the cgroup uses {used / _MB:.0f} of {limit / _MB:.0f} MB"
        if limit - used < max(limit // 10, 16 * _MB):
            yield Finding("warning", "memory_tight", text, "at the limit the kernel ends the service",
                          "raise the limit in /etc/conf.d/crmbridge, then rc-service crmbridge restart")  # fmt: skip
        else:
            yield Finding("ok", "memory_limit", text)
    if kills and service:
        yield Finding("note", "oom_killed", f"the kernel ended {kills} process(es) here for want of memory",
                      "the service was restarted each time; nothing is lost by that", "dmesg | grep -i oom"
                      )  # fmt: skip
    left = re.search(r"^MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    if left and int(left[1]) < 48 * 1024:
        yield Finding("warning", "machine_memory_low", f"{int(left[1]) // 1024} MB of memory are left on this machine",
                      "the kernel may end the service", "ps axo rss,pid,args --sort=-rss | head")  # fmt: skip


def cgroup(pid: int) -> tuple[int, int | None, int]:
    """Return what a process's memory cgroup uses without its caches, the tightest limit, and how often it was hit."""
    used, limit, kills = 0, None, 0
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, controllers, name = line.split(":", 2)
        is_new = not controllers
        base = Path("/sys/fs/cgroup") if is_new else Path("/sys/fs/cgroup/memory")
        top, most = ("memory.current", "memory.max") if is_new else ("memory.usage_in_bytes", "memory.limit_in_bytes")
        place = base / name.strip("/")
        if (not is_new and "memory" not in controllers.split(",")) or not (place / top).exists():
            continue
        cached = _counted(place / "memory.stat", "inactive_file" if is_new else "total_inactive_file")
        used = int((place / top).read_text()) - cached
        kills = _counted(place / ("memory.events" if is_new else "memory.oom_control"), "oom_kill")
        while place != base.parent:
            with contextlib.suppress(OSError, ValueError):  # "max"
                found = int((place / most).read_text())
                limit = min(found, limit or found) if found < 2**60 else limit
            place = place.parent
    return used, limit, kills


def _counted(path: Path, name: str) -> int:
    with contextlib.suppress(OSError):
        found = re.search(rf"^{name} (\d+)", path.read_text(), re.MULTILINE)
        return int(found[1]) if found else 0
    return 0


class Listener(NamedTuple):
    """Who listens on a port."""

    pid: int
    name: str


def holder(port: int) -> Listener | None:
    """Return which process listens on a TCP port, as far as this user may see."""
    inodes = set()
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
                parts = line.split()
                if int(parts[1].rsplit(":", 1)[1], 16) == port and parts[3] == "0A":
                    inodes.add(f"socket:[{parts[9]}]")
    for place in Path("/proc").iterdir() if inodes else ():
        with contextlib.suppress(OSError):
            if place.name.isdigit() and any(_target(handle) in inodes for handle in (place / "fd").iterdir()):
                return Listener(int(place.name), (place / "comm").read_text().strip())
    return None


# --- the log ---


def logged(path: Path) -> Iterator[Finding]:
    """Look at the log's size, and in its end for restarts and refused webhooks of the last hour."""
    if not path.exists():
        return
    size = path.stat().st_size
    if size > _LARGE_LOG_BYTES:
        yield Finding("warning", "log_large", f"{path} has {size / _MB:.0f} MB", "nobody rotates it: the disk fills",
                      "logrotate -f /etc/logrotate.d/crmbridge")  # fmt: skip
    else:
        yield Finding("ok", "log", f"{path} has {size / _MB:.1f} MB")
    recent = [line for line in tail(path) if _age_s(line) < 3600]
    wrong = sum("webhook.refused code=signature_mismatch" in line for line in recent)
    if wrong >= 3:
        yield Finding("warning", "signatures_wrong", f"{wrong} webhooks of the last hour had a wrong signature",
                      "if they are Meta's, app_secrets is not this app's secret, and its messages are refused",
                      f"grep signature_mismatch {path}; then set [instagram] app_secrets to the Instagram app secret "
                      "(Meta's console: API setup with Instagram login) and restart")  # fmt: skip
    starts = sum(" start version=" in line for line in recent)
    if starts >= 5:
        yield Finding("warning", "restarts", f"the service started {starts} times within the last hour",
                      "it ends again and again; the lines before each start tell why",
                      f"grep -B 20 ' start version=' {path} | less")  # fmt: skip


def tail(path: Path) -> list[str]:
    """Return the last lines of a log."""
    with owner.opened(path, None) as file:  # whoever may write it may put something else in its place
        file.seek(max(os.fstat(file.fileno()).st_size - _TAIL_BYTES, 0))
        return file.read().decode(errors="replace").splitlines()


def _age_s(line: str) -> float:
    with contextlib.suppress(ValueError):
        return time.time() - epoch_s(line.partition(" ")[0])
    return float("inf")


# --- what the settings alone tell ---


def settings(given: config.Settings, source: Path, crm_urls: list[str]) -> Iterator[Finding]:
    """Look for keys that the file does not have, and for values that are hardly meant."""
    text = source.read_text(encoding="utf-8")
    shown = config.shown(given)
    new = [name for name in shown if not re.search(rf"^\s*{name.partition('.')[2]}\s*[=:]", text, re.MULTILINE)]
    if new:
        yield Finding("note", "ini_keys_new", f"{source} does not have {len(new)} of the keys: {', '.join(new)}",
                      "they have their defaults", "crmbridge init")  # fmt: skip
    yield from _meta_secrets(given, source)
    yield from _open_networks(given, source, crm_urls)
    yield from _proxy(given, source)


def _meta_secrets(given: config.Settings, source: Path) -> Iterator[Finding]:
    odd = [word for word in given.instagram.app_secrets if not re.fullmatch(r"[0-9a-f]{32}", word)]
    if odd:
        yield Finding("warning", "app_secret_odd", f"{len(odd)} of [instagram] app_secrets is not 32 hex digits",
                      "then it is no app secret (no quotes, no token), and Meta's webhooks are refused",
                      f"${{EDITOR:-nano}} {source}, then restart")  # fmt: skip
    token = given.instagram.verify_token
    if token and (len(token) < 8 or token != token.strip("\"' ") or " " in token):
        yield Finding("warning", "verify_token_odd", "[instagram] verify_token is short, quoted or has spaces",
                      "quotes are part of it, and who guesses it can have Meta's console confirm the address",
                      f"openssl rand -hex 16, for {source} and Meta's console")  # fmt: skip


def _open_networks(given: config.Settings, source: Path, crm_urls: list[str]) -> Iterator[Finding]:
    wide = [str(net) for net in given.crm.allow_networks if net.prefixlen < (8 if net.version == 4 else 16)]
    if wide:
        yield Finding("warning", "networks_wide", f"[crm] allow_networks opens {', '.join(wide)}",
                      "whoever may set a CRM URL can have the bridge call your internal machines",
                      f"name only the CRM's network in {source}")  # fmt: skip
    if given.crm.allow_http and not any(url.startswith("http:") for url in crm_urls):
        yield Finding("note", "http_unneeded", "[crm] allow_http is on, and no account's CRM needs it",
                      "a CRM that is set by mistake as http:// gets messages unencrypted", "allow_http = false"
                      )  # fmt: skip


def _proxy(given: config.Settings, source: Path) -> Iterator[Finding]:
    loopback = given.web.host in ("127.0.0.1", "::1", "localhost")
    proxy = given.web.trusted_proxy
    if given.web.public_url.startswith("https:") and loopback and not proxy:
        yield Finding("warning", "proxy_unnamed", "[web] public_url is https and trusted_proxy is empty",
                      "the log shows the reverse proxy as the caller of every request",
                      f"trusted_proxy = {'::1' if given.web.host == '::1' else '127.0.0.1'} in {source}, "
                      "then restart")  # fmt: skip
    elif proxy and loopback and proxy not in ("127.0.0.1", "::1"):
        yield Finding("warning", "proxy_wrong", f"[web] trusted_proxy is {proxy}, but only this machine can connect",
                      "the proxy's word is not believed, and the log shows it as the caller",
                      f"trusted_proxy = 127.0.0.1 in {source}, then restart")  # fmt: skip


def backups(settings: config.Settings, db: database.Database | None) -> Iterator[Finding]:
    """Look for the last good backup, and for a later one that failed."""
    folder = settings.store.path.parent
    todo = f"crmbridge backup {folder}/backups/ --keep 14; daily by cron: docs/operate.md, Backups"
    if db is None:
        return
    good, tried = copies.last(db), copies.last(db, good=False)
    if tried is not None and tried["error"] is not None:
        yield Finding("warning", "backup_failed", f"the last backup failed, at {tried['ended_at']}: {tried['error']}",
                      "what came since the one before is lost when the disk dies", todo)  # fmt: skip
    if good is None:
        day_ago = instant(time.time() - _DAY_S)
        is_old = any(row["created_at"] < day_ago for row in accounts.everyone(db))
        yield Finding("warning" if is_old else "note", "backup_none", f"no backup of {settings.store.path} was made",
                      "if the disk dies, tokens, keys and what waits are lost", todo)  # fmt: skip
        return
    age_s = time.time() - epoch_s(good["began_at"])
    if age_s > 1.25 * _DAY_S:
        yield Finding("warning", "backup_old", f"the last good backup is {age_s / _DAY_S:.1f} days old: {good['file']}",
                      "what came since is lost when the disk dies", todo)  # fmt: skip
    else:
        yield Finding("ok", "backup", f"the last backup is {age_s / 3600:.1f} hours old: {good['file']}")


def figures(settings: config.Settings | None, db: database.Database | None, service: list[Process]) -> dict[str, Any]:
    """Return the numbers that a monitor may want."""
    found: dict[str, Any] = {
        "processes": [
            {"pid": one.pid, "mb": round(one.mb, 1), "kind": "pss" if one.is_pss else "rss"} for one in service
        ],
        "budget_mb": {"idle": IDLE_MB, "loaded": LOADED_MB},
    }
    if db is not None:
        found |= db.sizes()
    elif settings is not None:
        with contextlib.suppress(OSError):
            disk = os.statvfs(settings.store.path.parent)
            found["disk_free_bytes"] = disk.f_bavail * disk.f_frsize
    return found
