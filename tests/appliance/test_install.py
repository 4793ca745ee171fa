"""install.sh as root, from a bundle, in a box without network: first installation, again, status, uninstall."""

import io
import os
import re
import socket
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from crmbridge import __version__
from tests.appliance.box import Box, Layer
from tests.appliance.cuts import cut
from tests.appliance.shop import Shop, opened
from tests.appliance.suites import on_both
from tests.appliance.trees import CHECKOUT, in_box, later, tree
from tests.needs import require
from tests.waiting import until

pytestmark = pytest.mark.appliance


def everything(box: Box) -> str:
    """Tell of every file of the installation that a running service leaves alone."""
    places = (
        "/opt/crmbridge /etc/crmbridge /etc/init.d /etc/conf.d /etc/logrotate.d /etc/passwd /etc/group /usr/local/bin"
    )
    return box.run("sh", "-c", f"find {places} -printf '%p %i %U:%G %m %s %T@\\n' | sort; cat /etc/crmbridge/*").stdout


def test_a_first_installation_needs_no_network_and_makes_what_the_design_says(installed: Box) -> None:
    assert installed.run("crmbridge", "health").stdout == "healthy\n"
    listed = installed.run(
        "stat", "-c", "%a %U:%G %n",
        "/opt/crmbridge", "/opt/crmbridge/current/crmbridge/__main__.py", "/opt/crmbridge/current/install.sh",
        "/opt/crmbridge/current/docs/instagram.md", "/opt/crmbridge/current/docs/proxy/Caddyfile",
        "/etc/crmbridge", "/etc/crmbridge/crmbridge.ini", "/etc/crmbridge/crmbridge.key", "/var/lib/crmbridge",
        "/var/lib/crmbridge/bridge.db", "/var/lib/crmbridge/backups", "/var/log/crmbridge",
        "/var/log/crmbridge/crmbridge.log", "/etc/init.d/crmbridge", "/etc/conf.d/crmbridge",
        "/etc/logrotate.d/crmbridge", "/etc/cron.daily/crmbridge",
    ).stdout  # fmt: skip
    assert listed.splitlines() == [
        "755 root:root /opt/crmbridge",
        "644 root:root /opt/crmbridge/current/crmbridge/__main__.py",
        "755 root:root /opt/crmbridge/current/install.sh",
        "644 root:root /opt/crmbridge/current/docs/instagram.md",
        "644 root:root /opt/crmbridge/current/docs/proxy/Caddyfile",
        "750 root:crmbridge /etc/crmbridge",
        "640 root:crmbridge /etc/crmbridge/crmbridge.ini",
        "600 crmbridge:crmbridge /etc/crmbridge/crmbridge.key",
        "750 crmbridge:crmbridge /var/lib/crmbridge",
        "600 crmbridge:crmbridge /var/lib/crmbridge/bridge.db",
        "700 crmbridge:crmbridge /var/lib/crmbridge/backups",
        "750 crmbridge:crmbridge /var/log/crmbridge",
        "640 crmbridge:crmbridge /var/log/crmbridge/crmbridge.log",
        "755 root:root /etc/init.d/crmbridge",
        "644 root:root /etc/conf.d/crmbridge",
        "644 root:root /etc/logrotate.d/crmbridge",
        "755 root:root /etc/cron.daily/crmbridge",
    ]
    assert "\ntrusted_proxy = 127.0.0.1\n" in installed.run("cat", "/etc/crmbridge/crmbridge.ini").stdout
    for place in ("/opt/crmbridge", "/etc/crmbridge"):  # neither code nor configuration is the service's to change
        words = [
            "su",
            "-s",
            "/bin/sh",
            "-c",
            f"cd /; find {place} -writable ! -type l ! -name crmbridge.key",
            "crmbridge",
        ]
        assert installed.run(*words).stdout == ""
    status = installed.run("/opt/crmbridge/current/install.sh", "status").stdout
    for said in (
        "service        started\n",
        "it starts in runlevel default",
        "healthy",
        "/var/lib/crmbridge/bridge.db",
    ):
        assert said in status


