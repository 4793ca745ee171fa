"""``crmbridge account``: connect and change accounts, list them, hold their deliveries or sends, let them go on."""

import getpass
import json
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from crmbridge import contract, log, terminal
from crmbridge.connecting import Connected, Connector
from crmbridge.errors import Misconfigured, NotFound
from crmbridge.events import instant, read_instant, read_span
from crmbridge.store import accounts, dead, endpoints
from crmbridge.store.database import Database


def show(db: Database) -> None:
    """Print a line for each account, oldest first, and below it what is held back and why."""
    for row in accounts.everyone(db):
        subscribed = {1: "subscribed", 0: "not subscribed", None: "?"}[row["subscription_ok"]]
        target = log.origin(row["crm_webhook_url"]) if row["crm_webhook_url"] else "(pull)"
        name = row["username"] or "-"
        terminal.say(f"{row['id']}  {row['status']:8} {subscribed:14} {row['instagram_account_id']}  {name}  {target}")
        for what, kind in endpoints.WHAT.items():
            for hold in endpoints.locks(endpoints.find(db, row["id"], kind)):
                until = f" until {hold['until']}" if hold["until"] else ""
                why = f": {hold['reason']}" if hold["reason"] else ""
                terminal.say(f"  {what} held since {hold['since']}{until}{why}")


_ASKED = {"access_token": "Access token: ", "webhook_secret": "Webhook secret: "}
_READ_MOST = 8192


def secrets(names: Sequence[str]) -> dict[str, str]:
    """Return secrets by their names, each a line of standard input; a person at a terminal is asked for them.

    Raises Misconfigured for more lines, and for fewer.
    """
    if not names:
        return {}
    if sys.stdin is not None and sys.stdin.isatty():
        try:
            given = [getpass.getpass(_ASKED[name]) for name in names]
        except EOFError:
            raise Misconfigured("nothing was typed") from None
    else:
        try:
            text = sys.stdin.buffer.read(_READ_MOST).decode() if sys.stdin is not None else ""
            given = [line.removesuffix("\r") for line in text.split("\n")]
        except UnicodeDecodeError:
            raise Misconfigured("standard input is not UTF-8 text") from None
    while given and not given[-1]:
        given.pop()
    if len(given) != len(names):
        raise Misconfigured(
            f"standard input has {len(given)} line(s), and is to have {len(names)}: {', then '.join(names)}"
        )
    return dict(zip(names, given, strict=True))


def add(connector: Connector, given: Mapping[str, Any]) -> None:
    """Connect the account that a token belongs to, by the API's names, and print its id."""
    read = _read(given)
    done = connector.add(
        None,
        token=read["access_token"],
        url=read.get("crm_webhook_url"),
        secret=read.get("webhook_secret"),
        username=None,
        now_s=time.time(),
    )
    row = done.account
    terminal.say(f"connected {row['id']}  {row['instagram_account_id']}  {row['username'] or '-'}")
    if done.adopted:
        terminal.say(f"{done.adopted} event(s) that came for it before go to the CRM now")
    _tell(done, is_new_token=True)


def change(db: Database, connector: Connector, account_id: str, given: Mapping[str, Any]) -> None:
    """Change what is given of an account, by the API's names, and print what changed."""
    _require(db, account_id)
    if not given:
        raise Misconfigured("say what to set: --token, --secret, --url, --pull, --active or --inactive")
    done = connector.change(accounts.found(db, account_id), _read(given), time.time())
    terminal.say(f"set {', '.join(given)} of {account_id}, which is {done.account['status']}")
    was_held, again = done.released
    if was_held:
        terminal.say(f"released deliveries of {account_id}")
    if again:
        terminal.say(f"{again} event(s) of {account_id} that a 401 ended are sent again")
    _tell(done, is_new_token="access_token" in given)


def _read(given: Mapping[str, Any]) -> dict[str, Any]:
    """Hold values to what the API takes."""
    body = json.dumps(given).encode()
    return contract.read(contract.AccountUpdate, body).model_dump(exclude_unset=True)


def _tell(done: Connected, *, is_new_token: bool) -> None:
    if done.made:
        terminal.say(f"webhook_secret {done.made}")
        terminal.complain("the webhook secret is shown once: give it to the CRM, which checks signatures with it")
    if "webhook_secret_weak" in done.warnings:
        terminal.complain("warning: the webhook secret is easy to guess: take 16 characters or more at random")
    if is_new_token and not done.account["subscription_ok"]:
        said = done.account["subscription_error"]
        terminal.complain(f"warning: not subscribed to its webhooks, which is tried again every six hours: {said}")


def pause(
    db: Database, account_id: str, what: Sequence[str], *, until: str | None, lasts: str | None, reason: str | None
) -> None:
    """Hold deliveries or sends back, or with neither both. Raises Misconfigured for a time that makes no sense."""
    _require(db, account_id)
    now_s = time.time()
    try:
        if lasts is not None:
            until = instant(now_s + read_span(lasts))
        elif until is not None:
            until = read_instant(until)
    except ValueError as error:
        raise Misconfigured(f"{'--for' if lasts is not None else '--until'} {error}") from None
    if reason is not None and not (reason.isprintable() and 0 < len(reason) <= 255):
        raise Misconfigured("--reason must be printable text of at most 255 characters")
    endpoints.pause(db, account_id, what or list(endpoints.WHAT), reason=reason, until=until)
    for name in what or endpoints.WHAT:
        terminal.say(f"paused {name} of {account_id}" + (f" until {until}" if until else ""))


def resume(db: Database, account_id: str, what: Sequence[str], *, held: bool) -> None:
    """Let what was paused go on, of the two or both; where nothing was, or if `held`, also what an answer holds."""
    _require(db, account_id)
    for name in what or endpoints.WHAT:
        target = endpoints.WHAT[name]
        was_paused = endpoints.resume(db, account_id, target)
        if was_paused:
            terminal.say(f"resumed {name} of {account_id}")
        account = accounts.found(db, account_id)
        may_release = held or not was_paused
        was_held, again = dead.release(db, account, target) if may_release else (False, 0)
        if again:
            terminal.say(f"{again} event(s) of {account_id} that a 401 ended are sent again")
        if was_held:
            terminal.say(f"released {name} of {account_id}")
        elif (left := endpoints.locked(db, account_id, target)) is not None:
            todo = endpoints.to_type(account_id, target, left["cause"])
            terminal.say(
                f"{name} of {account_id} are still held: {left['reason'] or left['cause']}; to end that: {todo}"
            )
        elif not was_paused and not again:
            terminal.say(f"{name} of {account_id} were not paused")


def _require(db: Database, account_id: str) -> None:
    try:
        accounts.found(db, account_id)
    except NotFound:
        raise Misconfigured(f"there is no account {account_id}; 'crmbridge account list' shows them") from None
