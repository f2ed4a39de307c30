"""A `datasets` name, a folder saved by `datasets`, or Parquet files. Knows columns and splits;
decodes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.config.data import DataConfig
from pipeline.data.readers.base import (
    Record,
    SkipCounter,
    content_fingerprint,
    file_signature,
    image_column,
    reason_of,
)
from pipeline.data.readers.files import MAX_IMAGE_BYTES, read_file
from pipeline.data.readers.parquet_limits import check_inflated

_BATCH = 1000
_SHARDS = 64
"""Shards in which a data set on this disk is streamed."""


class HubRows:
    """The `train` split of a data set, or whichever comes first."""

    def __init__(self, config: DataConfig) -> None:
        from datasets import Image

        self.name = config.source
        self.tally = SkipCounter()
        rows = load(config)
        self._image = image_column(self.name, config.image_column, rows.column_names)
        self.columns = [column for column in rows.column_names if column != self._image]
        paths = (
            not isinstance(rows.features[self._image], Image)
            and getattr(rows.features[self._image], "dtype", "") == "string"
        )
        if isinstance(rows.features[self._image], Image):
            # Undecoded, so that a corrupted image is reported here.
            rows = rows.cast_column(self._image, Image(decode=False))
        self._rows = rows
        # A table of its own, so that reading captions does not read images.
        self._images = rows.select_columns([self._image])
        self._beside = Path(config.source).expanduser().parent
        # The library's fingerprint does not cover files that rows only name.
        files = (
            (
                file_signature(self._beside / str(self._images[row][self._image]))
                for row in range(len(rows))
            )
            if paths
            else ()
        )
        self.stamp = content_fingerprint([rows._fingerprint, self._image, *files])

    def __len__(self) -> int:
        return len(self._rows)

    def label(self, row: int) -> str:
        return f"row {row}"

    def image(self, row: int) -> bytes:
        return content_of(self._images[row][self._image], self._beside)

    def records(self, columns: Sequence[str]) -> Iterator[list[Record]]:
        rows = self._rows.select_columns(list(columns))
        named = label_names(rows.features)
        for batch in rows.iter(_BATCH):
            for i in range(len(batch[columns[0]])):
                yield [{column: named(column, batch[column][i]) for column in columns}]


def content_of(cell: object, beside: Path) -> bytes:
    """The file in a cell of images: bytes, a path relative to `beside`, or the pair of both that
    `datasets` uses.

    Raises:
        ValueError: it is none of these.
        OSError: the file cannot be read.
    """
    if isinstance(cell, dict):
        cell = cell.get("bytes") or cell.get("path")
    if isinstance(cell, bytes):
        return cell
    if isinstance(cell, str) and cell and "\0" not in cell:
        return read_file(beside / cell, MAX_IMAGE_BYTES)
    raise ValueError(f"it holds {type(cell).__name__} and no image")


def label_names(features: Mapping[str, object]) -> Callable[[str, object], object]:
    """(column, value) -> the value, or its name where the column holds class labels."""
    from datasets import ClassLabel

    labels = {
        column: feature for column, feature in features.items() if isinstance(feature, ClassLabel)
    }

    def named(column: str, value: object) -> object:
        return (
            labels[column].int2str(value)
            if column in labels and isinstance(value, int) and value >= 0
            else value
        )

    return named


def load(config: DataConfig, *, streaming: bool = False) -> Any:
    """The data set, mapped or streamed; the library's types are not known here.

    Raises:
        FileNotFoundError: it does not exist, or the library cannot read it.
        ValueError: a Parquet file inflates to many times its size.
    """
    import datasets

    path = Path(config.source).expanduser()
    if path.suffix == ".parquet" and path.exists():
        check_inflated(path)
    try:
        if path.is_dir():
            loaded = datasets.load_from_disk(str(path))
        elif path.suffix == ".parquet":
            loaded = datasets.load_dataset("parquet", data_files=str(path), streaming=streaming)
        else:
            loaded = datasets.load_dataset(config.source, streaming=streaming)
    except Exception as error:  # the library raises many kinds for a name that cannot be had
        raise FileNotFoundError(
            f"data.source {config.source!r} is no folder or file here and no data set that can be "
            f"loaded ({reason_of(error)}); give shapes, emoji, a folder of images, a file or "
            "shards (docs/data.md), or a datasets name with network access"
        ) from error
    if isinstance(loaded, dict):
        loaded = loaded["train"] if "train" in loaded else next(iter(loaded.values()))
    if streaming and isinstance(loaded, datasets.Dataset):
        return loaded.to_iterable_dataset(num_shards=min(_SHARDS, max(len(loaded), 1)))
    return loaded


def is_saved_dataset(path: Path) -> bool:
    """Whether a folder was written by `datasets`' save_to_disk."""
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()