@on_both
def test_the_memory_that_it_asks_for_is_enough(tmp_path: Path, bundle: Path, suite: str) -> None:
    """All of a box with just that, and told so: as on a server of 128 MB."""
    (asked_mb,) = re.findall(r"\bwheels_mb=(\d+)", (CHECKOUT / "install.sh").read_text())
    box = Box(tmp_path / "box", memory_mb=int(asked_mb), suite=suite)
    try:
        in_box(box, "/root/crmbridge.sh", bundle)
        box.boot()
        meminfo = f"echo MemAvailable: {int(asked_mb) * 1024} kB >/srv/meminfo; mount --bind /srv/meminfo /proc/meminfo"
        box.run("sh", "-ec", meminfo)
        box.run("sh", "crmbridge.sh", "install")
        assert box.run("crmbridge", "health").stdout == "healthy\n"
    finally:
        box.close()


def test_a_second_run_changes_nothing(installed: Box) -> None:
    before, pid = everything(installed), installed.run("pgrep", "-f", "crmbridge serve").stdout
    said = installed.run("sh", "crmbridge.sh", "install").stdout
    assert "is already installed; the service is started" in said
    assert "made" not in said
    assert installed.run("pgrep", "-f", "crmbridge serve").stdout == pid
    assert everything(installed) == before


def test_uninstall_leaves_what_is_the_owners_and_purge_does_not(installed: Box) -> None:
    installed.run("sh", "-c", "cd /opt/crmbridge/current && crmbridge check | grep /etc/crmbridge/crmbridge.ini")
    said = installed.run("/opt/crmbridge/current/install.sh", "uninstall").stdout
    for kept in ("/etc/crmbridge", "/etc/conf.d/crmbridge", "/var/lib/crmbridge", "/var/log/crmbridge"):
        assert f"kept     {kept}\n" in said
        assert (installed.root / kept.lstrip("/")).exists()
    assert "/opt/crmbridge" not in said.splitlines()[-1]  # nothing is there any more to be typed
    gone = "/opt/crmbridge /etc/init.d/crmbridge* /etc/logrotate.d/crmbridge /etc/cron.daily/crmbridge"
    left = f"ls -d {gone} /usr/local/bin/crmbridge 2>/dev/null"
    assert installed.run("sh", "-c", left, check=False).stdout == ""
    assert installed.run("pgrep", "-f", "crmbridge serve", check=False).stdout == ""
    assert "crmbridge" not in installed.run("rc-update", "show").stdout
    key = installed.run("cat", "/etc/crmbridge/crmbridge.key").stdout
    installed.run("sh", "crmbridge.sh", "install")  # takes them up again
    assert installed.run("cat", "/etc/crmbridge/crmbridge.key").stdout == key
    elsewhere = """
        mv /var/lib/crmbridge /srv/data
        ln -s /srv/data /var/lib/crmbridge
        mv /etc/crmbridge/crmbridge.key /srv/key
        sed -i 's|^key_file = .*|key_file = /srv/key|' /etc/crmbridge/crmbridge.ini"""
    installed.run("sh", "-ec", elsewhere)
    refused = installed.run("sh", "crmbridge.sh", "uninstall", "--purge", check=False)
    assert (refused.returncode, "uninstall --purge --yes" in refused.stdout) == (1, True)
    for typed, code in (("no", 1), ("purge", 0)):
        asked = ["script", "-qec", "sh crmbridge.sh uninstall --purge", "/dev/null"]
        done = installed.run(*asked, check=False, stdin=f"{typed}\n")
        assert (done.returncode, "Type purge to go on" in done.stdout) == (code, True), done.stdout
    said = done.stdout.replace("\r", "")
    assert "kept     /srv/data\n" in said
    assert "kept     /srv/key\n" in said
    left = (
        "find / -xdev -path /proc -prune -o -name '*crmbridge*' -print; getent passwd crmbridge; getent group crmbridge"
    )
    assert installed.run("sh", "-c", left, check=False).stdout == "/root/crmbridge.sh\n"


def test_a_damaged_bundle_does_nothing(box: Box, bundle: Path, tmp_path: Path) -> None:
    damaged = bytearray(bundle.read_bytes())
    damaged[-5_000_000] ^= 1
    for content in (bytes(damaged), bundle.read_bytes()[:-1000]):
        (tmp_path / "damaged").write_bytes(content)
        in_box(box, "/root/crmbridge.sh", tmp_path / "damaged")
        done = box.run("sh", "crmbridge.sh", "install", check=False)
        assert done.returncode == 1
        assert "damaged or incomplete; nothing was done" in done.stdout
        assert not (box.root / "opt" / "crmbridge").exists()


