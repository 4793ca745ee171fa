"""Reads crmbridge.ini and the environment into frozen settings, one value per room.

An unknown key or a bad value stops the start and is named. Knows nothing of what the rooms do.
"""

import configparser
import contextlib
import ipaddress
import itertools
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import urlsplit

from crmbridge import log, urls
from crmbridge.errors import Misconfigured

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
ROOT = Path(__file__).resolve().parent.parent
SHIPPED_INI = ROOT / "crmbridge.ini"
SYSTEM_INI = Path("/etc/crmbridge/crmbridge.ini")
_SYSTEM_DATA = Path("/var/lib/crmbridge")
_PREFIX = "CRMBRIDGE_"
LOOK_UP_S = 30  # so long Instagram may need to show a message in its conversation
_VERSION = re.compile(r"/v\d+\.\d+\Z")
SECRET_LEAST, _SECRET_FAIR = 8, 16  # characters of a secret: fewer can be guessed at once, or with patience


def _key(default: Any, read: Callable[[str], Any], *, secret: bool = False, url: bool = False) -> Any:
    """Declare a key: a `secret` is never shown, of a `url` only what cannot hold one."""
    return field(default=default, metadata={"read": read, "secret": secret, "url": url})


def _text(value: str) -> str:
    return value


def _host(value: str) -> str:
    if not value:  # else it would listen on every address
        raise ValueError("must be an address or a name; 0.0.0.0 is every IPv4 address")
    return value


def _words(value: str) -> tuple[str, ...]:
    """Split a list; what is empty between two separators, or at an end, is no word."""
    return tuple(word for word in re.split(r"[\s,]+", value) if word)


def _secrets(value: str) -> tuple[str, ...]:
    words = _words(value)
    for number, word in enumerate(words, 1):
        if word[0] in "#;":
            raise ValueError("a comment needs a line of its own")
        if len(word) < SECRET_LEAST:
            raise ValueError(f"number {number} of {len(words)} is shorter than {SECRET_LEAST} characters")
    return words


def _path(value: str) -> Path:
    if not value or "\0" in value:
        raise ValueError("must name a file")
    return Path(value)


def _whole(low: int, high: int) -> Callable[[str], int]:
    def read(value: str) -> int:
        try:
            number = int(value)
        except ValueError:
            raise ValueError("must be a whole number; a comment needs a line of its own") from None
        if not low <= number <= high:
            raise ValueError(f"must be between {low} and {high}")
        return number

    return read


