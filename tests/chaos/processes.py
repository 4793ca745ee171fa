"""The bridge's processes, killed and started again by their ids; knows no load and no rules."""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.waiting import PATIENCE_S, until

_READY = b"serve.ready"
_ROOT = Path(__file__).absolute().parent.parent.parent


class Process:
    """The bridge as a process; `planted` names a bug that it is started with."""

    def __init__(self, name: str, ini: Path, environ: Mapping[str, str], planted: str | None = None) -> None:
        module = ["crmbridge"] if planted is None else ["tests.chaos.planted", planted]
        self._words = [sys.executable, "-m", *module, "serve", "--config", str(ini)]
        self._environ = {**environ, "PYTHONPATH": str(_ROOT)}
        self._process: subprocess.Popen[bytes] | None = None
        self._logs = ini.parent / "logs"
        self._logs.mkdir(exist_ok=True)
        self._starts = 0
        self.name = name

    @property
    def _log(self) -> Path:
        return self._logs / f"{self.name}-{self._starts:04}.log"

    def spawn(self) -> None:
        """Start it without waiting for it."""
        self._starts += 1
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(self._words, env=self._environ, stderr=log, stdout=log)

    def wait_ready(self) -> None:
        """Wait until it does its work; RuntimeError when it ended or takes too long."""
        until(lambda: _READY in self._log.read_bytes() or not self.runs())
        if _READY not in self._log.read_bytes():
            raise RuntimeError(f"{self.name} did not start:\n{self._log.read_text()}")

    def runs(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def kill(self) -> None:
        """End it with SIGKILL."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """Ask it to end, and kill it when it does not."""
        self._end(signal.SIGTERM)

    def wait(self, timeout_s: float) -> int:
        """Wait until it ended by itself; return its exit status."""
        assert self._process is not None
        return self._process.wait(timeout_s)

    def _end(self, number: int) -> None:
        if self._process is None:
            return
        if self._process.poll() is None:
            os.kill(self._process.pid, number)
        try:
            self._process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def log_lines(folder: Path, names: Sequence[str], most: int = 40) -> list[str]:
    """Return the lines of all logs that name one of these, in the order of their times."""
    found = [
        line
        for path in sorted((folder / "logs").glob("*.log"))
        for line in path.read_text(errors="replace").splitlines()
        if any(name in line for name in names)
    ]
    return sorted(found)[:most]
