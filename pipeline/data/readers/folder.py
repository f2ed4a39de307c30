"""Images that are files: a folder with captions, or a table of paths. Knows layouts; decodes
nothing.

A folder's captions come from metadata.jsonl or metadata.csv, from NAME.txt next to NAME.png, or
from the names of its subfolders by `data.caption_template`. A table is a .csv or .jsonl file with a
column of paths, or of images in base64.
"""

from __future__ import annotations

import base64
import binascii
import csv
import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath

import pyarrow as pa

from pipeline.data.readers.base import (
    BAD_CAPTION,
    NoCaptions,
    Record,
    SkipCounter,
    content_fingerprint,
    existing_column,
    file_signature,
    image_column,
    is_text,
    listed,
    printable,
    text_of,
)
from pipeline.data.readers.images import EXTENSIONS, UNREAD

TABLE_SUFFIXES = (".csv", ".jsonl")
LAYOUTS = """accepted are
  images/metadata.csv with the columns file_name,text      (cat.png,a cat on a mat)
  images/metadata.jsonl, one row per line                  ({"file_name": "cat.png", "text": "a cat on a mat"})
  images/cat.png next to images/cat.txt                    (a cat on a mat)
  images/cat/1.png with data.caption_template              ("a photo of a {folder}")"""
NO_CAPTION = "images that no caption names left out"
CLOSED = "folders that cannot be read left out"
NO_IMAGE = "captions of images that are not there left out"
_METADATA = ("metadata.jsonl", "metadata.csv")
_LONGEST_PATH = 1024
_BASE64 = ("data:", "iVBORw0KGgo", "/9j/4", "R0lGOD", "UklGR", "SUkqA", "TU0AK")
"""First characters of PNG, JPEG, GIF, WebP and TIFF in base64, and of a data URI."""


class FileRows:
    """Images of a folder, or of a table of paths.

    Args:
        name: of the source, for messages.
        root: the folder that paths are relative to.
        named: image -> what is written of it, in order. An image is a path relative to `root`, or
            base64.
    """

    def __init__(
        self,
        name: str,
        root: Path,
        named: dict[str, list[Record]],
        columns: list[str],
        tally: SkipCounter,
    ) -> None:
        self.name = name
        self.root = root
        self.columns = columns
        self.tally = tally
        # A million paths take a tenth of the memory of Python strings.
        self._images = pa.array(list(named), pa.large_string())
        self._counts = pa.array([len(records) for records in named.values()], pa.int32())
        # As JSON, since a column may hold a text in one row and a list in the next.
        self._records = pa.array(
            [json.dumps(record) for records in named.values() for record in records],
            pa.large_string(),
        )
        self.stamp = content_fingerprint([name, *(self._state(image) for image in named)])

    def __len__(self) -> int:
        return len(self._images)

    def label(self, row: int) -> str:
        image = self._images[row].as_py()
        return f"row {row}" if is_inline(image) else image

    def image(self, row: int) -> bytes:
        image = self._images[row].as_py()
        if not is_inline(image):
            return (self.root / image).read_bytes()
        try:
            return base64.b64decode(image.rpartition("base64,")[2], validate=True)
        except binascii.Error as error:
            raise ValueError(f"row {row} is neither a path nor base64 ({error})") from error

    def records(self, columns: Sequence[str]) -> Iterator[list[Record]]:
        first = 0
        for count in self._counts:
            yield [json.loads(self._records[first + i].as_py()) for i in range(count.as_py())]
            first += count.as_py()

    def _state(self, image: str) -> object:
        return image if is_inline(image) else file_signature(self.root / image)


def folder_rows(
    folder: Path, text_column: str, template: str | None, *, require_captions: bool = True
) -> FileRows:
    """A folder in whichever layout it has. Without `require_captions`, images that have none are
    among its rows.

    Raises:
        NoCaptions: there are no captions, and they are required.
        ValueError: a column is missing, or a path leads out of the folder.
    """
    tally = SkipCounter()
    images = _images_below(folder, tally)
    columns = ["folder", "name"]
    metadata = next((folder / name for name in _METADATA if (folder / name).is_file()), None)
    if metadata is not None:
        rows = list(_rows_of(metadata))
        columns = list(dict.fromkeys([*columns, *(column for row in rows for column in row)]))
        columns = [column for column in columns if column != "file_name"]
        named = _named(metadata, rows, set(images), tally)
        for image in images:
            if image not in named and require_captions:
                tally.add(NO_CAPTION, image)
            elif image not in named:
                path = PurePosixPath(image)
                named[image] = [{"folder": path.parent.name, "name": path.stem}]
        named = dict(sorted(named.items()))
    else:
        named = {}
        beside = text_column == "text" and template is None
        for image in images:
            path = PurePosixPath(image)
            record: Record = {"folder": path.parent.name, "name": path.stem}
            if beside:
                try:
                    record["text"] = [
                        line.strip()
                        for line in text_of((folder / image).with_suffix(".txt")).splitlines()
                    ]
                except FileNotFoundError:
                    if require_captions:
                        tally.add(NO_CAPTION, image)
                        continue
                except ValueError:
                    tally.add(BAD_CAPTION, str(path.with_suffix(".txt")))
                    if require_captions:
                        continue
            named[image] = [record]
        if beside:
            columns.append("text")
        if not named:
            unread = [line for line in tally.lines() if BAD_CAPTION in line or CLOSED in line]
            raise NoCaptions(
                f"{folder} holds {len(images)} images and no captions; "
                f"{'; '.join(unread) or LAYOUTS}"
            )
    return FileRows(str(folder), folder, named, columns, tally)


