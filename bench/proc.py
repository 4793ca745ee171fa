"""What the kernel tells of a process: its time, switches, writes and memory; and how busy all others were."""

import contextlib
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

_TICKS_S = os.sysconf("SC_CLK_TCK")


def _cpu_s(pid: int) -> tuple[float, float]:
    words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(words[11]) / _TICKS_S, int(words[12]) / _TICKS_S


def _switches(pid: int) -> int:
    """Return how often the process's threads gave way of themselves."""
    number = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            found = re.search(r"^voluntary_ctxt_switches:\s+(\d+)", (task / "status").read_text(), re.MULTILINE)
            number += int(found[1]) if found else 0
    return number


def _busy_s() -> float:
    user, nice, system, _, _, irq, soft_irq, *_ = map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:])
    return (user + nice + system + irq + soft_irq) / _TICKS_S


def memory(pid: int) -> dict[str, float]:
    """Return memory in MB of 1024 KiB. Private dirty is the process's alone; PSS falls with every Python beside it."""
    found = dict(re.findall(r"^(\w+): +(\d+) kB$", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE))
    mb = {name: int(found[name]) / 1024 for name in ("Private_Dirty", "Pss", "Rss")}
    return {**mb, "threads": len(list(Path(f"/proc/{pid}/task").iterdir()))}


@dataclass(frozen=True)
class Reading:
    """A process at one moment; `mine_s` is the time of all that the measurement itself runs."""

    at: float
    user_s: float
    system_s: float
    switches: int
    written: int
    busy_s: float
    mine_s: float

    @classmethod
    def of(cls, pid: int, *helpers: int) -> Self:
        """Read a server's figures; `helpers` are the fakes."""
        user_s, system_s = _cpu_s(pid)
        io = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
        mine_s = sum(sum(_cpu_s(one)) for one in (pid, os.getpid(), *helpers))
        return cls(time.monotonic(), user_s, system_s, _switches(pid), int(io["wchar"]), _busy_s(), mine_s)

    def until(self, later: "Reading", number: int) -> dict[str, float]:
        """Return what a message took, and how many cores others had."""
        user_ms, system_ms = (later.user_s - self.user_s) * 1000, (later.system_s - self.system_s) * 1000
        others_s = later.busy_s - self.busy_s - (later.mine_s - self.mine_s)
        return {
            "cpu_ms": (user_ms + system_ms) / number,
            "sys_ms": system_ms / number,
            "switches": (later.switches - self.switches) / number,
            "written_kb": (later.written - self.written) / number / 1024,
            "others_cores": max(others_s, 0) / (later.at - self.at),
        }


def ranks(seconds: Sequence[float]) -> dict[str, float]:
    """Return p50 and p99 in milliseconds."""
    times = sorted(one * 1000 for one in seconds)
    return {f"p{share}": times[max(-(-share * len(times) // 100) - 1, 0)] for share in (50, 99)}


def say(name: str, *values: object) -> None:
    """Print a line of a table."""
    texts = [f"{value:.2f}" if isinstance(value, float) else str(value) for value in values]
    print(f"{name:44}" + "".join(f"{text:>10}" for text in texts), flush=True)
