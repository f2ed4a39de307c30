"""Signals that a test sends to itself."""

from __future__ import annotations

import signal


def send(*numbers: signal.Signals) -> None:
    for number in numbers:
        # Os.kill may come to another thread, and be handled a little later
        signal.raise_signal(number)
