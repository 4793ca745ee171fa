"""``crmbridge health``: asks the running server how it is. Loads next to nothing, as it is run every minute."""

import contextlib
import http.client
import json
import os
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path

from crmbridge import answers, config, terminal
from crmbridge.errors import Misconfigured

NO_ANSWER = 3
_GONE = 4
_TRY_S = 10.0
_PAUSE_S = 0.1
_LISTENS = "0A"  # in /proc/net/tcp
_STATUSES = ("alive", "healthy", "unhealthy")
HERE = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "*": "127.0.0.1", "::": "::1"}  # noqa: S104 - asked, not bound


def run(web: config.Web, *, live: bool, wait_s: float) -> int:
    """Print what the server says, asking again for `wait_s` until it is well.

    Returns 0 when it is well (`live`: when it answers at all), 1 when it is not, NO_ANSWER when nothing answers.
    """
    if not web.port:
        raise Misconfigured("[web] port is 0: only the log tells which port it listens on")
    return _told(lambda: ask(web.host, web.port, live=live), wait_s)


def of_process(pid: int, *, live: bool, wait_s: float) -> int:
    """Do the same, asking where a process listens; it is not waited for when it has ended."""

    def once() -> tuple[int, str]:
        if not Path(f"/proc/{pid}").exists():
            return _GONE, f"there is no process {pid}"
        answer = NO_ANSWER, f"process {pid} listens nowhere"
        for host, port in _listens(pid):
            answer = ask(host, port, live=live)
            if answer[0] != NO_ANSWER:
                break
        return answer

    return _told(once, wait_s)


def _told(once: Callable[[], tuple[int, str]], wait_s: float) -> int:
    ends = time.monotonic() + wait_s
    while True:
        status, told = once()
        if status in (0, _GONE) or time.monotonic() >= ends:
            terminal.say(told)
            return NO_ANSWER if status == _GONE else status
        time.sleep(_PAUSE_S)


def _listens(pid: int) -> list[tuple[str, int]]:
    """Return the TCP addresses on which a process listens, as far as this user may see."""
    found, held = [], set()
    with contextlib.suppress(OSError):
        for handle in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):  # closed meanwhile
                held.add(os.readlink(handle))
    for table, family, words in (("tcp", socket.AF_INET, "=I"), ("tcp6", socket.AF_INET6, "=4I")):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
                _, here, _, state, *_, inode = line.split()[:10]
                if state == _LISTENS and f"socket:[{inode}]" in held:
                    address, _, port = here.partition(":")
                    packed = struct.pack(words, *(int(address[at : at + 8], 16) for at in range(0, len(address), 8)))
                    found.append((socket.inet_ntop(family, packed), int(port, 16)))
    return found


def ask(host: str, port: int, *, live: bool = False) -> tuple[int, str]:
    """Ask once; return 0, 1 or NO_ANSWER, and what was said."""
    host, path = HERE.get(host, host), "/health/live" if live else "/health"
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


def at(address: str) -> config.Web:
    """Read HOST:PORT. Raises Misconfigured."""
    host, _, port = address.rpartition(":")
    if not (port.isascii() and port.isdigit() and 0 < int(port) < 65_536):
        raise Misconfigured(f"--at {address}: not HOST:PORT")
    return config.Web(host=host.strip("[]"), port=int(port))
