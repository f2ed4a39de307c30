"""A diagnosis as one HTML page that stands alone: what the table says, with images. Knows HTML
and thumbnails; finds nothing out.

Whatever comes from the data (names, captions, messages) is escaped.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence

import numpy as np

from pipeline.data.readers.images import open_picture
from pipeline.doctor.inspect_source import Part
from pipeline.doctor.report import Bin, CaptionReport, Diagnosis, Group, SourceReport
from pipeline.doctor.text_report import numbers, pixels, vocabulary_share
from stage1_tokenizer.pixels import to_rgb

_THUMBNAIL = 96
_GROUPS = 20
"""Groups of copies, and of images that look alike, that are shown."""
_EXAMPLES = 24
"""Usable images that are shown with their captions, evenly spread."""
_LISTED = 20
_TITLES = {
    "fails": "Training would stop",
    "warns": "Training would suffer",
    "notes": "Good to know",
}


def as_page(diagnosis: Diagnosis, parts: Sequence[Part], suggested: str | None) -> str:
    """The page; `parts` are what the diagnosis was made of, in the order of its sources."""
    name = _text(" + ".join(source.name for source in diagnosis.sources))
    verdict = "Training would stop" if diagnosis.fails else "Training can start"
    body = [f"<h1>{name}</h1><p class={'fails' if diagnosis.fails else 'fine'}>{verdict}.</p>"]
    for level, title in _TITLES.items():
        found = [finding.text for finding in diagnosis.findings if finding.level == level]
        if found:
            body.append(
                f"<h3 class={level}>{title}</h3><ul>{''.join(f'<li>{_text(text)}</li>' for text in found)}</ul>"
            )
    for source, part in zip(diagnosis.sources, parts, strict=True):
        body.append(_source(source, part, title=len(parts) > 1))
    if diagnosis.captions is not None:
        body.append(_captions(diagnosis.captions))
    if suggested is not None:
        body.append(f"<h2>Suggested configuration</h2><pre>{_text(suggested)}</pre>")
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><title>doctor: "
        f"{name}</title><style>{_STYLE}</style>{''.join(body)}</html>\n"
    )


def _source(source: SourceReport, part: Part, *, title: bool) -> str:
    several = source.duplicates
    facts = {
        "pictures" + (" looked at, of more" if source.first_only else ""): f"{source.rows:,}",
        "readable": f"{source.readable:,}",
        "usable": f"{source.usable:,}: {source.train:,} to train on, {source.held_out:,} held out",
        "shorter side": pixels(source.shorter_side),
        "longer side": pixels(source.longer_side),
        "copies of other files": f"{several.copies:,} ({several.held_out_copies:,} held-out "
        "images have one in training)",
        "alike without being copies": f"{several.alike:,} ({several.held_out_alike:,} held-out "
        "images look like one in training)",
        "plain surfaces": f"{several.plain:,}",
    }
    parts = [f"<h2>{_text(source.name) if title else 'Pictures'}</h2>", _facts(facts)]
    parts += [
        _bars("Shorter sides, pixels", source.sides),
        _bars("Longer over shorter side", source.aspects),
    ]
    parts += [_bars("Modes", source.modes), _bars("Formats by name", source.formats)]
    if source.left_out:
        rows = [
            [_text(left.reason), f"{left.count:,}", _text(left.names)] for left in source.left_out
        ]
        parts.append("<h3>Left out</h3>" + _table(["reason", "pictures", "the first"], rows))
    if source.unreadable:
        rows = [[_text(one.name), _text(one.problem)] for one in source.unreadable[:_LISTED]]
        more = source.rows - source.readable - len(rows)
        parts.append(
            "<h3>Unreadable</h3>"
            + _table(["picture", "why"], rows)
            + (f"<p>and {more:,} more (doctor.json)</p>" if more else "")
        )
    parts.append(_groups("Copies of one file", several.groups, part))
    parts.append(_groups("Images that look alike", several.alike_groups, part))
    parts.append(_examples(part))
    return "".join(parts)


def _groups(title: str, groups: Sequence[Group], part: Part) -> str:
    if not groups:
        return ""
    shown = []
    # Those across the splits are the dangerous ones.
    for group in sorted(groups, key=lambda group: len(set(group.held_out)) < 2)[:_GROUPS]:
        pictures = [
            _figure(part, row, name + (" (held out)" if held_out else ""))
            for row, name, held_out in zip(group.rows, group.names, group.held_out, strict=True)
        ]
        more = (
            f"<p>and {group.count - len(pictures):,} more</p>"
            if group.count > len(pictures)
            else ""
        )
        shown.append(f"<div class=group>{''.join(pictures)}{more}</div>")
    return f"<h3>{title}</h3>{''.join(shown)}"


def _examples(part: Part) -> str:
    rows = np.flatnonzero(part.fit)
    if not len(rows) or part.opened is None:
        return ""
    some = rows[
        np.unique(np.linspace(0, len(rows) - 1, min(_EXAMPLES, len(rows))).round().astype(int))
    ]
    figures = [
        _figure(part, int(row), " / ".join(part.captions[int(row)]) if part.captions else "")
        for row in some
    ]
    return f"<h3>Some of the usable images</h3><div class=group>{''.join(figures)}</div>"


def _figure(part: Part, row: int, caption: str) -> str:
    assert part.opened is not None
    try:
        image = to_rgb(open_picture(part.opened.rows.picture(row), at_least=_THUMBNAIL))
    except (OSError, ValueError):  # gone since it was looked at
        return f"<figure><figcaption>{_text(caption)}</figcaption></figure>"
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    data = base64.b64encode(buffer.getvalue()).decode()
    shown = f'<img src="data:image/jpeg;base64,{data}" alt="">'
    return f"<figure>{shown}<figcaption>{_text(caption[:200])}</figcaption></figure>"


def _captions(captions: CaptionReport) -> str:
    facts = {
        "captions": f"{captions.captions:,}, {captions.distinct:,} of them distinct",
        "images that share a caption": f"{captions.shared:,}",
        "characters": numbers(captions.characters),
        "different words": f"{captions.words:,}, {captions.words_once:,} of them once",
    }
    if captions.tokens is not None:
        facts |= {
            "text slots needed": f"{numbers(captions.tokens)}; there are {captions.length}",
            "captions too long": f"{captions.too_long:,}",
            "vocabulary used": f"{captions.vocabulary_used:,} of {captions.vocabulary:,} entries "
            f"({vocabulary_share(captions):.1%})",
            "longest caption": captions.longest[:400],
        }
    repeated = [[_text(one.label[:200]), f"{one.count:,}"] for one in captions.repeated[:_LISTED]]
    again = (
        "<h3>Captions of several images</h3>" + _table(["caption", "pictures"], repeated)
        if repeated
        else ""
    )
    return (
        f"<h2>Captions</h2>{_facts(facts)}{_bars('Text slots needed', captions.token_bins)}{again}"
    )


def _facts(facts: dict[str, str]) -> str:
    rows = "".join(
        f"<tr><th>{_text(name)}</th><td>{_text(fact)}</td></tr>"
        for name, fact in facts.items()
        if fact
    )
    return f"<table class=facts>{rows}</table>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are HTML already."""
    lines = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><tr>{''.join(f'<th>{name}</th>' for name in head)}</tr>{lines}</table>"


