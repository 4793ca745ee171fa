"""A command typed in this process: as much as a process of its own shows, without the half second that one takes.

Not for commands that change the process, as `serve` and `backup` do.
"""

import io
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from crmbridge.cli import main


def typed(folder: Path, *words: str, encoding: str = "utf-8", stdin: str = "", **environ: str) -> tuple[int, str]:
    """Run a command with a folder's configuration; return its exit status and what it printed on both channels."""
    said = io.BytesIO()
    given = {"CRMBRIDGE_CONFIG": str(folder / "crmbridge.ini"), **environ}
    return _do(words, given, (said, said), encoding, stdin, Path.cwd()), said.getvalue().decode(encoding)


def run(folder: Path, *words: str, stdin: str = "", **environ: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder; return what a process of its own would."""
    said = io.BytesIO(), io.BytesIO()
    status = _do(words, environ, said, "utf-8", stdin, folder)
    return subprocess.CompletedProcess(words, status, *(channel.getvalue().decode() for channel in said))


def _do(
    words: Sequence[str],
    environ: Mapping[str, str],
    channels: tuple[io.BytesIO, io.BytesIO],
    encoding: str,
    stdin: str,
    folder: Path,
) -> int:
    umask, handlers = os.umask(0o022), logging.getLogger().handlers[:]
    level, on_term = logging.getLogger("crmbridge").level, signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in [name for name in os.environ if name.startswith("CRMBRIDGE_")]:
            patch.delenv(name)
        for name, value in environ.items():
            patch.setenv(name, value)
        streams = [io.TextIOWrapper(channel, encoding=encoding, write_through=True) for channel in channels]
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode(errors="surrogateescape"))))
        patch.setattr(sys, "stdout", streams[0])
        patch.setattr(sys, "stderr", streams[1])
        try:
            return main(words)
        except SystemExit as ended:
            return int(ended.code or 0)
        finally:
            os.umask(umask)
            signal.signal(signal.SIGTERM, on_term)
            logging.getLogger().handlers[:] = handlers
            logging.getLogger("crmbridge").setLevel(level)
            for stream in streams:
                stream.detach()  # what was printed stays readable
