"""Boxes for the tests of the appliance, and crmbridge installed in one: made once for all workers of a run."""

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.appliance.box import SUITES, Box, Layer, cache, why_not
from tests.appliance.trees import CHECKOUT, in_box, tree
from tests.needs import require


@pytest.fixture(scope="session", autouse=True)
def boxes_can_be_made() -> None:
    """Skip with the reason where no box can be made; in CI that is a failure."""
    reason = why_not()
    require(reason is None, str(reason))


@pytest.fixture
def box(tmp_path: Path, suite: str) -> Iterator[Box]:
    """An empty Debian with OpenRC, not booted, bounded to 1 GB, with no network but loopback."""
    made = Box(tmp_path / "box", memory_mb=1024, suite=suite)
    yield made
    made.close()


@contextlib.contextmanager
def _once(made: Path) -> Iterator[bool]:
    """Let one process at a time in; yield whether `made` is still to be made."""
    with made.with_name(made.name + ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield not made.exists()


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all workers of this run share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base


@pytest.fixture(scope="session")
def wheels(shared: Path) -> Path:
    """The packages for every Python, as `install.sh bundle` gets them from the index; kept from run to run."""
    pins = hashlib.sha256((CHECKOUT / "requirements.txt").read_bytes()).hexdigest()[:12]
    made = cache() / f"wheels-{pins}"
    with _once(made) as missing:
        if missing:
            source = tree(shared / "source")
            words = [str(source / "install.sh"), "bundle", str(shared / "first.sh")]
            python = getattr(sys, "_base_executable", sys.executable)
            done = subprocess.run(
                words, env={**os.environ, "PYTHON": python}, capture_output=True, text=True, check=False
            )
            require(done.returncode == 0, f"no bundle without a package index: {done.stderr[-2000:]}")
            draft = shared / "unpacked"
            draft.mkdir()
            script = 'tail -n "+$(awk \'/^# the tar file begins/ {print NR + 1; exit}\' "$1")" "$1" | tar -x -C "$2"'
            subprocess.run(["sh", "-c", script, "-", shared / "first.sh", draft], check=True)
            shutil.copytree(draft / "wheels", made.with_name(made.name + ".new"), dirs_exist_ok=True)
            made.with_name(made.name + ".new").rename(made)
    return made


@pytest.fixture(scope="session")
def bundle(shared: Path, wheels: Path) -> Path:
    """The bundle of this checkout."""
    made = shared / "crmbridge.sh"
    with _once(made) as missing:
        if missing:
            source = tree(shared / "bundled")
            (source / "wheels").symlink_to(wheels)
            subprocess.run([str(source / "install.sh"), "bundle", str(made)], check=True, capture_output=True)
    return made


@pytest.fixture(scope="session")
def suite(request: pytest.FixtureRequest) -> str:
    """The Debian that a test runs on: bookworm; or both, one after the other, where it is marked `on_both`."""
    return str(getattr(request, "param", SUITES[0]))


@pytest.fixture(scope="session")
def layer(shared: Path, bundle: Path, suite: str) -> Layer:
    """What an installation from the bundle changes in the base system; the service is stopped."""
    made = shared / f"installed-{suite}"
    with _once(made) as missing:
        if missing:
            # more than that no installation may take
            box = Box(shared / f"installing-{suite}", memory_mb=128, suite=suite)
            try:
                in_box(box, "/root/crmbridge.sh", bundle)
                box.boot()
                box.run("sh", "crmbridge.sh", "install")
                box.run("openrc", "shutdown", check=False)
            except BaseException:
                box.close()
                raise
            box.keep(made)
    return Layer(made, suite)


@pytest.fixture
def installed(tmp_path: Path, layer: Layer) -> Iterator[Box]:
    """A box in which crmbridge was installed from the bundle and runs; /root/crmbridge.sh is the bundle."""
    made = Box(tmp_path / "box", memory_mb=1024, layer=layer)
    try:
        made.boot()
        made.run("crmbridge", "health", "--wait", "60")
        yield made
    finally:
        made.close()
