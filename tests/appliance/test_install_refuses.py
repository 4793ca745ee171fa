"""What install.sh says as root when a server lacks something: which, why, how to go on; and that it changes nothing."""

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.appliance.box import Box
from tests.appliance.trees import in_box, tree

pytestmark = pytest.mark.appliance
LIBRARY = "/usr/lib/python3.11"
OLD = next((path for minor in (10, 9, 8) for path in sorted(Path.home().glob(f".pyenv/versions/3.{minor}.*"))), None)


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    """A booted Debian with the checkout in /srv/tree; a test leaves it as it was."""
    folder = tmp_path_factory.mktemp("bare")
    box = Box(folder / "box", memory_mb=300, binds=[OLD] if OLD else [])
    box.boot()
    in_box(box, "/srv/tree", tree(folder / "tree"))
    yield box
    box.close()


@contextlib.contextmanager
def hidden(box: Box, *paths: str) -> Iterator[None]:
    """Take files away for a while."""
    for path in paths:
        box.run("mv", path, f"{path}.hidden")
    try:
        yield
    finally:
        for path in paths:
            box.run("mv", f"{path}.hidden", path)


@contextlib.contextmanager
def mounted(box: Box, *words: str) -> Iterator[None]:
    box.run("mkdir", "-p", words[-1]) if words[-1].startswith(("/opt", "/var")) else None
    box.run("mount", *words)
    try:
        yield
    finally:
        box.run("umount", words[-1])


def refuses(box: Box, *said: str, env: dict[str, str] | None = None, command: str = "install") -> None:
    """Hold that it stops with 1, says all of this, and leaves no trace."""
    done = box.run("sh", "/srv/tree/install.sh", command, check=False, env=env)
    for text in said:
        assert text in done.stdout
    assert done.returncode == 1
    assert "Traceback" not in done.stdout
    places = "/opt/crmbridge /etc/crmbridge /etc/init.d/crmbridge /var/lib/crmbridge"
    left = box.run("sh", "-c", f"find {places} -type f 2>/dev/null; getent passwd crmbridge", check=False)
    assert left.stdout == ""


def test_without_root(bare: Box) -> None:
    words = ["su", "-s", "/bin/sh", "-c", "cd /; sh /srv/tree/install.sh install", "nobody"]
    done = bare.run(*words, check=False)
    assert (done.returncode, "this needs root" in done.stdout) == (1, True)


def test_without_python(bare: Box) -> None:
    with hidden(bare, "/usr/bin/python3", "/usr/bin/python3.11"):
        refuses(bare, "there is no python3 in PATH", "emerge --ask --newuse dev-lang/python:3.13")


def test_with_an_old_python(bare: Box) -> None:
    if OLD:
        python = str(OLD / "bin" / "python3")
    else:
        python = "/srv/old-python"
        bare.run("sh", "-c", f"printf '#!/bin/sh\\necho version 3.9\\n' >{python}; chmod 755 {python}")
    refuses(bare, "is Python 3.", "crmbridge runs on Python 3.11, 3.12, 3.13 and 3.14", env={"PYTHON": python})


@pytest.mark.parametrize(
    ("module", "path"),
    [("venv", "venv"), ("ensurepip", "ensurepip"), ("sqlite3", "sqlite3"), ("ssl", "ssl.py")],
)
def test_without_a_module_of_python(bare: Box, module: str, path: str) -> None:
    with hidden(bare, f"{LIBRARY}/{path}"):
        refuses(bare, f"python3 has no {module} module", "dev-lang/python ensurepip sqlite ssl")


def test_with_a_python_that_the_service_could_not_run(bare: Box) -> None:
    bare.run("cp", "/usr/bin/python3.11", "/root/python3")
    refuses(bare, "could not run /root/python3: /root is closed to others", env={"PYTHON": "/root/python3"})


def test_nothing_is_imported_from_where_it_is_run(bare: Box) -> None:
    planted = (
        'rm -rf /tmp/w; mkdir /tmp/w; cd /tmp/w; echo \'open("/tmp/w/imported", "w")\' >venv.py; cp venv.py ssl.py'
    )
    words = ["sh", "-c", f"{planted}; sh /srv/tree/install.sh install", "-"]
    assert "pip must reach" in bare.run(*words, check=False, env={"PIP_RETRIES": "0", "PYTHONINSPECT": "1"}).stdout
    assert bare.run("ls", "/tmp/w").stdout == "ssl.py\nvenv.py\n"


