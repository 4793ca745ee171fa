"""Waiting for what must come to be, and ports for it: how fast this machine is proves nothing, and breaks nothing."""

import secrets
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

PATIENCE_S = 60.0  # for any one thing; more than a machine with other work takes for it
BULK_S = 5 * PATIENCE_S  # for thousands of them
SWEEP_S = 5.0  # what waits without a bell is found after this at the latest
_RINGS = 40
Seen = TypeVar("Seen")


def until(
    look: Callable[[], Seen],
    is_it: Callable[[Seen], object] = bool,
    *,
    timeout_s: float = PATIENCE_S,
    pause_s: float = 0.05,
) -> Seen:
    """Look again and again until what is seen is what is wanted, and return it.

    Raises:
        TimeoutError: it never was; the message tells what was seen last.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        is_last = time.monotonic() > deadline  # what came while this process did not run is seen, too
        if is_it(seen := look()):
            return seen
        if is_last:
            raise TimeoutError(f"not within {timeout_s:g} s; seen last: {str(seen)[-3000:]}")
        time.sleep(pause_s)


def assert_rung(ask: Callable[[int], object], await_it: Callable[[int], object]) -> None:
    """Assert that bells bring what is asked for, time and again, and not who looks anyhow every five seconds.

    There are three who may look so, each at a time of its own: what they bring four times in a row takes five seconds.
    A busy machine does not make every such row late.
    """
    took_s = list[float]()
    for number in range(_RINGS):
        time.sleep(0.3)  # who is still at work needs no bell
        ask(number)
        began = time.monotonic()
        await_it(number)
        took_s.append(time.monotonic() - began)
        if number >= 3 and sum(took_s[-4:]) < SWEEP_S / 2:
            return
    raise AssertionError(f"nothing came sooner than without a bell: {took_s}")


def free_port() -> int:
    """Return a port of 127.0.0.1 that is free, below those that the kernel gives to calls and to whoever asks for any.

    So it is still free when its server starts, and when that starts again.
    """
    given_from = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = 10_000 + secrets.randbelow(max(given_from - 10_000, 10_000))
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what ended a minute ago takes no port
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
