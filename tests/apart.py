"""A network of a test's own: every address there is this machine, and names lead where the test says.

A test that is `apart` runs in a process with a network and a name server of its own; run as a program, this module is
that process.
"""

import contextlib
import functools
import importlib
import ipaddress
import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

from tests.needs import require

NAMES: dict[str, list[str]] = {}  # what the name server there knows: a name's addresses
ASKED: list[str] = []  # the names it was asked for
_A, _AAAA = 1, 28
_ROOT = Path(__file__).resolve().parent.parent


def apart(test: Callable[[Path], None]) -> Callable[[Path], None]:
    """Run a test in a network of its own; it takes a folder alone."""

    @functools.wraps(test)
    def outside(tmp_path: Path) -> None:
        require(os.geteuid() == 0 and shutil.which("ip") and shutil.which("unshare"), "needs root, ip and unshare")
        words = ["unshare", "--net", "--mount", "--propagation", "private", sys.executable, "-W", "error", "-m"]
        words += ["tests.apart", test.__module__, test.__name__, str(tmp_path)]
        environ = {**os.environ, "PYTHONPATH": str(_ROOT)}
        done = subprocess.run(words, cwd=_ROOT, env=environ, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    return outside


def _prepare(folder: str) -> None:
    for words in ("link set lo up", "route add local 0.0.0.0/0 dev lo", "-6 route add local ::/0 dev lo"):
        subprocess.run(["ip", *words.split()], check=True)
    for name, text in (
        ("resolv.conf", "nameserver 127.0.0.1\noptions attempts:1 timeout:2\n"),
        ("hosts", "127.0.0.1 localhost\n::1 localhost\n"),
        ("nsswitch.conf", "hosts: files dns\n"),
    ):
        path = Path(folder) / name
        path.write_text(text)
        if Path("/etc", name).exists():
            subprocess.run(["mount", "--bind", str(path), f"/etc/{name}"], check=True)
    asked = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    asked.bind(("127.0.0.1", 53))
    threading.Thread(target=_answer, args=(asked,), daemon=True).start()


def _answer(asked: socket.socket) -> None:
    while True:
        query, sender = asked.recvfrom(4096)
        with contextlib.suppress(OSError):
            asked.sendto(_reply(query), sender)


def _reply(query: bytes) -> bytes:
    labels, at = [], 12
    while query[at]:
        labels.append(query[at + 1 : at + 1 + query[at]].decode("latin-1").lower())
        at += 1 + query[at]
    name, (kind,) = ".".join(labels), struct.unpack("!H", query[at + 1 : at + 3])
    ASKED.append(name)
    found = [ipaddress.ip_address(address) for address in NAMES.get(name, [])]
    told = [one.packed for one in found if one.version == {_A: 4, _AAAA: 6}.get(kind)]
    records = b"".join(struct.pack("!HHHIH", 0xC00C, kind, 1, 0, len(data)) + data for data in told)
    flags = 0x8180 if name in NAMES else 0x8183
    return query[:2] + struct.pack("!HHHHH", flags, 1, len(told), 0, 0) + query[12 : at + 5] + records


if __name__ == "__main__":
    module, name, folder = sys.argv[1:]
    with tempfile.TemporaryDirectory() as settings:
        # Under its own name, so that the test and this process share what the name server knows.
        here = importlib.import_module("tests.apart")
        here._prepare(settings)
        getattr(importlib.import_module(module), name).__wrapped__(Path(folder))