def test_repair_where_usr_is_read_only_prints_what_can_be_typed(installed: Box) -> None:
    readonly = "rm /usr/local/bin/crmbridge; mount --bind /usr/local /usr/local; mount -o remount,bind,ro /usr/local"
    installed.run("sh", "-ec", readonly)
    said = installed.run("sh", "crmbridge.sh", "repair").stdout
    assert "the command is /opt/crmbridge/current/bin/crmbridge" in said
    assert "cannot" not in said.replace("/usr/local/bin cannot have a link", "")


def test_where_there_is_no_ipv6(box: Box, bundle: Path) -> None:
    box.run("sh", "-ec", "echo 1 >/proc/sys/net/ipv6/conf/all/disable_ipv6; echo 127.0.0.1 localhost >/etc/hosts")
    assert "inet6" not in box.run("ip", "address").stdout
    in_box(box, "/root/crmbridge.sh", bundle)
    box.boot()
    box.run("sh", "crmbridge.sh", "install")
    shop = Shop(box)
    try:
        for host in ("127.0.0.1", "localhost"):
            shop.configure(web__host=host)
            shop.rc("restart")
            assert box.run("crmbridge", "health", "--wait", "60").stdout == "healthy\n"
        shop.open()
        assert shop.customer_says("in") == 200
        until(lambda: shop.at_crm() == ["in"])
        assert shop.send("out")["status"] == "pending"
        until(lambda: shop.at_instagram() == ["out"])
        assert box.run("/opt/crmbridge/current/install.sh", "status").returncode == 0
    finally:
        shop.close()


@on_both
def test_a_second_server_goes_on_from_one_file(tmp_path: Path, layer: Layer, bundle: Path) -> None:
    secret = ("--passphrase-file", "/root/passphrase")
    with opened(tmp_path / "first", layer, memory_mb=1024) as shop:
        shop.crm_answers(status=503, always=True)
        assert shop.customer_says("owed") == 200
        shop.box.run("sh", "-c", "echo correct horse battery >/root/passphrase")
        shop.box.run("crmbridge", "backup", "/root/it.db", "--with-key", *secret)
        (tmp_path / "it.db").write_bytes((shop.box.root / "root/it.db").read_bytes())
        ini, account_id = shop.ini.read_text(), shop.account_id
    box = Box(tmp_path / "second", memory_mb=1024, suite=layer.suite)
    shop = Shop(box)
    try:
        in_box(box, "/root/crmbridge.sh", bundle)
        in_box(box, "/root/it.db", tmp_path / "it.db")
        box.boot()
        box.run("sh", "crmbridge.sh", "install")
        box.run("sh", "-c", "echo correct horse battery >/root/passphrase; rc-service crmbridge stop")
        said = box.run("crmbridge", "restore", "/root/it.db", *secret).stdout
        assert "made /etc/crmbridge/crmbridge.ini: the configuration from the backup" in said
        assert "  admin keys in it: 1;" in said
        assert "  ordinary keys in it: 1\n" in said
        assert shop.ini.read_text() == ini
        shop.start_sandbox()
        shop.rc("start")
        shop.wait_healthy()
        assert account_id in box.run("crmbridge", "account", "list").stdout
        until(lambda: shop.at_crm() == ["owed"])
        assert box.run("/opt/crmbridge/current/install.sh", "status").returncode == 0
    finally:
        shop.close()
        box.close()


def test_a_user_that_was_there_before_outlives_a_purge(box: Box, bundle: Path) -> None:
    in_box(box, "/root/crmbridge.sh", bundle)
    box.boot()
    box.run("useradd", "-r", "crmbridge")
    box.run("rm", "/usr/sbin/logrotate")
    said = box.run("sh", "crmbridge.sh", "install").stdout
    assert "5. The log is rotated by logrotate:  emerge --ask app-admin/logrotate\n" in said
    assert said.count("  made     ") == 1
    assert "user crmbridge" not in said
    assert "kept     user crmbridge" in box.run("sh", "crmbridge.sh", "uninstall", "--purge", "--yes").stdout
    assert box.run("id", "crmbridge").returncode == 0


