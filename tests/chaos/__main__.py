"""``python -m tests.chaos --kills 1000 --seed 7``: long runs by hand, fifty kills to a database."""

import argparse
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

from tests.chaos.planted import PLANTED
from tests.chaos.run import Plan, run

_KILLS_A_RUN = 50


def main() -> int:
    """Make the runs; 1 when one of them found a violation."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description="Kill the bridge under load, and judge.")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1, help="of the first run; the next ones count up")
    parser.add_argument("--planted", choices=PLANTED, help="start the bridge with this bug")
    parser.add_argument("--keep", action="store_true", help="keep the folder of a run that found something")
    options = parser.parse_args()
    total, failed, left, seed = Counter[str](), [], options.kills, options.seed
    while left > 0:
        folder = Path(tempfile.mkdtemp(prefix="crmbridge-chaos-", dir="/var/tmp"))
        result = run(Plan(seed, min(left, _KILLS_A_RUN), options.planted), folder)
        print(result.told(), flush=True)
        total.update(result.counts)
        failed += [seed] if result.violations else []
        if result.violations and options.keep:
            print(f"kept {folder}")
        else:
            shutil.rmtree(folder)
        left, seed = left - _KILLS_A_RUN, seed + 1
    print(f"\nall {seed - options.seed} runs together")
    print("\n".join(f"  {number:8}  {name}" for name, number in sorted(total.items())))
    print(f"violations in the runs with seed {', '.join(map(str, failed))}" if failed else "no violations")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
