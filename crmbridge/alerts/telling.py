"""How an alert is told: the words, the administrator's command, and the URL. Knows nothing of when."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import tempfile
from dataclasses import dataclass
from typing import Literal

from crmbridge import log, net, terminal
from crmbridge.alerts.kinds import kind_of
from crmbridge.events import instant

COMMAND_S = 30.0
# What a shell, a mail program and their like go by. Nothing else of the environment is given to the command: the
# bridge's own secrets may be in it.
INHERITED = (
    "PATH", "HOME", "USER", "LOGNAME", "SHELL", "TMPDIR", "TZ", "LANG", "LANGUAGE", "MAILRC", "EMAIL", "REPLYTO",
)  # fmt: skip
_STDERR_BYTES = 500
State = Literal["raised", "repeated", "cleared", "test"]


@dataclass(frozen=True)
class News:
    """What is to be told about an alert: `more` causes since it was last told of, `count` in all."""

    kind: str
    state: State
    message: str
    todo: str
    account_id: str
    account_name: str | None
    since_s: float
    now_s: float
    count: int
    more: int


def text(news: News) -> str:
    """Return an alert as a letter that is understood at two in the morning; its first line can be a subject."""
    kind = kind_of(news.kind)
    lines = [subject(news), "", _sentence(news.message)]
    if news.state in ("raised", "repeated"):
        lines.append(_sentence(f"What it means: {kind.cause}"))
    if news.account_id:
        lines.append(f"Account: {_account(news)}")
    lines.append(_sentence(_course(news)))
    if news.state in ("raised", "repeated"):
        lines += ["", "What to do: " + news.todo, "It is over when: " + kind.ends.replace("ACCOUNT", news.account_id)]
    return log.struck("\n".join(map(terminal.escaped, lines)) + "\n")


def body(news: News) -> bytes:
    """Return an alert as JSON; `text` holds it all in one line, as chat programs' incoming webhooks show it."""
    line = f"{subject(news)}: {_sentence(news.message)} {_sentence(_course(news))}"
    if news.state in ("raised", "repeated"):
        line += f" What to do: {news.todo}"
    facts = {
        "alert": news.kind,
        "state": news.state,
        "message": terminal.escaped(news.message),
        "account_id": news.account_id or None,
        "since": instant(news.since_s),
        "count": news.count,
        "todo": terminal.escaped(news.todo) if news.state in ("raised", "repeated") else None,
        "text": terminal.escaped(line),
    }
    return log.struck(json.dumps(facts, ensure_ascii=False)).encode()


def subject(news: News) -> str:
    """Return one line: the state, the kind, and whom and which machine it is about."""
    head = {"raised": "ALERT", "repeated": "ALERT, still", "cleared": "All clear", "test": "Test"}[news.state]
    about = f" of {news.account_name or news.account_id}" if news.account_id else ""
    return f"crmbridge on {socket.gethostname()}: {head}: {news.kind}{about}"


def _account(news: News) -> str:
    return f"{news.account_name} ({news.account_id})" if news.account_name else news.account_id


def _course(news: News) -> str:
    """Tell since when, how long and how often."""
    since, lasted = instant(news.since_s)[:16].replace("T", " ") + " UTC", span(news.now_s - news.since_s)
    counted = not kind_of(news.kind).lasting and news.count > 1
    if news.state == "cleared":
        return f"It began at {since} and lasted {lasted}" + (f"; {news.count:,} times in all" if counted else "")
    if news.state == "repeated" and counted and news.more:
        return f"And {news.more:,} more since it was last told; {news.count:,} since {since}"
    if news.state == "repeated":
        return f"It has lasted {lasted}, since {since}"
    return f"Since {since}" + (f", {news.count:,} times so far" if counted else "")


def span(seconds: float) -> str:
    """Render a duration for a person: ``40 s``, ``7 min``, ``2 h 5 min``, ``3 d 4 h``."""
    minutes, hours = int(seconds // 60), int(seconds // 3600)
    if minutes < 1:
        return f"{max(int(seconds), 0)} s"
    if hours < 1:
        return f"{minutes} min"
    whole, rest = (f"{hours} h", f"{minutes % 60} min") if hours < 48 else (f"{hours // 24} d", f"{hours % 24} h")
    return whole if rest.startswith("0 ") else f"{whole} {rest}"


def _sentence(words: str) -> str:
    words = words.strip()
    return words[:1].upper() + words[1:] + ("" if words.endswith((".", "!", "?")) else ".")


def run_command(command: str, news: News) -> str | None:
    """Give an alert to the command; return what went wrong, or None.

    Whatever it started is ended with it when it takes too long.
    """
    environ = {name: value for name, value in os.environ.items() if name in INHERITED or name.startswith("LC_")}
    environ |= {"ALERT_KIND": news.kind, "ALERT_STATE": news.state, "ALERT_ACCOUNT": news.account_id}
    # Files instead of pipes: nothing that the command leaves behind can hold us up.
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as complaint:
        given.write(text(news).encode())
        given.seek(0)
        try:
            process = subprocess.Popen(
                ["/bin/sh", "-c", command],
                stdin=given,
                stdout=subprocess.DEVNULL,
                stderr=complaint,
                env=environ,
                start_new_session=True,
            )
        except OSError as error:
            return type(error).__name__
        try:
            status = process.wait(COMMAND_S)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return f"it took longer than {COMMAND_S:g} s"
        if status == 0:
            return None
        complaint.seek(0)
        said = complaint.read(_STDERR_BYTES).decode(errors="replace").strip()
        return f"exit status {status}" + (f": {said}" if said else "")


def open_session() -> net.Session:
    """Return a session for the URL: it is the administrator's own, and may lead anywhere."""
    reach = net.Reach(any_address=True, http=True)
    return net.Session(reach, connect_timeout_s=5, timeout_s=15, connections=1, status_decides=True)


def post(session: net.Session, url: str, news: News) -> str | None:
    """Post an alert to the URL; return what went wrong, or None."""
    try:
        answer = session.call("POST", url, headers={"Content-Type": "application/json"}, body=body(news))
    except net.CallFailed as failure:
        return failure.message
    return None if 200 <= answer.status < 300 else f"HTTP {answer.status}"
