"""``crmbridge check``: is this installation fit to run? Looks at files only; calls nobody and changes nothing.

`doctor` begins with the same look.
"""

import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from crmbridge import config, net, terminal, vault
from crmbridge.alerts.kinds import kind_of
from crmbridge.errors import BridgeError, Misconfigured
from crmbridge.events import epoch_s
from crmbridge.instagram import reading
from crmbridge.store import accounts, alerts, database, endpoints, overview, retention, vitals

_BEGIN, _END = "\ufdd0", "\ufdd1"  # no characters: Unicode leaves them to programs
_UNMARKED = {ord(_BEGIN): None, ord(_END): None}
_THEIRS = re.compile(f"{_BEGIN}.*?{_END}", re.DOTALL)


def theirs(text: str) -> str:
    """Mark the words of others in what a finding says: a name, a reason, what a far side told."""
    return f"{_BEGIN}{text.translate(_UNMARKED)}{_END}" if text else ""


def message(error: BridgeError) -> str:
    """Return an error's message with what is quoted in it marked."""
    head, said, tail = error.message.rpartition(error.quoted) if error.quoted else ("", "", error.message)
    return head + theirs(said) + tail


def named(account: database.Row) -> str:
    """Return an account's id, and its name marked as theirs."""
    return f"{account['id']} ({theirs(account['username']) if account['username'] else '-'})"


@dataclass(frozen=True)
class Finding:
    """What was found: `why` it matters, and `todo`, what to type. A `slug` is for programs and stays as it is.

    With an ``error`` the bridge does not do its work, whether it starts or not, a ``warning`` wants to be seen to, a
    ``note`` is good to know; ``blind`` is what could not be looked at. `public` is `what` without the words of others
    (`theirs`), for whoever helps.
    """

    level: Literal["error", "blind", "warning", "note", "ok"]
    slug: str
    what: str
    why: str = ""
    todo: str = ""
    account_id: str | None = None
    public: str = ""

    def __post_init__(self) -> None:
        if not self.public:  # it is new, and its words are still marked
            object.__setattr__(self, "public", _THEIRS.sub("[…]", self.what))
            object.__setattr__(self, "what", self.what.translate(_UNMARKED))


_EXPIRES_DAYS, _DAY_S = 14, 86_400
_STARTS = ("app_secrets_empty",)  # the service runs with it, and does nothing of use


@dataclass
class Look:
    """What the files told, and what is open now: whoever looked closes the database."""

    found: list[Finding] = field(default_factory=list)
    db: database.Database | None = None
    keys: vault.Vault | None = None


def run(settings: config.Settings, source: Path, *, verbose: bool) -> int:
    """Print what is set otherwise than by default, and every finding; return 0 when nothing stops a start, else 1.

    The service starts by that, so what is only broken is told in words: a new installation has no app secret yet.
    """
    terminal.say(f"configuration: {source.resolve()}")
    shown, differing = config.shown(settings), config.differing(settings, config.usual(source))
    told = [name for name in shown if verbose or "[{}] {}".format(*name.split(".")) in differing]
    terminal.say(*(f"  {name} = {shown[name]}" for name in told))
    if len(told) < len(shown):
        terminal.say(f"  {len(shown) - len(told)} settings have their defaults; --verbose shows them, too")
    seen = look(settings)
    if seen.db is not None:
        seen.db.close()
    for one in seen.found:
        terminal.say(line(one))
    broken = [one for one in seen.found if one.level in ("error", "blind")]
    warned = [one for one in seen.found if one.level == "warning"]
    deaf = [one.what for one in warned if one.slug == "verify_token_empty"]
    if any(one.slug not in _STARTS for one in broken):
        terminal.say("not fit to run")
        return 1
    if broken:
        terminal.say(f"it starts, but is broken: {'; '.join(one.what for one in broken)}")
    elif warned:
        terminal.say(f"fit to run, but {deaf[0] if deaf else f'see to the {len(warned)} warning(s) above'}")
    else:
        terminal.say("fit to run")
    return 0