# As BusyBox has them: other options, and no useradd at all.
BUSYBOX = """
cd /usr/sbin
rm -f useradd groupadd usermod userdel groupdel adduser addgroup deluser delgroup
cat >/usr/sbin/addgroup <<'X'
#!/bin/sh
[ "$1" = -S ] && [ $# = 2 ] || exit 9
echo "$2:x:990:" >>/etc/group
X
cat >/usr/sbin/adduser <<'X'
#!/bin/sh
[ "$*" = "-S -D -H -G crmbridge -h /var/lib/crmbridge -s /sbin/nologin -g crmbridge crmbridge" ] || exit 9
echo "crmbridge:x:990:990:crmbridge:/var/lib/crmbridge:/usr/sbin/nologin" >>/etc/passwd
echo "crmbridge:!::0:99999:7:::" >>/etc/shadow
X
cat >/usr/sbin/deluser <<'X'
#!/bin/sh
sed -i "/^$1:/d" /etc/passwd /etc/group /etc/shadow
X
chmod 755 /usr/sbin/addgroup /usr/sbin/adduser /usr/sbin/deluser
"""


def test_where_the_users_are_busyboxs(box: Box, bundle: Path) -> None:
    in_box(box, "/root/crmbridge.sh", bundle)
    box.boot()
    box.run("sh", "-ec", BUSYBOX)
    box.run("sh", "crmbridge.sh", "install")
    assert box.run("crmbridge", "health").stdout == "healthy\n"
    assert "removed  user crmbridge" in box.run("sh", "crmbridge.sh", "uninstall", "--purge", "--yes").stdout
    assert box.run("grep", "-c", "crmbridge", "/etc/passwd", check=False).stdout == "0\n"


def test_where_nobody_can_make_a_user_it_says_so_at_the_start(box: Box, bundle: Path) -> None:
    in_box(box, "/root/crmbridge.sh", bundle)
    box.boot()
    box.run("sh", "-c", "rm -f /usr/sbin/useradd /usr/sbin/adduser")
    done = box.run("sh", "crmbridge.sh", "install", check=False)
    assert (done.returncode, done.stdout) == (
        1,
        "install.sh: useradd is missing.\n  It comes with shadow:  emerge --ask shadow\n",
    )


def test_a_bundle_that_cannot_be_unpacked_and_a_clock_that_is_wrong_say_so_in_a_line(box: Box, bundle: Path) -> None:
    in_box(box, "/root/crmbridge.sh", bundle)
    box.boot()
    box.run("mount", "-t", "tmpfs", "-o", "size=1m,noexec", "tmpfs", "/tmp")
    done = box.run("sh", "crmbridge.sh", "install", check=False)
    assert (done.returncode, done.stdout.count("\n")) == (1, 1)
    assert "). Is the disk full? TMPDIR=/another/folder" in done.stdout
    box.run("mount", "-o", "remount,size=200m,noexec", "/tmp")
    box.run("sed", "-i", "-e", "1,9s/bundle_made=[0-9]*/bundle_made=4000000000/", "crmbridge.sh")
    done = box.run("sh", "crmbridge.sh", "install", check=False)
    assert (done.returncode, done.stdout.count("\n")) == (1, 2)
    assert "the clock is wrong" in done.stdout
    box.run("sed", "-i", "-e", "1,9s/bundle_made=[0-9]*/bundle_made=1/", "crmbridge.sh")
    said = box.run("sh", "crmbridge.sh", "install").stdout
    assert said.count("  made     ") == 1
    assert "logrotate:" not in said


def test_new_defaults_are_laid_beside_what_an_administrator_changed(installed: Box, tmp_path: Path) -> None:
    installed.run("sh", "-c", "echo 'respawn_delay=3' >>/etc/conf.d/crmbridge")
    edits = (
        ("openrc/crmbridge.confd", "# Open files.\n", "# Files that may be open.\n"),
        ("openrc/crmbridge.logrotate", "rotate 14\n", "rotate 15\n"),
    )
    in_box(installed, "/root/next", later(tmp_path / "next", "9.0.0", edits=edits))
    said = installed.run("sh", "/root/next/install.sh", "upgrade").stdout
    assert "kept     /etc/conf.d/crmbridge; what is new: /opt/crmbridge/current/openrc/crmbridge.confd" in said
    assert "respawn_delay=3" in installed.run("cat", "/etc/conf.d/crmbridge").stdout
    assert "Files that may be open" in installed.run("cat", "/etc/conf.d/._cfg0000_crmbridge").stdout
    assert "rotate 15" in installed.run("cat", "/etc/logrotate.d/crmbridge").stdout  # nobody had changed it
    installed.run("/opt/crmbridge/current/install.sh", "rollback")
    assert "rotate 14" in installed.run("cat", "/etc/logrotate.d/crmbridge").stdout


