"""What is written of an image -> its captions. Knows columns, templates and lengths; knows no
files and no images."""

from __future__ import annotations

import math
import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import AnyStr

import pyarrow as pa

from pipeline.config.data import CaptionLines, DataConfig
from pipeline.data.readers.base import (
    BAD_CAPTION,
    LONG_CAPTION,
    NoCaptions,
    Record,
    Rows,
    SkipCounter,
    existing_column,
)
from pipeline.data.readers.written_lists import texts_of_list

LONGEST = 2**16
"""Most characters of a caption. Tokenizers abort the process on texts of many megabytes."""
NO_TEXT = "images without a caption left out"
MISSING = "images whose caption is NaN, null or the like left out"
LISTS = "images whose caption is a list written as text, read item by item"
UNCAPTIONED = (NO_TEXT, MISSING)
"""Reasons for which images are left out only where captions are required."""
TEXT_COLUMNS = ("text", "txt", "caption", "captions")
"""Columns of captions where `data.text_column` has its default; the first that is there counts. In
shards, columns are file extensions."""
LINES_READ: dict[CaptionLines, str] = {
    "each": "each line is a caption",
    "joined": "lines are joined",
    "first": "the first line counts",
}
"""What `data.caption_lines` does, for the user."""
CAPTION_FILES = "caption files"
"""The name of the fact (`Rows.facts`) that captions are lines of text files."""
_MISSING = frozenset(
    (
        *("#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN"),
        *("<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"),
    )
)
"""Texts that stand for a missing cell: the defaults of pandas.read_csv (`na_values`)."""


@dataclass(frozen=True)
class FoundCaptions:
    """What a source says of one image.

    Attributes:
        texts: its captions within the length limits, each once.
        reasons: what was left out or changed, for a `SkipCounter`.
    """

    texts: list[str]
    reasons: list[str]


class Captions:
    """The captions of many images, in little memory."""

    def __init__(self, captions: Iterable[list[str]]) -> None:
        self._lists = pa.array(captions, pa.large_list(pa.large_string()))

    def __len__(self) -> int:
        return len(self._lists)

    @property
    def total(self) -> int:
        """Captions of all images together."""
        return len(self._lists.flatten())

    def __getitem__(self, index: int) -> list[str]:
        return self._lists[index].as_py()


class CaptionReader:
    """How a source's records become captions.

    Args:
        name: of the source, for messages.
        columns: that it has.
        config: names the column or the template.

    Raises:
        NoCaptions: no column is named, and none that is known is there.
        ValueError: a named column is missing, or the template is invalid.
    """

    def __init__(self, name: str, columns: Sequence[str], config: DataConfig) -> None:
        self.template = config.caption_template
        self._least = config.filter.min_caption
        self._most = config.filter.max_caption
        if self.template is None:
            self.columns = [_text_column(name, columns, config.text_column)]
            return
        try:
            fields = [
                part
                for _, part, _, _ in string.Formatter().parse(self.template)
                if part is not None
            ]
        except ValueError as error:
            raise ValueError(
                f"data.caption_template {self.template!r} is no template ({error}); write 'a photo "
                f"of a {{label}}'"
            ) from error
        if not fields:
            raise ValueError(
                f"data.caption_template {self.template!r} names no column; write 'a photo of a "
                f"{{label}}'"
            )
        self.columns = [
            existing_column(name, part, columns, "data.caption_template")
            for part in dict.fromkeys(fields)
        ]

    def of(self, records: Sequence[Record]) -> FoundCaptions:
        """The captions of one image."""
        found: dict[str, None] = {}
        reasons: dict[str, None] = {}
        for record in records:
            try:
                texts = self._texts(record, reasons)
            except UnicodeDecodeError:
                reasons[BAD_CAPTION] = None
                continue
            except RecursionError:
                reasons[LONG_CAPTION] = None
                continue
            for text in texts:
                if len(text) > LONGEST:
                    reasons[LONG_CAPTION] = None
                    continue
                text = text.strip("\ufeff \t\r\n").strip().encode("utf-8", "replace").decode()
                if len(text) >= self._least and (self._most is None or len(text) <= self._most):
                    found[text] = None
        if found:
            reasons.pop(MISSING, None)
        elif MISSING not in reasons:
            reasons[NO_TEXT] = None
        return FoundCaptions(list(found), list(reasons))

    def _texts(self, record: Record, reasons: dict[str, None]) -> list[str]:
        """The captions of one record. Adds why there are none."""
        if any(_is_missing(record.get(column)) for column in self.columns):
            reasons[MISSING] = None
            return []
        if self.template is None:
            value = record.get(self.columns[0])
            if isinstance(value, list | tuple):
                return [_plain(item) for item in value]
            text = _plain(value)
            if (listed := texts_of_list(text)) is not None:
                reasons[LISTS if listed else MISSING] = None
                return listed
            return [text]
        values = {column: _plain(record.get(column)) for column in self.columns}
        if not all(values.values()):
            return []
        return [
            "".join(
                text + (values[part] if part else "")
                for text, part, _, _ in string.Formatter().parse(self.template)
            )
        ]


