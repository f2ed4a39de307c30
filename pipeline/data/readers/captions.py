"""What is written of an image -> its captions. Knows columns, templates and lengths; knows no
files and no images."""

from __future__ import annotations

import string
from collections.abc import Iterable, Sequence

import pyarrow as pa

from pipeline.config.data import DataConfig
from pipeline.data.readers.base import (
    BAD_CAPTION,
    NoCaptions,
    Record,
    Rows,
    SkipCounter,
    existing_column,
)

NO_TEXT = "images without a caption left out"


class Captions:
    """The captions of many images, in little memory."""

    def __init__(self, captions: Iterable[list[str]]) -> None:
        self._lists = pa.array(captions, pa.large_list(pa.large_string()))

    def __len__(self) -> int:
        return len(self._lists)

    def __getitem__(self, index: int) -> list[str]:
        return self._lists[index].as_py()


class CaptionReader:
    """How a source's records become captions.

    Args:
        name: of the source, for messages.
        columns: that it has.
        config: names the column or the template.

    Raises:
        ValueError: a column is missing, or the template is invalid.
    """

    def __init__(self, name: str, columns: Sequence[str], config: DataConfig) -> None:
        self.template = config.caption_template
        self._least = config.filter.min_caption
        self._most = config.filter.max_caption
        if self.template is None:
            # In shards, columns are file extensions.
            column = (
                "txt"
                if config.text_column == "text" and "text" not in columns and "txt" in columns
                else config.text_column
            )
            self.columns = [existing_column(name, column, columns, "data.text_column")]
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

    def of(self, records: Sequence[Record]) -> tuple[list[str], bool]:
        """The captions of one image within the length limits, each once; and whether a text was
        skipped because it is not UTF-8."""
        found: dict[str, None] = {}
        undecodable = False
        for record in records:
            try:
                texts = self._texts(record)
            except UnicodeDecodeError:
                undecodable = True
                continue
            for text in texts:
                text = text.strip().encode("utf-8", "replace").decode()
                if len(text) >= self._least and (self._most is None or len(text) <= self._most):
                    found[text] = None
        return list(found), undecodable

    def _texts(self, record: Record) -> list[str]:
        if self.template is None:
            value = record.get(self.columns[0])
            return (
                [_plain(item) for item in value]
                if isinstance(value, list | tuple)
                else [_plain(value)]
            )
        values = {column: _plain(record.get(column)) for column in self.columns}
        if not all(values.values()):
            return []
        return [
            "".join(
                text + (values[part] if part else "")
                for text, part, _, _ in string.Formatter().parse(self.template)
            )
        ]


def captions_of(rows: Rows, config: DataConfig, tally: SkipCounter) -> Captions:
    """The captions of every row; those without any are counted.

    Raises:
        NoCaptions: there are images and no columns.
        ValueError: a column is missing, or the template is invalid.
    """
    if not rows.columns:
        raise NoCaptions(f"{rows.name} holds {len(rows)} images and no column of captions")
    reader = CaptionReader(rows.name, rows.columns, config)

    def each() -> Iterable[list[str]]:
        for row, records in enumerate(rows.records(reader.columns)):
            texts, undecodable = reader.of(records)
            if undecodable:
                tally.add(BAD_CAPTION, rows.label(row))
            if not texts:
                tally.add(NO_TEXT, rows.label(row))
            yield texts

    return Captions(each())


def captions_if_any(rows: Rows, config: DataConfig) -> Captions:
    """The captions of every row; none at all where they cannot be read."""
    try:
        return captions_of(rows, config, SkipCounter())
    except ValueError:
        return Captions([] for _ in range(len(rows)))


def _plain(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, list | tuple):
        return ", ".join(filter(None, map(_plain, value)))
    # Parquet and shards may hold texts as bytes, and str() would write them as b'...'.
    return (value.decode("utf-8-sig") if isinstance(value, bytes) else str(value)).strip()
