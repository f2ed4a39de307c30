"""`minidalle codebook`: what each code of a tokenizer draws and how often it is used, as images
and as one HTML page.

Knows tokenizers and images; trains nothing. Codes are sorted by use, the most used first.
"""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipeline.runtime.atomic_io import atomic_write_dir, check_output_dir
from pipeline.runtime.image_grid import bars, picture_grid
from stage1_tokenizer import (
    CodebookStatistics,
    ImageTokenizer,
    codebook_statistics,
    count_codes,
    counts_by_level,
    to_model_range,
    to_pictures,
)

NUMBERS = "codebook.json"
"""The page's numbers, for programs."""
_BATCH = 64
_SHOWN = 1024
"""Codes shown of a level, at most."""
_EXAMPLES = 3
"""Places shown in context for each code."""
_MAP = 1024
"""Side of the two-dimensional map, in pixels."""


@dataclass
class LevelView:
    """One level's codes, most used first."""

    name: str
    statistics: CodebookStatistics
    codes: list[int]
    """Codes shown, in the order of the images."""
    counts: list[int]
    pictures: dict[str, np.ndarray]
    """By title: grids of the codes alone and in context, map, usage curve."""


@torch.no_grad()
def codebook_page(tokenizer: Path, pictures: np.ndarray, out: Path) -> list[LevelView]:
    """Writes PNGs, index.html and codebook.json on the codes of `pictures` (N,H,W,3) uint8 to
    `out`; returns what is on the page.

    Raises:
        ValueError: the folder holds no tokenizer, or there are no images.
        FileExistsError: there is something else in `out` already.
    """
    model = ImageTokenizer.from_pretrained(tokenizer)
    check_output_dir(out, NUMBERS, "codebook page")
    if not len(pictures):
        raise ValueError(
            "there are no images to see the codes in; give a configuration with held-out images"
        )
    codes = torch.cat(
        [
            model.encode(to_model_range(torch.from_numpy(pictures[i : i + _BATCH]))).flatten(1)
            for i in range(0, len(pictures), _BATCH)
        ]
    )
    layout = model.quantizer.layout(
        (
            pictures.shape[1] // model.own_config.downsample_factor,
            pictures.shape[2] // model.own_config.downsample_factor,
        )
    )
    whole = count_codes(codes, layout)
    starts = np.cumsum([0, *(level.length for level in layout)])
    vectors = model.code_vectors.split([level.num_codes for level in layout])
    common = torch.cat(
        [
            own.flatten().bincount().argmax().expand(own.shape[1])
            for own in codes.split([level.length for level in layout], dim=1)
        ]
    )
    views = []
    for number, (level, counts) in enumerate(
        zip(layout, whole.split([level.num_codes for level in layout]), strict=True)
    ):
        order = counts.argsort(descending=True, stable=True)[:_SHOWN]
        own = codes[:, starts[number] : starts[number + 1]].reshape(len(codes), *level.grid)
        patch = (pictures.shape[1] // level.grid[0], pictures.shape[2] // level.grid[1])
        drawn = _alone(
            model, common, int(starts[number]), level.length, order, patch, pictures.shape[1:3]
        )
        views.append(
            LevelView(
                "" if len(layout) == 1 else f"level {number + 1}, {level.grid[0]}x{level.grid[1]}",
                codebook_statistics(counts),
                order.tolist(),
                counts[order].tolist(),
                {
                    "alone": picture_grid(list(drawn), columns=32, gap=1),
                    "in context": _in_context(pictures, own, order, patch),
                    "map": _map(vectors[number][order], drawn),
                    "use": bars(counts.sort(descending=True).values.numpy()),
                },
            )
        )
    total = codebook_statistics(counts_by_level(whole, layout)[""])
    atomic_write_dir(out, lambda beside: _write(beside, views, total, len(pictures), tokenizer))
    return views


def _alone(
    model: ImageTokenizer,
    common: Tensor,
    start: int,
    length: int,
    order: Tensor,
    patch: tuple[int, int],
    size: Sequence[int],
) -> np.ndarray:
    """What each code draws when it stands everywhere, other levels holding their commonest code:
    the middle place (K,p,p,3)."""
    grid = (
        size[0] // model.own_config.downsample_factor,
        size[1] // model.own_config.downsample_factor,
    )
    top, left = (size[0] // patch[0] // 2) * patch[0], (size[1] // patch[1] // 2) * patch[1]
    patches = []
    for first in range(0, len(order), _BATCH):
        some = order[first : first + _BATCH]
        stream = common.expand(len(some), -1).clone()
        stream[:, start : start + length] = some[:, None]
        flat = len(model.quantizer.layout(grid)) > 1
        drawn = to_pictures(
            model.decode(stream if flat else stream.reshape(-1, *grid), grid)
        ).numpy()
        patches.append(drawn[:, top : top + patch[0], left : left + patch[1]])
    return np.concatenate(patches)


def _in_context(
    pictures: np.ndarray, codes: Tensor, order: Tensor, patch: tuple[int, int]
) -> np.ndarray:
    """For each code a column of places where it was chosen, with what lies around them; grey where
    there are no more."""
    height, width = patch
    padded = np.pad(pictures, ((0, 0), (height, height), (width, width), (0, 0)), mode="edge")
    cells = []
    for code in order.tolist():
        shown: list[np.ndarray] = []
        seen: set[int] = set()
        for number, i, j in (codes == code).nonzero().tolist():
            if number not in seen and len(shown) < _EXAMPLES:  # of different images
                seen.add(number)
                shown.append(
                    padded[number, i * height : (i + 3) * height, j * width : (j + 3) * width]
                )
        shown += [np.full((3 * height, 3 * width, 3), 224, np.uint8)] * (_EXAMPLES - len(shown))
        cells.append(np.concatenate(shown))
    return picture_grid(cells, columns=32, gap=1)


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
    for (x, y), picture in reversed(list(zip(places.tolist(), drawn, strict=True))):
        top, left = int(y * (_MAP - height)), int(x * (_MAP - width))
        canvas[top : top + height, left : left + width] = picture
    return canvas


def _write(
    folder: Path,
    views: Sequence[LevelView],
    total: CodebookStatistics,
    pictures: int,
    tokenizer: Path,
) -> None:
    """PNGs and the page, which holds them too, so that it can be sent alone."""
    folder.mkdir(parents=True, exist_ok=True)
    sections = []
    for view in views:
        images = []
        for title, picture in view.pictures.items():
            image = Image.fromarray(picture)
            words = [title, *([view.name.split(",")[0]] if view.name else [])]
            name = "-".join(words).replace(" ", "-") + ".png"
            image.save(folder / name)
            buffer = io.BytesIO()
            image.save(buffer, "PNG")
            data = base64.b64encode(buffer.getvalue()).decode()
            scale = max(1, 1000 // image.width)
            images.append(
                f'<h3>{_TITLES[title]}</h3><img width="{image.width * scale}" '
                f'src="data:image/png;base64,{data}" alt="{title}">'
            )
        s = view.statistics
        share = sum(view.counts) or 1
        rows = "".join(
            f"<tr><td>{code}</td><td>{count:,}</td><td>{count / share:.2%}</td></tr>"
            for code, count in zip(view.codes, view.counts, strict=True)
        )
        sections.append(
            f"<h2>{html.escape(view.name or 'codebook')}</h2><p>{s.usage:.1%} of the codes used, "
            f"perplexity {s.perplexity:,.1f}, "
            f"{s.dead} never used; the {len(view.codes)} most used are shown, most used "
            f"first.</p>{''.join(images)}"
            "<details><summary>use of each "
            f"code</summary><table><tr><th>code</th><th>uses</th><th>share</th></tr>{rows}</table></details>"
        )
    head = (
        f"{total.usage:.1%} of all codes used on {pictures} images, perplexity "
        f"{total.perplexity:,.1f}, {total.dead} never used"
    )
    page = (
        "<!doctype html><html lang=en><meta charset=utf-8><title>codebook of "
        f"{html.escape(str(tokenizer))}</title><style>{_STYLE}</style>"
        "<h1>Codebook of "
        f"{html.escape(str(tokenizer))}</h1><p>{head}.</p>{''.join(sections)}</html>\n"
    )
    (folder / "index.html").write_text(page, encoding="utf-8")
    numbers = [
        {"level": v.name, **asdict(v.statistics), "codes": v.codes, "uses": v.counts} for v in views
    ]
    (folder / NUMBERS).write_text(json.dumps({"pictures": pictures, "levels": numbers}) + "\n")


_TITLES = {
    "alone": "What each code draws, standing everywhere",
    "in context": "Where it is used: the place and what lies around it, three images per code",
    "map": "The codebook in two dimensions (principal components of the codes' vectors)",
    "use": "How often each code is used, sorted",
}
_STYLE = (
    "body{font:16px system-ui,sans-serif;max-width:1040px;margin:2em auto;padding:0 "
    "1em}img{image-rendering:pixelated;max-width:100%}"
    "td,th{text-align:right;padding:0 1em}"
)
