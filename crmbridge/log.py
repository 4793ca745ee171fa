"""One structured line per fact on stderr, with the correlation id, and with secrets struck out.

Message texts are never handed to this room.
"""

import contextlib
import contextvars
import json
import logging
import os
import re
import stat
import sys
import traceback
from collections.abc import Iterator
from typing import Any, TextIO
from urllib.parse import urlsplit

from crmbridge.events import instant

ALERT = 45  # between error and critical
logging.addLevelName(ALERT, "ALERT")
_logger = logging.getLogger("crmbridge")
_correlation: contextvars.ContextVar[str] = contextvars.ContextVar("correlation", default="")
_SECRETS = re.compile(
    r"crmb_[0-9a-z]{4,}_[0-9A-Za-z]+|\b(?:IGAA|EAA)[0-9A-Za-z_-]{8,}|whsec_[0-9A-Za-z+/=]+"
    r"|(?<=access_token=)[^&\s\"']+|(?<=Bearer )[^\s\"']+"
)
_MARKS = ("crmb_", "IGAA", "EAA", "whsec_", "access_token=", "Bearer ")
_PLAIN = re.compile(r"[\w.:/@+%*,<>~()\[\]{}-]+\Z", re.ASCII)


@contextlib.contextmanager
def correlated(correlation_id: str) -> Iterator[None]:
    """Put the id into every line that this thread logs inside the block."""
    token = _correlation.set(correlation_id)
    try:
        yield
    finally:
        _correlation.reset(token)


def correlation_id() -> str:
    """Return the id of the work in hand, or an empty string."""
    return _correlation.get()


def debug(name: str, /, **facts: Any) -> None:
    _log(logging.DEBUG, name, facts)


def info(name: str, /, **facts: Any) -> None:
    _log(logging.INFO, name, facts)


def warning(name: str, /, **facts: Any) -> None:
    _log(logging.WARNING, name, facts)


def error(name: str, /, **facts: Any) -> None:
    _log(logging.ERROR, name, facts)


def alert(name: str, /, **facts: Any) -> None:
    _log(ALERT, name, facts)


def exception(name: str, /, **facts: Any) -> None:
    """Log at error level with the traceback of the exception being handled, in one line.

    Only frames and the exception's type are shown: its message may quote what a customer wrote.
    """
    _log(logging.ERROR, name, {**facts, **_told(sys.exc_info())})


def _log(level: int, name: str, facts: dict[str, Any]) -> None:
    if _logger.isEnabledFor(level):
        _logger.log(level, name, extra={"facts": facts})


class _Line(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        facts = getattr(record, "facts", None)
        if facts is None:
            head, facts = record.name, {"message": record.getMessage()}
            if record.exc_info:
                facts |= _told(record.exc_info)
        else:
            head = record.getMessage()
        parts = [instant(record.created), record.levelname.lower(), head]
        parts += [f"{key}={_value(value)}" for key, value in facts.items() if value is not None]
        if "correlation" not in facts and (correlation := _correlation.get()):
            parts.append(f"correlation={correlation}")
        line = " ".join(parts)
        return struck(line)


def struck(text: str) -> str:
    """Return a text with what looks like a credential struck out."""
    # Looking for the marks first costs a tenth of the substitution, and nearly no line has one.
    return _SECRETS.sub("[secret]", text) if any(mark in text for mark in _MARKS) else text


def origin(url: str) -> str:
    """Return of a URL what is no secret: scheme, host and port."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        return "(not a URL)"
    return f"{parts.scheme}://" + (f"[{host}]" if ":" in host else host) + (f":{port}" if port is not None else "")


def _told(info: Any) -> dict[str, str]:
    kind, _, trace = info
    frames = traceback.extract_tb(trace)
    where = " < ".join(f"{frame.name}@{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno}" for frame in reversed(frames))
    return {"exception": kind.__name__, "trace": where} if kind else {}


def _value(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:.3f}".rstrip("0").rstrip(".")
    text = str(value)
    return text if _PLAIN.match(text) else json.dumps(text).replace("\x7f", "\\u007f")  # DEL json leaves as it is


class _Rotated(logging.StreamHandler[TextIO]):
    """Follows a log file's name: when the file was moved away and a new one is there, goes on in that one."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._path = ""
        with contextlib.suppress(OSError):  # no file descriptor, or no /proc
            if stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
                self._path = os.readlink(f"/proc/self/fd/{stream.fileno()}")

    def emit(self, record: logging.LogRecord) -> None:
        if self._path:
            with contextlib.suppress(OSError):  # then the old file goes on
                self._follow()
        super().emit(record)

    def _follow(self) -> None:
        old, new = os.fstat(self.stream.fileno()), os.stat(self._path)
        if os.path.samestat(old, new):
            return
        opened = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        for number in {1, self.stream.fileno()}:
            if os.path.samestat(os.fstat(number), old):
                os.dup2(opened, number)
        os.close(opened)


def setup(level: str, stream: TextIO | None = None) -> None:
    """Send every logger of the process through this room's one-line form."""
    handler = _Rotated(stream or sys.stderr)
    handler.setFormatter(_Line())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    _logger.setLevel(level.upper())
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)
