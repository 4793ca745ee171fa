"""The house keeps its walls: which room may import which, and where broad things are allowed."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "crmbridge"
# Each room may import the rooms of the floors below its own (design: direction).
FLOORS = (
    {"errors", "events", "clock", "terminal", "answers", "urls", "dial", "__init__"},
    {"log"},
    {"config", "vault", "signing", "contract", "net", "apikey", "matching"},
    {"health"},
    {"store", "instagram", "crm"},
    {"alerts", "connecting"},
    {"delivery", "upkeep", "watch", "tending", "ops"},
    {"worker", "web"},
    {"bridge"},
    {"cli"},
    {"__main__"},
)
SANDBOX_MAY = {"events", "sandbox", "signing", "terminal"}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if "migrations" not in path.parts)


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def floor(name: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if name in rooms)


def imported_rooms(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "crmbridge":
            assert node.level == 0
            names = (
                [node.module or ""]
                if "." in (node.module or "")
                else [f"crmbridge.{entry.name}" for entry in node.names]
            )
            found |= {name.split(".")[1] for name in names}
        if isinstance(node, ast.Import):
            assert not any(entry.name.split(".")[0] == "crmbridge" for entry in node.names)
    return found - {"__version__"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_only_what_lies_below_it(path: Path) -> None:
    here = room(path)
    if here == "sandbox":
        assert imported_rooms(path) <= SANDBOX_MAY
        return
    for other in imported_rooms(path) - {here}:
        if other == "sandbox":
            assert here == "cli"
        else:
            assert floor(other) < floor(here), f"{here} imports {other}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_module_says_what_it_is_for(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text()))


def test_huey_is_known_to_the_worker_alone_and_sql_to_the_store() -> None:
    for path in FILES:
        text = path.read_text()
        if "import huey" in text or "from huey" in text:
            assert room(path) == "worker"
        if "from peewee" in text or "import peewee" in text:
            assert room(path) == "store"


def test_every_connection_comes_by_one_guard() -> None:
    bare = [path for path in FILES if "sqlite3.connect(" in path.read_text()]
    assert bare == [PACKAGE / "store" / "sqlite.py"]


def test_meta_words_stay_in_their_rooms() -> None:
    words = ('"mid"', '"messaging"', '"entry"', "igsid")
    for path in FILES:
        if room(path) not in ("instagram", "sandbox"):
            assert not [word for word in words if word in path.read_text()], path


def test_the_tree_has_no_unknown_top_level_entry() -> None:
    known = {
        "crmbridge", "tests", "static", "api-spec.yaml", "crmbridge.ini", "install.sh", "openrc", "requirements.txt",
        "README.md", "CHANGELOG.md", "LICENSE", "docs", "pyproject.toml", ".ci", ".gitignore", "bench", "contrib",
    }  # fmt: skip
    ignored = {".git", ".venv", "var", ".mypy_cache", ".ruff_cache", ".pytest_cache", ".hypothesis", "__pycache__"}
    assert {path.name for path in ROOT.iterdir()} - ignored <= known
