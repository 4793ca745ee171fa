"""``crmbridge check``: is this installation fit to run? Looks at files only; calls nobody and changes nothing."""

import os
import time
from pathlib import Path

from crmbridge import config, vault
from crmbridge.errors import Misconfigured
from crmbridge.store import accounts, alerts, database, overview, pauses, retention, vitals


def run(settings: config.Settings, source: Path) -> int:
    """Print the effective configuration and every finding; return 0 when nothing stops a start, else 1."""
    print(f"configuration: {source.resolve()}")
    for name, value in config.shown(settings).items():
        print(f"  {name} = {value}")
    findings = _findings(settings)
    for level, text in findings:
        print(f"{level}: {text}")
    failed = any(level == "error" for level, _ in findings)
    print("not fit to run" if failed else "fit to run")
    return int(failed)


def _findings(settings: config.Settings) -> list[tuple[str, str]]:
    found = [("warning", doubt) for doubt in config.doubts(settings)]
    for path in (settings.store.path.parent, settings.store.queue_path.parent):
        if path.exists() and not os.access(path, os.W_OK):
            found.append(("error", f"{path} cannot be written by this user"))
    keys = None
    try:
        keys = vault.load(settings.vault.key_file)
        found.append(("ok", f"key file {settings.vault.key_file}"))
    except Misconfigured as error:
        found.append(("error", error.message))
    try:
        db = database.open_existing(settings.store.path)
    except Misconfigured as error:
        return [*found, ("error", error.message)]
    try:
        db.require_schema()
        found.append(("ok", f"database {settings.store.path}, schema up to date"))
        sizes = db.sizes()
        told = ", ".join(f"{name.removesuffix('_bytes')} {size / 2**20:.1f}" for name, size in sizes.items())
        found.append(("ok", f"sizes in MB: {told}"))
        if sizes["free_bytes"] > retention.SPARE_BYTES and not db.can_shrink():
            todo = f'sqlite3 {settings.store.path} "PRAGMA auto_vacuum = incremental; VACUUM"'
            found.append(("warning", f"the file cannot shrink; while the service is stopped: {todo}"))
        if db.is_full:
            found.append(("warning", "the disk is too full for the reserve: nothing new would be taken"))
        everyone = accounts.everyone(db)
        found.append(("ok", f"{len(everyone)} account(s)"))
        no_worker = vitals.worker_problem(db, time.time())
        if no_worker:
            found.append(("warning", f"{no_worker}; nothing goes out until it is started: crmbridge serve"))
        found += _state(db)
        found += [("warning", text) for account in everyone for text in _stops(db, account)]
        for account in everyone if keys else []:
            if account["access_token_sealed"]:
                keys.open(account["access_token_sealed"])  # type: ignore[union-attr]
            else:
                found.append(("warning", f"{account['id']} has no access token: {account['status_reason']}"))
    except Misconfigured as error:
        found.append(("error", error.message))
    finally:
        db.close()
    return found


def _stops(db: database.Database, account: database.Row) -> list[str]:
    """Say what holds an account back or keeps it from hearing, each with what to type."""
    found, put = [], f"PUT /api/v1/accounts/{account['id']}"
    if account["status"] != "active":
        what = "sends are" if account["status"] == "error" else "deliveries and sends are"
        why = f": {account['status_reason']}" if account["status_reason"] else ""
        todo = "a new access_token, or status: active" if account["status"] == "error" else "status: active"
        found.append(f"is {account['status']} since {account['status_since']}, its {what} held{why}; {put} with {todo}")
    for what, target in pauses.WHAT.items():
        hold = pauses.everyone(db).get((target, account["id"]))
        if hold is None:
            continue
        text = f"{what} are paused since {hold['since']}" + (f" until {hold['until']}" if hold["until"] else "")
        text += f": {hold['reason']}" if hold["reason"] else ""
        found.append(f"{text}; {pauses.to_type(account['id'], target, hold['cause'])}")
    if account["subscription_ok"] == 0:
        found.append(f"is not subscribed to Instagram's webhooks: {account['subscription_error']}; {put} with a new "
                     "access_token, or wait: it is tried again every six hours")  # fmt: skip
    return [f"{account['id']} ({account['username'] or '-'}) {text}" for text in found]


def _state(db: database.Database) -> list[tuple[str, str]]:
    """Return what each account waits for, how late it is and what died, and the alerts that are open."""
    found = []
    for row in overview.accounts(db):
        for name in overview.NAMES.values():
            text = f"{row['account_id']} ({row['username'] or row['status']}) {name}: {row[f'pending_{name}']} pending"
            oldest, late = row[f"oldest_pending_{name.removesuffix('s')}_at"], row["latency"][name]
            text += f" since {oldest}" if oldest else ""
            text += f", {row[f'dead_{name}']} dead; last hour: {overview.said(late)}"
            found.append(("warning" if row[f"dead_{name}"] else "ok", text))
    unrouted = overview.unrouted(db)
    if unrouted:
        found.append(("warning", f"{unrouted} event(s) for Instagram accounts that are not connected here"))
    for alert in alerts.everything(db):
        if alert["cleared_at"] is None:
            about = f" {alert['account_id']}" if alert["account_id"] else ""
            found.append(("warning", f"alert {alert['kind']}{about} since {alert['since']}: {alert['message']}"))
    return found