def line(one: Finding) -> str:
    """Return a finding in one line."""
    return f"{one.level}: {one.what}" + (f"; {one.todo}" if one.todo else "")


def look(settings: config.Settings) -> Look:
    """Look at the files that the settings name, and at what the database tells."""
    seen = Look([Finding(one.level, one.slug, one.problem, todo=one.todo) for one in config.doubts(settings)])
    found = seen.found
    try:
        seen.keys = vault.load(settings.vault.key_file)
        found.append(Finding("ok", "key_file", f"key file {settings.vault.key_file}"))
    except Misconfigured as error:
        found.append(Finding("error", "key_file", error.message))
    if settings.crm.ca_file is not None:
        try:
            number = net.certificates(settings.crm.ca_file)
            found.append(Finding("ok", "ca_file", f"[crm] ca_file {settings.crm.ca_file}: {number} certificate(s)"))
        except Misconfigured as error:
            found.append(Finding("error", "ca_file", error.message))
    try:
        for path in {settings.store.path.parent, settings.store.queue_path.parent}:
            if path.exists() and not os.access(path, os.W_OK):
                found.append(Finding("error", "folder_closed", f"{path} cannot be written by this user"))
        seen.db = database.open_existing(settings.store.path, settings.vault.key_file)
        seen.db.require_schema()
        found += _database(seen.db)
        found += _state(seen.db)
        for account in accounts.everyone(seen.db):
            found += _stops(seen.db, account)
            found += _token(seen.keys, account)
    except BridgeError as error:
        found.append(Finding("error", "database", error.message))
    except OSError as error:
        found.append(
            Finding("blind", "database", f"{error.filename or settings.store.path}: {error.strerror or error}")
        )
    return seen


def new_token(account_id: str) -> str:
    """Return what sets another access token."""
    return f"make a new token in Meta's console, then: crmbridge account set {account_id} --token -"


def to_start() -> str:
    """Return what starts the service on this machine."""
    return "rc-service crmbridge start" if is_installed() else "crmbridge serve"


def is_installed() -> bool:
    """Tell whether OpenRC looks after the service on this machine."""
    return Path("/etc/init.d/crmbridge").exists()


def _database(db: database.Database) -> Iterator[Finding]:
    yield Finding("ok", "database", f"database {db.path}, schema up to date")
    sizes = db.sizes()
    told = ", ".join(f"{name.removesuffix('_bytes')} {size / 2**20:.1f}" for name, size in sizes.items())
    yield Finding("ok", "sizes", f"sizes in MB: {told}")
    if sizes["free_bytes"] > retention.SPARE_BYTES and not db.can_shrink():
        todo = f'sqlite3 {db.path} "PRAGMA auto_vacuum = incremental; VACUUM"'
        yield Finding("warning", "cannot_shrink", f"the file cannot shrink; while the service is stopped: {todo}")
    if db.is_full:
        text = "the disk is too full for the reserve: nothing new would be taken"
        yield Finding("warning", "disk_full", text, todo=f"df -h {db.path.parent}")
    yield Finding("ok", "accounts", f"{len(accounts.everyone(db))} account(s)")
    no_worker = vitals.worker_problem(db, time.time())
    if no_worker:
        text = f"{no_worker}; nothing goes out until it is started: {to_start()}"
        yield Finding("warning", "worker_dead", text)


def _token(keys: vault.Vault | None, account: database.Row) -> Iterator[Finding]:
    if not account["access_token_sealed"]:
        text = f"{account['id']} has no access token: {account['status_reason']}"
        todo = new_token(account["id"])
        yield Finding("warning", "token_missing", text, todo=todo, account_id=account["id"])
        return
    end, renew = reading.token_end(account), new_token(account["id"])
    until = f"it ends {end.said()}" if end else "nobody knows when it ends"
    if account["token_refusals"] >= accounts.REFUSED_OFTEN:
        often = f"Instagram refused {account['token_refusals']} times running to renew the access token"
        yield Finding("warning", "token_not_renewed", f"{named(account)}: {often}; {until}", todo=renew,
                      account_id=account["id"])  # fmt: skip
    left_days = (epoch_s(end.at) - time.time()) / _DAY_S if end else _EXPIRES_DAYS
    if left_days < _EXPIRES_DAYS:
        text = f"{named(account)}: the access token has {max(left_days, 0):.0f} day(s) left: {until}"
        yield Finding("warning", "token_expiring", text, todo=renew, account_id=account["id"])
    if keys is not None:
        accounts.token(keys, account)


