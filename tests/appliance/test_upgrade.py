"""From one version to another and back, with messages waiting: what was accepted is never lost, whatever goes wrong."""

import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from crmbridge import __version__
from tests.appliance.box import Box, Layer
from tests.appliance.cuts import cut
from tests.appliance.shop import DATA, SANDBOX, Shop, opened
from tests.appliance.suites import on_both
from tests.appliance.trees import in_box, later
from tests.waiting import until

pytestmark = pytest.mark.appliance
TOOL = "/opt/crmbridge/current/install.sh"


@pytest.fixture(scope="module")
def opened_shop(tmp_path_factory: pytest.TempPathFactory, layer: Layer) -> Iterator[Shop]:
    with opened(
        tmp_path_factory.mktemp("shop"), layer, memory_mb=1024,
        delivery__crm_quick_s="1", delivery__crm_slow_s="1", delivery__probe_s="1",
    ) as made:  # fmt: skip
        yield made


@pytest.fixture
def shop(opened_shop: Shop) -> Shop:
    """A shop of this version whose CRM is down, with one message waiting for it."""
    shop = opened_shop
    if version(shop.box) != __version__:
        shop.box.run(TOOL, "rollback")
    shop.ask("POST", f"{SANDBOX}/crm/sandbox/reset", {})
    shop.crm_answers(status=503, always=True)
    assert shop.customer_says("before") == 200
    return shop


def to(box: Box, source: Path) -> None:
    box.run("rm", "-rf", "/root/next")
    in_box(box, "/root/next", source)


def install(shop: Shop, source: Path, command: str = "upgrade", *, check: bool = True) -> str:
    """Copy a tree into the box and run its install.sh there."""
    to(shop.box, source)
    done = shop.box.run("sh", "/root/next/install.sh", command, check=False)
    assert (done.returncode == 0) == check, done.stdout
    return done.stdout


def version(box: Box) -> str:
    return box.run("crmbridge", "--version").stdout.split()[-1]


def migrations(shop: Shop) -> str:
    return shop.box.run("sqlite3", f"{DATA}/bridge.db", "SELECT MAX(name) FROM schema_migration").stdout.strip()


def delivered(shop: Shop, *texts: str) -> None:
    """Let the CRM work again, and hold that it gets just these texts, in their order."""
    shop.crm_answers(status=None, always=True)
    until(lambda: len(shop.at_crm()) >= len(texts))
    assert shop.at_crm() == list(texts)


@on_both
def test_an_upgrade_and_a_rollback_lose_nothing(shop: Shop, tmp_path: Path) -> None:
    box = shop.box
    ini = box.run("cat", "/etc/crmbridge/crmbridge.ini").stdout
    said = install(
        shop, later(tmp_path / "next", "9.0.0", edits=(("crmbridge.ini", "[log]", "[log]\n# Colour of the log.\n#"),))
    )
    assert "saved    /var/lib/crmbridge/backups/upgrades/crmbridge-20" in said
    assert re.search(r"rehearsed on a copy of the database: healthy; migrated: 0099_later; \d", said), said
    assert "migrated applied 0099_later" in said
    assert (version(box), migrations(shop), shop.health()) == ("9.0.0", "0099_later", "healthy")
    assert shop.customer_says("between") == 200
    status = box.run(TOOL, "status").stdout
    assert f"previous       {__version__}" in status
    box.run(TOOL, "rollback")
    # what the newer version added stays, and is left alone
    assert (version(box), migrations(shop), shop.health()) == (__version__, "0099_later", "healthy")
    assert shop.customer_says("after") == 200
    box.run(TOOL, "rollback")  # forward again
    assert version(box) == "9.0.0"
    assert box.run("cat", "/etc/crmbridge/crmbridge.ini").stdout == ini
    delivered(shop, "before", "between", "after")
    assert sorted(path.name for path in (box.root / "opt" / "crmbridge").iterdir() if path.name[0] != ".") == sorted(
        [__version__, "9.0.0", "current", "previous"]
    )


SERVE = "def _serve(options: argparse.Namespace) -> None:\n"
HEALTH = "    problem = call.db.schema_problem()\n"
REAL = "'rehearsal' not in str"
Edits = tuple[tuple[str, str, str], ...]
# What passes its rehearsal and then fails: the migration, edits, and what is said of it.
BROKEN: dict[str, tuple[str, Edits, str]] = {
    "a migration fails": (
        f"if {REAL}(db.database): db.execute_sql('CREATE TABLE accounts (a)')",
        (),
        "the database could not be brought to the schema of 9.0.0",
    ),
    "it dies at once": (
        "pass",
        (("crmbridge/cli.py", SERVE, f"{SERVE}    sys.exit('it does not start')\n"),),
        "its process has ended twice",
    ),
    "it is not well": (
        "pass",
        (
            (
                "crmbridge/web/public.py",
                HEALTH,
                f"    if {REAL}(call.db.path):\n        return ['never well']\n{HEALTH}",
            ),
        ),
        "unhealthy: never well",
    ),
}


