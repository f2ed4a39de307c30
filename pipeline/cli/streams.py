"""Standard output and error whose reader may be gone: `| head -1`, a closed terminal. Knows no
command."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any, TextIO, cast

_READER_IS_GONE = (errno.EPIPE, errno.EIO, errno.ECONNRESET)
"""EIO is that of a terminal that was closed."""


class _Stream:
    """A text stream that drops what comes after its reader is gone, so that the work goes on."""

    def __init__(self, stream: TextIO, name: str) -> None:
        self._stream = stream
        self._name = name

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._drop(error)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._drop(error)

    def _drop(self, error: OSError) -> None:
        # The file itself, since the interpreter flushes what is left in its buffer at exit.
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._stream.fileno())
        os.close(null)
        if error.errno not in _READER_IS_GONE:
            raise OSError(
                f"cannot write {self._name} ({error.strerror}); free some space, or send it to "
                "another file"
            ) from error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def lasting_streams() -> Iterator[None]:
    """Lets a command go on after the reader of its output is gone.

    Raises:
        OSError: the output cannot be written for another reason, such as a full disk; by the write.
    """
    with open(os.devnull, "w") as null:
        # There is none where the shell closed it (`>&-`).
        output = cast(TextIO, _Stream(sys.stdout or null, "standard output"))
        errors = cast(TextIO, _Stream(sys.stderr or null, "standard error"))
        with redirect_stdout(output), redirect_stderr(errors):
            yield
