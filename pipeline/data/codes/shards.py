"""One Arrow file of a codes dataset: written atomically, checked, memory-mapped. Knows rows and
bytes; knows no tokenizer and not which files belong together.

One row per image: `codes` (all views one after another), `text` (its first caption, null where it
has none), `more_texts` (its others), `row` (its number in its split of the source, where unusable
images do not count), `name` (its file or row in the source). Files are Arrow streams with the
schema metadata of `datasets`, so `Dataset.from_file` reads them too.
"""

from __future__ import annotations

import mmap
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.runtime.atomic_io import atomic_write, sha256_of

_BATCH = 1000
"""Rows of a record batch; so many are in memory while a file is written."""
_SMALL_CODES = 2**16
"""Codes below this are 16-bit integers."""


@dataclass(frozen=True)
class EncodedRows:
    """Some rows, encoded."""

    codes: np.ndarray
    """(B,N) integers, all views one after another."""
    captions: Sequence[Sequence[str]]
    """Those of each image."""
    numbers: Sequence[int]
    """The images' numbers in the source."""
    names: Sequence[str]
    """The images' files or rows in the source."""


@dataclass(frozen=True)
class Shard:
    """What identifies a complete file."""

    name: str
    rows: int
    captions: int
    """Of all its rows together."""
    bytes: int
    sha256: str


def kind_of(levels: Iterable[dict[str, Any]]) -> str:
    """The integers that hold the codes of a manifest's `levels`."""
    return "uint16" if all(level["num_codes"] <= _SMALL_CODES for level in levels) else "int32"


def write_shard(path: Path, blocks: Iterable[EncodedRows], *, codes: int, kind: str) -> Shard:
    """Writes rows of `codes` integers of type `kind` each; some thousand rows are in memory at a
    time.

    Raises:
        OSError: the disk is full or the folder cannot be written; a file that `path` held before is
            kept.
    """
    schema = _schema(codes, kind)
    rows = 0
    captions = 0
    with atomic_write(path) as beside:
        with pa.OSFile(str(beside), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            for batch in _batches(blocks, schema):
                writer.write_batch(batch)
                rows += len(batch)
                captions += len(batch) - batch.column("text").null_count
                captions += len(batch.column("more_texts").flatten())
        written = described(beside, rows=rows, captions=captions)
    return replace(written, name=path.name)


def described(path: Path, *, rows: int, captions: int) -> Shard:
    """What identifies a file that was just written."""
    return Shard(path.name, rows, captions, path.stat().st_size, sha256_of(path))


def verify_shard(path: Path, shard: Shard, *, hashed: bool) -> str | None:
    """What is wrong with a file; None where it has the right size and, with `hashed`, the right
    content."""
    if not path.is_file():
        return "is missing"
    if (size := path.stat().st_size) != shard.bytes:
        return (
            f"is truncated or corrupted: it has {size:,} bytes and was written with {shard.bytes:,}"
        )
    if hashed and sha256_of(path) != shard.sha256:
        return "is corrupted: its content is not what was written"
    return None


def schema_of(path: Path) -> pa.Schema:
    """The columns of a file; it may have no rows."""
    with pa.OSFile(str(path)) as file, pa.ipc.open_stream(file) as reader:
        return reader.schema


def read_batches(path: Path) -> Iterator[pa.RecordBatch]:
    """The rows of a file, some thousand at a time."""
    with pa.OSFile(str(path)) as file, pa.ipc.open_stream(file) as reader:
        yield from reader


class OpenShard:
    """A file's rows by their position, memory-mapped.

    Raises:
        ValueError: it is not such a file.
    """

    def __init__(self, path: Path) -> None:
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            batches = list(pa.ipc.open_stream(pa.py_buffer(self._map)))
            self._ends = list(accumulate(len(batch) for batch in batches))
            self._codes = [_values(batch.column("codes"), len(batch)) for batch in batches]
            self._columns = [
                tuple(batch.column(name) for name in ("text", "more_texts", "row"))
                for batch in batches
            ]
            self._names = [
                batch.column("name") if "name" in batch.schema.names else None for batch in batches
            ]
        except (pa.ArrowException, KeyError, OSError, ValueError) as error:
            raise ValueError(
                f"{path} cannot be read ({error}); move it away and run `minidalle encode` again"
            ) from error

    def codes(self, row: int) -> np.ndarray:
        """(N,) integers, a view of the file."""
        batch, within = self._find(row)
        return self._codes[batch][within]

    def text(self, row: int) -> str:
        """The first caption, or '' where there is none."""
        batch, within = self._find(row)
        return self._columns[batch][0][within].as_py() or ""

    def texts(self, row: int) -> list[str]:
        """All captions, the first one first."""
        batch, within = self._find(row)
        text, more, _ = self._columns[batch]
        return [one for one in (text[within].as_py(), *more[within].as_py()) if one is not None]

    def number(self, row: int) -> int:
        batch, within = self._find(row)
        return self._columns[batch][2][within].as_py()

    def name(self, row: int) -> str:
        """The image's file or row in the source; its number where the file has no names."""
        batch, within = self._find(row)
        names = self._names[batch]
        return f"row {self.number(row)}" if names is None else names[within].as_py()

    def release(self) -> None:
        """Releases mapped pages to the system, which reads them again when they are needed."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)

    def _find(self, row: int) -> tuple[int, int]:
        batch = bisect_right(self._ends, row)
        return batch, row - (self._ends[batch - 1] if batch else 0)


def _schema(codes: int, kind: str) -> pa.Schema:
    from datasets import Features, List, Value

    texts = {"text": Value("string"), "more_texts": List(Value("string"))}
    source = {"row": Value("int64"), "name": Value("string")}
    return Features({"codes": List(Value(kind), length=codes), **texts, **source}).arrow_schema


def _batches(blocks: Iterable[EncodedRows], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    waiting: list[EncodedRows] = []
    for block in blocks:
        waiting.append(block)
        if sum(len(rows.captions) for rows in waiting) >= _BATCH:
            yield _batch(waiting, schema)
            waiting = []
    if waiting:
        yield _batch(waiting, schema)


def _batch(blocks: list[EncodedRows], schema: pa.Schema) -> pa.RecordBatch:
    kind = schema.field("codes").type
    codes = np.concatenate([block.codes for block in blocks]).astype(
        kind.value_type.to_pandas_dtype()
    )
    captions = [texts for block in blocks for texts in block.captions]
    columns = [
        pa.FixedSizeListArray.from_arrays(pa.array(codes.reshape(-1)), type=kind),
        pa.array([texts[0] if texts else None for texts in captions], pa.string()),
        pa.array([texts[1:] for texts in captions], schema.field("more_texts").type),
        pa.array([number for block in blocks for number in block.numbers], pa.int64()),
        pa.array([name for block in blocks for name in block.names], pa.string()),
    ]
    return pa.record_batch(columns, schema=schema)


def _values(column: Any, rows: int) -> np.ndarray:
    return column.flatten().to_numpy(zero_copy_only=True).reshape(rows, -1)
