"""A Debian of its own for one test: root file system, processes, loopback network, memory bound and the real OpenRC.

The base system is made once by debootstrap and kept (`CRMBRIDGE_BOX_CACHE`, else ~/.cache/crmbridge-box). A box lays an
overlay over it inside namespaces of its own, so a test may do anything as root and needs no network.
"""

import contextlib
import hashlib
import itertools
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import IO, NamedTuple

from tests.waiting import BULK_S, until

SUITES = ("bookworm", "trixie")  # OpenRC 0.45 with Python 3.11, OpenRC 0.56 with Python 3.13
PACKAGES = (
    "openrc",
    "procps",
    "iproute2",
    "ca-certificates",
    "curl",
    "logrotate",
    "sqlite3",
    "python3",
    "python3-venv",
)
# What debootstrap cannot install: it takes the first of several packages that will do, and apt-get a better one.
BY_APT = {"trixie": ("logrotate",)}
TOOLS = ("debootstrap", "unshare", "nsenter", "ip")
_CGROUPS = Path("/sys/fs/cgroup")
_NUMBERS = itertools.count()

# The first process of a box: it reaps orphans and does nothing else. The arguments: root, upper, work, base, network.
_BIRTH = """
set -e
mount --make-rprivate /
mount -t overlay overlay -o "lowerdir=$4,upperdir=$2,workdir=$3" "$1"
mount -t proc proc "$1/proc"
mount -t tmpfs -o mode=755 tmpfs "$1/run"
mkdir "$1/run/lock"
mount -t tmpfs -o mode=755 tmpfs "$1/dev"
for name in null zero full random urandom tty; do
    : >"$1/dev/$name"
    mount --bind "/dev/$name" "$1/dev/$name"
done
mkdir "$1/dev/shm"
mount -t tmpfs tmpfs "$1/dev/shm"
ln -s /proc/self/fd "$1/dev/fd"
mkdir "$1/dev/pts"
mount -t devpts -o newinstance,ptmxmode=0666 devpts "$1/dev/pts"
ln -s pts/ptmx "$1/dev/ptmx"
if [ "$5" = own ]; then ip link set lo up; else cp /etc/resolv.conf "$1/etc/resolv.conf"; fi
shift 5
for folder; do
    mkdir -p "$root$folder"
    mount --bind -o ro "$folder" "$root$folder"
done
: >"$root/run/born"
exec chroot "$root" /bin/sh -c 'while :; do sleep 3600 & wait; done'
"""


def why_not() -> str | None:
    """Return why no box can be made here, or None."""
    if os.geteuid() != 0:
        return "a box needs root"
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    return f"a box needs {', '.join(missing)}" if missing else None


def cache() -> Path:
    """Return the folder that keeps what is made once for many runs."""
    folder = Path(os.environ.get("CRMBRIDGE_BOX_CACHE") or Path.home() / ".cache" / "crmbridge-box")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def base(suite: str = SUITES[0]) -> Path:
    """Return the folder of a suite's base system, made by debootstrap when it is not there; takes about a minute then.

    Raises:
        CalledProcessError: debootstrap or apt-get failed; its last lines are in `output`.
    """
    by_apt = BY_APT.get(suite, ())
    name = hashlib.sha256(" ".join((suite, *PACKAGES)).encode()).hexdigest()[:12]
    made, draft = cache() / name, cache() / f"{name}.new"
    with (cache() / "lock").open("w") as lock, _locked(lock):
        if not made.exists():
            shutil.rmtree(draft, ignore_errors=True)
            included = ",".join(name for name in PACKAGES if name not in by_apt)
            words = ["debootstrap", "--variant=minbase", f"--include={included}", suite, str(draft), _mirror()]
            _call(words)
            if by_apt:
                shutil.copy("/etc/resolv.conf", draft / "etc" / "resolv.conf")
                _call(["chroot", str(draft), "apt-get", "install", "-qy", "--no-install-recommends", *by_apt])
            shutil.rmtree(draft / "var" / "cache" / "apt", ignore_errors=True)
            draft.rename(made)
    return made


def _call(words: Sequence[str]) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise subprocess.CalledProcessError(done.returncode, words, done.stdout[-2000:] + done.stderr[-2000:])


@contextlib.contextmanager
def _locked(file: IO[str]) -> Iterator[None]:
    import fcntl

    fcntl.flock(file, fcntl.LOCK_EX)
    yield


def _mirror() -> str:
    """Return the address that this machine takes its own Debian packages from; it has the other suites, too."""
    words = ["apt-get", "indextargets", "--format", "$(RELEASE) $(COMPONENT) $(REPO_URI)", "Created-By: Packages"]
    listed = subprocess.run(words, capture_output=True, text=True, check=False).stdout
    found = re.search(r"^\S+ main (\S+/debian/?)$", listed, re.MULTILINE)
    return found[1] if found else "http://deb.debian.org/debian"


class Layer(NamedTuple):
    """What a box had changed in the base system of a suite."""

    path: Path
    suite: str