@on_both
@pytest.mark.parametrize(("migration", "edits", "why"), BROKEN.values(), ids=BROKEN)
def test_a_broken_upgrade_goes_back_by_itself_within_ten_seconds(
    shop: Shop, tmp_path: Path, migration: str, edits: Edits, why: str
) -> None:
    name = "0099_later" if migration == "pass" else "0098_broken"
    to(shop.box, later(tmp_path / "next", "9.0.0", name=name, migration=migration, edits=edits))
    restart_s = restarted(shop)
    said, status, outage_s = upgraded(shop)
    print(f"{outage_s:.1f} s from the stop to the start; a restart took {restart_s:.1f} s")
    assert status == 1, said
    assert why in said
    assert "rehearsed on a copy of the database: healthy" in said
    assert f"putting {__version__} back" in said
    assert f"{__version__} is as before" in said
    assert (version(shop.box), shop.health()) == (__version__, "healthy")
    restart_s = max(restart_s, restarted(shop))
    assert outage_s < 10 * max(1, restart_s / 2)  # on an idle machine a restart takes two
    assert shop.customer_says("after") == 200
    delivered(shop, "before", "after")


def restarted(shop: Shop) -> float:
    """Restart the service; return the seconds, by which this machine's speed is told."""
    began_s = time.monotonic()
    shop.rc("restart")
    took_s = time.monotonic() - began_s
    shop.wait_healthy()
    return took_s


def upgraded(shop: Shop) -> tuple[str, int, float]:
    """Upgrade to /root/next; return what is said, the status, and the seconds from the stop to the old one's start."""
    words = [*shop.box.entering(), "sh", "/root/next/install.sh", "upgrade"]
    link, started = shop.box.root / "opt/crmbridge/current", shop.box.root / "run/openrc/started/crmbridge"
    stopped_s = back_s = 0.0
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as run:
        while run.poll() is None:
            if not stopped_s and not started.is_symlink():
                stopped_s = time.monotonic()
            if not link.exists() or link.readlink().name != __version__:
                back_s = 0.0
            elif stopped_s and not back_s and started.is_symlink():
                back_s = time.monotonic()
            time.sleep(0.02)
        said = run.communicate()[0]
    assert back_s > stopped_s > 0, said
    return said, run.returncode, back_s - stopped_s


# What its rehearsal shows to be broken: as above.
NOT_FIT: dict[str, tuple[str, Edits, str]] = {
    "a migration fails": ("db.execute_sql('CREATE TABLE accounts (a)')", (), "table accounts already exists"),
    "a migration does not end": (
        "db.execute_sql('WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT COUNT(*) FROM n')",
        (("crmbridge/ops/rehearsal.py", "_LONGEST_S = 600\n", "_LONGEST_S = 3\n"),),
        "the rehearsal took more than 3 s and was ended",
    ),
    "it is not well": (
        "pass",
        (("crmbridge/web/public.py", HEALTH, f"{HEALTH}    problem = 'ill'\n"),),
        "unhealthy: ill",
    ),
}


@pytest.mark.parametrize(("migration", "edits", "why"), NOT_FIT.values(), ids=NOT_FIT)
def test_what_a_rehearsal_shows_to_be_broken_stops_nothing(
    shop: Shop, tmp_path: Path, migration: str, edits: Edits, why: str
) -> None:
    pid, schema = shop.pid(), migrations(shop)
    name = "0099_later" if migration == "pass" else "0098_broken"
    said = install(shop, later(tmp_path / "next", "9.0.0", name=name, migration=migration, edits=edits), check=False)
    assert why in said.replace('"', "")
    assert "did not pass its rehearsal" in said
    assert (version(shop.box), migrations(shop), shop.pid()) == (__version__, schema, pid)
    left = shop.box.run("sh", "-c", f"ls -A {DATA}/backups/upgrades").stdout.split()
    assert [name for name in left if not name.endswith(".db")] == []
    delivered(shop, "before")


def test_the_same_version_with_other_content_is_another_one(shop: Shop, tmp_path: Path) -> None:
    edits = (("crmbridge/__init__.py", "__version__", "# mended\n__version__"),)
    said = install(shop, later(tmp_path / "next", __version__, edits=edits))
    assert f"crmbridge {__version__}-2 is started; {__version__} is kept" in said
    assert "is already installed" in shop.box.run("sh", "/root/next/install.sh", "install").stdout
    shop.box.run(TOOL, "rollback")
    delivered(shop, "before")


