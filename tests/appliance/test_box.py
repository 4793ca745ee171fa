"""The box itself: that it is closed off, and that OpenRC in it is the real one."""

import pytest

from tests.appliance.box import Box

pytestmark = pytest.mark.appliance


def test_a_box_has_openrc_and_nothing_of_the_machine(box: Box) -> None:
    assert "Runlevel: default" in (box.boot() and box.run("rc-status").stdout)
    assert box.run("ps", "-p", "1", "-o", "comm=").stdout.strip() == "sh"
    assert box.run("ip", "-brief", "address").stdout.split()[0] == "lo"
    assert box.run("curl", "-sS", "--max-time", "5", "http://192.0.2.1/", check=False).returncode != 0


def test_memory_is_bounded(box: Box) -> None:
    greedy = "x = bytearray(1200 * 2**20)\nfor i in range(0, len(x), 4096): x[i] = 1"
    assert box.run("python3", "-c", greedy, check=False).returncode == -9


def test_files_outlive_a_power_cut(box: Box) -> None:
    box.run("sh", "-c", "echo kept >/var/lib/kept; sync; echo gone >/run/gone")
    box.reboot(orderly=False)
    assert box.run("sh", "-c", "cat /var/lib/kept; ls /run/gone", check=False).stdout.startswith("kept\nls:")
