"""The OpenRC service, 0.45 in a box of 1 GB, 0.56 in one of 256 MB: what an administrator does with it, and reboots."""

import re
from collections.abc import Iterator

import pytest

from tests.appliance.box import Layer
from tests.appliance.shop import DATA, LOG, Shop, opened
from tests.appliance.suites import on_both
from tests.waiting import until

pytestmark = [pytest.mark.appliance, on_both]
MEMORY_MB = {"bookworm": 1024, "trixie": 256}


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory, layer: Layer) -> Iterator[Shop]:
    memory_mb = MEMORY_MB[layer.suite]
    with opened(tmp_path_factory.mktemp("shop"), layer, memory_mb=memory_mb, conf_d=["respawn_delay=1"]) as shop:
        yield shop


def test_both_flows_and_what_status_tells(shop: Shop) -> None:
    assert shop.customer_says("in 1") == 200
    until(lambda: "in 1" in shop.at_crm())
    assert shop.send("out 1")["status"] == "pending"
    until(lambda: "out 1" in shop.at_instagram())
    told = shop.rc("status")
    assert re.search(r"\* status: started\n \* process \d+ since 20.+, \d+ MB\n \* healthy\n", told), told
    assert "checkconfig: " in shop.rc("describe")


def test_it_runs_as_its_user_and_leaves_nothing_open_to_others(shop: Shop) -> None:
    process = (shop.box.root / f"proc/{shop.pid()}/status").read_text()
    user = shop.box.run("id", "-u", "crmbridge").stdout.strip()
    assert re.search(rf"^Uid:\s+{user}\s+{user}\s+{user}\s+{user}$", process, re.MULTILINE)
    assert "NoNewPrivs:\t1" in process
    assert "Umask:\t0077" in process
    assert "CapEff:\t0000000000000000" in process
    limits = (shop.box.root / f"proc/{shop.pid()}/limits").read_text()
    assert re.search(r"Max open files +4096 +4096", limits)
    for place, mode in ((DATA, "/077"), ("/var/log/crmbridge", "/027")):
        words = ["find", place, "-mindepth", "1", "(", "!", "-user", "crmbridge", "-o", "-perm", mode, ")"]
        assert shop.box.run(*words).stdout == ""


def test_doctor_and_backup_are_commands_of_the_service(shop: Shop) -> None:
    assert shop.box.run("rc-service", "crmbridge", "doctor", check=False).returncode in (0, 1)
    assert f"to        {DATA}/backups/crmbridge-20" in shop.rc("backup")
    (listed,) = shop.box.run("sh", "-c", f"stat -c '%a %U' {DATA}/backups/*").stdout.splitlines()
    assert listed == "600 crmbridge"


def test_a_killed_process_is_started_again_and_nothing_is_lost(shop: Shop) -> None:
    shop.crm_answers(status=500, always=True)
    pid, texts = shop.pid(), [f"killed {number}" for number in range(5)]
    assert [shop.customer_says(text) for text in texts] == [200] * 5
    shop.box.run("kill", "-9", str(pid))
    shop.wait_replaced(pid)
    shop.crm_answers(status=None, always=True)
    shop.wait_healthy()
    until(lambda: set(texts) <= set(shop.at_crm()))
    assert shop.customer_says("after the kill") == 200
    until(lambda: "after the kill" in shop.at_crm())
    assert all(shop.at_crm().count(text) == 1 for text in texts)


def test_a_wrong_configuration_is_named_and_stops_nothing(shop: Shop) -> None:
    pid, good = shop.pid(), shop.ini.read_text()
    for wrong in (good + "[nonsense]\nx = 1\n", good.replace("port = 8080", "port = many")):
        shop.ini.write_text(wrong)
        for words in (["reload"], ["restart"], ["checkconfig"]):
            told = shop.box.run("rc-service", "crmbridge", *words, check=False)
            assert told.returncode != 0
            assert "there is no section [nonsense]" in told.stdout or "[web] port: bad value 'many'" in told.stdout
            assert ("the running process goes on" in told.stdout) == (words != ["checkconfig"])
            assert "failed to stop" not in told.stdout or words == ["restart"]
        assert "alive" in shop.rc("healthcheck")  # and the supervisor does not take it for dead
    shop.ini.write_text(good.replace("port = 8080", "port = 8081"))
    assert "alive" in shop.rc("healthcheck")
    shop.ini.write_text(good)
    assert shop.pid() == pid
    assert "status: started" in shop.rc("status")


@pytest.mark.parametrize("command", ["restart", "reload"])
def test_a_restart_loses_nothing_and_keeps_the_supervisor(shop: Shop, command: str) -> None:
    shop.crm_answers(status=500, always=True)
    assert shop.customer_says(f"before the {command}") == 200
    pid = shop.pid()
    assert "does not answer" not in shop.rc(command)
    shop.crm_answers(status=None, always=True)
    assert shop.customer_says(f"after the {command}") == 200  # at once: the command waits for an answer
    assert shop.pid() != pid
    until(lambda: {f"before the {command}", f"after the {command}"} <= set(shop.at_crm()))
    assert "status: started" in shop.rc("status")
    assert len(shop.supervisors()) == 1


def test_a_stop_waits_for_calls_in_flight(shop: Shop) -> None:
    shop.crm_answers(status=200, delay_s=4)
    assert shop.customer_says("in flight") == 200
    shop.wait_calling()
    shop.rc("stop")
    assert not shop.pids()
    assert not shop.supervisors()
    assert shop.at_crm().count("in flight") == 1
    assert "calls_left=false" in shop.log().splitlines()[-1]
    assert shop.box.run("rc-service", "crmbridge", "status", check=False).returncode == 3
    shop.rc("start")
    shop.wait_healthy()
    assert shop.at_crm().count("in flight") == 1


def test_a_log_that_is_rotated_loses_no_line(shop: Shop) -> None:
    calls = " target=crm "
    before, received, texts = shop.log(), len(shop.crm_received()), [f"rotated {number}" for number in range(12)]
    for number, text in enumerate(texts):
        assert shop.customer_says(text) == 200
        if number % 4 == 2:
            shop.box.run("logrotate", "--force", "/etc/logrotate.d/crmbridge")
    until(lambda: set(texts) <= set(shop.at_crm()))
    folder = LOG.rpartition("/")[0]
    names = ["crmbridge.log", "crmbridge.log.1", "crmbridge.log.2.gz", "crmbridge.log.3.gz"]
    listed = shop.box.run("sh", "-c", f"stat -c '%n %a %U:%G' {LOG}*").stdout.splitlines()
    assert listed == [f"{folder}/{name} 640 crmbridge:crmbridge" for name in names]

    def kept() -> str:
        return shop.box.run("sh", "-c", f"zcat -f {folder}/*").stdout

    assert set(before.splitlines()) <= set(kept().splitlines())
    until(lambda: kept().count(calls) - before.count(calls) == len(shop.crm_received()) - received)
    assert calls in shop.log()


def test_it_is_back_after_a_reboot_and_after_a_power_cut(shop: Shop) -> None:
    for orderly in (True, False):
        shop.crm_answers(status=500, always=True)
        assert shop.customer_says(f"orderly {orderly}") == 200
        told = shop.box.reboot(orderly=orderly)
        assert "Starting crmbridge" in told
        shop.wait_healthy()
        shop.start_sandbox()
        until(lambda text=f"orderly {orderly}": shop.at_crm().count(text) == 1)  # type: ignore[misc]
        assert "status: started" in shop.rc("status")
