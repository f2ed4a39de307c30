"""A diagnosis as one HTML page that stands alone: what the table says, with images. Knows
thumbnails; `text_report.py` words the facts, and the template `html_report.html` lays them out.

The template escapes whatever comes from the data: names, captions, messages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.data.readers.images import open_picture
from pipeline.doctor.inspect_source import Part
from pipeline.doctor.report import CaptionReport, Diagnosis, Group
from pipeline.doctor.text_report import caption_facts, source_facts
from pipeline.runtime.html_page import data_uri, render
from stage1_tokenizer.pixels import to_rgb

_THUMBNAIL = 96
_GROUPS = 20
"""Groups of copies, and of images that look alike, that are shown."""
_EXAMPLES = 24
"""Usable images that are shown with their captions, evenly spread."""
_LISTED = 20


@dataclass(frozen=True)
class _Figure:
    caption: str
    image: str | None
    """As a `data:` URI; None where the file is gone."""


def as_page(diagnosis: Diagnosis, parts: Sequence[Part], suggested: str | None) -> str:
    """The page; `parts` are what the diagnosis was made of, in the order of its sources."""
    return render(
        Path(__file__).with_suffix(".html"),
        name=" + ".join(source.name for source in diagnosis.sources),
        diagnosis=diagnosis,
        sources=[_source(part) for part in parts],
        captions=_captions(diagnosis.captions) if diagnosis.captions is not None else None,
        suggested=suggested,
    )


def _source(part: Part) -> dict[str, object]:
    report = part.report
    return {
        "report": report,
        "facts": source_facts(report),
        "left_out": [(left.reason, f"{left.count:,}", left.names) for left in report.left_out],
        "unreadable": [(one.name, one.problem) for one in report.unreadable[:_LISTED]],
        "groups": [
            ("Copies of one file", _groups(report.duplicates.groups, part)),
            ("Images that look alike", _groups(report.duplicates.alike_groups, part)),
        ],
        "examples": _examples(part),
    }


def _groups(groups: Sequence[Group], part: Part) -> list[dict[str, object]]:
    # Those across the splits are the dangerous ones.
    across_first = sorted(groups, key=lambda group: len(set(group.held_out)) < 2)
    return [
        {
            "count": group.count,
            "figures": [
                _figure(part, row, name + (" (held out)" if held_out else ""))
                for row, name, held_out in zip(group.rows, group.names, group.held_out, strict=True)
            ],
        }
        for group in across_first[:_GROUPS]
    ]


def _examples(part: Part) -> list[_Figure]:
    rows = np.flatnonzero(part.fit)
    places = np.linspace(0, len(rows) - 1, min(_EXAMPLES, len(rows))).round().astype(int)
    return [
        _figure(part, int(row), " / ".join(part.captions[int(row)]) if part.captions else "")
        for row in rows[np.unique(places)]
    ]


def _figure(part: Part, row: int, caption: str) -> _Figure:
    assert part.opened is not None
    try:
        image = to_rgb(open_picture(part.opened.rows.picture(row), at_least=_THUMBNAIL))
    except (OSError, ValueError):  # gone since it was read
        return _Figure(caption[:200], None)
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    return _Figure(caption[:200], data_uri(image, quality=85))


def _captions(captions: CaptionReport) -> dict[str, object]:
    longest = [("longest caption", captions.longest[:400])] if captions.longest else []
    return {
        "facts": caption_facts(captions) + longest,
        "token_bins": captions.token_bins,
        "repeated": [(one.label[:200], f"{one.count:,}") for one in captions.repeated[:_LISTED]],
    }
