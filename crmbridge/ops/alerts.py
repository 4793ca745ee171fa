"""``crmbridge alert``: what is wrong and what was, and whether an alert would arrive."""

import time

from crmbridge import config, log, terminal
from crmbridge.alerts import telling
from crmbridge.alerts.kinds import kind_of
from crmbridge.store import alerts as record
from crmbridge.store.database import Database


def show(db: Database, *, also_ended: bool) -> None:
    """Print the open alerts, the oldest first, with what to do; if asked then the last of each kind that ended."""
    rows = [row for row in record.everything(db) if also_ended or row["cleared_at"] is None]
    for row in rows:
        about = f"  {row['account_id']}" if row["account_id"] else ""
        state = f"ended {row['cleared_at']}" if row["cleared_at"] else "open"
        terminal.say(f"{row['kind']}{about}  {state}  since {row['since']}  {row['count']} time(s)  {row['message']}")
        if row["cleared_at"] is None:
            terminal.say(f"    what to do: {kind_of(row['kind']).todo.replace('ACCOUNT', row['account_id'])}")
    if all(row["cleared_at"] for row in rows):
        terminal.say("no alert is open")


def test(settings: config.Alerts) -> int:
    """Send a test alert through log, command and URL now, and print what each did; return 1 when one failed."""
    now_s, message = time.time(), "this is a test of the alerts; nothing is wrong"
    news = telling.News("test", "test", message, "nothing", "", None, since_s=now_s, now_s=now_s, count=1, more=1)
    log.alert("alert.test", state="test", message=message)
    terminal.say("log      written, on standard error")
    problems = {}
    if settings.command:
        problems["command"] = telling.run_command(settings.command, news)
    if settings.url:
        problems["url"] = telling.post(telling.open_session(), settings.url, news)
    for channel, problem in problems.items():
        terminal.say(f"{channel:8} {'took it' if problem is None else 'failed: ' + problem}")
    if not problems:
        terminal.say("[alerts] command and url are both empty: alerts go to the log alone")
    return int(any(problems.values()))
