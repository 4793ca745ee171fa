"""From one version to another and back, with messages waiting: what was accepted is never lost, whatever goes wrong."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from crmbridge import __version__
from tests.appliance.box import Box
from tests.appliance.cuts import cut
from tests.appliance.shop import DATA, SANDBOX, Shop, opened
from tests.appliance.trees import in_box, later
from tests.waiting import until

pytestmark = pytest.mark.appliance
TOOL = "/opt/crmbridge/current/install.sh"


@pytest.fixture(scope="module")
def opened_shop(tmp_path_factory: pytest.TempPathFactory, layer: Path) -> Iterator[Shop]:
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


def test_an_upgrade_and_a_rollback_lose_nothing(shop: Shop, tmp_path: Path) -> None:
    box, schema = shop.box, migrations(shop)
    ini = box.run("cat", "/etc/crmbridge/crmbridge.ini").stdout
    said = install(
        shop, later(tmp_path / "next", "9.0.0", edits=(("crmbridge.ini", "[log]", "[log]\n# Colour of the log.\n#"),))
    )
    assert "saved    /var/lib/crmbridge/backups/before-9.0.0-" in said
    assert "migrated applied 0099_later" in said
    assert (version(box), migrations(shop), shop.health()) == ("9.0.0", "0099_later", "healthy")
    assert shop.customer_says("between") == 200
    status = box.run(TOOL, "status").stdout
    assert f"previous       {__version__}" in status
    said = box.run(TOOL, "rollback").stdout
    assert "took back 0099_later" in said
    assert (version(box), migrations(shop), shop.health()) == (__version__, schema, "healthy")
    assert shop.customer_says("after") == 200
    box.run(TOOL, "rollback")  # forward again
    assert (version(box), migrations(shop)) == ("9.0.0", "0099_later")
    assert box.run("cat", "/etc/crmbridge/crmbridge.ini").stdout == ini
    delivered(shop, "before", "between", "after")
    assert sorted(path.name for path in (box.root / "opt" / "crmbridge").iterdir() if path.name[0] != ".") == sorted(
        [__version__, "9.0.0", "current", "previous"]
    )


SERVE = "def _serve(options: argparse.Namespace) -> None:\n"
BROKEN: dict[str, tuple[str, tuple[tuple[str, str, str], ...], str]] = {
    "a migration fails": (
        "db.execute_sql('CREATE TABLE accounts (a)')",
        (),
        "the database could not be brought to the schema of 9.0.0",
    ),
    "the service does not come up": (
        "pass",
        (
            ("crmbridge/__main__.py", SERVE, f"{SERVE}    sys.exit('it does not start')\n"),
            ("install.sh", "--wait 60", "--wait 20"),
            ("openrc/crmbridge", "    ask 15 ", "    ask 1 "),
        ),
        "was not well within a minute",
    ),
}


@pytest.mark.parametrize(("migration", "edits", "why"), BROKEN.values(), ids=BROKEN)
def test_a_broken_upgrade_goes_back_by_itself(
    shop: Shop, tmp_path: Path, migration: str, edits: tuple[tuple[str, str, str], ...], why: str
) -> None:
    schema = migrations(shop)
    said = install(shop, later(tmp_path / "next", "9.0.0", migration=migration, edits=edits), check=False)
    assert why in said
    assert f"putting {__version__} back" in said
    assert f"{__version__} is as before" in said
    assert (version(shop.box), migrations(shop), shop.health()) == (__version__, schema, "healthy")
    assert shop.customer_says("after") == 200
    delivered(shop, "before", "after")


def test_a_version_that_did_not_run_before_holds_up_nothing(shop: Shop, tmp_path: Path) -> None:
    key = "/etc/crmbridge/crmbridge.key"
    shop.box.run("mv", key, "/root/key")
    said = install(shop, later(tmp_path / "next", "9.0.0"), check=False)
    assert f"{__version__} is back with all that was accepted, but does not run" in said
    assert not (shop.box.root / "opt/crmbridge/.moving").exists()
    shop.box.run("mv", "/root/key", key)
    shop.box.run("sh", "/root/next/install.sh", "upgrade")
    shop.rc("start")  # it could not be started, and was stopped then
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


def test_what_a_version_that_is_taken_back_has_accepted_is_kept(shop: Shop, tmp_path: Path) -> None:
    # its health says no, but it takes webhooks: one comes while install.sh waits for it
    edits = (
        ("crmbridge/web/health_routes.py", "return [problem]", "return [problem or 'never well']"),
        ("crmbridge/web/health_routes.py", "if problem:", "if True:"),
        ("install.sh", "--wait 60", "--wait 20"),
    )
    to(shop.box, later(tmp_path / "next", "9.0.0", edits=edits))
    words = [*shop.box.entering(), "sh", "/root/next/install.sh", "upgrade"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as run:
        until(lambda: shop.health() == "unhealthy")
        assert shop.customer_says("between") == 200
        said, _ = run.communicate()
    assert "never well" in said
    assert f"{__version__} is as before" in said
    assert (version(shop.box), shop.health(), run.returncode) == (__version__, "healthy", 1)
    delivered(shop, "before", "between")


# Where install.sh is killed: a line of its trace, and the seconds from there. Every second kill is of all it started.
STEPS = (
    ("cp -a -- .*/venv", 0.1),
    ("mv -- /opt/crmbridge/.draft", 0),
    ("file=/var/lib/crmbridge/backups", 0.3),
    ("mv -- /opt/crmbridge/.moving.new", 0),
    ("set_schema", 0),
    ("set_schema", 0.4),
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