def _bars(title: str, bins: Sequence[Bin]) -> str:
    if not bins:
        return ""
    most = max(one.count for one in bins)
    rows = "".join(
        f"<tr><th>{_text(one.label)}</th><td>{one.count:,}</td><td class=bar><i "
        f"style='width:{100 * one.count / most:.1f}%'></i></td></tr>"
        for one in bins
    )
    return f"<h3>{_text(title)}</h3><table class=bars>{rows}</table>"


def _text(value: str) -> str:
    return html.escape(value)


_STYLE = """body{font:16px system-ui,sans-serif;max-width:1040px;margin:2em auto;padding:0 1em;color:#222}
h2{margin-top:2em;border-bottom:1px solid #ccc}table{border-collapse:collapse}
td,th{text-align:left;padding:.15em 1em .15em 0;vertical-align:top;overflow-wrap:anywhere}
.facts th,.bars th{font-weight:normal;color:#666;white-space:nowrap}
.bars td{text-align:right}.bars .bar{width:24em;text-align:left}.bar i{display:block;background:#285aa0;height:.8em;margin-top:.3em}
.group{display:flex;flex-wrap:wrap;gap:.5em;padding:.5em;margin:.5em 0;background:#f4f4f4}
figure{margin:0;width:112px}figure img{display:block;margin:auto}figcaption{font-size:12px;overflow-wrap:anywhere}
pre{background:#f4f4f4;padding:1em;overflow-x:auto}
.fails{color:#b00020}.warns{color:#9a5b00}.fine{color:#1b6e2c}p.fails,p.fine{font-size:1.3em}"""
