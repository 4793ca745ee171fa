"""An install.sh that is killed in the middle."""

from tests.appliance.box import Box

_KILL = """
: >/tmp/trace # else the first look may take the trace of the run before for this one's
setsid sh -x /root/next/install.sh "$1" >/tmp/said 2>/tmp/trace &
pid=$!
# what undoes the run before comes first
is_there() { sed '1,/^+ need_clock/d' /tmp/trace | grep -q -e "^+ $1"; }
until is_there "$2"; do
    # it may have come to the step, and to its end, between the two looks
    kill -0 $pid 2>/dev/null || is_there "$2" || { cat /tmp/said; tail -n 20 /tmp/trace; exit 9; }
    sleep 0.005
done
sleep "$3"
kill -9 $4$pid || : # the last steps may have ended by themselves
"""


def cut(box: Box, command: str, step: str, delay_s: float, *, all_of_it: bool) -> None:
    """Run /root/next/install.sh, and kill it some time after a line of its trace; `all_of_it`: and what it started."""
    words = ["sh", "-c", _KILL, "-", command, step, str(delay_s), "-" if all_of_it else ""]
    done = box.run(*words, check=False)
    assert done.returncode == 0, (step, done.stdout)
