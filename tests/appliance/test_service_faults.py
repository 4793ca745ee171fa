"""The OpenRC service where things go wrong, in boxes of 256 MB: crash loops, a full disk, a Python that is gone."""

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.appliance.box import Layer
from tests.appliance.shop import DATA, LOG, SOON, Shop, opened
from tests.appliance.suites import on_both
from tests.needs import require
from tests.waiting import until

pytestmark = [pytest.mark.appliance, on_both]
TOOL = "/opt/crmbridge/current/install.sh"


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory, layer: Layer) -> Iterator[Shop]:
    with opened(tmp_path_factory.mktemp("shop"), layer, memory_mb=256) as shop:
        yield shop


def test_a_crash_loop_is_slowed_down_and_ends_with_its_cause(shop: Shop) -> None:
    assert "--retry TERM/30/KILL/5 --" in shop.supervisors()[0]
    assert "--respawn-delay 2 --respawn-max 0 " in shop.supervisors()[0]
    good = shop.ini.read_text()
    shop.ini.write_text(good + "[nonsense]\nx = 1\n")
    began = time.monotonic()
    shop.box.run("kill", "-9", str(shop.pid()))
    until(lambda: shop.log().count("there is no section [nonsense]") >= 2)
    took_s = time.monotonic() - began
    began = time.monotonic()
    shop.rc("checkconfig", check=False)  # what one start takes before it ends with this
    assert 4 <= took_s < 14 + 4 * (time.monotonic() - began)
    shop.ini.write_text(good)
    shop.wait_healthy()


def test_a_boot_with_what_is_wrong_ends_well_once_it_is_mended(shop: Shop) -> None:
    good = shop.ini.read_text()
    shop.ini.write_text(good + "[nonsense]\nx = 1\n")
    before = shop.log().count("there is no section")
    told = shop.box.reboot()
    until(lambda: shop.log().count("there is no section") > before)
    assert "there is no section [nonsense]" in told
    assert "Started all the same, as this is a boot: it is tried every 2 seconds" in told
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
    shop.wait_calling()
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
    shop.box.run("kill", "-9", str(pid))
    assert "Python 3." in until(lambda: status(shop), lambda found: found[0] != 0 and "install" in found[1])[1]
    shop.box.run("mv", f"{python}.gone", python)
    shop.wait_healthy()


def test_a_hung_process_is_replaced_also_after_a_boot_with_a_wrong_configuration(shop: Shop) -> None:
    good, conf_d = shop.ini.read_text(), shop.box.root / "etc/conf.d/crmbridge"
    settings = conf_d.read_text()
    shop.conf_d(*SOON)
    shop.ini.write_text(good + "[nonsense]\nx = 1\n")
    shop.box.reboot()
    shop.ini.write_text(good)
    shop.wait_healthy()
    pid = shop.pid()
    shop.ini.write_text(good.replace("port = 8080", "port = 8081"))  # it is asked where it listens
    shop.box.run("kill", "-STOP", str(pid))
    assert status(shop)[0] == 1
    shop.ini.write_text(good)
    shop.wait_replaced(pid)
    shop.wait_healthy()
    assert f" error service.hung pid={pid}" in shop.log()
    (shop.box.root / "etc/conf.d/crmbridge").write_text(settings)
    shop.rc("restart")


def status(shop: Shop) -> tuple[int, str]:
    done = shop.box.run("rc-service", "crmbridge", "status", check=False)
    return done.returncode, done.stdout


def test_an_orphan_is_named_by_status_and_doctor_and_ended(shop: Shop) -> None:
    for command in (["rc-service", "crmbridge", "restart"], [TOOL, "repair"], ["sh", "crmbridge.sh", "install"]):
        pid = shop.pid()
        shop.box.run("pkill", "-9", "supervise-daemo")
        assert "unsupervised" in status(shop)[1]
        for _ in range(2):
            code, said = status(shop)
            assert (code != 0, f"process {pid} has no supervisor" in said) == (True, True), said
            assert "unsupervised" in shop.box.run("crmbridge", "doctor", "--no-calls", check=False).stdout
            assert shop.box.run(TOOL, "status", check=False).returncode == 1
            shop.rc("zap")  # and OpenRC calls it stopped
        shop.box.run(*command)
        assert shop.pid() != pid
        assert (status(shop)[0], len(shop.supervisors())) == (0, 1)
        assert shop.health() == "healthy"
    shop.box.run("rc-service", "--nodeps", "crmbridge", "restart")
    shop.rc("start")
    assert (len(shop.supervisors()), len(shop.pids())) == (1, 1)
    shop.wait_healthy()


