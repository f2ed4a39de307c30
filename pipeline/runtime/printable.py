"""Text that a terminal shows as it is: control characters are escaped. Knows characters; knows no
messages."""

from __future__ import annotations

import re

_LONG = 200
"""Characters of a name in a message."""
_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 but for tab and newline, DEL, C1
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # bidirectional controls
    "\u2028\u2029"  # line and paragraph separators
    "\ud800-\udfff]"  # undecodable bytes of file names
)


def escaped(text: str) -> str:
    r"""Text without control characters: each is written as \uXXXX, which JSON reads as well. Tabs
    and newlines stay."""
    return _CONTROL.sub(lambda match: f"\\u{ord(match.group()):04x}", text)


def printable(name: str) -> str:
    """A name on one line, without control characters, truncated to fit."""
    line = escaped(name.replace("\n", "\\n"))
    return line if len(line) <= _LONG else f"{line[:_LONG]}..."
