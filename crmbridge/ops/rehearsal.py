"""``crmbridge check --rehearse FILE``: could this version serve what is in a backup?

Tries it on a copy: without engine, queue or alerts, on a port of its own, and calls nobody.
"""

import _thread
import contextlib
import os
import re
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from crmbridge import config, terminal
from crmbridge.ops import health
from crmbridge.store import database, vitals

_DRAFT = ".rehearsal-"
_MEMORY_MB, _SPARE_MB = 100, 50
_LONGEST_S = 600
_MB = 10**6
Opener = Callable[[config.Settings], tuple[Any, database.Database]]  # returns a server


def run(settings: config.Settings, file: Path, open_server: Opener) -> int:
    """Migrate and serve a copy of a backup, ask it once how it is, and delete it; return 0 when it was well.

    Where disk or memory do not allow that, it is said and skipped. After `_LONGEST_S` this process ends.
    """
    began_s = time.monotonic()
    signal.alarm(_LONGEST_S + 5)  # what lets no other thread run is ended by the kernel
    watch = threading.Timer(_LONGEST_S, _give_up, [file])
    watch.daemon = True
    watch.start()
    try:
        return _rehearse(settings, file, open_server, began_s)
    finally:
        watch.cancel()
        signal.alarm(0)


def _give_up(file: Path) -> None:
    """End this process whatever it is at: a statement of SQLite heeds no signal."""
    terminal.complain(f"crmbridge: the rehearsal took more than {_LONGEST_S} s and was ended")
    _tidy(file)
    os._exit(1)


def _tidy(file: Path) -> None:
    for left in file.parent.glob(f"{_DRAFT}*"):
        shutil.rmtree(left, ignore_errors=True)


def _rehearse(settings: config.Settings, file: Path, open_server: Opener, began_s: float) -> int:
    _tidy(file)  # of one that was killed
    lack = _lack(file)
    if lack:
        terminal.say(f"rehearsal skipped: {lack}")
        return 0
    with tempfile.TemporaryDirectory(prefix=_DRAFT, dir=file.parent) as folder:
        copy = Path(folder, "bridge.db")
        shutil.copyfile(file, copy)
        with contextlib.closing(database.open_existing(copy)) as db:
            steps = db.migrate()
            vitals.beat(db, "worker", time.time())  # there is none
        status, said = _serve(settings, copy, open_server)
    migrated = f"; migrated: {', '.join(steps)}" if steps else ""
    took_s = time.monotonic() - began_s
    terminal.say(f"rehearsed on a copy of the database: {said}{migrated}; {took_s:.1f} s")
    return status


def _lack(file: Path) -> str | None:
    disk = os.statvfs(file.parent)
    free_mb, needs_mb = disk.f_bavail * disk.f_frsize / _MB, 2 * file.stat().st_size / _MB + _SPARE_MB
    if free_mb < needs_mb:
        return f"{free_mb:.0f} MB are free in {file.parent}, and it takes {needs_mb:.0f} MB"
    left = re.findall(r"^(?:MemAvailable|SwapFree): +(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    free_mb = sum(map(int, left)) / 1000
    return f"{free_mb:.0f} MB of memory are free, and it takes {_MEMORY_MB} MB" if free_mb < _MEMORY_MB else None


def _serve(settings: config.Settings, copy: Path, open_server: Opener) -> tuple[int, str]:
    tried = replace(
        settings,
        store=config.Store(copy, copy.with_name("queue.db")),
        web=replace(settings.web, host="127.0.0.1", port=0),
        alerts=config.Alerts(),
    )
    server, db = open_server(tried)
    answers: list[tuple[int, str]] = []
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background process was told to ignore it

    def ask() -> None:
        try:
            answers.append(health.ask("127.0.0.1", server.port))
        finally:
            _thread.interrupt_main()  # which ends the server

    asking = threading.Thread(target=ask)
    asking.start()
    server.run()
    asking.join()
    server.close()
    db.close()
    return answers[0]
