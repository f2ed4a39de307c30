"""Images that responses name by URL (`response_format: url`), for a while in memory. Knows bytes
alone."""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from collections.abc import Callable

MAX_BYTES = 64 * 2**20
"""Of all images; older ones are dropped."""
MAX_SECONDS = 3600.0


class ImageStore:
    """Files by names that cannot be guessed."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._files: OrderedDict[str, tuple[float, bytes]] = OrderedDict()
        self._bytes = 0

    def add(self, content: bytes, ending: str) -> str:
        """Keeps a file; returns its name."""
        name = f"{secrets.token_urlsafe(16)}.{ending}"
        self._files[name] = (self._clock(), content)
        self._bytes += len(content)
        self._drop()
        return name

    def get(self, name: str) -> bytes | None:
        """The file; None where it is not, or no longer, there."""
        self._drop()
        found = self._files.get(name)
        return None if found is None else found[1]

    def _drop(self) -> None:
        oldest = self._clock() - MAX_SECONDS
        while self._files and (
            self._bytes > MAX_BYTES or next(iter(self._files.values()))[0] < oldest
        ):
            _, (_, content) = self._files.popitem(last=False)
            self._bytes -= len(content)
