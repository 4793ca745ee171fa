"""``crmbridge health``: asks the running server how it is. Loads next to nothing, as it is run every minute."""

import http.client
import json
import os
import socket
import time
from pathlib import Path

from crmbridge import answers, config, terminal
from crmbridge.errors import Misconfigured

NO_ANSWER = 3
_TRY_S = 10.0
_PAUSE_S = 0.1
_STATUSES = ("alive", "healthy", "unhealthy")
HERE = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "*": "127.0.0.1", "::": "::1"}  # noqa: S104 - asked, not bound


def run(web: config.Web, *, live: bool, wait_s: float) -> int:
    """Print what the server says, asking again for `wait_s` until it is well.

    Returns 0 when it is well (`live`: when it answers at all), 1 when it is not, NO_ANSWER when nothing answers.
    """
    if not web.port:
        raise Misconfigured("[web] port is 0: only the log tells which port it listens on")
    path = "/health/live" if live else "/health"
    ends = time.monotonic() + wait_s
    while True:
        status, told = _ask(HERE.get(web.host, web.host), web.port, path)
        if status == 0 or time.monotonic() >= ends:
            terminal.say(told)
            return status
        time.sleep(_PAUSE_S)


def _ask(host: str, port: int, path: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection(host, port, timeout=_TRY_S)
    try:
        status, body = answers.get(connection, path, timeout_s=_TRY_S, headers={"Connection": "close"})
    except (OSError, http.client.HTTPException) as error:
        return NO_ANSWER, f"no answer from {host}:{port}: {str(error) or type(error).__name__}"
    try:
        said = json.loads(body)
    except ValueError:
        said = None
    # Another program may have the port, and may say 200 to everything.
    if not isinstance(said, dict) or not (said.get("status") in _STATUSES or "correlation_id" in said):
        return NO_ANSWER, f"what answers at {host}:{port} is not crmbridge: HTTP {status}"
    well = status == 200 or path == "/health/live"
    said_status = str(said.get("status") or f"HTTP {status}")
    return int(not well), ": ".join([said_status, *filter(None, ["; ".join(said.get("reasons", []))])])


def worker(queue_path: Path, *, wait_s: float) -> int:
    """Ring a worker in its own process more often than its bell holds, so that somebody must hear it.

    Returns 0 when it is heard, NO_ANSWER when it is not within `wait_s`.
    """
    holds = int(Path("/proc/sys/net/unix/max_dgram_qlen").read_text())
    ends = time.monotonic() + wait_s
    while True:
        try:
            os.chdir(queue_path.parent)  # the whole path may be longer than a socket's address
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as bell:
                bell.settimeout(max(ends - time.monotonic(), _PAUSE_S))
                bell.connect(queue_path.name + ".bell")
                for _ in range(holds + 2):
                    bell.send(b"!")
            terminal.say("alive")
            return 0
        except OSError as error:
            if time.monotonic() >= ends:
                terminal.say(f"no worker hears {queue_path}.bell: {error}")
                return NO_ANSWER
        time.sleep(_PAUSE_S)


def at(address: str) -> config.Web:
    """Read HOST:PORT. Raises Misconfigured."""
    host, _, port = address.rpartition(":")
    if not (port.isascii() and port.isdigit() and 0 < int(port) < 65_536):
        raise Misconfigured(f"--at {address}: not HOST:PORT")
    return config.Web(host=host.strip("[]"), port=int(port))
