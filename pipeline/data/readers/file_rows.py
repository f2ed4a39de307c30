"""`FileRows`: images that are files or base64, and what is written of them, in little memory. Knows
no layouts; decodes nothing."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

import pyarrow as pa

from pipeline.data.readers.base import (
    Record,
    Rows,
    SkipCounter,
    content_fingerprint,
    file_signature,
)
from pipeline.data.readers.files import MAX_IMAGE_BYTES, read_file

_LONGEST_PATH = 1024
_BASE64 = ("data:", "iVBORw0KGgo", "/9j/4", "R0lGOD", "UklGR", "SUkqA", "TU0AK")
"""First characters of PNG, JPEG, GIF, WebP and TIFF in base64, and of a data URI."""


class FileRows(Rows):
    """Images of a folder, or of a table of paths.

    Args:
        name: of the source, for messages.
        root: the folder that paths are relative to.
        named: image -> what is written of it, in order. An image is a path relative to `root`, or
            base64.
        facts: what was understood of the layout, as names and values for the user.
    """

    def __init__(
        self,
        name: str,
        root: Path,
        named: dict[str, list[Record]],
        columns: list[str],
        tally: SkipCounter,
        facts: Sequence[tuple[str, str]] = (),
    ) -> None:
        self.name = name
        self.root = root
        self.columns = columns
        self.tally = tally
        self.facts = list(facts)
        # A million paths take a tenth of the memory of Python strings.
        self._images = pa.array(list(named), pa.large_string())
        self._counts = pa.array([len(records) for records in named.values()], pa.int32())
        # As JSON, since a column may hold a text in one row and a list in the next.
        self._records = pa.array(
            [json.dumps(record) for records in named.values() for record in records],
            pa.large_string(),
        )
        self.layout = f"{len(named):,} image files"
        # Names relative to the root: moving it changes nothing.
        self.stamp = content_fingerprint(self._state(image) for image in named)

    def __len__(self) -> int:
        return len(self._images)

    def label(self, row: int) -> str:
        image = self._images[row].as_py()
        return f"row {row}" if is_inline(image) else image

    def image(self, row: int) -> bytes:
        image = self._images[row].as_py()
        if not is_inline(image):
            return read_file(self.root / image, MAX_IMAGE_BYTES)
        try:
            return base64.b64decode(image.rpartition("base64,")[2], validate=True)
        except binascii.Error as error:
            raise ValueError(
                f"row {row} is neither a path nor base64 ({error}); write one of them"
            ) from error

    def records(self, columns: Sequence[str]) -> Iterator[list[Record]]:
        first = 0
        for count in self._counts:
            yield [json.loads(self._records[first + i].as_py()) for i in range(count.as_py())]
            first += count.as_py()

    def _state(self, image: str) -> object:
        return image if is_inline(image) else file_signature(self.root / image, image)


def is_inline(cell: str) -> bool:
    """Whether a cell of images holds one in base64 rather than a path."""
    return cell.startswith(_BASE64) or len(cell) > _LONGEST_PATH


def of_path(image: str) -> Record:
    """What a path says. Lists, since a name such as "none" is no missing cell."""
    path = PurePosixPath(image)
    return {"folder": [path.parent.name], "name": [path.stem]}
