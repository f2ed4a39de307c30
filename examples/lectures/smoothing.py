"""Draws every smoothing of a bit as a function of the uniform number that samples it.

    python -m examples.lectures.smoothing --out smoothing.png

The formulas are in `stage1_tokenizer/quantizers/smoothing.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import torch

from examples.lectures.plots import canvas, out_option
from stage1_tokenizer.quantizers.smoothing import Smoothing, inverse

PROBABILITIES = (0.2, 0.5, 0.8)
SHARPNESS = (2.0, 6.0, 30.0)
NAMES = {
    "spike_exponential": "f1\nspike_exponential",
    "spike_power": "f2\nspike_power",
    "spike_root": "f2'\nspike_root",
    "two_sided_power": "f3\ntwo_sided_power",
}
"""Smoothing -> its name in lecture notes as well; the others come after these."""


def curve(kind: Smoothing, probability: float, sharpness: float) -> tuple[list[float], list[float]]:
    """eps in [0,1], and the smoothed bit at each."""
    eps = torch.linspace(0, 1, 1001, dtype=torch.float64)
    s = inverse(eps, torch.full_like(eps, probability), sharpness, kind)
    return eps.tolist(), s.tolist()


def main(out: Path) -> None:
    """A row per smoothing, a column per probability of the bit, a line per inverse temperature."""
    kinds = [*NAMES, *(kind for kind in get_args(Smoothing) if kind not in NAMES)]
    plot = canvas(8, 1.5 * len(kinds))
    rows = plot.subplots(len(kinds), len(PROBABILITIES), sharex=True, sharey=True)
    for kind, row in zip(kinds, rows, strict=True):
        row[0].set_ylabel(NAMES.get(kind, kind), fontsize=8)
        for probability, axes in zip(PROBABILITIES, row, strict=True):
            step = [0, 1 - probability, 1 - probability, 1]
            axes.plot(step, [0, 0, 1, 1], "k--", linewidth=1, label="the bit, 1[eps >= 1-p]")
            for sharpness in SHARPNESS:
                axes.plot(*curve(kind, probability, sharpness), label=f"b = {sharpness:g}")
            axes.grid(alpha=0.3)
    for probability, top, bottom in zip(PROBABILITIES, rows[0], rows[-1], strict=True):
        top.set_title(f"p = {probability}")
        bottom.set_xlabel("eps")
    plot.legend(*rows[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    plot.savefig(out)


if __name__ == "__main__":
    main(out_option(__doc__ or ""))
