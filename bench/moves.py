"""What a message makes a server do, counted where users run it: calls, moves between modules, SQL, commits."""

import json
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench import counting, load
from bench.stage import ROOT, Stage, Version, roots

_KNOWN, _MANY, _EIGHT = 50, 80, 8
_SETTLE_S = 0.4
_COLUMNS = ("calls", "moves", "statements", "BEGIN", "COMMIT", "compiled")
_WIDTH = 150
Found = dict[str, Counter[str]]


def show(options: Any) -> None:
    """Count for this version, and for the one that it is compared with."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="crmbridge-bench-", dir=options.folder)))
        versions = stack.enter_context(roots(options.against))
        told = {name: _version(folder / name.replace("/", "-"), root, options.times) for name, root in versions.items()}
    print(f"{'A message':52}" + "".join(f"{name:>11}" for name in _COLUMNS))
    for version, cases in told.items():
        for case, found in cases.items():
            row = _row(found)
            print(f"{version + ': ' + case:52}" + "".join(f"{row[name]:11.2f}" for name in _COLUMNS))
    for version, cases in told.items():
        for case, found in cases.items():
            print(f"\n{version}: {case}: statements")
            print(*(line[:_WIDTH] for line in counting.table(found["statements"], 1)), sep="\n")
    if options.json:
        Path(options.json).write_text(json.dumps(told, indent=1) + "\n")


def _row(found: Found) -> dict[str, float]:
    row = {name: float(found[name].total()) for name in ("calls", "moves", "statements", "compiled")}
    return {**row, **{name: float(found["frames"][name]) for name in ("BEGIN", "COMMIT")}}


def _version(folder: Path, root: Path, times: int) -> dict[str, Found]:
    counter = str(ROOT / "bench" / "counting.py")
    lone, together = (Version(root.name, root, (counter, how)) for how in ("as it comes", "together"))
    found: dict[str, Found] = {}
    for name in ("lone", "eight"):
        (folder / name).mkdir(parents=True)
    with Stage(folder / "lone", lone) as stage:
        stage.instagram(echo="never")
        _meet(stage, _KNOWN)

        def text(name: str) -> None:
            load.fire(load.webhooks(stage, [name]), connections=1)
            stage.wait_for(1)

        def send(name: str) -> None:
            load.fire(load.sends(stage, [name]), connections=1)
            stage.wait_for(2)

        found["a lone text, webhook to the CRM's 2xx"] = _median(stage, text, times)
        found["a send, POST to its status event's 2xx"] = _median(stage, send, times)
    with Stage(folder / "eight", together, settings=f"[delivery]\nslots_per_endpoint = {_EIGHT}\n") as stage:
        _meet(stage, _MANY)

        def texts(name: str) -> None:
            many = [f"{name} {number}" for number in range(_MANY)]
            load.fire(load.webhooks(stage, many, customers=_MANY, each=_MANY), connections=1)
            stage.wait_for(_MANY)

        found[f"a text of {_MANY} in one webhook, turns of eight"] = _median(stage, texts, max(times // 4, 3), _MANY)
    return found


def _meet(stage: Stage, customers: int) -> None:
    """Have customers write, and their names be asked for."""
    for turn in range(2):
        texts = [f"hello {turn} {number}" for number in range(customers)]
        load.fire(load.webhooks(stage, texts, customers=customers), connections=1, per_s=20)
    stage.arrivals(2 * customers)
    time.sleep(3)


def _median(stage: Stage, act: Callable[[str], None], times: int, messages: int = 1) -> Found:
    """Act so often; return the median of each name's counts by message, so that regular jobs are left out."""
    samples = []
    for turn in range(times):
        time.sleep(_SETTLE_S)
        stage.counts()
        act(f"message {turn}")
        time.sleep(_SETTLE_S)
        samples.append(stage.counts())
        stage.arrivals(0, 0)
    found: Found = {}
    for kind in samples[0]:
        names = {name for sample in samples for name in sample[kind]}
        medians = {name: statistics.median(sample[kind].get(name, 0) for sample in samples) for name in names}
        found[kind] = Counter({name: value / messages for name, value in medians.items() if value})
    return found
