"""The ebuilds of contrib/gentoo, which were never run on Gentoo: bash reads them, and what they name is there."""

import re
import subprocess
from pathlib import Path

import pytest

from crmbridge import __version__
from tests.test_cli import ROOT

OVERLAY = ROOT / "contrib" / "gentoo"
EBUILDS = sorted(OVERLAY.rglob("*.ebuild"))
MAIN = OVERLAY / "net-im" / "crmbridge" / f"crmbridge-{__version__}.ebuild"


@pytest.mark.parametrize("ebuild", EBUILDS, ids=lambda path: path.name)
def test_an_ebuild_is_bash_and_says_that_it_was_never_run(ebuild: Path) -> None:
    done = subprocess.run(["bash", "-n", ebuild], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Never run on Gentoo" in ebuild.read_text().splitlines()[0]


def test_the_ebuild_is_of_this_version_and_installs_what_install_sh_does() -> None:
    text, install = MAIN.read_text(), (ROOT / "install.sh").read_text()
    for name in re.findall(r"\b(openrc/\S+|requirements\.txt|crmbridge\.ini)", text):
        assert (ROOT / name).exists(), name
    (copied,) = re.findall(r"doins -r (.*)", text)
    (shipped,) = re.findall(r'^shipped="(.*)"$', install, re.MULTILINE)
    assert set(copied.split()) == set(shipped.split()) - {"install.sh", "openrc"}
    assert "--require-hashes" in text  # so the pins are those of requirements.txt
    (marked,) = re.findall(r"awk '(/\^[^/]*/)", text)
    assert marked.strip("/^") in (ROOT / "openrc" / "bundle").read_text()
    for place in ("/var/lib/crmbridge", "/var/log/crmbridge", "/opt/crmbridge", "/etc/crmbridge"):
        assert f"={place}\n" in install
        assert place in text


@pytest.mark.parametrize("arch", ["x86_64", "aarch64"])
def test_what_the_ebuild_says_to_fetch_is_a_command_that_install_sh_knows(arch: str) -> None:
    text = MAIN.read_text()
    name = f"crmbridge-{__version__}-{arch}.sh"
    assert f"${{P}}-{arch}.sh )" in text
    body = text[text.index("pkg_nofetch() {") :].partition("\n}\n")[0] + "\n}\n"
    script = 'einfo() { echo "$*"; }; P=$2 A=$3; eval "$1"; pkg_nofetch'
    words = ["bash", "-c", script, "-", body, f"crmbridge-{__version__}", name]
    told = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert f"./install.sh bundle --for {arch} {name}\n" in told
    known = subprocess.run([ROOT / "install.sh", "help"], capture_output=True, text=True, check=True).stdout
    assert re.search(rf"ARCH, if not this machine's: .*\b{arch}\b", known)


def test_the_ebuild_knows_the_pythons_that_the_program_does() -> None:
    (first, last) = re.findall(r"python3_\{(\d+)\.\.(\d+)\}", MAIN.read_text())[0]
    assert f'requires-python = ">=3.{first},<3.{int(last) + 1}"' in (ROOT / "pyproject.toml").read_text()
