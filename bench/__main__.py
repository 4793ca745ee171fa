"""``python -m bench``: what crmbridge costs beside what it stands on, and beside another version of it.

Exits with 1 when a message was lost or came twice. A MB is 1024 KiB, as in top.
"""

import argparse

from bench import beside, moves, rounds, waiting

_FIGURES = {
    "rounds": rounds.show, "moves": moves.show, "accounts": beside.show_accounts, "held": beside.show_held,
    "neighbour": beside.show_neighbour, "backlog": waiting.show,
}  # fmt: skip


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.partition("\n")[0])
    parser.add_argument("figure", nargs="*", help=f"of {', '.join(_FIGURES)} (default: all)")
    parser.add_argument("--against", metavar="REV", help="a revision that rounds and moves measure, too")
    parser.add_argument("--rounds", type=int, default=5, help="how often each is measured in turn (default: 5)")
    parser.add_argument("--messages", type=int, default=1200, help="messages of a burst of the rounds (default: 1200)")
    parser.add_argument("--rate", type=float, default=20, help="messages a second of the rounds (default: 20)")
    parser.add_argument("--seconds", type=float, default=10, help="how long a steady rate lasts (default: 10)")
    parser.add_argument("--sync-us", type=int, default=300, help="microseconds of a sync in the rounds (default: 300)")
    parser.add_argument("--disk", action="store_true", help="let a sync take what the disk takes")
    parser.add_argument("--times", type=int, default=20, help="messages that moves counts, for medians (default: 20)")
    parser.add_argument("--waiting", type=int, default=100_000, help="deliveries that wait (default: 100,000)")
    parser.add_argument("--folder", default="/var/tmp", help="where the database is written: a disk, not memory")
    parser.add_argument("--json", metavar="FILE", help="where the figures of rounds or moves go as JSON")
    options = parser.parse_args()
    names = options.figure or list(_FIGURES)
    if unknown := set(names) - set(_FIGURES):
        parser.error(f"unknown figure {', '.join(unknown)}")
    for name in names:
        _FIGURES[name](options)


if __name__ == "__main__":
    main()
