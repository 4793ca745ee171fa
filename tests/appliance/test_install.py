"""install.sh as root, from a bundle, in a box without network: first installation, again, status, uninstall."""

import os
import re
import socket
from pathlib import Path

import pytest

from crmbridge import __version__
from tests.appliance.box import Box
from tests.appliance.cuts import cut
from tests.appliance.trees import in_box, later, tree
from tests.needs import require

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
        "/etc/crmbridge", "/etc/crmbridge/crmbridge.ini", "/etc/crmbridge/crmbridge.key", "/var/lib/crmbridge",
        "/var/lib/crmbridge/bridge.db", "/var/lib/crmbridge/backups", "/var/log/crmbridge",
        "/var/log/crmbridge/crmbridge.log", "/etc/init.d/crmbridge", "/etc/conf.d/crmbridge",
        "/etc/logrotate.d/crmbridge",
    ).stdout  # fmt: skip
    assert listed.splitlines() == [
        "755 root:root /opt/crmbridge",
        "644 root:root /opt/crmbridge/current/crmbridge/__main__.py",
        "755 root:root /opt/crmbridge/current/install.sh",
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
    for said in ("SQLite", "started; starts at boot (runlevel default)", "healthy", "/var/lib/crmbridge/bridge.db"):
        assert said in status


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
    left = "ls -d /opt/crmbridge /etc/init.d/crmbridge* /etc/logrotate.d/crmbridge /usr/local/bin/crmbridge 2>/dev/null"
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
    said = installed.run("sh", "crmbridge.sh", "uninstall", "--purge").stdout
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


def test_wrong_owners_and_modes_are_mended(installed: Box) -> None:
    spoil = """
        chmod 644 /etc/crmbridge/crmbridge.ini
        chown root:root /etc/crmbridge/crmbridge.key
        chmod 777 /var/lib/crmbridge
        chown root:root /var/lib/crmbridge/queue.db
        ln -s /etc/shadow /var/lib/crmbridge/link
        ln /etc/shadow /var/lib/crmbridge/second-name
        mv /var/lib/crmbridge/backups /var/lib/crmbridge/saved
        su -s /bin/sh -c 'ln -s /etc/logrotate.d /var/lib/crmbridge/backups' crmbridge
        mv /var/log/crmbridge /srv/log
        ln -s /srv/log /var/log/crmbridge
        chmod 777 /srv/log
        rm /usr/local/bin/crmbridge
        mount --bind /usr/local /usr/local
        mount -o remount,bind,ro /usr/local"""
    installed.run("sh", "-ec", spoil)
    shadow = installed.run("stat", "-c", "%a %U:%G", "/etc/shadow").stdout
    said = installed.run("sh", "crmbridge.sh", "repair").stdout
    for path, mode, owner in (
        ("/etc/crmbridge/crmbridge.ini", "640", "root:crmbridge"),
        ("/etc/crmbridge/crmbridge.key", "600", "crmbridge:crmbridge"),
        ("/var/lib/crmbridge", "750", "crmbridge:crmbridge"),
    ):
        assert f"mended   {path}: mode {mode}, owner {owner}" in said
        assert installed.run("stat", "-c", "%a %U:%G", path).stdout == f"{mode} {owner}\n"
    assert "mended   /var/lib/crmbridge/queue.db" in said
    assert installed.run("stat", "-c", "%a %U:%G", "/etc/shadow").stdout == shadow
    # the service's link leads nowhere, an administrator's does
    assert installed.run("stat", "-c", "%a %U:%G", "/etc/logrotate.d").stdout == "755 root:root\n"
    assert installed.run("stat", "-c", "%a %U:%G", "/srv/log").stdout == "750 crmbridge:crmbridge\n"
    assert "the command is /opt/crmbridge/current/bin/crmbridge" in said
    assert "mended" not in installed.run("sh", "crmbridge.sh", "repair").stdout


def test_repair_after_its_python_is_gone_needs_no_network_and_loses_nothing(layer: Path, tmp_path: Path) -> None:
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
        assert "took back 0099_later" in box.run("/opt/crmbridge/current/install.sh", "rollback", env=python).stdout
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
    ("init_first", 0.3),
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
