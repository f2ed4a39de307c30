"""Images per second of rendering the shapes world at 64x64 with captions, on one thread.

python -m benchmarks.shapes_drawing
"""

from __future__ import annotations

import torch

from benchmarks.timing import interleave, report
from pipeline.config.data import DataConfig
from pipeline.data.load import load_source

IMAGES = 4096


def main() -> None:
    torch.set_num_threads(1)
    source = load_source(DataConfig(source="shapes", image_size=64), "train")

    def draw() -> None:
        for first in range(0, IMAGES, 256):
            rows = range(first, first + 256)
            source.images(rows)
            source.captions(rows)

    seconds = interleave({"ours": draw}, rounds=5)
    report(
        "drawing shapes, 64x64, 1 to 3 objects, one core",
        "images/s",
        {name: IMAGES / s for name, s in seconds.items()},
    )


if __name__ == "__main__":
    main()
