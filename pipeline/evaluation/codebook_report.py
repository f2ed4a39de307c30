"""`minidalle codebook`: what each code of a tokenizer draws and how often it is used, as images
and as one HTML page.

Knows tokenizers and images; trains nothing. Codes are sorted by use, the most used first. The
page's form is the template `codebook_report.html`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipeline.evaluation.metrics import check_channels
from pipeline.runtime.atomic_io import atomic_write_dir, check_output_dir
from pipeline.runtime.html_page import data_uri, render
from pipeline.runtime.image_grid import bars, make_grid
from stage1_tokenizer import (
    CodebookStatistics,
    TokenizerModule,
    codebook_statistics,
    count_codes,
    distinct_codes,
    reencoding_metrics,
    statistics_by_level,
    to_model_range,
    to_uint8,
)
from stage1_tokenizer.code_views import CodeViews, check_gumbel, gumbel_views, naive_views
from stage1_tokenizer.codebook_redundancy import JPEG_QUALITY, common_codes, decode_middle
from stage1_tokenizer.transparency import on_background

NUMBERS = "codebook.json"
"""The page's numbers, for programs."""
METRICS = ("distinct_codes", "reencode_agreement", f"reencode_agreement_jpeg{JPEG_QUALITY}")
"""Metrics of the whole codebook and of each level, next to the statistics of their use."""
Mode = Literal["naive", "gumbel", "both"]
"""Which whole images show a code: a grid filled with it, a grid optimized to be encoded as it."""
_BATCH = 64
_SHOWN = 1024
"""Codes shown of a level, at most."""
_VIEWED = 64
"""Codes of a level that have whole images, at most."""
_EXAMPLES = 3
"""Images in which each code is shown in context."""
_MAP = 1024
"""Side of the two-dimensional map, in pixels."""
_COLUMNS = 32
_WHOLE_COLUMNS = 16


@dataclass
class LevelView:
    """One level's codes, most used first."""

    name: str
    statistics: CodebookStatistics
    metrics: dict[str, float]
    """By the names of `METRICS`."""
    codes: list[int]
    """Codes shown, in the order of the images."""
    counts: list[int]
    images: dict[str, np.ndarray]
    """By title: grids of the codes alone and in context, whole images, map, usage curve."""
    code_fractions: dict[str, list[float]]
    """By "naive" and "gumbel", for the first codes shown: of the codes that the whole image is
    encoded as, the fraction that are this code."""

    @property
    def mean_code_fractions(self) -> dict[str, float]:
        return {name: float(np.mean(own)) for name, own in self.code_fractions.items()}


