"""Everything that a command prints. A value can hold what moves the cursor, hides or reorders words, or ends a line:
here it is shown for what it is. Knows no command.
"""

import re
import sys
import textwrap
from typing import TextIO

# What shows nothing though Python calls it printable: Unicode's Default_Ignorable_Code_Point, and the empty braille.
_UNSEEN = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)


def escaped(text: str) -> str:
    """Return a text as one line that shows all that is in it: ESC as ``\\x1b``, a line's end as ``\\n``.

    So it is with every control, format, private, unassigned or unseen character, every lone surrogate, and every
    blank but the space.
    """
    if text.isprintable() and not _UNSEEN.search(text):
        return text
    return "".join(
        char if char.isprintable() and not _UNSEEN.match(char) else char.encode("unicode_escape").decode()
        for char in text
    )


def wrapped(head: str, text: str) -> list[str]:
    """Return a text as lines of 110 characters below a head; a word that is longer stays whole."""
    return textwrap.wrap(
        escaped(text), 110, initial_indent=head, subsequent_indent=" " * len(head), break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip


def say(*lines: str, at_once: bool = False) -> None:
    """Print each line on standard output; `at_once` where somebody waits for it at the other end of a pipe."""
    _print(sys.stdout, lines)
    if at_once and sys.stdout is not None:
        sys.stdout.flush()


def complain(*lines: str) -> None:
    """Print each line on standard error."""
    _print(sys.stderr, lines)


def flush() -> None:
    """Write out what was printed. Raises BrokenPipeError where nobody reads it any more."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()


def _print(stream: TextIO | None, lines: tuple[str, ...]) -> None:
    if stream is None:  # it was closed before the start
        return
    encoding = stream.encoding or "utf-8"
    text = "".join(f"{escaped(line)}\n" for line in lines)
    stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