def _number(value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise ValueError("must be a number of seconds, without a unit; a comment needs a line of its own") from None


def _seconds(low: float, high: float) -> Callable[[str], float]:
    def read(value: str) -> float:
        number = _number(value)
        if not low <= number <= high:
            raise ValueError(f"must be between {low:.10g} and {high:.10g}")
        return number

    return read


def _delays(value: str) -> tuple[float, ...]:
    delays = tuple(_number(word) for word in _words(value))
    if not delays or not all(0.1 <= delay <= 86_400 for delay in delays):
        raise ValueError("must be one or more delays in seconds, each between 0.1 and 86400")
    return delays


def _flag(value: str) -> bool:
    try:
        return {
            "true": True,
            "yes": True,
            "on": True,
            "1": True,
            "false": False,
            "no": False,
            "off": False,
            "0": False,
        }[value.strip().lower()]
    except KeyError:
        raise ValueError("must be true or false") from None


def _networks(value: str) -> tuple[Network, ...]:
    return tuple(ipaddress.ip_network(word) for word in _words(value))


def _url(value: str) -> str:
    """Return a URL that can be called. What is wrong is said without a word of it: it may hold a secret."""
    urls.read(value)
    return value.rstrip("/")


def _url_or_nothing(value: str) -> str:
    return _url(value) if value else ""


def _path_or_nothing(value: str) -> Path | None:
    return _path(value) if value else None


def _address_or_nothing(value: str) -> str:
    return str(ipaddress.ip_address(value)) if value else ""


def _one_of(*names: str) -> Callable[[str], str]:
    def read(value: str) -> str:
        if value.lower() not in names:
            raise ValueError("must be one of " + ", ".join(names))
        return value.lower()

    return read


@dataclass(frozen=True)
class Web:
    host: str = _key("127.0.0.1", _host)
    port: int = _key(8080, _whole(0, 65_535))
    threads: int = _key(8, _whole(1, 64))
    public_url: str = _key("", _url_or_nothing, url=True)
    trusted_proxy: str = _key("", _address_or_nothing)


@dataclass(frozen=True)
class Store:
    path: Path = _key(Path("var/bridge.db"), _path)
    queue_path: Path = _key(Path("var/queue.db"), _path)


@dataclass(frozen=True)
class Vault:
    key_file: Path = _key(Path("var/crmbridge.key"), _path)


@dataclass(frozen=True)
class Instagram:
    graph_url: str = _key("https://graph.instagram.com/v27.0", _url, url=True)
    app_secrets: tuple[str, ...] = _key((), _secrets, secret=True)
    verify_token: str = _key("", _text, secret=True)
    comments: bool = _key(False, _flag)
    mentions: bool = _key(False, _flag)
    profile_wait_s: float = _key(1.0, _seconds(0, 10))
    connect_timeout_s: float = _key(5.0, _seconds(0.1, 60))
    timeout_s: float = _key(30.0, _seconds(1, 300))


@dataclass(frozen=True)
class Crm:
    connect_timeout_s: float = _key(5.0, _seconds(0.1, 60))
    timeout_s: float = _key(15.0, _seconds(0.5, 300))
    allow_networks: tuple[Network, ...] = _key((), _networks)
    allow_http: bool = _key(False, _flag)
    ca_file: Path | None = _key(None, _path_or_nothing)


@dataclass(frozen=True)
class Delivery:
    crm_quick_s: tuple[float, ...] = _key((1, 2, 4, 8, 16), _delays)
    crm_slow_s: tuple[float, ...] = _key((60, 300, 900, 1800, 3600), _delays)
    crm_give_up_s: float = _key(86_400, _seconds(60, 2_592_000))
    instagram_retry_s: tuple[float, ...] = _key((2, 10, 60), _delays)
    instagram_unavailable_s: tuple[float, ...] = _key((5, 15, 60, 300, 900), _delays)
    instagram_give_up_s: float = _key(86_400, _seconds(60, 2_592_000))
    look_up_s: tuple[float, ...] = _key((5, 30), _delays)
    probe_s: tuple[float, ...] = _key((5, 10, 30, 60), _delays)
    senders: int = _key(12, _whole(3, 64))
    slots_per_endpoint: int = _key(4, _whole(2, 63))
    instagram_sends_per_s: float = _key(50, _seconds(0.1, 100))
    stop_grace_s: float = _key(10, _seconds(0, 300))


@dataclass(frozen=True)
class Retention:
    text_days: int = _key(7, _whole(1, 3_650))
    metadata_days: int = _key(90, _whole(7, 3_650))
    unrouted_days: int = _key(7, _whole(1, 3_650))
    unrouted_max: int = _key(10_000, _whole(0, 10_000_000))
    max_mb: int = _key(2_048, _whole(0, 1_000_000))


@dataclass(frozen=True)
class Alerts:
    command: str = _key("", _text, secret=True)
    url: str = _key("", _url_or_nothing, secret=True)
    repeat_after_s: float = _key(3_600, _seconds(1, 604_800))
    endpoint_down_after_s: float = _key(900, _seconds(1, 604_800))
    disk_free_mb: int = _key(200, _whole(0, 1_000_000))
    silence_hours: int = _key(24, _whole(0, 720))


@dataclass(frozen=True)
class Log:
    level: str = _key("info", _one_of("debug", "info", "warning", "error"))


@dataclass(frozen=True)
class Settings:
    web: Web = field(default_factory=Web)
    store: Store = field(default_factory=Store)
    vault: Vault = field(default_factory=Vault)
    instagram: Instagram = field(default_factory=Instagram)
    crm: Crm = field(default_factory=Crm)
    delivery: Delivery = field(default_factory=Delivery)
    retention: Retention = field(default_factory=Retention)
    alerts: Alerts = field(default_factory=Alerts)
    log: Log = field(default_factory=Log)
    retired: tuple[str, ...] = ()  # keys of earlier versions that an old file still has


_RETIRED = {"delivery": ("replay_per_s",)}
_SECTIONS: dict[str, type[Any]] = {
    section.name: section.default_factory  # type: ignore[misc]
    for section in fields(Settings)
    if section.default_factory is not MISSING
}


def find(named: str | None, environ: Mapping[str, str]) -> Path:
    """Return the configuration file to use: the named one, $CRMBRIDGE_CONFIG, ./crmbridge.ini or the system's."""
    chosen = named or environ.get(_PREFIX + "CONFIG")
    if chosen:
        return Path(chosen)
    here = Path("crmbridge.ini")
    if os.path.exists(here):  # a folder that may not be looked into has none
        return here
    with contextlib.suppress(PermissionError):  # it is there, and not for this user
        if not SYSTEM_INI.exists():
            return here
    return SYSTEM_INI


def usual(path: Path) -> Settings:
    """Return the defaults with the places that a configuration of that name has unless somebody changed them."""
    settings, folder = Settings(), path.resolve().parent
    if path == SYSTEM_INI:
        store = Store(path=_SYSTEM_DATA / "bridge.db", queue_path=_SYSTEM_DATA / "queue.db")
        settings = replace(settings, store=store, vault=Vault(key_file=folder / "crmbridge.key"))
    return _rooted(settings, folder)


def differing(one: Settings, other: Settings) -> list[str]:
    """Name the keys that two configurations set differently."""
    return [
        f"[{section}] {entry.name}"
        for section, room in _SECTIONS.items()
        for entry in fields(room)
        if getattr(getattr(one, section), entry.name) != getattr(getattr(other, section), entry.name)
    ]


def load(path: Path, environ: Mapping[str, str] = os.environ) -> Settings:
    """Read the file, then what the environment overrides; relative paths start at the file's folder.

    Raises Misconfigured that names the file, section and key at fault.
    """
    try:
        return read(path.read_text(encoding="utf-8-sig"), path, environ)
    except FileNotFoundError:
        raise Misconfigured(f"no configuration at {path}: run 'crmbridge init', or name one with --config") from None
    except (OSError, UnicodeDecodeError) as error:
        raise Misconfigured(f"{path} cannot be read: {error}") from None


def read(text: str, path: Path, environ: Mapping[str, str] = os.environ) -> Settings:
    """Read a configuration as if it stood in the file of that name. Raises Misconfigured."""
    parser = configparser.ConfigParser(interpolation=None, default_section="")
    try:
        parser.read_string(text, source=str(path))
    except configparser.Error as error:
        raise Misconfigured(f"{path}: {_said(error)}") from None

    given: dict[tuple[str, str], tuple[str, str]] = {}
    for section in parser.sections():
        for name, value in parser.items(section):
            given[section, name] = (value, f"{path} [{section}] {name}")
    given.update(_overrides(environ))

    values: dict[str, dict[str, Any]] = {section: {} for section in _SECTIONS}
    retired: list[str] = []
    for (section, name), (value, place) in given.items():
        if section not in _SECTIONS:
            raise Misconfigured(f"{place}: there is no section [{section}]; known: {', '.join(_SECTIONS)}")
        known = {entry.name: entry for entry in fields(_SECTIONS[section])}
        if name in _RETIRED.get(section, ()):
            retired.append(f"[{section}] {name}")
            continue
        if name not in known:
            raise Misconfigured(f"{place}: there is no such key; known in [{section}]: {', '.join(known)}")
        try:
            if known[name].metadata["secret"]:
                _require_utf8(value)
            values[section][name] = known[name].metadata["read"](value.strip())
        except ValueError as error:
            is_open = not (known[name].metadata["secret"] or known[name].metadata["url"])
            shown = f" {value!r}" if is_open else ""
            raise Misconfigured(f"{place}: bad value{shown}: {error}", quoted=shown) from None
    made = {section: cls(**values[section]) for section, cls in _SECTIONS.items()}
    settings = Settings(**made, retired=tuple(retired))
    if settings.delivery.slots_per_endpoint >= settings.delivery.senders:
        raise Misconfigured(f"{path} [delivery] slots_per_endpoint: must be fewer than senders")
    if settings.retention.text_days > settings.retention.metadata_days:
        raise Misconfigured(f"{path} [retention] text_days: must not be above metadata_days")
    settings = _rooted(settings, path.resolve().parent)
    own = {
        "[store] path": settings.store.path,
        "[store] queue_path": settings.store.queue_path,
        "[vault] key_file": settings.vault.key_file,
        "the configuration": path,
    }
    for one, other in itertools.combinations(own, 2):
        if own[one].resolve() == own[other].resolve():
            raise Misconfigured(f"{path}: {one} and {other} are the same file, {own[one]}")
    return settings


def _said(error: configparser.Error) -> str:
    """Say what is wrong with a file, without the lines that configparser quotes: they may hold a secret."""
    if isinstance(error, configparser.MissingSectionHeaderError):
        return f"File contains no section headers: line {error.lineno} comes before any [section]"
    if isinstance(error, configparser.ParsingError):
        found = [number for number, *_ in getattr(error, "errors", ())] or [getattr(error, "lineno", "?")]
        lines = ", ".join(map(str, found))
        return f"line {lines} is neither a [section] nor 'key = value'"
    return str(error).replace("\n", " ")


def _require_utf8(secret: str) -> None:
    """Raise ValueError for bytes of the environment that are no text: nothing could be signed with them."""
    try:
        secret.encode()
    except UnicodeEncodeError:
        raise ValueError("is not UTF-8 text") from None


class Doubt(NamedTuple):
    """What the bridge starts with, but hardly as its operator wants; `todo` is what to do.

    With an ``error`` it does not do its work.
    """

    slug: str
    problem: str
    todo: str = ""
    level: Literal["error", "warning"] = "warning"


def absent(path: Path) -> list[str]:
    """Return the shipped file's lines of the keys that this file does not have, with their comments."""
    parser = configparser.ConfigParser(interpolation=None, default_section="")
    parser.read_string(path.read_text(encoding="utf-8-sig"))
    lines: list[str] = []
    comment: list[str] = []
    section, is_told = "", False
    for line in SHIPPED_INI.read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            section, comment = line.strip("[]"), []
            lines += [line]
        elif line.startswith("#"):
            comment = [line] if is_told else [*comment, line]
            is_told = False
        elif line:
            is_told = True
            if not parser.has_option(section, line.partition("=")[0].strip()):
                lines += [*comment, line]
                comment = []
    return [line for line, after in zip(lines, [*lines[1:], "["], strict=True) if not (line[0] == after[0] == "[")]


def doubts(settings: Settings) -> list[Doubt]:
    """Return what in the settings is doubtful."""
    found = [
        Doubt("key_retired", f"{name} does nothing any more: take it out of the configuration")
        for name in settings.retired
    ]
    if not settings.instagram.app_secrets:
        problem = "[instagram] app_secrets is empty: every webhook from Meta will be refused"
        found.append(Doubt("app_secrets_empty", problem, level="error"))
    short = [word for word in settings.instagram.app_secrets if len(word) < _SECRET_FAIR]
    if short:
        problem = (
            f"{len(short)} of [instagram] app_secrets has fewer than {_SECRET_FAIR} characters: whoever guesses it can "
            "forge what customers write"
        )
        found.append(Doubt("app_secret_short", problem))
    if any(re.search(r"[;|'\"]|[^!-~]", word) for word in settings.instagram.app_secrets):
        problem = "[instagram] app_secrets holds quotes or unseen characters; a comma separates several"
        found.append(Doubt("app_secret_odd", problem))
    if not settings.instagram.verify_token:
        problem = "[instagram] verify_token is empty: Meta cannot verify the webhook address"
        found.append(Doubt("verify_token_empty", problem))
    look_up_s = sum(settings.delivery.look_up_s)
    if look_up_s < LOOK_UP_S:
        problem = (
            f"[delivery] look_up_s are {look_up_s:g} s in all: with less than {LOOK_UP_S} s a send that Instagram "
            "shows late is sent twice"
        )
        found.append(Doubt("look_up_short", problem))
    if not settings.alerts.command and not settings.alerts.url:
        problem = "[alerts] command and url are both empty: nobody is told of an alert, it is only in the log"
        found.append(Doubt("alerts_unheard", problem, "set one of them, then: crmbridge alert test"))
    return found


def _overrides(environ: Mapping[str, str]) -> dict[tuple[str, str], tuple[str, str]]:
    found = {}
    for variable, value in environ.items():
        if variable.startswith(_PREFIX) and variable != _PREFIX + "CONFIG":
            section, _, name = variable[len(_PREFIX) :].lower().partition("_")
            found[section, name] = (value, f"environment variable {variable}")
    return found


def _rooted(settings: Settings, folder: Path) -> Settings:
    return Settings(
        **{
            **{section: getattr(settings, section) for section in (*_SECTIONS, "retired")},
            "store": Store(path=folder / settings.store.path, queue_path=folder / settings.store.queue_path),
            "vault": Vault(key_file=folder / settings.vault.key_file),
            "crm": replace(settings.crm, ca_file=settings.crm.ca_file and folder / settings.crm.ca_file),
        }
    )


def shown(settings: Settings) -> dict[str, str]:
    """Return the effective settings as ``section.key`` → text: secrets masked, URLs without path, query and user.

    The version in the path of graph_url is shown.
    """
    lines = {}
    for section in _SECTIONS:
        room = getattr(settings, section)
        for entry in fields(room):
            value = getattr(room, entry.name)
            if entry.metadata["secret"]:
                text = "(set)" if value else "(not set)"
            elif entry.metadata["url"] and value:
                version = _VERSION.search(urlsplit(value).path)
                text = log.origin(value) + (version[0] if version else "")
            elif isinstance(value, tuple):
                text = " ".join(f"{part:g}" if isinstance(part, float) else str(part) for part in value)
            else:
                text = f"{value:g}" if isinstance(value, float) else "" if value is None else str(value)
            lines[f"{section}.{entry.name}"] = text
    return lines
