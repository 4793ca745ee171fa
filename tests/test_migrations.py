"""The schema goes forward alone: one transaction for each step, by the real program with planted migrations."""

import contextlib
import re
import shutil
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.test_cli import ROOT, run
from tests.waiting import PATIENCE_S

FOLDER = Path("crmbridge") / "store" / "migrations"
HEAD = "from peewee import Database\n\n\n"
GOOD = (
    HEAD
    + """
def up(migrator, db):
    db.execute_sql("ALTER TABLE contacts ADD COLUMN shoe_size INTEGER")
    db.execute_sql("UPDATE api_keys SET name = upper(name)")
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


def test_an_older_version_runs_on_what_a_newer_one_added(code: Path) -> None:
    plant(code, "0007_shoes", GOOD)
    assert at(code, "migrate").stdout == "applied 0007_shoes\n"
    assert "ANNA" in str(dump(code))
    (code / FOLDER / "0007_shoes.py").unlink()
    assert at(code, "migrate").stdout == "nothing to do\n"
    assert at(code, "check").returncode == 0
    assert at(code, "key", "create", "--name", "berta", "--admin").returncode == 0
    plant(code, "0007_shoes", GOOD)
    assert at(code, "migrate").stdout == "nothing to do\n"
    assert "berta" in str(dump(code))


def test_a_step_of_another_program_is_refused(code: Path) -> None:
    plant(code, "0001_nobodys", GOOD)
    assert at(code, "migrate").stdout == "applied 0001_nobodys\n"
    (code / FOLDER / "0001_nobodys.py").unlink()
    refused = at(code, "key", "list")
    assert (refused.returncode, "not of this program's making (it has 0001_nobodys)" in refused.stderr) == (1, True)


@pytest.mark.parametrize("fault", ["SELECT nonsense FROM nowhere", "INSERT INTO api_keys SELECT * FROM api_keys"])
def test_a_step_that_fails_leaves_schema_and_rows_untouched(code: Path, fault: str) -> None:
    before = dump(code)
    last = '    db.execute_sql("UPDATE api_keys SET name = upper(name)")\n'
    plant(code, "0007_shoes", GOOD.replace(last, f'{last}    db.execute_sql("{fault}")\n', 1))
    failed = at(code, "migrate")
    assert failed.returncode == 1
    assert "cannot be migrated" in failed.stderr
    assert dump(code) == before


def test_a_rehearsal_migrates_and_serves_a_copy_and_leaves_nothing(code: Path) -> None:
    assert at(code, "backup", "copy.db").returncode == 0
    before, left = dump(code), sorted(code.iterdir())
    plant(code, "0007_shoes", GOOD)
    done = at(code, "check", "--rehearse", "copy.db")
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"rehearsed on a copy of the database: healthy; migrated: 0007_shoes; \d+\.\d s\n", done.stdout)
    in_background = f"trap '' INT; PYTHONPATH={code} {sys.executable} -m crmbridge check --rehearse copy.db"
    assert subprocess.run(["sh", "-c", in_background], cwd=code, timeout=PATIENCE_S, check=False).returncode == 0
    plant(code, "0007_shoes", GOOD.replace("upper(name)", "nonsense"))
    broken = at(code, "check", "--rehearse", "copy.db")
    assert (broken.returncode, "no such column: nonsense" in broken.stderr) == (1, True)
    (code / FOLDER / "0007_shoes.py").unlink()
    (code / "var" / "crmbridge.key").write_text("none")
    assert at(code, "check", "--rehearse", "copy.db").returncode == 1
    assert (dump(code), sorted(code.iterdir())) == (before, left)


def test_a_rehearsal_that_does_not_end_is_ended(code: Path) -> None:
    assert at(code, "backup", "copy.db").returncode == 0
    before, left = dump(code), sorted(code.iterdir())
    place = code / "crmbridge" / "ops" / "rehearsal.py"
    usual = place.read_text()
    place.write_text(re.sub(r"^_LONGEST_S = \d+$", "_LONGEST_S = 2", usual, flags=re.MULTILINE))
    endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT COUNT(*) FROM n"
    for said, step in (
        ("crmbridge: the rehearsal took more than 2 s and was ended\n", f'db.execute_sql("{endless}")'),
        ("", 're.match("(a*)*b", "a" * 40)'),  # no other thread comes to run meanwhile
    ):
        plant(code, "0007_shoes", f"import re\n\n\ndef up(migrator, db):\n    {step}\n")
        began_s = time.monotonic()
        ended = at(code, "check", "--rehearse", "copy.db")
        assert time.monotonic() - began_s < PATIENCE_S / 2
        assert (ended.returncode != 0, ended.stderr) == (True, said)
    place.write_text(usual)
    plant(code, "0007_shoes", GOOD)
    assert at(code, "check", "--rehearse", "copy.db").returncode == 0
    assert (dump(code), sorted(code.iterdir())) == (before, left)


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


def test_a_database_of_the_first_edition_is_refused_with_a_plain_sentence(code: Path) -> None:
    with contextlib.closing(sqlite3.connect(code / "var" / "bridge.db")) as db, db:
        db.execute("INSERT INTO schema_migration (name, applied) VALUES ('0001_initial', '2026-01-01')")
    refused = at(code, "key", "list")
    assert refused.returncode == 1
    assert "it was made by the first edition, which was never released" in refused.stderr
