"""Bounds the memory of decoding over all threads of a process. Knows bytes; decodes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Condition

DECODING_BYTES = 2**30
"""Bytes that images being decoded may take together, by default."""
BYTES_PER_PIXEL = 16
"""Most bytes of memory per pixel while an image is decoded and shrunk: Pillow keeps 4 per pixel,
and transparency needs four images."""


class MemoryBudget:
    """Bytes that threads take before they decode, and give back. What is larger than the whole
    budget is decoded alone."""

    def __init__(self, most: int = DECODING_BYTES) -> None:
        self.most = most
        self._taken = 0
        self._changed = Condition()

    @contextmanager
    def taken(self, count: int) -> Iterator[None]:
        """Waits until `count` bytes are free, and takes them."""
        count = min(count, self.most)
        with self._changed:
            self._changed.wait_for(lambda: self._taken + count <= self.most)
            self._taken += count
        try:
            yield
        finally:
            with self._changed:
                self._taken -= count
                self._changed.notify_all()


DECODING = MemoryBudget()
"""Shared by everything that decodes images in this process."""
