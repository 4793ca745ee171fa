"""install.sh as a stranger meets it: what it says when something is missing, and that it recovers. No network."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.waiting import BULK_S

CHECKOUT = Path(__file__).resolve().parent.parent
TOOLS = ["cat", "chmod", "dirname", "flock", "mktemp", "mv", "readlink", "rm", "sha256sum", "sh"]
REAL_PYTHON = getattr(sys, "_base_executable", sys.executable)  # the suite itself runs in a virtual environment


class Checkout:
    """A copy of what install.sh reads, below a path with spaces, and a PATH that holds nothing by accident."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "a check out"
        self.bin = folder / "bin"
        (self.root / "tests").mkdir(parents=True)
        self.bin.mkdir()
        for name in ("install.sh", "requirements.txt", "tests/requirements.txt"):
            shutil.copy(CHECKOUT / name, self.root / name)
        for tool in TOOLS:
            if found := shutil.which(tool):
                (self.bin / tool).symlink_to(found)
        self.elsewhere = folder / "elsewhere"
        self.elsewhere.mkdir()

    @property
    def venv(self) -> Path:
        return self.root / ".venv"

    def add_python(self, name: str, script: str) -> None:
        """Put a program called `name` on the PATH; `$REAL` is a real Python in its script."""
        program = self.bin / name
        program.write_text(f"#!/bin/sh\nREAL='{REAL_PYTHON}'\n{script}\n")
        program.chmod(0o755)

    def add_real_python(self, *, pip: str = "import os; raise SystemExit(os.environ.get('PIP_SAYS'))") -> None:
        """Put a real python3 on the PATH. Copying pip takes seconds, so its environments get this one instead."""
        self.add_python(
            "python3",
            'if [ "$1 $2" != "-m venv" ]; then exec "$REAL" "$@"; fi\n'
            'set -e; "$REAL" -m venv --without-pip "$3"\n'
            f'for folder in "$3"/lib/python*/site-packages; do echo "{pip}" >"$folder/pip.py"; done',
        )

    def add_program(self) -> None:
        """Put a crmbridge into the checkout that prints its arguments and needs no package."""
        package = self.root / "crmbridge"
        package.mkdir()
        (package / "__init__.py").touch()
        (package / "__main__.py").write_text("import sys\nprint('crmbridge', sys.argv[1:])\n")
        (self.root / "requirements.txt").write_text("# nothing\n")

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(self.root / "install.sh"), *arguments],
            cwd=self.elsewhere,
            env={"PATH": str(self.bin), "HOME": str(self.elsewhere), **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=BULK_S,
            check=False,
        )


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_help_lists_the_commands(checkout: Checkout) -> None:
    result = checkout.run("help")
    assert result.returncode == 0
    assert result.stderr == ""
    for word in (
        "install",
        "upgrade",
        "rollback",
        "repair",
        "uninstall",
        "--purge",
        "status",
        "bundle",
        "demo",
        "test",
    ):
        assert f"\n  {word}" in result.stdout or f"[{word}]" in result.stdout
    assert "PYTHON=" in result.stdout


@pytest.mark.parametrize("arguments", [["instal"], ["--demo"], []])
def test_an_unknown_command_exits_2_with_the_usage(checkout: Checkout, arguments: list[str]) -> None:
    result = checkout.run(*arguments)
    assert result.returncode == 2
    assert result.stdout == ""
    assert "Usage: ./install.sh" in result.stderr
    assert all(argument in result.stderr for argument in arguments)


# what is on the PATH, and what must be said about it
PYTHONS = {
    "none": ({}, ["no python3 in PATH"]),
    "too old": ({"python3": "echo version 3.9"}, ["python3 is Python 3.9"]),
    "too new": ({"python3": "echo version 3.15"}, ["python3 is Python 3.15"]),
    "a stand-in that runs nothing": ({"python3": "exit 127"}, ["no python3 in PATH"]),
    "no ensurepip": ({"python3": "echo module ensurepip"}, ["python3 has no ensurepip module"]),
    "no ssl": ({"python3": "echo module ssl"}, ["python3 has no ssl module"]),
    "incomplete tells more than old": (
        {"python3": "echo version 3.9", "python3.12": "echo module sqlite3"},
        ["python3.12 has no sqlite3 module"],
    ),
}


@pytest.mark.parametrize("command", ["demo", "test"])
@pytest.mark.parametrize(("pythons", "said"), PYTHONS.values(), ids=PYTHONS)
def test_without_a_suitable_python_it_says_what_to_install(
    checkout: Checkout, command: str, pythons: dict[str, str], said: list[str]
) -> None:
    for name, script in pythons.items():
        checkout.add_python(name, script)
    result = checkout.run(command)
    assert result.returncode == 1
    for text in [*said, "Gentoo:", "emerge", "Debian:", "apt install python3 python3-venv"]:
        assert text in result.stderr
    assert not checkout.venv.exists()


