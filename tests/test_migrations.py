"""The schema forwards and backwards: one transaction for each step, by the real program with planted migrations."""

import contextlib
import shutil
import sqlite3
import subprocess
from pathlib import Path

import pytest

from tests.test_cli import ROOT, run

NEWEST = "0006_truths"
FOLDER = Path("crmbridge") / "store" / "migrations"
HEAD = "from peewee import Database\n\n\n"
GOOD = (
    HEAD
    + """
def up(migrator, db):
    db.execute_sql("ALTER TABLE contacts ADD COLUMN shoe_size INTEGER")
    db.execute_sql("UPDATE api_keys SET name = upper(name)")


def down(migrator, db):
    db.execute_sql("ALTER TABLE contacts DROP COLUMN shoe_size")
    db.execute_sql("UPDATE api_keys SET name = lower(name)")
"""
)


@pytest.fixture
def code(tmp_path: Path) -> Path:
    """The program in a folder of its own, where migrations can be planted, with a database and one key in it."""
    shutil.copytree(ROOT / "crmbridge", tmp_path / "crmbridge", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "crmbridge.ini", tmp_path)
    assert at(tmp_path, "init").returncode == 0
    assert at(tmp_path, "key", "create", "--name", "anna", "--admin").returncode == 0
    return tmp_path


def at(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return run(folder, *words, PYTHONPATH=str(folder))


def plant(folder: Path, name: str, text: str) -> None:
    (folder / FOLDER / f"{name}.py").write_text(text)


def dump(folder: Path) -> list[str]:
    with contextlib.closing(sqlite3.connect(folder / "var" / "bridge.db")) as connection:
        return list(connection.iterdump())


def test_the_newest_migration_is_named_without_a_database(tmp_path: Path) -> None:
    assert run(tmp_path, "migrate", "--show").stdout == f"{NEWEST}\n"


def test_there_and_back_again(code: Path) -> None:
    before = dump(code)
    plant(code, "0007_shoes", GOOD)
    assert at(code, "migrate").stdout == "applied 0007_shoes\n"
    assert "ANNA" in str(dump(code))
    assert at(code, "key", "create", "--name", "berta", "--admin").returncode == 0
    back = at(code, "migrate", "--to", NEWEST)
    assert (back.returncode, back.stdout) == (0, "took back 0007_shoes\n")
    (code / FOLDER / "0007_shoes.py").unlink()
    after = [line for line in dump(code) if "berta" not in line]
    assert sorted(map(str.lower, after)) == sorted(map(str.lower, before))  # what came meanwhile stays
    assert at(code, "migrate", "--to", NEWEST).stdout == "nothing to do\n"
    assert at(code, "check").returncode == 0


def test_every_migration_since_the_fifth_goes_back(code: Path) -> None:
    names = sorted(path.stem for path in (code / FOLDER).glob("[0-9]*.py"))
    since = names[names.index("0005_appliance") :]
    back = at(code, "migrate", "--to", names[names.index("0005_appliance") - 1])
    assert back.stdout.split("\n")[:-1] == [f"took back {name}" for name in reversed(since)]
    forth = at(code, "migrate")
    assert forth.stdout.split("\n")[:-1] == [f"applied {name}" for name in since]


@pytest.mark.parametrize("fault", ["SELECT nonsense FROM nowhere", "INSERT INTO api_keys SELECT * FROM api_keys"])
def test_a_step_that_fails_leaves_schema_and_rows_untouched(code: Path, fault: str) -> None:
    before = dump(code)
    last = '    db.execute_sql("UPDATE api_keys SET name = upper(name)")\n'
    plant(code, "0007_shoes", GOOD.replace(last, f'{last}    db.execute_sql("{fault}")\n', 1))
    failed = at(code, "migrate")
    assert failed.returncode == 1
    assert "cannot be migrated" in failed.stderr
    assert dump(code) == before


def test_a_step_back_that_fails_leaves_all_of_it(code: Path) -> None:
    plant(code, "0007_shoes", GOOD.replace("lower(name)", "nonsense"))
    assert at(code, "migrate").returncode == 0
    before = dump(code)
    failed = at(code, "migrate", "--to", NEWEST)
    assert failed.returncode == 1
    assert "cannot be migrated" in failed.stderr
    assert dump(code) == before


def test_what_cannot_be_taken_back_is_refused_before_anything_changes(code: Path) -> None:
    plant(code, "0007_shoes", GOOD)
    assert at(code, "migrate").returncode == 0
    before = dump(code)
    for to, said in (
        ("0003_views", "0004_channel does not define down(). Put the backup from before it back."),
        ("0009_later", "has no migration 0009_later; it has: 0001_initial, "),
    ):
        failed = at(code, "migrate", "--to", to)
        assert failed.returncode == 1
        assert said in failed.stderr
        assert dump(code) == before
    (code / FOLDER / "0007_shoes.py").unlink()
    newer = at(code, "migrate", "--to", NEWEST)
    assert (newer.returncode, "0007_shoes" in newer.stderr) == (1, True)


def test_nothing_is_migrated_under_a_running_process(code: Path) -> None:
    import fcntl

    plant(code, "0007_shoes", GOOD)
    with (code / "var" / "bridge.db.open").open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_SH)  # as every process does that has the database open
        failed = at(code, "migrate")
        assert (failed.returncode, "stop the service first" in failed.stderr) == (1, True)
        fcntl.flock(held, fcntl.LOCK_EX)  # as who migrates does
        for words in (["key", "list"], ["serve"]):
            refused = at(code, *words)
            assert (refused.returncode, "is being migrated or restored" in refused.stderr) == (1, True)
    assert at(code, "migrate").stdout == "applied 0007_shoes\n"