class Box:
    """One system; it lives until `close`. What runs in it dies with it.

    Args:
        folder: where its files go; removed by `close`.
        memory_mb: what all of it together may take, swap included; None: no bound.
        network: "own" has loopback alone; "host" shares the machine's, for installations from a package index.
        binds: folders of the machine that are seen, read-only, under the same path inside.
        layer: what an earlier box, ended by `keep`, had changed in the base system; it is not changed itself.
        suite: which Debian it is, where no layer tells.
    """

    def __init__(
        self,
        folder: Path,
        *,
        memory_mb: int | None = None,
        network: str = "own",
        binds: Sequence[Path] = (),
        layer: Layer | None = None,
        suite: str = SUITES[0],
    ) -> None:
        self._folder, self._network, self._binds = folder, network, binds
        self._lower = f"{layer.path}:{base(layer.suite)}" if layer else str(base(suite))
        for name in ("root", "upper", "work"):
            (folder / name).mkdir(parents=True)
        self._cgroup = _bounded(memory_mb) if memory_mb else None
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self.start()
        except BaseException:
            self.close()
            raise

    def start(self) -> None:
        """Give it its first process: file systems and loopback are there, no service is."""
        root = str(self._folder / "root")
        enter = f'echo $$ >"{self._cgroup}/cgroup.procs"; ' if self._cgroup else ""
        spaces = [
            "--mount",
            "--pid",
            "--fork",
            "--uts",
            "--ipc",
            "--cgroup",
            "--kill-child",
            *["--net"] * (self._network == "own"),
        ]
        words = ["sh", "-c", f"root={root}\n{_BIRTH}", "box", root, str(self._folder / "upper")]
        words += [str(self._folder / "work"), self._lower, self._network, *map(str, self._binds)]
        said = self._folder / "birth"
        with said.open("w") as file:
            self._process = subprocess.Popen(
                ["sh", "-c", enter + 'exec unshare "$@"', "box", *spaces, *words], start_new_session=True, stderr=file
            )
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")

        def first() -> str:
            assert self._process is not None
            if self._process.poll() is not None:
                raise RuntimeError(f"the box did not start: {said.read_text()}")
            pids = children.read_text().split()
            return pids[0] if pids and Path(f"/proc/{pids[0]}/root/run/born").exists() else ""

        self._pid = until(first)

    @property
    def root(self) -> Path:
        """Its file system, as seen from outside."""
        return Path(f"/proc/{self._pid}/root")

    def run(
        self,
        *words: str,
        check: bool = True,
        env: Mapping[str, str] | None = None,
        stdin: str | None = None,
        timeout: float = BULK_S,
    ) -> subprocess.CompletedProcess[str]:
        """Run a program in it as root, in /root; stdout and stderr come together in `stdout`.

        Raises:
            AssertionError: `check` is set and the status is not 0; what it printed is the message.
        """
        clean = {
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": "/root",
            "LANG": "C.UTF-8",
        }
        done = subprocess.run(
            [*self.entering(), *words],
            env=clean | dict(env or {}), input=stdin, stdin=subprocess.DEVNULL if stdin is None else None,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout, check=False,
        )  # fmt: skip
        if check:
            assert done.returncode == 0, f"{' '.join(words)}: exit status {done.returncode}\n{done.stdout}"
        return done

    def entering(self) -> list[str]:
        """Return the words before a program's own that run it inside: for `subprocess.Popen`."""
        enter = f'echo $$ >"{self._cgroup}/cgroup.procs"; ' if self._cgroup else ""
        inside = f"--target={self._pid}"
        spaces = ["--mount", "--pid", "--uts", "--ipc", "--cgroup", "--net", "--root"]
        return ["sh", "-c", enter + 'exec nsenter "$@"', "box", inside, *spaces, "env", "--chdir=/root"]

    def boot(self) -> str:
        """Start OpenRC's default runlevel, as a boot does, and return what it printed."""
        return self.run("openrc", "--no-stop", "default", check=False).stdout

    def cut(self) -> None:
        """End everything in it at once, as a power cut does for processes; the files stay."""
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(self._pid), signal.SIGKILL)
        self._process.wait()
        self._process = None

    def reboot(self, *, orderly: bool = True) -> str:
        """Shut down (`orderly`: services stop first), start again, and return what the boot printed."""
        if orderly:
            self.run("openrc", "shutdown", check=False)
        self.cut()
        self.start()
        return self.boot()

    def keep(self, layer: Path) -> None:
        """End it, and keep what it changed as a layer for other boxes."""
        self.cut()
        (self._folder / "upper").rename(layer)
        self.close()

    def close(self) -> None:
        """End it and remove its files."""
        if self._process is not None:
            self.cut()
        if self._cgroup:
            with contextlib.suppress(TimeoutError):
                until(partial(_removed, self._cgroup))  # the kernel counts the dead for a moment
        shutil.rmtree(self._folder, ignore_errors=True)


def _removed(cgroup: Path) -> bool:
    with contextlib.suppress(OSError):
        for group in (*cgroup.glob("*/"), cgroup):
            group.rmdir()
        return True
    return False


def _bounded(memory_mb: int) -> Path:
    """Make a memory cgroup, of either version, and return its folder."""
    old = _CGROUPS / "memory"
    group = (old if old.is_dir() else _CGROUPS) / f"crmbridge-{os.getpid()}-{next(_NUMBERS)}"
    group.mkdir()
    limits = ["memory.limit_in_bytes", "memory.memsw.limit_in_bytes"] if old.is_dir() else ["memory.max"]
    for limit in limits:
        if (group / limit).exists():
            (group / limit).write_text(str(memory_mb * 2**20))
    if not old.is_dir() and (group / "memory.swap.max").exists():
        (group / "memory.swap.max").write_text("0")
    return group
