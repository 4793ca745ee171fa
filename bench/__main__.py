"""``python -m bench``: what crmbridge costs beside what it stands on, and beside another version of it.

Exits with 1 when a message was lost or came twice. A MB is 1024 KiB, as in top.
"""

import argparse
import math
import socket
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from bench import aging, load, moves, proc, recovery, rounds, waiting
from bench.stage import NEIGHBOUR, SHOP, Stage
from crmbridge import config

_WARM_UP_S = 2
_AGING_S = 1800


def main() -> None:
    """Measure what was asked for."""
    staged = {"backlog": _backlog, "neighbour": _neighbour, "recovery": _recovery, "retention": _retention}
    compared = {"rounds": rounds.show, "moves": moves.show}
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.partition("\n")[0])
    parser.add_argument("figure", nargs="*", help=f"of {', '.join([*compared, *staged])} (default: all)")
    parser.add_argument("--against", metavar="REV", help="a revision that rounds and moves measure, too")
    parser.add_argument("--rounds", type=int, default=5, help="how often each is measured in turn (default: 5)")
    parser.add_argument("--messages", type=int, default=1200, help="messages of a burst of the rounds (default: 1200)")
    parser.add_argument("--rate", type=float, default=20, help="messages a second at a steady rate (default: 20)")
    parser.add_argument("--seconds", type=float, default=10, help="how long a steady rate lasts (default: 10)")
    parser.add_argument("--sync-us", type=int, default=300, help="microseconds of a sync in the rounds (default: 300)")
    parser.add_argument("--disk", action="store_true", help="let a sync take what the disk takes")
    parser.add_argument("--times", type=int, default=20, help="messages that moves counts, for medians (default: 20)")
    parser.add_argument("--waiting", type=int, default=100_000, help="deliveries of the backlog (default: 100,000)")
    parser.add_argument("--dead", type=int, default=2000, help="dead letters of the recovery (default: 2000)")
    parser.add_argument("--old", type=int, default=200_000, help="messages for retention to take (default: 200,000)")
    parser.add_argument("--folder", default="/var/tmp", help="where the database is written: a disk, not memory")
    parser.add_argument("--json", metavar="FILE", help="where the figures of rounds or moves go as JSON")
    options = parser.parse_args()
    names = options.figure or [*compared, *staged]
    if unknown := set(names) - set(compared) - set(staged):
        parser.error(f"unknown figure {', '.join(unknown)}")
    for name in names:
        if name in compared:
            compared[name](options)
            continue
        folder = tempfile.TemporaryDirectory(prefix="crmbridge-bench-", dir=options.folder)
        with folder, Stage(Path(folder.name)) as stage:
            staged[name](stage, options)


def _say(name: str, *columns: object) -> None:
    print(f"{name:44}" + "".join(f"{column!s:>10}" for column in columns), flush=True)


def _say_times(name: str, seconds: Iterable[float]) -> float:
    """Print p50, p90, p99 and the longest; return the p99 in milliseconds."""
    times = sorted(one * 1000 for one in seconds)
    ranks = [times[math.ceil(share * len(times)) - 1] for share in (0.5, 0.9, 0.99, 1)]
    _say(f"  {name}", *(f"{ms:.1f}" for ms in ranks))
    return ranks[2]


def _say_memory(name: str, stage: Stage) -> None:
    _say(f"  {name}", *(f"{mb:.1f}" for mb in list(proc.memory(stage.pid).values())[:3]))


# --- a backlog, and a neighbour that hangs ---