def _stops(db: database.Database, account: database.Row) -> Iterator[Finding]:
    """Say what holds an account back or keeps it from hearing, each with what to type."""
    about = named(account)
    if account["status"] != "active":
        what = "sends are" if account["status"] == "error" else "deliveries and sends are"
        why = f": {account['status_reason']}" if account["status_reason"] else ""
        todo = endpoints.to_type(account["id"], "instagram", account["status"])
        text = f"{about} is {account['status']} since {account['status_since']}, its {what} held{why}"
        yield Finding("warning", "account_held", text, todo=todo, account_id=account["id"])
    for what, kind in endpoints.WHAT.items():
        hold = endpoints.locked(db, account["id"], kind)
        if hold is None or hold["cause"] != "operator":
            continue
        text = f"{about} {what} are paused since {hold['since']}" + (f" until {hold['until']}" if hold["until"] else "")
        text += f": {theirs(hold['reason'])}" if hold["reason"] else ""
        todo = endpoints.to_type(account["id"], kind, hold["cause"])
        yield Finding("warning", f"{what}_paused", text, todo=todo, account_id=account["id"])
    held = endpoints.find(db, account["id"], "crm")
    if held is not None and held["held_by"] in ("gone", "unauthorized"):
        is_asked = held["ask_at"] and held["paused_at"] is None
        asked = f"is asked again at {held['ask_at']}" if is_asked else "is not asked again by itself"
        text = f"{about} deliveries are held since {held['held_at']}: {held['held_reason']}; it {asked}"
        todo = endpoints.to_type(account["id"], "crm", held["held_by"])
        yield Finding("warning", "deliveries_held", text, todo=todo, account_id=account["id"])
    if account["subscription_ok"] == 0:
        said = theirs(account["subscription_error"] or "")
        text = f"{about} is not subscribed to Instagram's webhooks: {said}"
        todo = f"{new_token(account['id'])}, or wait: it is tried again every six hours"
        yield Finding("warning", "not_subscribed", text, todo=todo, account_id=account["id"])


def _state(db: database.Database) -> Iterator[Finding]:
    """Return what each account waits for, how late it is and what died, and the alerts that are open."""
    for row in overview.accounts(db):
        for name in overview.NAMES.values():
            whose = theirs(row["username"]) if row["username"] else row["status"]
            text = f"{row['account_id']} ({whose}) {name}: {row[f'pending_{name}']} pending"
            oldest, late = row[f"oldest_pending_{name.removesuffix('s')}_at"], row["latency"][name]
            text += f" since {oldest}" if oldest else ""
            text += f", {row[f'dead_{name}']} dead; last hour: {overview.said(late)}"
            dead = bool(row[f"dead_{name}"])
            todo = f"crmbridge dlq list --{name} --account {row['account_id']}" if dead else ""
            level, slug = ("warning", "dead_letters") if dead else ("ok", "queue")
            yield Finding(level, slug, text, todo=todo, account_id=row["account_id"])  # type: ignore[arg-type]
    unrouted = overview.unrouted(db)
    if unrouted:
        text = f"{unrouted} event(s) for Instagram accounts that are not connected here"
        yield Finding(
            "warning",
            "unrouted",
            text,
            todo="crmbridge account add --token - for each of them, or leave them to expire",
        )
    for alert in alerts.everything(db):
        if alert["cleared_at"] is None:
            about = f" {alert['account_id']}" if alert["account_id"] else ""
            text = f"alert {alert['kind']}{about} since {alert['since']}: {theirs(alert['message'])}"
            todo = kind_of(alert["kind"]).todo.replace("ACCOUNT", alert["account_id"])
            yield Finding("warning", f"alert_{alert['kind']}", text, todo=todo, account_id=alert["account_id"] or None)
