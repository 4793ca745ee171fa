"""``python -m bench``: memory, cold start, both flows at a steady rate, and a burst, as a short table.

Exits with 1 when a message was lost or came twice. A MB is 1024 KiB, as in top.
"""

import argparse
import contextlib
import math
import re
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from bench import aging, load, recovery, waiting
from bench.stage import NEIGHBOUR, SHOP, Stage
from crmbridge import config

_IDLE_MB, _LOADED_MB = 52, 64
_IDLE_S, _WARM_UP_S = 5, 2
_CONNECTIONS = 16
_AGING_S = 1800
_STACK = "import bottle, waitress, requests, peewee, huey, pydantic, cryptography.fernet, bcrypt"


def main() -> None:
    """Measure what was asked for."""
    figures = {
        "memory": _memory,
        "start": _start,
        "flow": _flow,
        "burst": _burst,
        "backlog": _backlog,
        "neighbour": _neighbour,
        "recovery": _recovery,
        "retention": _retention,
        "profile": _profile,
    }
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure crmbridge beside what it stands on.")
    parser.add_argument("figure", nargs="*", help=f"of {', '.join(figures)} (default: all)")
    parser.add_argument("--runs", type=int, default=7, help="cold starts (default: 7)")
    parser.add_argument("--rate", type=float, default=20, help="messages a second of the flows (default: 20)")
    parser.add_argument("--seconds", type=float, default=15, help="how long each flow is measured (default: 15)")
    parser.add_argument("--messages", type=int, default=3000, help="messages of the burst (default: 3000)")
    parser.add_argument("--waiting", type=int, default=100_000, help="deliveries of the backlog (default: 100,000)")
    parser.add_argument("--dead", type=int, default=2000, help="dead letters of the recovery (default: 2000)")
    parser.add_argument("--old", type=int, default=200_000, help="messages for retention to take (default: 200,000)")
    parser.add_argument("--folder", default="/var/tmp", help="where the database is written: a disk, not memory")
    options = parser.parse_args()
    if unknown := set(options.figure) - set(figures):
        parser.error(f"unknown figure {', '.join(unknown)}")
    for name in options.figure or figures:
        folder = tempfile.TemporaryDirectory(prefix="crmbridge-bench-", dir=options.folder)
        with folder, Stage(Path(folder.name)) as stage:
            figures[name](stage, options)


def _say(name: str, *columns: object) -> None:
    print(f"{name:44}" + "".join(f"{column!s:>10}" for column in columns), flush=True)


# --- memory and cold start ---


def _memory_mb(pid: int) -> tuple[float, float]:
    """Return a process's PSS and RSS. PSS falls with every other Python that runs: alone it would be close to RSS."""
    kib = dict(re.findall(r"^(Pss|Rss): +(\d+) kB$", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE))
    return int(kib["Pss"]) / 1024, int(kib["Rss"]) / 1024


