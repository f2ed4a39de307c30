"""A diagnosis as one HTML page that stands alone: what the table says, with images. Knows
thumbnails; `text_report.py` words the facts, and the template `html_report.html` lays them out.

The template escapes whatever comes from the data: names, captions, messages.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.data.readers.images import decoded
from pipeline.doctor.inspect_source import Part
from pipeline.doctor.report import Diagnosis, Group
from pipeline.doctor.text_report import caption_facts, source_facts
from pipeline.runtime.checkerboard import on_checkerboard
from pipeline.runtime.html_page import data_uri, render
from stage1_tokenizer.pixels import to_filterable
from stage1_tokenizer.transparency import filtered

_THUMBNAIL = 96
_GROUPS = 20
"""Groups of copies, and of images that look alike, that are shown."""
_EXAMPLES = 24
"""Usable images that are shown with their captions, evenly spread."""


def as_page(diagnosis: Diagnosis, parts: Sequence[Part], suggested: str | None) -> str:
    """The page; `parts` are what the diagnosis was made of, in the order of its sources."""
    return render(
        Path(__file__).with_suffix(".html"),
        diagnosis=diagnosis,
        parts=parts,
        suggested=suggested,
        source_facts=source_facts,
        caption_facts=caption_facts,
        shown_groups=_shown_groups,
        examples=_examples,
        thumbnail=_thumbnail,
    )


def _shown_groups(groups: Sequence[Group]) -> list[Group]:
    """Those across the splits first, which are the dangerous ones."""
    return sorted(groups, key=lambda group: len(set(group.held_out)) < 2)[:_GROUPS]


def _examples(part: Part) -> list[tuple[int, str]]:
    """Rows of usable images and their captions."""
    rows = np.flatnonzero(part.fit)
    places = np.linspace(0, len(rows) - 1, min(_EXAMPLES, len(rows))).round().astype(int)
    return [
        (int(row), " / ".join(part.captions[int(row)]) if part.captions else "")
        for row in rows[np.unique(places)]
    ]


def _thumbnail(part: Part, row: int) -> str | None:
    """An image as a `data:` URI; None where it cannot be read any more."""
    assert part.opened is not None
    try:
        config = part.config
        with decoded(
            part.opened.rows.image(row), _THUMBNAIL, config.max_pixels, config.values or "own"
        ) as found:
            image = to_filterable(found.image)
            image.thumbnail((_THUMBNAIL, _THUMBNAIL))
            shown = Image.fromarray(on_checkerboard(filtered(image)))
    except (OSError, ValueError):
        return None
    return data_uri(shown, quality=85)
