"""The command line: a table of commands, and what each calls. Nothing else reads arguments."""

import argparse
import contextlib
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from crmbridge import __version__, apikey, config, events, log, terminal, vault
from crmbridge.errors import BridgeError, Misconfigured
from crmbridge.store import accounts, database

_CLOSED_PIPE = 128 + signal.SIGPIPE  # as of a program that the signal ended
_FILES = ("at", "config", "file", "log", "passphrase_file", "rehearse", "target")  # arguments


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0 done, 1 failed, 2 wrong usage."""
    try:
        try:
            return _run(arguments)
        finally:
            terminal.flush()  # what nobody reads any more is told here, not by the interpreter's end
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                os.dup2(nowhere, stream.fileno())  # the interpreter flushes them once more
        return _CLOSED_PIPE


def _run(arguments: Sequence[str] | None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    _require_text(parser, options)
    try:
        os.umask(0o077)  # what we make is for our user alone
        if options.as_owner:
            _become_owner(options)
        return int(options.run(options) or 0)
    except BridgeError as error:
        terminal.complain(f"crmbridge: {error.message}")
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        raise
    except OSError as error:
        terminal.complain(f"crmbridge: {error.filename or ''}: {error.strerror or error}")
        return 1


class _Parser(argparse.ArgumentParser):
    """A parser that prints through `terminal`: its errors quote what was typed."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self.color = False  # Python 3.14 would write escape sequences of its own

    def error(self, message: str) -> NoReturn:
        """End with the usage, and what is wrong with it, in one line; a stray argument may be a secret."""
        stray = "unrecognized arguments: "
        if message.startswith(stray):
            words = [word.partition("=")[0] if word.startswith("-") else "…" for word in message[len(stray) :].split()]
            message = stray + " ".join(words)
        super().error(terminal.escaped(message))

    def _print_message(self, message: str, file: Any = None) -> None:
        write = terminal.say if file is sys.stdout else terminal.complain
        write(*message.rstrip("\n").split("\n"))


def _require_text(parser: _Parser, options: argparse.Namespace) -> None:
    """End as for wrong usage where an argument is no text; the name of a file may be any bytes."""
    for name, value in vars(options).items():
        for given in value if isinstance(value, list) else [value]:
            if isinstance(given, str) and name not in _FILES and not given.isascii():
                try:
                    given.encode()
                except UnicodeEncodeError:
                    parser.error(f"not UTF-8 text: {given}")


@dataclass(frozen=True)
class Option:
    """An option or argument as `argparse.add_argument` takes it; of those with the same `either` one may be given."""

    names: tuple[str, ...]
    how: dict[str, Any]
    either: str = ""

    def add(self, parser: argparse.ArgumentParser, lots: dict[str, Any]) -> None:
        """Make a parser know it."""
        if self.either and self.either not in lots:
            lots[self.either] = parser.add_mutually_exclusive_group()
        (lots[self.either] if self.either else parser).add_argument(*self.names, **self.how)


@dataclass(frozen=True)
class Command:
    """What is typed, what it runs, and what it is told; as root it becomes the data's owner first, unless it says not.

    `run` returns the exit status, or None for 0.
    """

    words: str
    run: Callable[[argparse.Namespace], int | None]
    about: str
    options: tuple[Option, ...] = ()
    as_owner: bool = True


def _opt(*names: str, either: str = "", **how: Any) -> Option:
    return Option(names, how, either)


def _flag(name: str, about: str, **how: Any) -> Option:
    return _opt(name, action="store_true", help=about, **how)


def _parser() -> _Parser:
    top = _Parser(
        prog="crmbridge", description="Carries Instagram direct messages to a shop's own CRM and the replies back."
    )
    top.add_argument("--version", action="version", version=f"crmbridge {__version__}")
    groups = {"": top.add_subparsers(required=True, metavar="COMMAND")}
    for command in _commands():
        group, _, name = command.words.rpartition(" ")
        if group not in groups:
            parent = groups[""].add_parser(group, help=_GROUPS[group])
            groups[group] = parent.add_subparsers(required=True, metavar="…")
        parser = groups[group].add_parser(name, help=command.about, description=command.about)
        lots: dict[str, Any] = {}
        for option in (_CONFIG, *command.options):
            option.add(parser, lots)
        parser.set_defaults(run=command.run, as_owner=command.as_owner)
    return top