@torch.no_grad()
def codebook_page(
    tokenizer: Path, images: np.ndarray, out: Path, *, mode: Mode = "naive"
) -> list[LevelView]:
    """Writes PNGs, index.html and codebook.json on the codes of `images` (N,H,W,3) uint8 to
    `out`; returns what is on the page.

    Raises:
        ValueError: the folder holds no tokenizer or one without codes, there are no images, or the
            tokenizer's quantizer has no Gumbel images.
        FileExistsError: there is something else in `out` already.
    """
    model = TokenizerModule.from_pretrained(tokenizer)
    model.require_codes("`minidalle codebook`")
    if mode != "naive":
        check_gumbel(model)
    check_output_dir(out, NUMBERS, "codebook page")
    if not len(images):
        raise ValueError(
            "there are no images to see the codes in; give a configuration with held-out images"
        )
    check_channels(f"the tokenizer {tokenizer}", model, images.shape[-1])
    factor = model.own_config.downsample_factor
    grid = (images.shape[1] // factor, images.shape[2] // factor)
    batches = []
    for first in range(0, len(images), _BATCH):
        codes = model.encode(to_model_range(torch.from_numpy(images[first : first + _BATCH])))
        batches.append((codes, to_uint8(model.decode(codes, grid))))
    codes = torch.cat([some.flatten(1) for some, _ in batches])
    counts = count_codes(codes, model.quantizer.layout(grid))
    distinct = distinct_codes(model, counts)
    metrics = reencoding_metrics(model, batches)
    metrics |= {f"distinct_codes{level}": float(number) for level, number in distinct.items()}
    views = _level_views(model, images, codes, counts, grid, metrics, mode)

    def write(beside: Path) -> None:
        for view in views:
            level = view.name.split(",")[0]
            for title, image in view.images.items():
                name = f"{title} {level}".strip().replace(" ", "-")
                Image.fromarray(image).save(beside / f"{name}.png")
        page = render(
            Path(__file__).with_suffix(".html"),
            tokenizer=tokenizer,
            total=statistics_by_level(counts, model.quantizer.layout(grid))[""],
            metrics={name: metrics[name] for name in METRICS},
            count=len(images),
            views=views,
            data_uri=lambda image: data_uri(Image.fromarray(image)),
            zip=zip,
        )
        (beside / "index.html").write_text(page, encoding="utf-8")
        levels = [
            {"level": v.name, **asdict(v.statistics), **v.metrics}
            | {"codes": v.codes, "uses": v.counts}
            | {"code_fraction": v.mean_code_fractions, "code_fractions": v.code_fractions}
            for v in views
        ]
        whole = {name: metrics[name] for name in METRICS}
        numbers = json.dumps({"images": len(images), **whole, "levels": levels}) + "\n"
        (beside / NUMBERS).write_text(numbers)

    atomic_write_dir(out, write)
    return views


def _level_views(
    model: TokenizerModule,
    images: np.ndarray,
    codes: Tensor,
    counts: Tensor,
    grid: tuple[int, int],
    metrics: Mapping[str, float],
    mode: Mode,
) -> list[LevelView]:
    """A view of each level, of codes (N, all levels' positions), counts (all levels' codes) and
    metrics (by name and level)."""
    layout = model.quantizer.layout(grid)
    lengths = [level.length for level in layout]
    sizes = [level.num_codes for level in layout]
    common = common_codes(counts, layout)
    views = []
    for number, level in enumerate(layout):
        start = sum(lengths[:number])
        own_counts = counts.split(sizes)[number]
        own = codes[:, start : start + level.length].reshape(len(codes), *level.grid)
        order = own_counts.argsort(descending=True, stable=True)[:_SHOWN]
        patch = (images.shape[1] // level.grid[0], images.shape[2] // level.grid[1])
        # Other levels hold their commonest code.
        streams = common.repeat(len(order), 1)
        streams[:, start : start + level.length] = order[:, None]
        drawn = decode_middle(model, streams, grid, number).numpy()
        whole = _whole_images(model, order[:_VIEWED], common, grid, number, mode)
        suffix = f"_level_{number + 1}" if len(layout) > 1 else ""
        views.append(
            LevelView(
                "" if len(layout) == 1 else f"level {number + 1}, {level.grid[0]}x{level.grid[1]}",
                codebook_statistics(own_counts),
                {name: metrics[f"{name}{suffix}"] for name in METRICS},
                order.tolist(),
                own_counts[order].tolist(),
                {
                    "alone": make_grid(list(drawn), columns=_COLUMNS, gap=1),
                    "in context": _in_context(images, own, order, patch),
                    " and ".join(whole): _side_by_side(list(whole.values())),
                    "map": _map(model.code_vectors.split(sizes)[number][order], drawn),
                    "use": bars(own_counts.sort(descending=True).values.numpy()),
                },
                {name: own.fractions.tolist() for name, own in whole.items()},
            )
        )
    return views


def _whole_images(
    model: TokenizerModule,
    codes: Tensor,
    common: Tensor,
    grid: tuple[int, int],
    number: int,
    mode: Mode,
) -> dict[str, CodeViews]:
    """Whole images of codes of a level, counted from 0, by "naive" and "gumbel" as `mode` says."""
    whole = {}
    if mode in ("naive", "both"):
        whole["naive"] = naive_views(model, codes, common, grid, number)
    if mode in ("gumbel", "both"):
        whole["gumbel"] = gumbel_views(model, codes, grid)
    return whole


def _side_by_side(views: Sequence[CodeViews]) -> np.ndarray:
    """A grid in which each code's images of all views are next to each other."""
    cells = torch.cat([view.images for view in views], dim=2).numpy()
    return make_grid(list(cells), columns=_WHOLE_COLUMNS // len(views), gap=4)


def _in_context(
    images: np.ndarray, codes: Tensor, order: Tensor, patch: tuple[int, int]
) -> np.ndarray:
    """For each code a column of positions where it was chosen, with what lies around them; grey
    where there are no more."""
    height, width = patch
    padded = np.pad(images, ((0, 0), (height, height), (width, width), (0, 0)), mode="edge")
    cells = []
    for code in order.tolist():
        shown: dict[int, np.ndarray] = {}  # one position per image
        for number, i, j in (codes == code).nonzero().tolist():
            if number not in shown and len(shown) < _EXAMPLES:
                rows = slice(i * height, (i + 3) * height)
                shown[number] = padded[number, rows, j * width : (j + 3) * width]
        grey = np.full((3 * height, 3 * width, images.shape[3]), 224, np.uint8)
        grey[..., 3:] = 255
        cells.append(np.concatenate([*shown.values(), *[grey] * (_EXAMPLES - len(shown))]))
    return make_grid(cells, columns=_COLUMNS, gap=1)


def _map(vectors: Tensor, drawn: np.ndarray) -> np.ndarray:
    """Each code's image at the two principal components of its vector, the most used on top."""
    centred = vectors.float() - vectors.float().mean(0)
    if centred.shape[1] < 2:
        centred = torch.cat([centred, torch.zeros_like(centred)], dim=1)
    _, _, directions = torch.linalg.svd(centred, full_matrices=False)
    places = centred @ directions[:2].T
    places = (places - places.amin(0)) / (places.amax(0) - places.amin(0)).clamp(min=1e-9)
    height, width = drawn.shape[1:3]
    canvas = np.full((_MAP, _MAP, 3), 255, np.uint8)
    for (x, y), image in reversed(list(zip(places.tolist(), drawn, strict=True))):
        top = int(y * (_MAP - height))
        left = int(x * (_MAP - width))
        canvas[top : top + height, left : left + width] = on_background(image)
    return canvas
