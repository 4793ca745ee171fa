"""Copies of this checkout, as they are or as another version, to install in a box."""

import shutil
import subprocess
from pathlib import Path

from crmbridge import __version__
from tests.appliance.box import Box

CHECKOUT = Path(__file__).resolve().parents[2]
SHIPPED = (
    "crmbridge",
    "static",
    "openrc",
    "api-spec.yaml",
    "crmbridge.ini",
    "install.sh",
    "requirements.txt",
    "README.md",
    "docs",
    "LICENSE",
)
_MIGRATION = '''"""One more table."""


def up(migrator, db):
    db.execute_sql("CREATE TABLE IF NOT EXISTS later (a TEXT)")
    {up}
'''


def tree(folder: Path) -> Path:
    """Copy what is shipped into a folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in SHIPPED:
        if (CHECKOUT / name).is_dir():
            shutil.copytree(CHECKOUT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(CHECKOUT / name, folder / name)
    return folder


def later(
    folder: Path,
    version: str,
    *,
    migration: str = "pass",
    name: str = "0099_later",
    edits: tuple[tuple[str, str, str], ...] = (),
) -> Path:
    """Make a tree of a later version with a migration of its own.

    `name` is the migration's, `migration` Python at the end of its `up`;
    each edit is a file, a text in it, and what stands there instead.
    """
    tree(folder)
    (folder / "crmbridge" / "store" / "migrations" / f"{name}.py").write_text(_MIGRATION.format(up=migration))
    for place, old, new in (("crmbridge/__init__.py", __version__, version), *edits):
        text = (folder / place).read_text()
        assert old in text, f"{place} has no {old!r}"
        (folder / place).write_text(text.replace(old, new))
    return folder


def in_box(box: Box, path: str, source: Path) -> None:
    """Copy a file or folder into a box, as `path` there."""
    subprocess.run(["cp", "-RL", str(source), str(box.root / path.lstrip("/"))], check=True)
