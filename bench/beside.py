"""The same flow to servers that differ in one thing, in turn: how many accounts, how much is held, what hangs."""

import math
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from bench import load, proc, waiting
from bench.stage import NEIGHBOUR, SHOP, Stage, Version, roots

_PER_S, _MEET_PER_S, _FEW = 10, 50, 100
_NAMES_S = 3
_Case = Callable[[Path], Stage]  # the flow goes to all accounts of the stage


def show_accounts(options: Any) -> None:
    """Spread the flow over all accounts of a server that has few, and of ones that have many."""
    with roots(options.against) as versions:
        for name, root in versions.items():
            stage = partial(Stage, version=Version(name, root))
            _in_turn(options, {f"{name}: {number} accounts": partial(stage, shops=number) for number in (2, 50, 500)})


def show_held(options: Any) -> None:
    """Have one account's deliveries be held, few and many, while the other's flow."""
    _in_turn(options, {f"beside {number} held": partial(_hold, number) for number in (_FEW, options.waiting)})


def show_neighbour(options: Any) -> None:
    """Have one account's CRM take connections and never answer, and as much wait for it as flows to the other."""
    with socket.create_server(("127.0.0.1", 0), backlog=4096) as silent:
        hang = partial(_hang, f"http://127.0.0.1:{silent.getsockname()[1]}/")
        _in_turn(options, {"alone": Stage, "beside one that hangs": hang}, also=[NEIGHBOUR])


def _hold(number: int, folder: Path) -> Stage:
    stage = Stage(folder, shops=2)
    held = stage.accounts.pop(SHOP)
    stage.command("account", "pause", held, "--deliveries")
    stage.stop()
    waiting.fill(folder / "var" / "bridge.db", held, SHOP, number, _FEW)
    stage.start()
    return stage


def _hang(url: str, folder: Path) -> Stage:
    stage = Stage(folder)
    stage.connect(NEIGHBOUR, url)
    return stage


def _in_turn(options: Any, cases: Mapping[str, _Case], also: Sequence[str] = ()) -> None:
    """Print what the flow takes from when a webhook is due to when the CRM has it, and the CPU a message.

    `also` are shops that get as much beside the flow, in all cases but the first.
    """
    number, first = math.ceil(_PER_S * options.seconds), next(iter(cases))
    times: dict[str, list[list[float]]] = {name: [] for name in cases}
    cpu_ms: dict[str, list[float]] = {name: [] for name in cases}
    with ExitStack() as stack:
        stages: dict[str, Stage] = {}
        for name, case in cases.items():
            place = tempfile.TemporaryDirectory(prefix="crmbridge-bench-", dir=options.folder)
            stages[name] = stage = stack.enter_context(case(Path(stack.enter_context(place))))
            hellos = load.webhooks(stage, [f"hello {one}" for one in range(len(stage.accounts))], customers=1)
            load.check(stage, hellos, load.fire(hellos, connections=1, per_s=_MEET_PER_S), {})
        time.sleep(_NAMES_S)  # all customers' names are asked for by then
        for turn in range(options.rounds + 1):  # the first one warms up
            texts = [f"message {one}" for one in range((turn + 1) * number)]
            for name, stage in stages.items():
                took, cpu = _flow(stage, texts, number, () if name == first else also)
                if turn:
                    times[name].append(took)
                    cpu_ms[name].append(cpu)
    proc.say(f"{_PER_S} messages a second, due -> CRM, ms", "p50", "p99", "p50 over", "p99 over", "CPU")
    for name, rounds in times.items():
        told = proc.ranks([one for some in rounds for one in some])
        own, least = ([proc.ranks(some) for some in times[which]] for which in (name, first))
        over = [statistics.median(a[rank] / b[rank] for a, b in zip(own, least, strict=True)) for rank in told]
        proc.say(f"  {name}", *told.values(), *over, statistics.median(cpu_ms[name]))


def _flow(stage: Stage, texts: Sequence[str], number: int, also: Sequence[str]) -> tuple[list[float], float]:
    """Let the last `number` texts flow; return what each took, and the CPU a message, in ms."""
    orders = load.webhooks(stage, texts, customers=1)[-number:]
    others = [load.webhooks(stage, [f"beside {text}" for text in texts[-number:]], shop) for shop in also]
    sent = [order for at_once in zip(orders, *others, strict=True) for order in at_once]
    before = stage.reading()
    shots = load.fire(sent, per_s=_PER_S * len(sent) / number)
    used = before.until(stage.reading(), number)
    came = load.check(stage, orders, shots, {})
    return [came.at[shot.text] - shot.due for shot in shots if shot.text in came.at], used["cpu_ms"]