def _span(text: str) -> float:
    try:
        return events.read_span(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _stdin(text: str) -> str:
    if text != "-":
        raise argparse.ArgumentTypeError("must be -: a secret in a command can be read by all on this machine")
    return text


_TOKEN = _opt("--token", metavar="-", type=_stdin, help="read the access token from standard input")
_SECRET = _opt("--secret", metavar="-", type=_stdin, help="read the webhook secret, too, after the token, each on a "
               "line of its own (default: one is made where a URL needs it, and shown once)")  # fmt: skip
_CONFIG = _opt("--config", metavar="FILE", help="the configuration file (default: $CRMBRIDGE_CONFIG, "
               "./crmbridge.ini, /etc/crmbridge/crmbridge.ini)")  # fmt: skip
_GROUPS = {
    "key": "make, list and revoke API keys",
    "account": "connect, change, list, hold and resume accounts",
    "alert": "what is wrong",
    "dlq": "dead deliveries",
}
_PASSPHRASE = _opt("--passphrase-file", metavar="F", help="the passphrase is its first line (default: asked for)")
_LOOK = (
    _flag("--no-calls", "call neither Instagram, CRMs nor the bridge itself"),
    _opt("--log", metavar="FILE", help="the service's log (default: /var/log/crmbridge/crmbridge.log)"),
)
_ENDS = (
    _opt("id", metavar="ID", help="acc_… as 'account list' shows"),
    _opt("--deliveries", action="append_const", dest="what", const="deliveries",
         help="what goes to the CRM (default: both)"),
    _opt("--sends", action="append_const", dest="what", const="sends",
         help="what goes to Instagram (default: both)"),
)  # fmt: skip
_WHO = (
    _opt("--contact", required=True, metavar="ID", help="the customer's id: sender_id of an event"),
    _opt("--account", metavar="ACC", help="as a customer of this account alone (default: of all)"),
)
_FILTERS = (
    _flag("--webhooks", "only what CRMs did not get", either="target"),
    _flag("--sends", "only what Instagram did not get", either="target"),
    _opt("--account", metavar="ID", help="only of this account"),
    _opt("--event", help="only this event, such as message.received"),
    _opt("--code", help="only what ended with this code, such as crm_error"),
    _opt("--older-than", metavar="SPAN", type=_span, help="dead for longer than 30m, 2h, 3d …"),
    _opt("--newer-than", metavar="SPAN", type=_span, help="dead for less than that"),
)


def _named(lot: str) -> tuple[Option, ...]:
    return (
        _opt("ids", nargs="*", metavar="ID", help="dlv_… as 'dlq list --all' shows, or a send's msg_…"),
        _flag("--all", lot),
        _flag("--preview", "only tell what would be done"),
    )


def _commands() -> tuple[Command, ...]:
    """Return all commands, in the order in which ``--help`` tells them."""
    return (
        Command("init", _init, "make what is missing: configuration, key file, database", as_owner=False),
        Command("serve", _serve, "run the bridge: web server and worker"),
        Command("migrate", _migrate, "bring the database's schema up to this version"),
        Command("check", _check, "show what is configured and look at the files; calls nobody", (
            _flag("--verbose", "also show the settings that have their defaults"),
            _opt("--rehearse", metavar="FILE", help="instead, try to migrate and serve a copy of this backup"),
        )),
        Command("health", _health, "ask the running server how it is: 0 well, 1 not, 3 no answer", (
            _flag("--live", "only whether it answers"),
            _opt("--wait", type=float, default=0, metavar="S", help="ask for S seconds until it is well"),
            _opt("--at", metavar="PLACE", help="HOST:PORT (default: as the configuration says)"),
            _opt("--pid", type=int, metavar="N", help="ask where this process listens, whatever else is said"),
        ), as_owner=False),
        Command("backup", _backup, "copy the database while the service runs, and check the copy", (
            _opt("target", metavar="FILE|FOLDER", help="a new file, or a folder for one with the time as its name"),
            _flag("--with-key", "seal the key file in, with a passphrase"),
            _opt("--keep", type=int, metavar="N", help="leave the last N in the FOLDER, once this one is made"),
            _PASSPHRASE,
        ), as_owner=False),
        Command("restore", _restore, "put a backup in the database's place; the service must not run", (
            _opt("file", metavar="FILE", help="a backup, or any whole copy of the database"),
            _PASSPHRASE,
        ), as_owner=False),
        Command("doctor", _doctor, "look at everything, also live: what is wrong, why, what to type; exit status 0 "
                "all well, 1 warnings, 2 something is broken, 3 could not look", (
            _flag("--json", "for programs"),
            _flag("--verbose", "also tell what is well, a line each"),
            _opt("--account", metavar="ID", help="call Instagram and the CRM for this account alone"),
            *_LOOK,
        ), as_owner=False),
        Command("support-bundle", _support_bundle, "write a file for whoever looks for a fault: no secrets, no texts, "
                "no names, no customers' ids", (
            _opt("file", nargs="?", metavar="FILE", help="(default: crmbridge-support-DATE.tar.gz, here)"),
            *_LOOK,
        ), as_owner=False),
        Command("explain", _explain, "tell what became of a message, and what to do about it", (
            _opt("id", metavar="ID", help="msg_…, evt_…, dlv_…, acc_…, cnv_…, an idempotency key, a correlation id, "
                 "or an id of Instagram"),
        )),
        Command("key create", _key_create, "make an API key and print it, once", (
            _opt("--name", required=True, help="what the key is for"),
            _flag("--admin", "may do everything on every account"),
            _opt("--account", action="append", default=[], metavar="ID", help="an account it is bound to"),
            _opt("--permission", action="append", default=[], metavar="P", choices=apikey.PERMISSIONS,
                 help="one of: " + ", ".join(apikey.PERMISSIONS) + " (default: all)"),
            _opt("--expires-days", type=float, metavar="D", help="when it ends"),
        )),
        Command("key list", _key_list, "list the API keys"),
        Command("key revoke", _key_revoke, "revoke an API key, at once", (
            _opt("id", help="key_… as 'key list' shows"),
        )),
        Command("account list", _account_list, "list the accounts and what is paused"),
        Command("account add", _account_add, "connect the Instagram account that a token belongs to", (
            _TOKEN,
            _SECRET,
            _opt("--url", metavar="URL", help="where its events go (default: nowhere, the CRM reads them by GET "
                 "/api/v1/events)"),
        )),
        Command("account set", _account_set, "give an account another token, secret or URL, or take it out of use", (
            _opt("id", metavar="ACC", help="acc_… as 'account list' shows"),
            _TOKEN,
            _SECRET,
            _opt("--url", metavar="URL", help="where its events go", either="where"),
            _flag("--pull", "its events go nowhere: the CRM reads them by GET /api/v1/events", either="where"),
            _flag("--active", "put it in use, and try again what an error holds", either="use"),
            _flag("--inactive", "hold all that it owes, until it is active again", either="use"),
        )),
        Command("account pause", _account_pause, "hold an account's deliveries and sends; nothing is lost", (
            *_ENDS,
            _opt("--until", metavar="TIME", help="when it ends by itself, such as 2027-01-15T08:00:00Z", either="end"),
            _opt("--for", metavar="SPAN", dest="lasts", help="how long it lasts, such as 30m, 2h or 3d", either="end"),
            _opt("--reason", metavar="TEXT", help="why, for whoever looks at it"),
        )),
        Command("account resume", _account_resume, "let what was paused go on", (
            *_ENDS,
            _flag("--held", "also what is held by what the CRM or Instagram answered; without a pause that is meant "
                  "anyway"),
        )),
        Command("alert list", _alert_list, "list the alerts that are open", (
            _flag("--all", "also the last ones that ended"),
        )),
        Command("alert kinds", _alert_kinds, "tell of each kind of alert what it means, what to do, and what ends it",
                as_owner=False),
        Command("alert test", _alert_test, "send a test alert through log, command and URL now"),
        Command("export", _export, "write all that is stored about a customer as JSON to standard output", _WHO),
        Command("erase", _erase, "erase what is stored about a customer, also where it is still owed", _WHO),
        Command("backfill", _backfill, "read again what Instagram may have told while nobody listened", (
            _opt("account", nargs="?", metavar="ACCOUNT", help="acc_… (default: every account)"),
            _opt("--since", default="24h", metavar="T", help="a time, or a duration such as 2h (default: 24h)"),
        )),
        Command("dlq list", _dlq_list, "tell what could not be delivered: how much, of whom, why", (
            _flag("--all", "list each delivery, oldest first, with its ID"),
            *_FILTERS,
        )),
        Command("dlq retry", _dlq_retry, "try dead deliveries again, in their old order", (
            _flag("--force", "also sends in doubt, each by its ID: they may arrive twice"),
            *_named("all that the filters let through, behind live traffic"),
            *_FILTERS,
        )),
        Command("dlq discard", _dlq_discard, "want dead deliveries no more: they are not tried again", (
            *_named("all that match"),
            *_FILTERS,
        )),
        Command("codes", _codes, "tell what Instagram's refusals mean, what happens and what to do", as_owner=False),
        Command("demo", _demo, "show both flows against the bundled sandbox; brings its own configuration", (
            _flag("--once", "exit after the round trip, 0 when every hop arrived"),
        ), as_owner=False),
        Command("sandbox", _sandbox, "run the local Meta and the sample CRM alone; needs no configuration", (
            _opt("--host", default="127.0.0.1", help="a loopback address"),
            _opt("--port", type=int, default=8090),
            _opt("--callback-url", help="where webhooks go, e.g. http://127.0.0.1:8080/webhooks/instagram"),
        ), as_owner=False),
    )  # fmt: skip


def _become_owner(options: argparse.Namespace) -> None:
    """As root, go on as the owner of the data folder; what is wrong with the configuration, the command itself says."""
    from crmbridge.ops import owner

    if os.geteuid() != 0:
        return
    path = config.find(options.config, os.environ).absolute()
    with contextlib.suppress(Misconfigured):
        place = config.load(path).store.path
        owner.become(owner.of(place), place.parent)
        options.config = str(path)  # a relative one is another place now


def _settings(options: argparse.Namespace) -> config.Settings:
    return config.load(config.find(options.config, os.environ))


@contextlib.contextmanager
def _database(options: argparse.Namespace) -> Any:
    settings = _settings(options)
    db = database.open_existing(settings.store.path, settings.vault.key_file)
    try:
        db.require_schema()
        yield db
    finally:
        db.close()


# --- init, migrate, check ---


def _init(options: argparse.Namespace) -> None:
    from crmbridge.ops import owner

    path = config.find(options.config, os.environ)
    is_new = not path.exists()
    if is_new:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(config.SHIPPED_INI, path)
        path.chmod(0o640)
    terminal.say(("made     " if is_new else "kept     ") + str(path))
    settings, absent, ini = config.load(path), config.absent(path), path
    whose = owner.of(settings.store.path)
    if is_new and whose:
        os.chown(path, -1, whose.gid)
    path, key_file = settings.store.path, settings.vault.key_file
    with owner.acting(whose):  # the database first, so that a key file without one tells of a disk that is not mounted
        path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not path.exists()
        if not is_new and not key_file.exists():
            _refuse_new_key(settings)
        may_be_made = is_new and not key_file.exists()
        with contextlib.closing(database.create(path) if may_be_made else database.open_existing(path, key_file)) as db:
            steps = db.migrate()
    is_made = vault.create(key_file, owner.ids(whose))
    terminal.say(("made     " if is_made else "kept     ") + str(key_file))
    terminal.say(("made     " if is_new else "migrated " if steps else "kept     ") + str(path))
    if absent:
        terminal.say(f"new      keys that {ini} does not have; so long their defaults apply:")
        terminal.say(*(f"  {line}" for line in absent))
    if is_new:
        terminal.say("next: crmbridge key create --name admin --admin, then crmbridge serve")


def _refuse_new_key(settings: config.Settings) -> None:
    db = database.open_existing(settings.store.path)
    try:
        sealed = db.schema_problem() is None and accounts.everyone(db)
    finally:
        db.close()
    if sealed:
        raise Misconfigured(
            f"{settings.vault.key_file} is gone, and only it opens the secrets of {len(sealed)} account(s) in "
            f"{settings.store.path}: put the saved key file back"
        )


def _migrate(options: argparse.Namespace) -> None:
    settings = _settings(options)
    with contextlib.closing(database.open_existing(settings.store.path, settings.vault.key_file)) as db:
        steps = db.migrate()
    terminal.say(*[f"applied {step}" for step in steps] or ["nothing to do"])


def _backup(options: argparse.Namespace) -> int:
    from crmbridge.ops import backup

    os.nice(10)  # the service goes first
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    return backup.run(
        _settings(options),
        options.target,
        ini=config.find(options.config, os.environ).absolute(),
        with_key=options.with_key,
        passphrase_file=options.passphrase_file,
        keep=options.keep,
    )


def _restore(options: argparse.Namespace) -> int:
    from crmbridge.ops import restore

    ini = config.find(options.config, os.environ).absolute()
    settings = config.load(ini) if os.path.lexists(ini) else config.usual(ini)
    return restore.run(settings, Path(options.file), ini=ini, passphrase_file=options.passphrase_file)


def _check(options: argparse.Namespace) -> int:
    from crmbridge.ops import check

    if options.rehearse:
        from crmbridge.ops import rehearsal

        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
        return rehearsal.run(_settings(options), Path(options.rehearse), _open_server)
    return check.run(_settings(options), config.find(options.config, os.environ), verbose=options.verbose)


def _open_server(settings: config.Settings) -> tuple[Any, database.Database]:
    from crmbridge import bridge
    from crmbridge.web.server import Server

    rooms = bridge.open_rooms(settings)
    return Server(bridge.make_app(rooms, lambda _: None), settings.web), rooms.db


def _health(options: argparse.Namespace) -> int:
    from crmbridge.ops import health

    if options.pid:
        return health.of_process(options.pid, live=options.live, wait_s=options.wait)
    web = health.at(options.at) if options.at else _settings(options).web
    return health.run(web, live=options.live, wait_s=options.wait)


def _doctor(options: argparse.Namespace) -> int:
    from crmbridge.ops import doctor

    return doctor.run(
        config.find(options.config, os.environ),
        as_json=options.json,
        verbose=options.verbose,
        calls=not options.no_calls,
        only=options.account,
        log_path=Path(options.log or doctor.LOG),
    )


def _support_bundle(options: argparse.Namespace) -> int:
    from crmbridge.ops import doctor, support

    path, target = config.find(options.config, os.environ), Path(options.file) if options.file else None
    return support.run(path, target, calls=not options.no_calls, log_path=Path(options.log or doctor.LOG))


def _explain(options: argparse.Namespace) -> int:
    from crmbridge.ops import explain
    from crmbridge.store.deliveries import Patience

    tried = _settings(options).delivery
    with _database(options) as db:
        return explain.run(db, options.id, Patience(tried.crm_give_up_s, tried.instagram_give_up_s))


# --- keys and accounts ---


def _key_create(options: argparse.Namespace) -> None:
    from crmbridge.ops import keys

    with _database(options) as db:
        keys.create(
            db,
            name=options.name,
            admin=options.admin,
            account_ids=options.account,
            permissions=options.permission,
            expires_days=options.expires_days,
        )


def _key_list(options: argparse.Namespace) -> None:
    from crmbridge.ops import keys

    with _database(options) as db:
        keys.show(db)


def _key_revoke(options: argparse.Namespace) -> None:
    from crmbridge.ops import keys

    with _database(options) as db:
        keys.revoke(db, options.id)


def _account_list(options: argparse.Namespace) -> None:
    from crmbridge.ops import accounts as ops

    with _database(options) as db:
        ops.show(db)


def _account_add(options: argparse.Namespace) -> None:
    from crmbridge.ops import accounts as ops

    if not options.token:
        raise Misconfigured("an account needs its access token: --token -, and the token on standard input")
    with _database(options) as db:
        ops.add(_connector(options, db), _account_given(options))


def _account_set(options: argparse.Namespace) -> None:
    from crmbridge.ops import accounts as ops

    given = _account_given(options)
    given |= {"crm_webhook_url": None} if options.pull else {}
    given |= {"status": "active" if options.active else "inactive"} if options.active or options.inactive else {}
    with _database(options) as db:
        ops.change(db, _connector(options, db), options.id, given)


def _account_given(options: argparse.Namespace) -> dict[str, Any]:
    from crmbridge.ops import accounts as ops

    wanted = {"access_token": options.token, "webhook_secret": options.secret}
    given: dict[str, Any] = ops.secrets([name for name, place in wanted.items() if place])
    return given | ({"crm_webhook_url": options.url} if options.url is not None else {})


def _connector(options: argparse.Namespace, db: database.Database) -> Any:
    from crmbridge import bridge, crm
    from crmbridge.connecting import Connector

    settings = _settings(options)
    return Connector(
        db,
        vault.load(settings.vault.key_file),
        bridge.open_client(settings),
        crm.reach(settings.crm),
        wake=lambda _: _ring(options),
        ask_s=settings.instagram.profile_wait_s,
    )


def _account_pause(options: argparse.Namespace) -> None:
    from crmbridge.ops import accounts as ops

    with _database(options) as db:
        ops.pause(db, options.id, options.what or (), until=options.until, lasts=options.lasts, reason=options.reason)
    _ring(options)


def _account_resume(options: argparse.Namespace) -> None:
    from crmbridge.ops import accounts as ops

    with _database(options) as db:
        ops.resume(db, options.id, options.what or (), held=options.held)
    _ring(options)


def _ring(options: argparse.Namespace) -> None:
    from crmbridge.worker import ring

    ring(_settings(options).store.queue_path)


def _alert_list(options: argparse.Namespace) -> None:
    from crmbridge.ops import alerts

    with _database(options) as db:
        alerts.show(db, also_ended=options.all)


def _alert_kinds(_: argparse.Namespace) -> None:
    from crmbridge.alerts import kinds

    terminal.say(*kinds.table())


def _codes(_: argparse.Namespace) -> None:
    from crmbridge.instagram import codes

    terminal.say(*codes.table())


def _alert_test(options: argparse.Namespace) -> int:
    from crmbridge.ops import alerts

    settings = _settings(options)
    log.setup(settings.log.level)
    return alerts.test(settings.alerts)


def _export(options: argparse.Namespace) -> int:
    from crmbridge.ops import export

    with _database(options) as db:
        return export.run(db, options.contact, options.account)


def _erase(options: argparse.Namespace) -> int:
    from crmbridge.ops import erase

    with _database(options) as db:
        found = erase.run(db, options.contact, options.account)
    _ring(options)
    return found


def _backfill(options: argparse.Namespace) -> None:
    from crmbridge.ops import backfill

    with _database(options) as db:
        backfill.ask(db, options.account, options.since)
    _ring(options)


def _dlq_list(options: argparse.Namespace) -> None:
    from crmbridge.ops import dlq

    with _database(options) as db:
        dlq.show(db, _dlq_filters(db, options), each=options.all)


def _dlq_retry(options: argparse.Namespace) -> int:
    from crmbridge.ops import dlq

    left, preview = 0, options.preview
    _require_choice(options)
    if options.all and options.force:
        raise Misconfigured("--force sends again what may have arrived: name it, one by one, once you have looked")
    with _database(options) as db:
        if options.all:
            dlq.retry_all(db, _dlq_filters(db, options), preview=preview)
        else:
            left = dlq.retry(db, options.ids, force=options.force, preview=preview)
    if not preview:
        _ring(options)
    return left


def _dlq_discard(options: argparse.Namespace) -> int:
    from crmbridge.ops import dlq

    _require_choice(options)
    with _database(options) as db:
        if not options.all:
            return dlq.discard(db, options.ids, preview=options.preview)
        dlq.discard_all(db, _dlq_filters(db, options), preview=options.preview)
    return 0


def _require_choice(options: argparse.Namespace) -> None:
    if bool(options.ids) == options.all:
        raise Misconfigured("name the deliveries, or say --all" + (", not both" if options.all else ""))


def _dlq_filters(db: database.Database, options: argparse.Namespace) -> Any:
    from crmbridge.ops import dlq
    from crmbridge.store.dead import Filter

    now_s = time.time()
    before = events.instant(now_s - options.older_than) if options.older_than else None
    after = events.instant(now_s - options.newer_than) if options.newer_than else None
    targets: list[Any] = ["crm"] * (not options.sends) + ["instagram"] * (not options.webhooks)
    wanted = [
        Filter(target, options.account, options.event, options.code, dead_after=after, dead_before=before)
        for target in targets
    ]
    dlq.check(db, wanted)
    return wanted


# --- serve, sandbox and demo ---


def _serve(options: argparse.Namespace) -> None:
    from crmbridge import bridge

    bridge.serve(_settings(options))


def _demo(options: argparse.Namespace) -> int:
    from crmbridge.sandbox import demo

    log.setup("warning")
    return demo.run(once=options.once)


def _sandbox(options: argparse.Namespace) -> None:
    from crmbridge.sandbox import Sandbox, demo

    try:
        sandbox = Sandbox(options.host, options.port, callback_url=options.callback_url)
    except (ValueError, OSError, OverflowError) as error:
        raise Misconfigured(str(error)) from None
    with sandbox:
        terminal.say(*demo.alone(sandbox).split("\n"), at_once=True)
        threading.Event().wait()
