"""What root starts works as the owner of the data folder: no file of root's is left there to bar the service."""

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.needs import require
from tests.test_backup import change
from tests.test_cli import ROOT
from tests.test_hostile_backup import endless
from tests.waiting import PATIENCE_S, until

UID = GID = 54_321  # nobody's
# The Python of a checkout may be closed to others, so all that could be imported later is imported while root.
PROGRAM = """
import codecs, ctypes, importlib, multiprocessing.dummy, pkgutil, sys
import crmbridge, crmbridge.cli as main
for module in pkgutil.walk_packages(crmbridge.__path__, "crmbridge."):
    if "migrations" not in module.name:
        importlib.import_module(module.name)
for name in ("ascii", "idna", "latin-1", "utf-8"):
    codecs.lookup(name)
sys.exit(main.main())
"""


@pytest.fixture(scope="module", autouse=True)
def may_become_another() -> None:
    require(os.geteuid() == 0, "needs root")


def started(place: Path, *words: str) -> subprocess.Popen[str]:
    """Start the program from a copy of the code that everybody may read."""
    code = place / "code"
    if not code.exists():
        shutil.copytree(ROOT / "crmbridge", code / "crmbridge", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "crmbridge.ini", code)
        subprocess.run(["chmod", "-R", "a+rX", code], check=True)
    env = {name: value for name, value in os.environ.items() if not name.startswith("CRMBRIDGE_")}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *words],
        env={**env, "PYTHONPATH": str(code)}, cwd=place / "etc", stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip


def run(place: Path, *words: str) -> subprocess.CompletedProcess[str]:
    with started(place, *words) as process:
        said, _ = process.communicate(timeout=PATIENCE_S)
    return subprocess.CompletedProcess(words, process.returncode, said)


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that everybody may pass, with etc/ of root's and data/ of another user's."""
    place = Path(tempfile.mkdtemp(prefix="crmbridge-test-"))
    place.chmod(0o755)
    for name, mode, owner in (("etc", 0o750, 0), ("data", 0o750, UID)):
        (place / name).mkdir()
        os.chown(place / name, owner, GID)
        (place / name).chmod(mode)
    (place / "etc" / "base.ini").write_text(ini(place))
    yield place
    shutil.rmtree(place)


def ini(place: Path) -> str:
    data = place / "data"
    return f"""
