"""Versions beside two floors, in turn: each round runs the floors, this version and another, and medians are told.

CPU of the server's process a message is the figure that a busy machine spoils least.
"""

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import requests

from bench import load, proc
from bench.stage import ROOT, Stage, Version, free_port, quick_syncs, roots

_CUSTOMERS, _ACCOUNTS, _WARM_UP, _IDLE_S = 100, 10, 100, 3
_SETTINGS = "[delivery]\ninstagram_sends_per_s = 100\n"
_FLOORS = {"generator": "canned", "F0": "plain", "F1": "commit"}
# The figures, and which of F1's each is compared with.
_FIGURES = {
    "in.cpu_ms": "cpu_ms", "out.cpu_ms": "cpu_ms", "in_slow.cpu_ms": "", "out_slow.cpu_ms": "", "in.sys_ms": "sys_ms",
    "out.sys_ms": "sys_ms", "in.switches": "switches", "out.switches": "switches", "in.written_kb": "",
    "out.written_kb": "", "in.acks_s": "acks_s", "in.through_s": "acks_s", "out.acks_s": "acks_s",
    "out.through_s": "acks_s", "in.p99": "p99", "out.p99": "p99", "in_slow.p50": "", "in_slow.p99": "",
    "out_slow.p50": "", "out_slow.p99": "", "idle.Private_Dirty": "", "idle.Pss": "", "idle.Rss": "",
    "after.Private_Dirty": "", "after.Pss": "", "after.Rss": "", "after.threads": "", "start_s": "",
    "fakes.acks_s": "acks_s", "in.others_cores": "",
    "out.others_cores": "",
}  # fmt: skip
Found = dict[str, float]


