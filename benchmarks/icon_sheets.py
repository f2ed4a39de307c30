"""The sheets of a bundle of icons that the documentation shows.

    python -m benchmarks.icon_sheets --bundle icons --out DIR

- `icons-held-out.png`: sixteen held-out names, and four samples below each.
- `icons-tones.png`, `icons-new-names.png`: held-out skin tones and names, a sample below each.
- `icons-styles.png`: twelve names in every style.
- `icons-edits.png`: by row an icon, the same with a part masked, and four edits.

Seed 0. What is held out is chosen by a hash of its name; the other names and the masks are fixed
below. The sets that the bundle was trained on are needed (`make icons`).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline import TextToImagePipeline
from pipeline.config.data import DataConfig
from pipeline.config.load import from_dict
from pipeline.data.builtin.icon_captions import styled_captions
from pipeline.data.builtin.icons import Icon, reported
from pipeline.data.readers.transparency import composed
from pipeline.evaluation.icons import some
from pipeline.runtime.atomic_io import atomic_write_png
from pipeline.runtime.image_grid import make_grid
from stage1_tokenizer.pixels import image_array

NAMES = (
    "red heart",
    "red apple",
    "cat face",
    "rocket",
    "hamburger",
    "automobile",
    "smiling face with sunglasses",
    "thumbs up: medium-dark skin tone",
    "woman firefighter: light skin tone",
    "soccer ball",
    "cactus",
    "flag: Japan",
)
EDITS = (
    ("grinning face", (0, 16, 64, 40), "smiling face with sunglasses"),
    ("woman firefighter: light skin tone", (0, 0, 64, 24), "woman cook: light skin tone"),
    ("grinning face with big eyes", (0, 0, 64, 32), "grinning face with big eyes"),
    ("cat face", (0, 32, 64, 64), "cat with tears of joy"),
)
"""A name to draw, the box of it to mask (left, top, right, bottom of 64), a name to edit it to."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", default="icons")
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    pipe = TextToImagePipeline.from_pretrained(asked.bundle)
    cells = reported(from_dict(DataConfig, pipe.trained_on["data"]))

    def write(name: str, images: Sequence[np.ndarray], columns: int) -> None:
        grid = Image.fromarray(make_grid(images, columns=columns)).quantize(256)
        atomic_write_png(asked.out / f"icons-{name}.png", grid)

    halves = [some(cells["cell"], 16)[:8], some(cells["cell"], 16)[8:]]
    rows = [row for half in halves for row in (_real(half), *_samples(pipe, half, 4))]
    write("held-out", [image for row in rows for image in row], 8)
    for name, icons in (("tones", cells["tone"]), ("new-names", cells["name"])):
        chosen = some(icons, 12)
        write(name, [*_real(chosen), *_samples(pipe, chosen, 1)[0]], 12)
    assert pipe.known_prompts is not None, "a bundle of icons has its styles"
    styles = pipe.known_prompts.styles
    prompts = [styled_captions(name, style)[0] for style in styles for name in NAMES]
    write("styles", [image_array(image) for image in pipe(prompts).images], len(NAMES))
    write("edits", [image for edit in EDITS for image in _edit(pipe, *edit)], 6)


def _real(icons: Sequence[Icon]) -> list[np.ndarray]:
    return [composed(icon.image, "keep") for icon in icons]


def _samples(
    pipe: TextToImagePipeline, icons: Sequence[Icon], count: int
) -> list[list[np.ndarray]]:
    """`count` rows of one sample per icon."""
    prompts = [styled_captions(icon.name, icon.style)[0] for icon in icons]
    images = pipe(prompts, num_images_per_prompt=count, truncate=True).images
    return [[image_array(image) for image in images[row::count]] for row in range(count)]


def _edit(
    pipe: TextToImagePipeline, name: str, box: tuple[int, int, int, int], to: str
) -> list[np.ndarray]:
    (image,) = pipe(styled_captions(name, "noto")[0]).images
    mask = Image.new("L", image.size)
    mask.paste(255, box)
    hidden = image.copy()
    hidden.paste((0, 0, 0, 0), box)
    edits = pipe.edit(image, mask, styled_captions(to, "noto")[0], num_images=4).images
    return [image_array(one) for one in (image, hidden, *edits)]


if __name__ == "__main__":
    main()
