"""The OpenRC service where things go wrong, in boxes of 256 MB: crash loops, a full disk, a Python that is gone."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.appliance.shop import DATA, LOG, SOON, Shop, opened
from tests.needs import require
from tests.waiting import until

pytestmark = pytest.mark.appliance


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory, layer: Path) -> Iterator[Shop]:
    with opened(tmp_path_factory.mktemp("shop"), layer, memory_mb=256) as shop:
        yield shop


def test_a_crash_loop_is_slowed_down_and_ends_with_its_cause(shop: Shop) -> None:
    assert "--retry TERM/30/KILL/5 --" in shop.supervisors()[0]
    assert "--respawn-delay 5 --respawn-max 0 " in shop.supervisors()[0]
    good = shop.ini.read_text()
    shop.ini.write_text(good + "[nonsense]\nx = 1\n")
    began = time.monotonic()
    shop.box.run("kill", "-9", str(shop.pid()))
    until(lambda: shop.log().count("there is no section [nonsense]") >= 2)
    took_s = time.monotonic() - began
    began = time.monotonic()
    shop.rc("checkconfig", check=False)  # what one start takes before it ends with this
    assert 10 <= took_s < 20 + 4 * (time.monotonic() - began)
    shop.ini.write_text(good)
    shop.wait_healthy()


def test_a_boot_with_what_is_wrong_ends_well_once_it_is_mended(shop: Shop) -> None:
    good = shop.ini.read_text()
    shop.ini.write_text(good + "[nonsense]\nx = 1\n")
    before = shop.log().count("there is no section")
    told = shop.box.reboot()
    until(lambda: shop.log().count("there is no section") > before)
    assert "there is no section [nonsense]" in told
    assert "Started all the same, as this is a boot: it is tried every 5 seconds" in told
    shop.ini.write_text(good)
    shop.wait_healthy()


def test_a_stop_ends_within_its_time_when_the_crm_hangs(shop: Shop) -> None:
    shop.configure(delivery__stop_grace_s="2")
    began = time.monotonic()
    shop.rc("restart")
    restart_s = time.monotonic() - began
    assert "--retry TERM/22/KILL/5 " in shop.supervisors()[0]
    shop.start_sandbox()
    shop.crm_answers(status=200, delay_s=60)
    assert shop.customer_says("hanging") == 200
    began = time.monotonic()
    shop.rc("stop")
    assert 2 <= time.monotonic() - began < 8 + restart_s
    assert shop.log().splitlines()[-1].endswith("calls_left=true")  # it ended by itself
    shop.rc("start")
    shop.wait_healthy()
    until(lambda: shop.at_crm() == ["hanging"])


def test_a_python_that_is_gone_is_named(shop: Shop) -> None:
    pid = shop.pid()
    python = shop.box.run("readlink", "-f", "/opt/crmbridge/current/venv/bin/python").stdout.strip()
    shop.box.run("mv", python, f"{python}.gone")
    for words in (["checkconfig"], ["restart"]):
        assert "install.sh repair" in shop.rc(*words, check=False)
    shop.rc("healthcheck")  # it cannot be asked, but that is no reason to end it
    assert shop.pid() == pid
    shop.box.run("mv", f"{python}.gone", python)
    assert shop.health() == "healthy"


def test_what_openrc_lost_sight_of_is_ended(shop: Shop) -> None:
    pid = shop.pid()
    shop.box.run("pkill", "-9", "supervise-daemo")
    assert "unsupervised" in shop.rc("status", check=False)
    assert f"Process {pid} had no supervisor" in shop.rc("restart")
    assert shop.pid() != pid
    shop.box.run("rc-service", "--nodeps", "crmbridge", "restart")
    shop.rc("start")
    assert len(shop.supervisors()) == 1
    shop.wait_healthy()


def test_its_memory_is_bounded_where_control_groups_are_mounted(shop: Shop) -> None:
    folder = "/sys/fs/cgroup/memory"
    mount = f"mkdir -p {folder} && mount -t cgroup -o memory cgroup {folder}"
    mounted = shop.box.run("sh", "-c", mount, check=False).returncode == 0
    require(mounted, "this kernel has no control groups of version 1 to mount in a box")
    shop.rc("restart")
    group = f"{folder}/openrc_crmbridge"
    assert shop.box.run("cat", f"{group}/memory.limit_in_bytes").stdout == f"{400 * 2**20}\n"
    assert str(shop.pid()) in shop.box.run("cat", f"{group}/cgroup.procs").stdout.split()
    shop.rc("stop")
    shop.box.run("rmdir", group)
    shop.box.run("umount", folder)
    shop.rc("start")
    shop.wait_healthy()


def test_crashes_do_not_add_up(tmp_path: Path, layer: Path) -> None:
    """As respawn_max is 0 nothing counts them, so fifteen in a row say the same as fifteen in a year."""
    with opened(tmp_path, layer, memory_mb=256, conf_d=["respawn_delay=1"]) as shop:
        for number in range(15):
            pid = shop.pid()
            assert shop.customer_says(f"crash {number}") == 200
            shop.box.run("kill", "-9", str(pid))
            shop.wait_replaced(pid)
            shop.wait_live()
        until(lambda: {f"crash {number}" for number in range(15)} <= set(shop.at_crm()))
        assert "status: started" in shop.rc("status")


def test_a_full_disk_is_waited_for_without_a_restart(tmp_path: Path, layer: Path) -> None:
    with opened(tmp_path, layer, memory_mb=256, conf_d=SOON, small_disk=True) as shop:
        assert shop.customer_says("before") == 200
        until(lambda: shop.at_crm() == ["before"])
        pid = shop.pid()
        for place in (DATA, LOG.rpartition("/")[0]):
            shop.box.run("sh", "-c", f"dd if=/dev/zero of={place}/ballast bs=4k 2>/dev/null; true")
        until(lambda: shop.customer_says("on a full disk") >= 500)
        until(lambda: shop.health() == "unhealthy")
        ends = time.monotonic() + 10
        while time.monotonic() < ends:  # five health checks
            assert shop.pid() == pid
            assert "alive" in shop.rc("healthcheck")
        # an administrator who restarts it, or a reboot, finds it again when there is room
        shop.rc("restart", check=False)
        shop.box.run("sh", "-c", f"rm {DATA}/ballast {LOG.rpartition('/')[0]}/ballast")
        shop.wait_healthy()
        assert shop.customer_says("after") == 200
        until(lambda: "after" in shop.at_crm())
