"""A command typed in this process: as much as a process of its own shows, without the half second that one takes."""

import io
import os
import sys
from pathlib import Path

import pytest

from crmbridge.cli import main


def typed(folder: Path, *words: str, encoding: str = "utf-8", stdin: str = "", **environ: str) -> tuple[int, str]:
    """Run a command with a folder's configuration; return its exit status and what it printed on both channels.

    Not for commands that change the process, as `serve` and `backup` do.
    """
    printed = io.BytesIO()
    umask = os.umask(0o022)
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("CRMBRIDGE_")]:
            patch.delenv(name)
        patch.setenv("CRMBRIDGE_CONFIG", str(folder / "crmbridge.ini"))
        for name, value in environ.items():
            patch.setenv(name, value)
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode(errors="surrogateescape"))))
        for channel in ("stdout", "stderr"):
            patch.setattr(sys, channel, io.TextIOWrapper(printed, encoding=encoding, write_through=True))
        try:
            status = main(words)
        except SystemExit as ended:
            status = int(ended.code or 0)
        finally:
            os.umask(umask)
            said = printed.getvalue().decode(encoding)
    return status, said
