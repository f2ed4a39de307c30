"""Shared by the scripts: an empty plot and the option `--out`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def canvas(width: float, height: float) -> Figure:
    """An empty plot of this size, in inches."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SystemExit("drawing needs matplotlib: pip install 'mini-dalle[plots]'") from None
    return Figure(figsize=(width, height), dpi=90, layout="constrained")


def out_option(description: str) -> Path:
    """The file that the command line names, `--out FILE.png`."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="the PNG to write")
    out: Path = parser.parse_args().out
    return out