def table_rows(file: Path, column: str | None) -> FileRows:
    """A .csv or .jsonl file of paths relative to its own folder.

    Raises:
        ValueError: the column of the images is missing, or a row is corrupted.
    """
    rows = list(_rows_of(file))
    tally = SkipCounter()
    columns = list(dict.fromkeys(column for row in rows for column in row))
    column = image_column(str(file), column, columns)
    named: dict[str, list[Record]] = {}
    for number, row in enumerate(rows, start=1):
        image = row.get(column)
        if not isinstance(image, str) or not image or "\0" in image or not is_text(image):
            tally.add("rows that name no image left out", f"row {number}")
        elif not is_inline(image) and not _is_file(file.parent / image):
            tally.add(NO_IMAGE, image)
        else:
            named.setdefault(image, []).append(
                {key: value for key, value in row.items() if key != column}
            )
    return FileRows(str(file), file.parent, named, [c for c in columns if c != column], tally)


def is_inline(cell: str) -> bool:
    """Whether a cell of images holds one in base64 rather than a path."""
    return cell.startswith(_BASE64) or len(cell) > _LONGEST_PATH


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # the name is too long
        return False


def _images_below(folder: Path, tally: SkipCounter) -> list[str]:
    found = []

    def closed(error: OSError) -> None:
        tally.add(CLOSED, str(error.filename))

    # Links to folders are not followed: they may lead back here.
    for where, folders, files in os.walk(folder, onerror=closed):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        below = Path(where).relative_to(folder)
        for name in files:
            extension = Path(name).suffix.lower()
            image = (below / name).as_posix()
            if name.startswith("."):  # such as ._cat.jpg, which is no image
                continue
            if extension in UNREAD:
                tally.add(
                    f"images of kinds that are not read ({', '.join(EXTENSIONS)} are) left out",
                    image,
                )
            elif extension not in EXTENSIONS:
                continue
            elif not is_text(image):
                tally.add("images whose names are not UTF-8 left out", ascii(image))
            elif not _is_file(Path(where) / name):
                tally.add("links to images that are not there left out", image)
            else:
                found.append(image)
    return sorted(found)


def _named(
    metadata: Path, rows: list[Record], images: set[str], tally: SkipCounter
) -> dict[str, list[Record]]:
    named: dict[str, list[Record]] = {}
    for number, row in enumerate(rows, start=1):
        where = f"{metadata} row {number}"
        existing_column(where, "file_name", list(row), "it names the image")
        name = row["file_name"]
        if not isinstance(name, str) or not name:
            raise ValueError(f"{where} names no image: file_name is {name!r}")
        path = PurePosixPath(os.path.normpath(name.replace("\\", "/")))
        if path.is_absolute() or path.parts[:1] == ("..",):
            raise ValueError(f"{where} names {name!r}, which lies outside the folder")
        if path.as_posix() not in images:
            tally.add(NO_IMAGE, name)
            continue
        record = {"folder": path.parent.name, "name": path.stem} | {
            key: value for key, value in row.items() if key != "file_name"
        }
        named.setdefault(path.as_posix(), []).append(record)
    return named


def _rows_of(path: Path) -> Iterable[Record]:
    text = text_of(path)
    if path.suffix.lower() == ".csv":
        return _rows_of_csv(path, text)
    return _rows_of_jsonl(path, text)


def _rows_of_csv(path: Path, text: str) -> list[Record]:
    csv.field_size_limit(2**31 - 1)  # images in base64 are long
    head = text.partition("\n")[0].strip()
    if "," not in head and (other := next((mark for mark in ";\t|" if mark in head), None)):
        raise ValueError(
            f"{path} separates its columns by {other!r} ({printable(head)}); save it with commas"
        )
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        rows = [dict(row) for row in reader]
    except csv.Error as error:
        raise ValueError(
            f"{path} is no CSV ({error}); texts with commas or line ends belong in double quotes"
        ) from error
    for number, row in enumerate(rows, start=1):
        if None in row:
            raise ValueError(
                f"{path} row {number} has more fields than its columns "
                f"{listed(reader.fieldnames or [])}; texts with commas belong in double quotes"
            )
    return rows


def _rows_of_jsonl(path: Path, text: str) -> list[Record]:
    rows = []
    # Not splitlines(): it also splits at characters that JSON allows inside a text.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                raise ValueError(
                    f"{path} line {number} is no JSON ({error}); each line must be one row"
                ) from error
            if not isinstance(row, dict):
                raise ValueError(
                    f"{path} line {number} is no row; write "
                    f'{{"file_name": "cat.png", "text": "a cat"}}'
                )
            rows.append(row)
    return rows