def test_the_daily_backup_is_quiet_when_it_is_made_and_told_when_not(installed: Box) -> None:
    assert installed.run("/etc/cron.daily/crmbridge").stdout == ""
    assert "crmbridge-20" in installed.run("ls", "/var/lib/crmbridge/backups").stdout
    # a second one of the same second would have its name
    installed.run("sh", "-c", "rm /var/lib/crmbridge/backups/*.db; mv /var/lib/crmbridge/bridge.db /srv/gone")
    done = installed.run("/etc/cron.daily/crmbridge", check=False)
    assert (done.returncode != 0, "is its disk mounted" in done.stdout) == (True, True), done.stdout


def test_status_tells_of_the_last_backup_what_the_database_knows(installed: Box) -> None:
    def told() -> list[str]:
        said = installed.run("/opt/crmbridge/current/install.sh", "status").stdout
        return re.findall(r"^last backup +(.*)$", said, re.MULTILINE)

    planted = "touch /var/lib/crmbridge/backups/crmbridge-20990101T000000Z.db"
    installed.run("su", "-s", "/bin/sh", "-c", planted, "crmbridge")
    assert told() == ["no backup of /var/lib/crmbridge/bridge.db was made"]
    installed.run("crmbridge", "backup", "/srv/elsewhere.db")
    assert told() == ["is 0.0 hours old: /srv/elsewhere.db"]
    installed.run("crmbridge", "backup", "/dev/null/no.db", check=False)
    failed, good = told()
    assert re.fullmatch(r"failed, at 20\S+Z: .*/dev/null.*", failed)
    assert good == "is 0.0 hours old: /srv/elsewhere.db"


def holders(box: Box) -> str:
    """Tell who has the installer's lock open; "free" when nobody has."""
    look = "find /proc/[0-9]*/fd -lname $0 2>/dev/null; flock -n $0 echo free"
    return box.run("sh", "-c", look, "/run/crmbridge-install.lock", check=False).stdout.strip()


def test_no_command_leaves_its_lock_to_what_it_started(installed: Box, tmp_path: Path) -> None:
    box, tool = installed, "/opt/crmbridge/current/install.sh"
    in_box(box, "/root/next", later(tmp_path / "next", "9.0.0"))
    for before, *words in (
        ("true", "sh", "crmbridge.sh", "uninstall"),
        ("true", "sh", "crmbridge.sh", "install"),
        ("true", tool, "status"),
        ("true", "sh", "/root/next/install.sh", "upgrade"),
        ("true", tool, "rollback"),
        ("rc-service crmbridge stop", tool, "repair"),
        ("rm -r /opt/crmbridge/current/venv/lib", tool, "repair"),
        ("pkill -9 supervise-daemo", "sh", "crmbridge.sh", "install"),
    ):
        box.run("sh", "-c", before)
        box.run(*words)
        assert holders(box) == "free", words
        if words[-1] != "uninstall":
            assert box.run("crmbridge", "health").stdout == "healthy\n", words
    box.run("sh", "crmbridge.sh", "uninstall", "--purge", "--yes")
    assert holders(box) == "free"