def show(options: Any) -> None:
    """Run the rounds and print what came of them."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="crmbridge-bench-", dir=options.folder)))
        environ = {} if options.disk else quick_syncs(folder, options.sync_us)
        versions = [
            Version(name, root, environ=environ) for name, root in stack.enter_context(roots(options.against)).items()
        ]
        sync = f"{options.sync_us / 1000:g} ms" if environ else "as long as the disk takes"
        print(f"{options.rounds} rounds; a sync takes {sync}", flush=True)
        raw: dict[str, list[Found]] = {name: [] for name in [*_FLOORS, *(version.name for version in versions)]}
        for turn in range(options.rounds):
            for name, kind in _FLOORS.items():
                raw[name].append(_floor(kind, environ, options.messages, options.folder))
            for version in versions[:: 1 if turn % 2 else -1]:
                with tempfile.TemporaryDirectory(prefix="crmbridge-bench-", dir=options.folder) as place:
                    raw[version.name].append(_version(Path(place), version, options))
            told = ", ".join(f"{name} {_headline(found[-1])}" for name, found in raw.items())
            print(f"round {turn + 1}: {told}", flush=True)
    medians = {name: _medians(found) for name, found in raw.items()}
    _print(medians)
    if options.json:
        told = json.dumps({"medians": medians, "raw": raw}, indent=1)
        Path(options.json).write_text(f"{told}\n")


def _headline(found: Found) -> str:
    return f"{found.get('in.cpu_ms', found.get('cpu_ms', 0)):.2f} ms"


def _medians(found: Sequence[Found]) -> Found:
    return {key: statistics.median(one[key] for one in found) for key in found[0]}


def _print(medians: dict[str, Found]) -> None:
    versions = [name for name in medians if name not in _FLOORS]
    titles = [*_FLOORS, *versions, *(f"{name}/F1" for name in versions), "/".join(versions)]
    lines = [["median", *(titles if len(versions) > 1 else titles[:-1])]]
    for key, plain in _FIGURES.items():
        own = [medians[name][key] for name in versions]
        floors = [medians[name][plain] if plain else math.nan for name in _FLOORS]
        values = [*floors, *own, *(_over(value, floors[-1]) for value in own)]
        values += [_over(*own)] if len(own) > 1 else []
        lines.append([key, *("" if math.isnan(value) else f"{value:.2f}" for value in values)])
    for first, *others in lines:
        print(f"{first:22}" + "".join(f"{text:>14}" for text in others))


def _over(value: float, floor: float) -> float:
    return value / floor if floor else math.nan


# --- the floors, and what the generator can do ---


@contextmanager
def _served(kind: str, environ: dict[str, str], folder: Path) -> Iterator[tuple[int, str]]:
    port = free_port()
    words = [sys.executable, "-m", "bench.floor", kind, str(port), str(folder)]
    with subprocess.Popen(words, cwd=ROOT, env=dict(os.environ) | environ) as process:
        while process.poll() is None:
            with suppress(requests.ConnectionError):
                requests.post(f"http://127.0.0.1:{port}/", data=b"x", timeout=5)
                break
            time.sleep(0.01)
        try:
            yield process.pid, f"http://127.0.0.1:{port}/"
        finally:
            process.kill()


def _floor(kind: str, environ: dict[str, str], number: int, place: str) -> Found:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="crmbridge-bench-", dir=place)))
        pid, url = stack.enter_context(_served(kind, environ, folder))
        _burst(load.straight(url, [f"warm-up {turn}" for turn in range(_WARM_UP)]))
        before = proc.Reading.of(pid)
        found = _burst(load.straight(url, [f"floor {turn}" for turn in range(number)]))
        return found | before.until(proc.Reading.of(pid), number)


def _burst(orders: Sequence[load.Order]) -> Found:
    shots = load.fire(orders)
    if any(shot.status not in (200, 202) for shot in shots):
        sys.exit(f"{sum(shot.status not in (200, 202) for shot in shots)} of {len(shots)} were not accepted")
    took_s = max(shot.answered for shot in shots) - shots[0].due
    return {"acks_s": len(shots) / took_s, **proc.ranks([shot.answered - shot.began for shot in shots])}


# --- a version ---


def _version(folder: Path, version: Version, options: Any) -> Found:
    with Stage(folder, version, shops=_ACCOUNTS, settings=_SETTINGS) as stage:
        stage.instagram(echo="never")
        found: Found = {"start_s": stage.start_s}
        time.sleep(_IDLE_S)
        found |= {f"idle.{name}": value for name, value in proc.memory(stage.pid).items()}
        texts = [f"fakes {turn}" for turn in range(options.messages)]
        found["fakes.acks_s"] = _burst(load.straight(stage.crm_webhook_url, texts))["acks_s"]
        stage.arrivals(0)
        steady = math.ceil(options.rate * options.seconds)
        writers: dict[str, Callable[..., list[load.Order]]] = {"in": load.webhooks, "out": load.sends}
        for more, (name, write) in enumerate(writers.items()):  # a send has one status event
            for case, number, per_s in (
                ("_warm_up", _WARM_UP, 50.0),
                ("", options.messages, math.inf),
                ("_slow", steady, options.rate),
            ):
                orders = write(stage, [f"{name}{case} {turn}" for turn in range(number)], customers=_CUSTOMERS)
                told = _through(stage, orders, number * more, per_s)
                found |= {f"{name}{case}.{key}": value for key, value in told.items()}
        return found | {f"after.{key}": value for key, value in proc.memory(stage.pid).items()}


def _through(stage: Stage, orders: list[load.Order], events: int, per_s: float) -> Found:
    """Send the orders and wait until they and as many status events came through; exit when one is lost or twice."""
    before, number = stage.reading(), len(orders)
    shots = load.fire(orders, per_s=per_s)
    stage.wait_for(number + events, 120)
    used = before.until(stage.reading(), number)
    came = load.check(stage, orders, shots, {"message.sent": events})
    took_s = max(shot.answered for shot in shots) - shots[0].due
    found = {"acks_s": number / took_s, "through_s": number / (came.last - shots[0].due), **used}
    if per_s < math.inf:
        return found | proc.ranks([came.at[shot.text] - shot.due for shot in shots])
    return found | proc.ranks([shot.answered - shot.began for shot in shots])