[web]
port = 0
[store]
path = {data}/bridge.db
queue_path = {data}/queue.db
[vault]
key_file = {place}/etc/crmbridge.key
"""


def owners(folder: Path) -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_uid, path.stat().st_mode & 0o777) for path in folder.iterdir()}


def install(place: Path) -> Path:
    path = place / "etc" / "crmbridge.ini"
    (place / "etc" / "base.ini").rename(path)
    os.chown(path, 0, GID)
    path.chmod(0o640)
    done = run(place, "init", "--config", str(path))
    assert done.returncode == 0, done.stdout
    return path


def test_init_leaves_the_configuration_roots_and_gives_the_rest_to_the_owner(place: Path) -> None:
    path = install(place)
    assert (path.stat().st_uid, path.stat().st_gid) == (0, GID)
    assert owners(place / "etc")["crmbridge.key"] == (UID, 0o600)
    data = owners(place / "data")
    assert data["bridge.db"] == (UID, 0o600)
    assert {uid for uid, _ in data.values()} == {UID}
    before = (place / "etc" / "crmbridge.key").read_bytes()
    again = run(place, "init", "--config", str(path))
    assert (again.returncode, again.stdout.count("kept ")) == (0, 3)
    assert (place / "etc" / "crmbridge.key").read_bytes() == before


def test_a_new_configuration_beside_another_users_data_can_be_read_by_them(place: Path) -> None:
    path = place / "data" / "crmbridge.ini"
    done = run(place, "init", "--config", str(path))
    assert done.returncode == 0, done.stdout
    made = path.stat()
    assert (made.st_uid, made.st_gid, made.st_mode & 0o777) == (0, GID, 0o640)
    assert set(owners(place / "data" / "var").values()) == {(UID, 0o600)}
    assert run(place, "check", "--config", str(path)).returncode == 0


def test_every_command_that_root_types_leaves_the_files_to_their_owner(place: Path) -> None:
    path = install(place)
    for words in (
        ["check"],
        ["migrate"],
        ["key", "create", "--name", "a", "--admin"],
        ["key", "list"],
        ["dlq", "list"],
    ):
        done = run(place, *words, "--config", str(path))
        assert done.returncode == 0, (words, done.stdout)
        assert {uid for uid, _ in owners(place / "data").values()} == {UID}, words


def test_a_forgotten_sudo_serves_as_the_owner(place: Path) -> None:
    install(place)
    with started(place, "serve", "--config", "crmbridge.ini") as process:
        assert process.stdout is not None
        said = list(itertools.takewhile(lambda line: "serve.ready" not in line, process.stdout))
        assert process.poll() is None, "".join(said)[-1500:]
        assert Path(f"/proc/{process.pid}").stat().st_uid == UID
        assert f"Groups:\t{GID} \n" in Path(f"/proc/{process.pid}/status").read_text()
        assert {uid for uid, _ in owners(place / "data").values()} == {UID}
        process.send_signal(signal.SIGTERM)
        rest, _ = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 0, rest


def test_doctor_looks_as_the_owner_and_finds_what_the_service_could_not_read(place: Path) -> None:
    path = install(place)
    for spoil, slug in ((place, ""), (place / "data" / "queue.db", "wrong_owner"), (path, "ini_closed")):
        if slug == "wrong_owner":
            spoil.touch()
        if slug == "ini_closed":
            os.chown(spoil, 0, 0)
        done = run(place, "doctor", "--json", "--config", str(path))
        found = {one["slug"]: one for one in json.loads(done.stdout)["findings"]}
        assert done.returncode == 2, done.stdout
        assert not slug or found[slug]["todo"], done.stdout
        assert "code_writable" not in found
        assert {uid for name, (uid, _) in owners(place / "data").items() if name != "queue.db"} == {UID}


def test_a_key_file_that_the_owner_cannot_read_is_found_by_check(place: Path) -> None:
    path = install(place)
    os.chown(place / "etc" / "crmbridge.key", 0, 0)
    found = run(place, "check", "--config", str(path))
    assert found.returncode == 1
    assert "crmbridge.key cannot be read" in found.stdout


def test_roots_own_folder_stays_roots(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    assert run(tmp_path, "init").returncode == 0
    assert {uid for uid, _ in owners(tmp_path / "etc" / "var").values()} == {0}


def test_backups_go_where_root_may_write_and_what_is_put_back_is_the_owners(place: Path) -> None:
    path, key_file = install(place), place / "etc" / "crmbridge.key"
    (place / "etc" / "passphrase").write_text("correct horse battery\n")
    secret = ["--with-key", "--passphrase-file", "passphrase"]
    for words in ([f"{place}/etc/it.db", *secret], [f"{place}/data/backups/"]):
        done = run(place, "backup", *words, "--config", "crmbridge.ini")
        assert (done.returncode, "not in the backup" in done.stdout) == (0, False), done.stdout
    assert owners(place / "etc")["it.db"] == (0, 0o600)
    assert owners(place / "data")["backups"] == (UID, 0o700)
    assert set(owners(place / "data" / "backups").values()) == {(UID, 0o600)}
    key = key_file.read_bytes()
    key_file.unlink()
    done = run(place, "restore", "it.db", "--passphrase-file", "passphrase", "--config", str(path))
    assert done.returncode == 0, done.stdout
    assert (key_file.read_bytes(), owners(place / "etc")["crmbridge.key"]) == (key, (UID, 0o600))
    data = owners(place / "data")
    assert data.pop("backups")
    assert data["bridge.db"] == (UID, 0o600)
    assert {uid for uid, _ in data.values()} == {UID}
    assert run(place, "check", "--config", str(path)).returncode == 0


def test_the_configuration_that_is_put_back_is_roots_for_the_service_to_read(place: Path) -> None:
    path = install(place)
    (place / "etc" / "passphrase").write_text("correct horse battery\n")
    secret = ["--with-key", "--passphrase-file", "passphrase"]
    assert run(place, "backup", f"{place}/etc/it.db", *secret, "--config", str(path)).returncode == 0
    text = path.read_text()
    path.unlink()
    (place / "etc" / "crmbridge.key").unlink()
    shutil.rmtree(place / "data")
    (place / "data").mkdir(mode=0o750)
    os.chown(place / "data", UID, GID)
    done = run(place, "restore", "it.db", "--passphrase-file", "passphrase", "--config", str(path))
    assert done.returncode == 0, done.stdout
    made = path.stat()
    assert (path.read_text(), made.st_uid, made.st_gid, made.st_mode & 0o777) == (text, 0, GID, 0o640)
    assert owners(place / "etc")["crmbridge.key"] == (UID, 0o600)
    assert {uid for uid, _ in owners(place / "data").values()} == {UID}
    assert run(place, "check", "--config", str(path)).returncode == 0


def test_root_copies_no_database_in_which_its_owner_laid_something_to_run(place: Path) -> None:
    path = install(place)
    change(place / "data" / "bridge.db", "CREATE INDEX odd ON accounts (length(printf('%.*c', 600, id)))")
    done = run(place, "backup", f"{place}/etc/it.db", "--config", str(path))
    assert (done.returncode, "(index odd): back up to" in done.stdout) == (1, True), done.stdout
    assert not list((place / "etc").glob("it.db*"))
    done = run(place, "backup", f"{place}/data/backups/", "--config", str(path))
    assert (done.returncode, "restore will refuse it: index odd" in done.stdout) == (0, True), done.stdout


def test_who_reads_a_backup_has_become_the_owner_for_good(place: Path) -> None:
    path = install(place)
    assert run(place, "backup", f"{place}/etc/it.db", "--config", str(path)).returncode == 0
    endless(place / "etc" / "it.db")
    with started(place, "restore", "it.db", "--config", str(path)) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        (child,) = until(lambda: children.read_text().split())
        status = Path(f"/proc/{child}/status")
        until(lambda: f"Uid:\t{UID}\t{UID}\t{UID}\t{UID}\n" in status.read_text())
        assert f"Gid:\t{GID}\t{GID}\t{GID}\t{GID}\n" in status.read_text()
        limits = Path(f"/proc/{child}/limits")  # they come next, before it reads anything
        until(lambda: not re.search("Max (cpu time|address space) +unlimited", limits.read_text()))
        process.kill()
        until(lambda: not status.exists() or "State:\tZ" in status.read_text())  # it does not outlive its parent


def test_no_link_that_the_service_makes_leads_root_astray(place: Path) -> None:
    path, backups, theirs = install(place), place / "data" / "backups", place / "etc" / "theirs"
    done = run(place, "backup", f"{backups}/", "--config", str(path))
    assert done.returncode == 0, done.stdout
    (made,) = backups.iterdir()
    (place / "etc" / "secret").write_text("root's alone")
    (place / "etc" / "secret").chmod(0o600)
    made.with_name(made.name + "-wal").symlink_to(place / "etc" / "secret")
    for given in (made, made.with_name(made.name + "-wal")):
        done = run(place, "restore", str(given), "--config", str(path))
        assert (done.returncode, "is a link" in done.stdout) == (1, True), done.stdout
    theirs.mkdir(mode=0o700)
    shutil.rmtree(backups)
    backups.symlink_to(theirs)
    done = run(place, "backup", f"{backups}/", "--config", str(path))
    assert (done.returncode, "Permission denied" in done.stdout) == (1, True), done.stdout
    assert not list(theirs.iterdir())


def test_what_the_owner_may_not_read_is_put_back_from_a_folder_of_roots(place: Path) -> None:
    path, backups = install(place), place / "data" / "backups"
    done = run(place, "backup", f"{place}/etc/it.db", "--config", str(path))
    assert done.returncode == 0, done.stdout
    backups.mkdir()
    os.chown(backups, UID, GID)
    (place / "etc" / "it.db").rename(backups / "it.db")
    done = run(place, "restore", f"{backups}/it.db", "--config", str(path))
    assert (done.returncode, "copy it to a folder of root's" in done.stdout) == (1, True), done.stdout
    for whose in (0, UID):  # as a copy, or moved
        (backups / "it.db").rename(place / "etc" / "it.db")
        os.chown(place / "etc" / "it.db", whose, -1)
        (place / "etc").chmod(0o700)
        done = run(place, "restore", f"{place}/etc/it.db", "--config", str(path))
        assert done.returncode == 0, done.stdout
        (place / "etc").chmod(0o750)
        (place / "etc" / "it.db").rename(backups / "it.db")