def captions_of(
    rows: Rows, config: DataConfig, tally: SkipCounter, *, required: bool = True
) -> Captions:
    """The captions of every row; those without any are counted where captions are required.

    Raises:
        NoCaptions: no row has one, and they are required.
        ValueError: a named column is missing, or the template is invalid.
    """
    reader = caption_reader(rows.name, rows.columns, config, required=required)
    if reader is None:
        return Captions([] for _ in range(len(rows)))

    own = SkipCounter()

    def each() -> Iterable[list[str]]:
        for row, records in enumerate(rows.records(reader.columns)):
            found = reader.of(records)
            for reason in found.reasons:
                if required or reason not in UNCAPTIONED:
                    own.add(reason, rows.label(row))
            yield found.texts

    captions = Captions(each())
    if required and len(rows) and not captions.total:
        why = "; ".join(rows.tally.lines() + own.lines())
        raise NoCaptions(
            f"{rows.name} holds {len(rows)} images and no captions: {why}; add some (docs/data.md)"
        )
    tally.merge(own)
    return captions


def caption_reader(
    name: str, columns: Sequence[str], config: DataConfig, *, required: bool
) -> CaptionReader | None:
    """How captions are read; None where none are required, no column is named, and none is known.
    Raises as `CaptionReader`."""
    try:
        return CaptionReader(name, columns, config)
    except NoCaptions:
        if required:
            raise
        return None


def _text_column(name: str, columns: Sequence[str], wanted: str) -> str:
    if wanted != "text":
        return existing_column(name, wanted, columns, "data.text_column")
    wanted = next((known for known in TEXT_COLUMNS if known in columns), wanted)
    if wanted not in columns and any(str(one).endswith(".txt") for one in columns):
        wanted = "txt"  # a named part of a shard's samples, found by its ending
    try:
        lacks = f"{name} holds images and no column of captions: it"
        return existing_column(lacks, wanted, columns, "data.text_column")
    except ValueError as error:
        raise NoCaptions(f"{error}; add one (docs/data.md)") from error


def lines_of(text: AnyStr, how: CaptionLines) -> list[AnyStr]:
    """The captions of a text file with several lines."""
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if line]
    if how == "joined" and lines:
        space = text[:0].ljust(1)  # " " of the text's own kind
        return [space.join(lines)]
    return lines[:1] if how == "first" else lines


def _is_missing(cell: object) -> bool:
    """Whether a cell stands for none. Items of a list never do: they are lines of a text file, or
    names of classes."""
    if isinstance(cell, bytes):
        return cell.strip().decode("latin-1") in _MISSING
    if isinstance(cell, str):
        return cell.strip() in _MISSING
    return isinstance(cell, float) and math.isnan(cell)


def _plain(value: object) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, list | tuple):
        return ", ".join(filter(None, map(_plain, value)))
    # Parquet and shards may hold texts as bytes, and str() would write them as b'...'.
    return (value.decode("utf-8-sig") if isinstance(value, bytes) else str(value)).strip()