def _backlog(stage: Stage, options: argparse.Namespace) -> None:
    many, few, folder = options.waiting, 100, stage.folder
    _say(f"A claim with {many} waiting, ms", "waiting", few, many, "ratio")
    for name, lanes in (("each in a lane of its own", lambda number: number), ("behind 100 lane heads", lambda _: 100)):
        small, large = waiting.claims_ms(folder, [(number, lanes(number)) for number in (few, many)])
        _say(f"  {name}", "", f"{small:.2f}", f"{large:.2f}", f"{large / small:.2f}")
    stage.stop()
    stage.crm_works(False)
    waiting.fill(folder / "var" / "bridge.db", stage.account_id, SHOP, many, max(many // 100, 1))
    stage.start()
    time.sleep(10)
    _say(f"{many} behind a dead CRM, MB", "dirty", "PSS", "RSS")
    _say_memory("after ten seconds", stage)
    stage.crm_works(True)
    began, drained = time.monotonic(), min(many, 20_000)
    came = stage.arrivals(drained, wait_s=600)
    seconds = max(came.at.values()) - began
    _say("  draining, a second", f"{len(came.texts) / seconds:.0f}")
    _say_memory("while draining", stage)


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
            sent, per_s = (orders, options.rate) if name == "alone" else (pairs, 2 * options.rate)
            shots = load.fire(sent, connections=rounds.CONNECTIONS, per_s=per_s)
            came = stage.arrivals(number)
            times = [came.at[shot.text] - shot.due for shot in shots if shot.text in came.at]
            p99_ms.append(_say_times(f"{name}: {len(times)} of {number}", times))
        _say("  p99 to p99 alone", f"{p99_ms[1] / p99_ms[0]:.2f}")


# --- a CRM that was dead ---


def _recovery(stage: Stage, options: argparse.Namespace) -> None:
    """A CRM dead for 25 hours, then well: all dead letters are asked for while live messages flow."""
    folder = stage.folder
    stage.stop()
    stage.crm_works(False)
    ended = recovery.die(folder, options.dead)
    _say(f"{options.dead} messages to a CRM dead for 25 hours", *(f"{number} {how}" for how, number in ended.items()))
    stage.crm_works(True)
    stage.start()

    def live(name: str, seconds: float) -> list[load.Order]:
        return load.webhooks(stage, [f"{name} {turn}" for turn in range(math.ceil(options.rate * seconds))])

    back = stage.arrivals(0)
    orders = live("warm-up", _WARM_UP_S)
    load.check(stage, orders, load.fire(orders, connections=rounds.CONNECTIONS, per_s=options.rate), {})
    print(stage.command("dlq", "retry", "--all", "--webhooks", "--preview"))
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
            print(stage.command("dlq", "retry", "--all", "--webhooks"))
        shots = load.fire(orders, connections=rounds.CONNECTIONS, per_s=options.rate)
        came = stage.arrivals(len(orders) + is_retry * options.dead, wait_s=seconds)
        back = came if is_retry else back
        took = [came.at[shot.text] - shot.due for shot in shots if shot.text in came.at]
        _say_times(f"{name}: {len(took)} of {len(orders)}", took)
        times += took
    ended_at = [at for text, at in back.at.items() if text.startswith("dead ")]
    twice, wrong = sum(number - 1 for number in back.texts.values()), recovery.out_of_order(back)
    _say("  came back", len(ended_at), f"{len(ended_at) / (max(ended_at) - began):.1f}/s", f"{twice} twice")
    _say("  out of their order", wrong)
    _say("  p99 to p99 alone", f"{_say_times('beside', beside) / _say_times('alone', alone):.2f}")
    if len(ended_at) < options.dead or twice or wrong:
        sys.exit(1)


# --- retention ---


def _retention(stage: Stage, options: argparse.Namespace) -> None:
    """What an acknowledgement takes while old messages go, beside what it takes between the runs."""
    database, minute = stage.folder / "var" / "bridge.db", math.ceil(options.rate * 60)

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
        shots += load.fire(orders, connections=rounds.CONNECTIONS, per_s=options.rate)
    took = aging.runs(stage.log_path.read_text())
    came = stage.arrivals(len(shots))
    say_sizes("after")
    _say("  runs, seconds in them, left undone", len(took), f"{sum(b - a for a, b in took):.0f}", aging.left(database))
    _say("  new ones", f"{len(shots)} sent", f"{len(shots) - len(came.texts)} lost")
    during = [shot for shot in shots if any(begin <= shot.due <= end for begin, end in took)]
    calm = [shot for shot in shots[minute // 20 :] if shot not in during]
    _say(f"{options.rate:g} messages a second, due -> 200, ms", "p50", "p90", "p99", "max")
    p99_ms = []
    for name, some in (("between the runs", calm), ("during them", during)):
        p99_ms.append(_say_times(f"{name}: {len(some)}", [shot.answered - shot.due for shot in some]))
    _say("  p99 to p99 between", f"{p99_ms[1] / p99_ms[0]:.2f}")


if __name__ == "__main__":
    main()