@pytest.mark.parametrize("module", ["venv", "ensurepip", "ssl", "sqlite3"])
def test_a_real_python_without_a_module_is_found_out(checkout: Checkout, tmp_path: Path, module: str) -> None:
    # a module that fails to import hides the real one
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / f"{module}.py").write_text("raise ImportError\n")
    checkout.add_python("python3", f'PYTHONPATH="{hidden}" exec "$REAL" "$@"')
    result = checkout.run("demo")
    assert result.returncode == 1
    assert f"python3 has no {module} module" in result.stderr


@pytest.mark.parametrize(
    ("program", "said"),
    [("nowhere/python3", "is not a program"), ("old", "is Python 3.9"), ("cat", "does not run as a Python")],
)
def test_a_python_that_was_named_is_the_only_one_tried(checkout: Checkout, program: str, said: str) -> None:
    checkout.add_real_python()
    checkout.add_python("old", "echo version 3.9")
    result = checkout.run("demo", PYTHON=program)
    assert result.returncode == 1
    assert said in result.stderr
    assert not checkout.venv.exists()


def test_a_failing_venv_shows_what_it_said(checkout: Checkout) -> None:
    checkout.add_python("python3", 'if [ "$1 $2" = "-m venv" ]; then echo no space left; exit 1; fi; exec "$REAL" "$@"')
    result = checkout.run("demo")
    assert result.returncode == 1
    assert "no space left" in result.stderr
    assert "could not make a virtual environment" in result.stderr


def test_the_environment_is_made_once_and_again_only_when_it_must(checkout: Checkout) -> None:
    checkout.add_real_python()
    checkout.add_program()

    def demo() -> bool:
        """Run the demo from elsewhere; true when the environment was made for it."""
        result = checkout.run("demo", "--once", "two words")
        assert result.returncode == 0, result.stderr
        assert result.stdout == "crmbridge ['demo', '--once', 'two words']\n"
        return "installing" in result.stderr

    assert demo(), "there was none"
    assert not demo(), "it is there and up to date"
    (checkout.venv / "crmbridge.stamp").unlink()
    assert demo(), "an installation was cut short"
    (checkout.root / "requirements.txt").write_text("# other\n")
    assert demo(), "the pins changed"
    (checkout.venv / "crmbridge.stamp").rename(checkout.venv / "crmbridge.stamp.kept")
    assert demo(), "an installation of test packages was cut short"
    (checkout.venv / "bin" / "python").unlink()
    assert demo(), "its Python is gone"
    checkout.root = checkout.root.rename(checkout.root.with_name("moved away"))
    assert demo(), "the checkout was moved"
    assert not demo()


def test_the_command_runs_by_a_link_from_anywhere_and_imports_nothing_from_there(checkout: Checkout) -> None:
    checkout.add_real_python()
    checkout.add_program()
    assert checkout.run("demo").returncode == 0
    (checkout.elsewhere / "crmbridge.py").write_text("raise SystemExit('the wrong one')\n")
    link = checkout.elsewhere / "crmbridge"
    link.symlink_to(checkout.venv / "bin" / "crmbridge")
    result = subprocess.run(
        [link, "--version"], cwd=checkout.elsewhere, env=os.environ, capture_output=True, text=True, check=False
    )
    assert result.stdout == "crmbridge ['--version']\n", result.stderr


def test_a_failing_pip_is_shown_and_the_next_run_recovers(checkout: Checkout) -> None:
    checkout.add_real_python()
    checkout.add_program()
    result = checkout.run("demo", PIP_SAYS="no such host")
    assert result.returncode == 1
    assert "no such host" in result.stderr
    assert "HTTPS_PROXY" in result.stderr
    assert checkout.run("demo").returncode == 0
    # the test packages are another set: failing to get them leaves the environment as it was
    assert checkout.run("test", PIP_SAYS="no such host").returncode == 1
    assert "installing" not in checkout.run("demo").stderr


@pytest.mark.slow
def test_a_real_pip_takes_nothing_that_is_not_pinned_by_hash(checkout: Checkout, tmp_path: Path) -> None:
    checkout.add_python("python3", 'exec "$REAL" "$@"')
    checkout.add_program()
    offline = {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": str(tmp_path)}
    assert checkout.run("demo", **offline).returncode == 0
    (tmp_path / "waitress-9.0-py3-none-any.whl").write_bytes(b"")
    (tmp_path / "waitress-9.1.tar.gz").write_bytes(b"")
    for requirement, said in {
        "waitress==9.0": "--require-hashes",
        "waitress==9.0 --hash=sha256:" + "0" * 64: "DO NOT MATCH THE HASHES",
        "waitress==9.1 --hash=sha256:" + "0" * 64: "No matching distribution found for waitress==9.1",
    }.items():
        (checkout.root / "tests" / "requirements.txt").write_text(requirement + "\n")
        result = checkout.run("test", **offline)
        assert result.returncode == 1
        assert said in result.stderr