def test_a_process_of_somebody_else_is_left_alone(shop: Shop) -> None:
    words = "-m crmbridge serve --config /etc/crmbridge/crmbridge.ini"
    script = f"sh -c 'sleep 300; :' {words} >/dev/null 2>&1 & echo $!"
    other = shop.box.run("su", "-s", "/bin/sh", "nobody", "-c", script).stdout.split()[0]
    shop.rc("stop")
    assert "is left" not in shop.rc("clear")
    assert (shop.box.root / "proc" / other).exists()
    shop.box.run("pkill", "-u", "nobody")
    shop.rc("start")
    assert "It is started" in shop.rc("clear", check=False)
    shop.wait_healthy()


def no_process(shop: Shop, said: str) -> None:
    """Hold that everybody says that it does not run, and why."""
    until(lambda: status(shop), lambda found: found[0] != 0 and said in found[1])
    until(lambda: status(shop)[1], lambda found: re.search(r"no process: ended \d+ time\(s\), last: ", found))
    for command in (["sh", TOOL, "status"], ["sh", TOOL, "repair"], ["sh", "crmbridge.sh", "install"]):
        done = shop.box.run(*command, check=False)
        assert (done.returncode, said in done.stdout) == (1, True), (command, done.stdout)


def test_a_boot_with_a_wrong_configuration_is_no_service_that_runs(shop: Shop) -> None:
    good = shop.ini.read_text()
    shop.ini.write_text(good + "[nonsense]\nx = 1\n")
    shop.box.reboot()
    until(lambda: status(shop), lambda found: found[0] != 0 and "there is no section [nonsense]" in found[1])
    until(lambda: status(shop)[1], lambda found: re.search(r"no process: ended \d+ time\(s\), last: ", found))
    shop.ini.write_text(good)
    shop.wait_healthy()
    assert status(shop)[0] == 0


def test_a_data_disk_that_is_not_mounted_is_named_by_everybody(shop: Shop) -> None:
    words = "though crmbridge was set up here: is its disk mounted (df)?"
    shop.box.run("mount", "-t", "tmpfs", "tmpfs", DATA)
    shop.box.run("kill", "-9", str(shop.pid()))
    no_process(shop, words)
    until(lambda: words in shop.log())
    checked = shop.box.run("crmbridge", "check", check=False).stdout
    shop.rc("stop")
    refused = shop.box.run("rc-service", "crmbridge", "start", check=False)
    made = shop.box.run("crmbridge", "init", check=False)
    upgrade = shop.box.run(TOOL, "repair", check=False)
    for said in (checked, refused.stdout, made.stdout, upgrade.stdout):
        assert words in said
        assert "crmbridge init" not in said
    assert (refused.returncode, made.returncode, upgrade.returncode) == (1, 1, 1)
    assert shop.box.run("find", DATA, "-name", "bridge.db").stdout == ""
    shop.box.run("umount", DATA)
    shop.box.run(TOOL, "repair")
    shop.wait_healthy()


def test_root_mends_what_root_left_and_follows_no_link_of_the_services_user(shop: Shop) -> None:
    shop.rc("stop")
    spoil = f"""
        chown root:root {DATA}/queue.db /etc/crmbridge/crmbridge.key
        chmod 644 /etc/crmbridge/crmbridge.ini
        chmod 777 {DATA}
        ln -s /etc/shadow {DATA}/link
        ln /etc/shadow {DATA}/second-name
        mv {DATA}/backups {DATA}/saved
        su -s /bin/sh -c 'ln -s /etc/logrotate.d {DATA}/backups' crmbridge
        mv /var/log/crmbridge /srv/log
        ln -s /srv/log /var/log/crmbridge
        chmod 777 /srv/log"""
    shop.box.run("sh", "-ec", spoil)
    shadow = shop.box.run("stat", "-c", "%a %U:%G", "/etc/shadow").stdout
    shop.rc("start")
    for path, owner in (
        ("/etc/crmbridge/crmbridge.ini", "640 root:crmbridge"),
        ("/etc/crmbridge/crmbridge.key", "600 crmbridge:crmbridge"),
        (DATA, "750 crmbridge:crmbridge"),
        (f"{DATA}/queue.db", "600 crmbridge:crmbridge"),
        # the service's link leads nowhere, an administrator's does
        ("/etc/logrotate.d", "755 root:root"),
        ("/srv/log", "750 crmbridge:crmbridge"),
    ):
        assert shop.box.run("stat", "-c", "%a %U:%G", path).stdout == f"{owner}\n", path
    assert shop.box.run("stat", "-c", "%a %U:%G", "/etc/shadow").stdout == shadow
    shop.rc("stop")
    undo = "rm link second-name backups; mv saved backups; rm /var/log/crmbridge; mv /srv/log /var/log/crmbridge"
    shop.box.run("sh", "-ec", f"cd {DATA}; {undo}")
    shop.rc("start")
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


def test_crashes_do_not_add_up(tmp_path: Path, layer: Layer) -> None:
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


def test_a_full_disk_is_waited_for_without_a_restart(tmp_path: Path, layer: Layer) -> None:
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
