"""How configurations say what is wrong with them: everything, in one error."""

from __future__ import annotations

import math
from itertools import chain


def out_of_range(config: object, section: str, interval: str, *names: str) -> list[str]:
    """A message for each of these fields that is outside of an interval, as in "[0, 1)", or
    "[1, inf]", which is "at least 1". `auto` and None are allowed."""
    low, high = (float(bound) for bound in interval[1:-1].split(","))
    least = low if interval[0] == "[" else math.nextafter(low, math.inf)
    most = high if interval[-1] == "]" else math.nextafter(high, -math.inf)
    needed = f"in {interval}"
    if high == math.inf:
        needed = f"above {low:g}" if interval[0] == "(" else f"at least {low:g}"
    values = {name: getattr(config, name) for name in names}
    return [
        f"{section}.{name} is {value}; it must be {needed.replace('at least 0', '0 or more')}"
        for name, value in values.items()
        if value not in ("auto", None) and not least <= value <= most
    ]


def problems(*checks: tuple[object, str]) -> list[str]:
    """The messages of those checks that are true, each of (what is wrong, message)."""
    return [message for wrong, message in checks if wrong]


def refuse(*found: list[str]) -> None:
    """Raises ValueError with all messages, where there are any."""
    if messages := list(chain(*found)):
        raise ValueError("; ".join(messages))