def test_no_name_that_the_services_user_made_leads_root_anywhere(installed: Box, tmp_path: Path) -> None:
    """Folders and links planted among the backups before an upgrade: blanks, newlines, links to what is root's."""
    box, backups = installed, "/var/lib/crmbridge/backups"
    box.run(
        "sh", "-ec", "mkdir /srv/victim; touch /srv/victim/crmbridge-20200101T000000Z.db /srv/other; chmod 777 /srv"
    )
    plant = f"""
        cd {backups}; mkdir -p 'x /srv/victim ' "$(printf 'a\\nb\\033[2J')"
        for number in 1 2 3 4; do mkdir "before-$number /srv/other .db"; touch "crmbridge-$(printf '\\033[2J').db"; done
        ln -s /srv/victim upgrades"""
    box.run("su", "-s", "/bin/sh", "-c", plant, "crmbridge")
    in_box(box, "/root/next", later(tmp_path / "next", "9.0.0"))
    box.run("chmod", "755", "/srv/victim")
    done = box.run("sh", "/root/next/install.sh", "upgrade", check=False)
    assert (done.returncode, "Permission denied" in done.stdout) == (1, True), done.stdout
    said = done.stdout + box.run("/opt/crmbridge/current/install.sh", "status", check=False).stdout
    box.run("su", "-s", "/bin/sh", "-c", f"rm {backups}/upgrades", "crmbridge")
    said += box.run("sh", "/root/next/install.sh", "upgrade").stdout
    said += box.run("/opt/crmbridge/current/install.sh", "status").stdout
    assert "\x1b" not in said
    assert box.run("ls", "/srv/victim", "/srv/other").stdout.split() == [
        "/srv/other",
        "/srv/victim:",
        "crmbridge-20200101T000000Z.db",
    ]


def test_repair_after_its_python_is_gone_needs_no_network_and_loses_nothing(layer: Layer, tmp_path: Path) -> None:
    homes = [path for minor in (12, 13, 14) for path in sorted(Path.home().glob(f".pyenv/versions/3.{minor}.*"))]
    require(homes, "the machine has no other Python to go on with")
    box = Box(tmp_path / "box", memory_mb=1024, layer=layer, binds=[homes[0]])
    try:
        box.run("chmod", "711", "/root")
        box.boot()
        box.run("crmbridge", "health", "--wait", "60")
        box.run("crmbridge", "key", "create", "--name", "kept", "--admin")
        in_box(box, "/root/next", later(tmp_path / "next", "9.0.0"))
        box.run("sh", "/root/next/install.sh", "upgrade")
        box.run("mv", "/usr/bin/python3.11", "/usr/bin/python3.11.gone")
        for words in (("crmbridge", "check"), ("rc-service", "crmbridge", "restart")):
            done = box.run(*words, check=False)
            assert done.returncode != 0
            assert "Python 3.11.2, with which it was installed, is gone" in done.stdout
            assert "install.sh repair" in done.stdout
        said = box.run("/opt/crmbridge/current/install.sh", "status", check=False)
        assert (said.returncode, "gone: 3.11.2" in said.stdout) == (1, True)
        python = {"PYTHON": str(homes[0] / "bin" / "python3")}
        box.run("/opt/crmbridge/current/install.sh", "rollback", env=python)
        box.run("rm", "-rf", "/opt/crmbridge/current/venv/lib")
        assert (
            "is whole; the service is started"
            in box.run("/opt/crmbridge/current/install.sh", "repair", env=python).stdout
        )
        assert "kept" in box.run("crmbridge", "key", "list").stdout
        assert homes[0].name in box.run("/opt/crmbridge/current/install.sh", "status").stdout
        assert "start version=" in box.run("grep", f"python={homes[0].name}", "/var/log/crmbridge/crmbridge.log").stdout
    finally:
        box.close()


# Where a first installation is killed: as in test_upgrade.
STEPS = (
    ("installed=no", 0.3),
    ("mv -- /opt/crmbridge/.draft", 0),
    ("usermod", 0),
    ("mv -- /etc/crmbridge/crmbridge.ini.new", 0),
    ("bridge .* init", 0.3),
    ("mv -- /opt/crmbridge/.moving.new", 0),
    ("place_service", 0),
    ("rc-update", 0),
    ("start_service", 0.7),
    ("rm -f -- /opt/crmbridge/.moving", 0),
)