def test_with_an_old_sqlite(bare: Box) -> None:
    bare.run("sed", "-i", "s/^least_sqlite=.*/least_sqlite=99.0/", "/srv/tree/install.sh")
    try:
        refuses(bare, "crmbridge needs 99.0 or later", "emerge --ask --oneshot dev-db/sqlite")
    finally:
        bare.run("sed", "-i", "s/^least_sqlite=.*/least_sqlite=3.35.0/", "/srv/tree/install.sh")


def test_without_openrc(bare: Box) -> None:
    with hidden(bare, "/sbin/rc-service"):
        refuses(bare, "there is no OpenRC here (rc-service is missing)", "crmbridge init", "crmbridge serve")


def test_where_openrc_started_nothing(bare: Box) -> None:
    with hidden(bare, "/run/openrc/softlevel"):
        refuses(bare, "OpenRC is installed but did not start this system", "openrc default")


@pytest.mark.parametrize("place", ["/opt", "/var/lib/crmbridge"])
def test_on_a_full_disk(bare: Box, place: str) -> None:
    with mounted(bare, "-t", "tmpfs", "-o", "size=20m", "tmpfs", place):
        refuses(bare, f"not enough disk space: {place} has 20 MB free", "Make room")
    bare.run("sh", "-c", "rmdir /var/lib/crmbridge 2>/dev/null || true")


@pytest.mark.parametrize(("wheels", "needed_mb"), [("", 124), ("/srv/tree/wheels", 92)])
def test_with_little_memory(bare: Box, wheels: str, needed_mb: int) -> None:
    """Swap counts; packages at hand take less than an index, and an index that cannot be had tells that it went on."""
    bare.run("sh", "-c", f"mkdir -p {wheels or '/srv'}; touch /srv/meminfo")
    with mounted(bare, "--bind", "/srv/meminfo", "/proc/meminfo"):
        for free_mb, said in (
            (
                needed_mb - 1,
                (f"not enough memory: {needed_mb - 1} MB are free", f"takes {needed_mb} MB", "mkswap /swap"),
            ),
            (needed_mb, ("pip must reach a package index",)),
        ):
            told = f"MemAvailable: {(free_mb - 8) * 1024} kB\\nSwapFree: {8 * 1024} kB\\n"
            bare.run("sh", "-c", f"printf '{told}' >/srv/meminfo")
            refuses(bare, *said, env={"PIP_RETRIES": "0"})
    bare.run("rm", "-rf", "/srv/tree/wheels")


def test_with_a_wrong_clock(bare: Box) -> None:
    bare.run("touch", "-d", "+3 days", "/srv/tree/crmbridge/errors.py")
    try:
        refuses(bare, "the clock is wrong", "net-misc/chrony")
    finally:
        bare.run("touch", "/srv/tree/crmbridge/errors.py")


def test_with_the_port_taken(bare: Box) -> None:
    listens = "import socket; s = socket.create_server(('127.0.0.1', 8080)); print('listens', flush=True); s.accept()"
    words = [*bare.entering(), "python3", "-c", listens]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "listens\n"
        refuses(bare, "another program uses port 8080", "ss -ltnp 'sport = :8080'")
        bare.run("python3", "-c", "import socket; socket.create_connection(('127.0.0.1', 8080))")


def test_from_a_folder_that_is_incomplete(bare: Box) -> None:
    with hidden(bare, "/srv/tree/openrc"):
        refuses(bare, "/srv/tree/openrc is missing")


@pytest.mark.parametrize("command", ["upgrade", "rollback", "repair", "status"])
def test_when_nothing_is_installed(bare: Box, command: str) -> None:
    refuses(bare, "crmbridge is not installed here", "install", command=command)


def test_while_another_run_is_at_work(bare: Box) -> None:
    lock = "exec 9>/run/crmbridge-install.lock; flock 9; echo locked; read -r _"
    words = [*bare.entering(), "sh", "-c", lock]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "locked\n"
        words = [*bare.entering(), "sh", "/srv/tree/install.sh", "repair"]
        with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as second:
            assert second.stderr is not None
            assert "another run is at work; waiting for it" in second.stderr.readline()
            first.communicate("go on\n")
            assert "not installed here" in second.stderr.readline()


def test_the_packages_cannot_be_had(bare: Box) -> None:
    refuses(bare, "pip must reach a package index", "Then run the same command again", env={"PIP_RETRIES": "0"})