@contextlib.contextmanager
def _python(code: str) -> Iterator[int]:
    """Run code in a bare Python; yield its pid once it is through, and then let it end."""
    words = [sys.executable, "-c", f"{code}\nprint(flush=True); input()"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin
        assert process.stdout
        process.stdout.readline()
        yield process.pid
        process.stdin.write(b"\n")


def _memory(stage: Stage, _: argparse.Namespace) -> None:
    stage.end_sandbox()
    time.sleep(_IDLE_S)
    found = {"crmbridge serve, one account": _memory_mb(stage.pid)}
    stage.stop()
    for name, code in (("floor: the packages, imported", _STACK), ("an empty Python", "")):
        with _python(code) as pid:
            found[name] = _memory_mb(pid)
    floor_mb = found["floor: the packages, imported"][0]
    _say(f"Idle memory, MB (budget {_IDLE_MB})", "PSS", "RSS", "to floor")
    for name, (pss_mb, rss_mb) in found.items():
        _say(f"  {name}", f"{pss_mb:.1f}", f"{rss_mb:.1f}", f"{pss_mb / floor_mb:.2f}")


def _start(stage: Stage, options: argparse.Namespace) -> None:
    stage.end_sandbox()
    bridge, floor = [], []
    for _ in range(options.runs):
        stage.stop()
        bridge.append(stage.start() * 1000)
        stage.stop()
        began = time.monotonic()
        with _python(_STACK):
            floor.append((time.monotonic() - began) * 1000)
    _say(f"Cold start, ms, {options.runs} runs", "median", "min", "max", "to floor")
    for name, times in (("first healthy GET /health", bridge), ("floor: the packages, imported", floor)):
        median = statistics.median(times)
        ratio = f"{median / statistics.median(floor):.2f}"
        _say(f"  {name}", *(f"{ms:.0f}" for ms in (median, min(times), max(times))), ratio)


# --- both flows at a steady rate ---


def _say_times(name: str, seconds: Iterable[float]) -> float:
    """Print p50, p90, p99 and the longest; return the p50 in milliseconds."""
    times = sorted(one * 1000 for one in seconds)
    ranks = [times[math.ceil(share * len(times)) - 1] for share in (0.5, 0.9, 0.99, 1)]
    _say(f"  {name}", *(f"{ms:.1f}" for ms in ranks))
    return ranks[0]


def _commits_s(folder: Path, per_s: float) -> Iterator[float]:
    """Yield how long one commit takes, with the settings of the bridge's database and as often."""
    with contextlib.closing(sqlite3.connect(folder / "floor.db", isolation_level=None)) as db:
        for sql in ("PRAGMA journal_mode = wal", "PRAGMA synchronous = full", "CREATE TABLE one (text)"):
            db.execute(sql)
        for _ in range(100):
            time.sleep(1 / per_s)
            began = time.monotonic()
            db.execute("INSERT INTO one VALUES (?)", ("x" * 500,))
            yield time.monotonic() - began


def _flow(stage: Stage, options: argparse.Namespace) -> None:
    number = math.ceil(options.rate * (_WARM_UP_S + options.seconds))

    def run(name: str, write: Callable[[Stage, list[str]], list[load.Order]], **more: int) -> list[load.Shot]:
        orders = write(stage, [f"{name} {turn}" for turn in range(number)])
        found = _fire(stage, name, orders, more, per_s=options.rate)
        return found[math.ceil(options.rate * _WARM_UP_S) :]

    _say(f"{options.rate:g} messages a second for {options.seconds:g} s, ms", "p50", "p90", "p99", "max")
    commit_ms = _say_times("floor: a commit, WAL, synchronous=FULL", _commits_s(stage.bridge.folder, options.rate))
    hops = run("straight", load.straight)
    floor_ms = commit_ms + 2 * _say_times("floor: a hop, due -> CRM", (one.arrived - one.due for one in hops))
    for name, write, accepted, there, more in (
        ("inbound", load.webhooks, "200", "CRM", {}),
        ("outbound", load.sends, "202", "Instagram", {"message.sent": number, "message.delivered": number}),
    ):
        shots = run(name, write, **more)
        _say_times(f"due -> {accepted}", (shot.answered - shot.due for shot in shots))
        _say_times(f"{accepted} -> {there}", (shot.arrived - shot.answered for shot in shots))
        p50_ms = _say_times(f"due -> {there}", (shot.arrived - shot.due for shot in shots))
        _say("  p50 to two hops and a commit", f"{p50_ms / floor_ms:.2f}")


def _fire(
    stage: Stage, name: str, orders: list[load.Order], more: dict[str, int], *, per_s: float = math.inf
) -> list[load.Shot]:
    """Send the orders and wait for them, and for as many of `more` events; exit when one is lost or comes twice."""
    shots = load.fire(orders, connections=_CONNECTIONS, per_s=per_s)
    came = stage.arrivals(len(orders) + sum(more.values()))
    accepted = sum(shot.status in (200, 202) for shot in shots)
    lost = sum(order.text not in came.at for order in orders)
    twice = sum(times - 1 for times in came.texts.values())
    _say(f"  {name}", f"{len(orders)} sent", f"{accepted} ok", f"{lost} lost", f"{twice} twice")
    if more:
        _say(f"  {' + '.join(more)}", *(came.events[event] for event in more))
    if accepted < len(orders) or lost or twice or any(came.events[event] != times for event, times in more.items()):
        sys.exit(1)
    return [shot.arriving(came.at[shot.text]) for shot in shots]


# --- a burst ---


def _burst(stage: Stage, options: argparse.Namespace) -> None:
    over, seen = threading.Event(), [_memory_mb(stage.pid)]

    def watch() -> None:
        while not over.wait(0.2):
            seen.append(_memory_mb(stage.pid))

    _say(f"Burst of {options.messages} inbound, {_CONNECTIONS} connections", "s", "per s")
    orders = load.webhooks(stage, [f"burst {turn}" for turn in range(options.messages)])
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    shots = _fire(stage, "inbound", orders, {})
    over.set()
    watcher.join()
    for name, end in (
        ("acknowledged", max(shot.answered for shot in shots)),
        ("at the CRM", max(shot.arrived for shot in shots)),
    ):
        _say(f"  all {name}", f"{end - shots[0].due:.2f}", f"{len(shots) / (end - shots[0].due):.0f}")
    _say(f"  memory, MB (budget {_LOADED_MB})", "PSS", "RSS")
    _say("  before", *(f"{mb:.1f}" for mb in seen[0]))
    _say("  at its peak", *(f"{max(mb):.1f}" for mb in zip(*seen, strict=True)))


# --- a backlog, and a neighbour that hangs ---


def _backlog(stage: Stage, options: argparse.Namespace) -> None:
    many, few, folder = options.waiting, 100, stage.bridge.folder
    _say(f"A claim with {many} waiting, ms", "waiting", few, many, "ratio")
    for name, lanes in (("each in a lane of its own", lambda number: number), ("behind 100 lane heads", lambda _: 100)):
        small, large = waiting.claims_ms(folder, [(number, lanes(number)) for number in (few, many)])
        _say(f"  {name}", "", f"{small:.2f}", f"{large:.2f}", f"{large / small:.2f}")
    stage.stop()
    stage.crm_works(False)
    waiting.fill(folder / "var" / "bridge.db", stage.account_id, SHOP, many, max(many // 100, 1))
    stage.start()
    time.sleep(10)
    _say(f"{many} behind a dead CRM, MB (budget {_LOADED_MB})", "PSS", "RSS")
    _say("  after ten seconds", *(f"{mb:.1f}" for mb in _memory_mb(stage.pid)))
    stage.crm_works(True)
    began, drained = time.monotonic(), min(many, 20_000)
    came = stage.arrivals(drained, wait_s=600)
    seconds = max(came.at.values()) - began
    _say("  draining, a second", f"{len(came.texts) / seconds:.0f}")
    _say("  while draining", *(f"{mb:.1f}" for mb in _memory_mb(stage.pid)))


def _neighbour(stage: Stage, options: argparse.Namespace) -> None:
    """One account's CRM takes connections and never answers, while another's is well."""
    with socket.create_server(("127.0.0.1", 0), backlog=4096) as silent:
        stage.connect(NEIGHBOUR, f"http://127.0.0.1:{silent.getsockname()[1]}/")
        number = math.ceil(options.rate * options.seconds)
        p99_ms = []
        _say(f"{options.rate:g} messages a second, due -> CRM, ms", "p50", "p90", "p99", "max")
        for name in ("alone", "beside one that hangs"):
            orders = load.webhooks(stage, [f"{name} {turn}" for turn in range(number)])
            other = load.webhooks(stage, [f"hangs {turn}" for turn in range(number)], NEIGHBOUR)
            pairs = [order for pair in zip(orders, other, strict=True) for order in pair]
            hangs = name != "alone"
            shots = load.fire(pairs if hangs else orders, connections=_CONNECTIONS, per_s=options.rate * (1 + hangs))
            came = stage.arrivals(number)
            times = [came.at[shot.text] - shot.due for shot in shots if shot.text in came.at]
            _say_times(f"{name}: {len(times)} of {number}", times)
            p99_ms.append(sorted(times)[math.ceil(0.99 * len(times)) - 1])
        _say("  p99 to p99 alone", f"{p99_ms[1] / p99_ms[0]:.2f}")


# --- a CRM that was dead ---


def _recovery(stage: Stage, options: argparse.Namespace) -> None:
    """A CRM dead for 25 hours, then well: all dead letters are asked for while live messages flow."""
    folder = stage.bridge.folder
    stage.stop()
    stage.crm_works(False)
    ended = recovery.die(folder, options.dead)
    _say(f"{options.dead} messages to a CRM dead for 25 hours", *(f"{number} {how}" for how, number in ended.items()))
    stage.crm_works(True)
    stage.start()

    def live(name: str, seconds: float) -> list[load.Order]:
        return load.webhooks(stage, [f"{name} {turn}" for turn in range(math.ceil(options.rate * seconds))])

    back = stage.arrivals(0)
    _fire(stage, "warm-up", live("warm-up", _WARM_UP_S), {}, per_s=options.rate)
    print(stage.bridge.command("dlq", "retry", "--all", "--webhooks", "--preview"))
    seconds = 1.1 * options.dead / config.Delivery().replay_per_s
    alone: list[float] = []
    beside: list[float] = []
    _say(f"{options.rate:g} messages a second, due -> CRM, ms", "p50", "p90", "p99", "max")
    # Alone before and after: what else the machine does then weighs on both sides.
    for name, lasts_s, times in (
        ("live alone, before", seconds / 2, alone),
        ("live beside the retry", seconds, beside),
        ("live alone, after", seconds / 2, alone),
    ):
        orders = live(name, lasts_s)
        if is_retry := times is beside:
            began = time.monotonic()
            print(stage.bridge.command("dlq", "retry", "--all", "--webhooks"))
        shots = load.fire(orders, connections=_CONNECTIONS, per_s=options.rate)
        came = stage.arrivals(len(orders) + is_retry * options.dead, wait_s=seconds)
        back = came if is_retry else back
        took = [came.at[shot.text] - shot.due for shot in shots if shot.text in came.at]
        _say_times(f"{name}: {len(took)} of {len(orders)}", took)
        times += took
    ended_at = [at for text, at in back.at.items() if text.startswith("dead ")]
    twice, wrong = sum(number - 1 for number in back.texts.values()), recovery.out_of_order(back)
    _say("  came back", len(ended_at), f"{len(ended_at) / (max(ended_at) - began):.1f}/s", f"{twice} twice")
    _say("  out of their order", wrong)
    p99_s = [sorted(times)[math.ceil(0.99 * len(times)) - 1] for times in (beside, alone)]
    _say("  p99 to p99 alone", f"{p99_s[0] / p99_s[1]:.2f}")
    if len(ended_at) < options.dead or twice or wrong:
        sys.exit(1)


# --- retention ---


def _retention(stage: Stage, options: argparse.Namespace) -> None:
    """What an acknowledgement takes while old messages go, beside what it takes between the runs."""
    database, minute = stage.bridge.folder / "var" / "bridge.db", math.ceil(options.rate * 60)

    def say_sizes(name: str) -> None:
        files = (database, database.with_name(database.name + "-wal"))
        _say(f"  {name}", *(f"{path.stat().st_size / 2**20 if path.exists() else 0:.1f}" for path in files))

    stage.stop()
    aging.fill(database, stage.account_id, SHOP, options.old)
    _say(f"{options.old} old messages, MB", "database", "log")
    say_sizes("before")
    stage.start()
    began, shots = time.monotonic(), list[load.Shot]()
    while time.monotonic() < began + _AGING_S and (not shots or aging.left(database)):
        orders = load.webhooks(stage, [f"new {len(shots) + turn}" for turn in range(minute)])
        shots += load.fire(orders, connections=_CONNECTIONS, per_s=options.rate)
    took = aging.runs(stage.bridge.log_path.read_text())
    came = stage.arrivals(len(shots))
    say_sizes("after")
    _say("  runs, seconds in them, left undone", len(took), f"{sum(b - a for a, b in took):.0f}", aging.left(database))
    _say("  new ones", f"{len(shots)} sent", f"{len(shots) - len(came.texts)} lost")
    during = [shot for shot in shots if any(begin <= shot.due <= end for begin, end in took)]
    calm = [shot for shot in shots[minute // 20 :] if shot not in during]
    _say(f"{options.rate:g} messages a second, due -> 200, ms", "p50", "p90", "p99", "max")
    p99_ms = []
    for name, some in (("between the runs", calm), ("during them", during)):
        times = sorted(shot.answered - shot.due for shot in some)
        _say_times(f"{name}: {len(times)}", times)
        p99_ms.append(times[math.ceil(0.99 * len(times)) - 1])
    _say("  p99 to p99 between", f"{p99_ms[1] / p99_ms[0]:.2f}")


# --- new customers, whose names are asked for ---


def _profile(stage: Stage, options: argparse.Namespace) -> None:
    """Every message is a stranger's, so that each asks for a name; beside it the same from known customers."""
    number, turns = math.ceil(options.rate * options.seconds / 3), 3
    cases = {
        "known customers": {"profile": "told", "profile_delay_s": 0},
        "strangers, names at once": {"profile": "told", "profile_delay_s": 0},
        "strangers, names take 2 s": {"profile": "told", "profile_delay_s": 2},
        "strangers, names fail": {"profile": "fails", "profile_delay_s": 0},
    }
    shots: dict[str, list[load.Shot]] = {name: [] for name in cases}
    stranger = 1_000_000
    _say(f"{options.rate:g} messages a second, {turns} x {number}", "", "", "", "")
    _fire(stage, "known", load.webhooks(stage, [f"known {turn}" for turn in range(100)]), {}, per_s=options.rate)
    for turn in range(turns):
        for name, settings in cases.items():
            stage.instagram(**settings)
            texts = [f"{name} {turn} {one}" for one in range(number)]
            strangers_from = 0 if name == "known customers" else stranger
            orders = load.webhooks(stage, texts, strangers_from=strangers_from)
            stranger += number
            shots[name] += _fire(stage, name, orders, {}, per_s=options.rate)
    _say("ms", "p50", "p90", "p99", "max")
    p99_ms = {}
    for name, found in shots.items():
        times = [shot.answered - shot.due for shot in found]
        _say_times(f"due -> 200: {name}", times)
        p99_ms[name] = sorted(times)[math.ceil(0.99 * len(times)) - 1]
        _say_times(f"due -> CRM: {name}", [shot.arrived - shot.due for shot in found])
    for name, p99 in p99_ms.items():
        _say(f"  p99 of 200 to known customers': {name}", f"{p99 / p99_ms['known customers']:.2f}")


if __name__ == "__main__":
    main()