def test_a_first_installation_killed_at_any_step_and_run_again_is_whole(box: Box, tmp_path: Path, wheels: Path) -> None:
    source = tree(tmp_path / "next")
    (source / "wheels").symlink_to(wheels)
    in_box(box, "/root/next", source)
    box.boot()
    # somebody has been here before
    before = "useradd -U brigitte; useradd -g brigitte crmbridge; mkdir -m 777 /srv/opt; ln -s /srv/opt /opt/crmbridge"
    box.run("sh", "-ec", before)
    for number, (step, delay_s) in enumerate(STEPS):
        cut(box, "install", step, delay_s, all_of_it=number % 2 == 1)
    said = box.run("sh", "/root/next/install.sh", "install").stdout
    assert "Traceback" not in said
    assert box.run("crmbridge", "health", "--wait", "60").stdout == "healthy\n"
    assert "is already installed; the service is started" in box.run("sh", "/root/next/install.sh", "install").stdout
    assert "it starts, but is broken: [instagram] app_secrets is empty" in box.run("crmbridge", "check").stdout
    assert box.run("stat", "-c", "%a", "/srv/opt").stdout == "755\n"
    left = "ls -A /opt/crmbridge/; ls /etc/crmbridge; pgrep -fc '^/srv/opt/.* -m crmbridge serve'"
    assert box.run("sh", "-c", left).stdout.split() == [
        __version__, "current", "crmbridge.ini", "crmbridge.key", "1",
    ]  # fmt: skip


def pip_settings() -> tuple[dict[str, str], list[Path], list[Path]]:
    """Return how pip finds packages on this machine: environment, folders, and files."""
    names = re.compile("PIP_.*|.*_PROXY|SSL_CERT_.*|REQUESTS_CA_BUNDLE", re.IGNORECASE)
    env = {name: value for name, value in os.environ.items() if names.fullmatch(name)}
    home = Path.home()
    files = {Path("/etc/pip.conf"), Path("/etc/hosts"), home / ".config/pip/pip.conf", home / ".pip/pip.conf"}
    texts = [*env.values(), *(path.read_text() for path in files if path.is_file())]
    named = {
        Path(found) for text in texts for found in re.findall(r"(?:^|[ =]|file://)(/[^\s#:]+)", text, re.MULTILINE)
    }
    # an index in a folder usually has the packages beside its pages
    folders = sorted({path.parent if path.name == "simple" else path for path in named if path.is_dir()})
    alone = [path for path in files | named if path.is_file() and not any(one in path.parents for one in folders)]
    return env, folders, alone


def test_a_bundle_for_another_architecture(tmp_path: Path) -> None:
    made = tmp_path / "bundle.sh"

    def bundle(arch: str) -> subprocess.CompletedProcess[str]:
        words = [str(CHECKOUT / "install.sh"), "bundle", "--for", arch, str(made)]
        env = {**os.environ, "PYTHON": getattr(sys, "_base_executable", sys.executable)}
        return subprocess.run(words, env=env, capture_output=True, text=True, check=False)

    done = bundle("riscv64")
    assert (done.returncode, made.exists()) == (1, False)
    assert "x86_64, aarch64, x86_64-musl and aarch64-musl, not 'riscv64'" in done.stderr
    done = bundle("aarch64-musl")
    require("pip must reach a package index" not in done.stderr, f"no package index: {done.stderr[-2000:]}")
    assert (done.returncode, "for aarch64-musl and Python 3.11" in done.stdout) == (0, True), done.stderr
    assert "fetching the packages for Python 3.11 on aarch64-musl" in done.stderr
    head, _, packed = made.read_bytes().partition(b"# the tar file begins with the next line\n")
    assert head.startswith(b"#!/bin/sh\n")
    with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
        wheels = [name for name in tar.getnames() if name.endswith(".whl")]
    assert len(wheels) > 10
    assert [name for name in wheels if not re.search(r"-any\.whl$|musllinux_\d_\d_aarch64\.whl$", name)] == []


def test_from_a_checkout_by_the_package_index(tmp_path: Path) -> None:
    env, folders, files = pip_settings()
    box = Box(tmp_path / "box", memory_mb=1024, network="host", binds=folders)
    try:
        for path in files:
            copy = box.root / str(path).lstrip("/")
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
        with socket.create_server(("127.0.0.1", 0)) as free:  # the network is the machine's
            port = free.getsockname()[1]
        in_box(box, "/srv/tree", tree(tmp_path / "tree"))
        box.run("sed", "-i", f"s/^port = .*/port = {port}/", "/srv/tree/crmbridge.ini")
        box.boot()
        done = box.run("sh", "/srv/tree/install.sh", "install", env=env, check=False)
        require("pip must reach a package index" not in done.stdout, f"no package index: {done.stdout[-2000:]}")
        assert f"started  crmbridge {__version__}: http://127.0.0.1:{port}/health is good" in done.stdout, done.stdout
    finally:
        box.close()