def test_a_version_that_did_not_run_before_holds_up_nothing(shop: Shop, tmp_path: Path) -> None:
    shop.rc("stop")
    key = "/etc/crmbridge/crmbridge.key"
    shop.box.run("mv", key, "/root/key")
    said = install(shop, later(tmp_path / "next", "9.0.0"), check=False)
    assert "did not pass its rehearsal" in said
    shop.box.run("mv", "/root/key", key)
    shop.box.run("sh", "/root/next/install.sh", "upgrade")
    shop.rc("start")  # it was stopped, and stays so
    shop.wait_healthy()
    assert version(shop.box) == "9.0.0"
    delivered(shop, "before")


def test_nobody_reads_what_it_says(shop: Shop, tmp_path: Path) -> None:
    to(shop.box, later(tmp_path / "next", "9.0.0"))
    shop.box.run("sh", "-c", "sh /root/next/install.sh upgrade 2>&1 | grep -m 1 saved")
    shop.box.run("flock", "/run/crmbridge-install.lock", "true")  # until it has ended
    assert not (shop.box.root / "opt/crmbridge/.moving").exists()
    shop.wait_healthy()
    delivered(shop, "before")


# Where install.sh is killed: a line of its trace, and the seconds from there. Every second kill is of all it started.
STEPS = (
    ("cp -a -- .*/venv", 0.1),
    ("mv -- /opt/crmbridge/.draft", 0),
    ("bridge 9.0.0.* backup", 0.3),
    ("bridge 9.0.0.* check", 0.5),
    ("mv -- /opt/crmbridge/.moving.new", 0),
    ("bridge 9.0.0.* migrate", 0),
    ("bridge 9.0.0.* migrate", 0.4),
    ("point current 9.0.0", 0),
    ("start_service", 0.7),
    ("point previous", 0),
    ("rm -f -- /opt/crmbridge/.moving", 0),
)


def test_an_upgrade_killed_at_any_step_and_run_again_loses_nothing(shop: Shop, tmp_path: Path) -> None:
    box = shop.box
    # another service file, too, so that it is put in place
    edits = (("openrc/crmbridge", "#!/sbin/openrc-run\n", "#!/sbin/openrc-run\n# later\n"),)
    to(box, later(tmp_path / "next", "9.0.0", edits=edits))
    for number, (step, delay_s) in enumerate(STEPS):
        cut(box, "upgrade", step, delay_s, all_of_it=number % 2 == 1)
        if version(box) == "9.0.0" and not (box.root / "opt/crmbridge/.moving").exists():
            box.run(TOOL, "rollback")
    said = box.run("sh", "/root/next/install.sh", "upgrade").stdout
    assert "Traceback" not in said
    shop.wait_healthy()
    assert (version(box), migrations(shop)) == ("9.0.0", "0099_later")
    delivered(shop, "before")


def test_a_move_killed_when_it_is_done_all_but_its_mark_is_finished_by_the_next_command(
    shop: Shop, tmp_path: Path
) -> None:
    done = '    echo "done $from" >"$mark"\n'
    edits = (("install.sh", done, f"{done}    [ ! -e /root/cut ] || kill -9 $$\n"),)
    box, mark = shop.box, shop.box.root / "opt/crmbridge/.moving"
    to(box, later(tmp_path / "next", "9.1.0", edits=edits))

    def previous() -> str:
        return box.run("readlink", "/opt/crmbridge/previous", check=False).stdout.strip()

    def killed(*words: str, was: str) -> int:
        box.run("touch", "/root/cut")
        assert box.run(*words, check=False).returncode == -9
        box.run("rm", "/root/cut")
        assert mark.read_text() == f"done {was}\n"
        shop.wait_healthy()
        done = box.run(TOOL, "status", check=False)
        assert (done.returncode, "unfinished" in done.stdout) == (1, True)
        return shop.pid()

    pid = killed("sh", "/root/next/install.sh", "upgrade", was=__version__)
    assert version(box) == "9.1.0"
    said = box.run("sh", "/root/next/install.sh", "upgrade").stdout
    assert "the last run was cut short" in said
    assert "putting" not in said
    assert (version(box), previous(), mark.exists(), shop.pid()) == ("9.1.0", __version__, False, pid)
    pid = killed(TOOL, "rollback", was="9.1.0")
    assert version(box) == __version__
    assert "the last run was cut short" in box.run(TOOL, "rollback").stdout  # and does not go forward again
    assert (version(box), previous(), mark.exists(), shop.pid()) == (__version__, "9.1.0", False, pid)
    box.run(TOOL, "rollback")
    assert version(box) == "9.1.0"
    delivered(shop, "before")
