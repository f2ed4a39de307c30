"""A list of paths: a .txt file with one image per line. Knows lines and files; decodes nothing."""

from __future__ import annotations

import os
from pathlib import Path

from pipeline.config.data import DataConfig
from pipeline.data.readers.base import NoCaptions, SkipCounter, printable, text_of
from pipeline.data.readers.file_rows import FileRows, of_path
from pipeline.data.readers.files import MAX_TABLE_BYTES
from pipeline.data.readers.folder import NO_CAPTION, columns_of, rows_of_paths
from pipeline.data.readers.paths import FileFinder, ImageNames
from pipeline.data.readers.tables import MARKS, as_character

LIST_SUFFIX = ".txt"
_TWICE = "paths that are listed several times read once"
_NOT_THERE = "paths that lead to no file left out"


def is_path_list(file: Path, delimiter: str | None = None) -> bool:
    """Whether a .txt file lists paths, and not captions: its first line has none of the marks that
    separate a name from its caption, or leads to a file as a whole.

    Args:
        delimiter: the only mark (`data.delimiter`).

    Raises:
        ValueError: it is no text, or no regular file; or several files match the line.
    """
    if file.suffix.lower() != LIST_SUFFIX:
        return False
    first = next(iter(_lines(file)), "")
    marks = MARKS if delimiter is None else (as_character(delimiter),)
    if not any(mark in first for mark in marks):
        return True
    return "\0" not in first and FileFinder(file.parent).find(first) is not None


def path_list_rows(file: Path, config: DataConfig, *, require_captions: bool = True) -> FileRows:
    """The images of a list. Paths are absolute, or relative to the list's folder; blank lines are
    skipped. The text file next to an image has its captions, as in a folder.

    Raises:
        NoCaptions: no image has a caption, and they are required.
        ValueError: the list leads to no image, or several files match a line.
    """
    tally = SkipCounter()
    names = ImageNames(file, file.parent, tally, missing=_NOT_THERE)
    as_listed: dict[str, str] = {}  # by the absolute path
    lines = _lines(file)
    for number, line in enumerate(lines, start=1):
        image = names.find(line, number)
        if image is None:
            continue
        path = os.path.abspath(file.parent / image)
        if path in as_listed:
            tally.add(_TWICE, image)
        else:
            as_listed[path] = image
    found = list(as_listed.values())
    if not found:
        first = f"; the first: {printable(lines[0])}" if lines else ""
        raise ValueError(
            f"{file} has {len(lines)} lines and none leads to an image{first}; write one path per "
            f"line, absolute or relative to {file.parent}"
        )
    named, facts = rows_of_paths(file.parent, found, tally, config, file.parent)
    if not named and require_captions:
        raise NoCaptions(
            f"{file} lists {len(found)} images and no caption; put NAME.txt next to NAME.png, or "
            "set data.caption_template"
        )
    if not require_captions:
        tally.drop(NO_CAPTION)
        named = {image: named.get(image, [of_path(image)]) for image in found}
    return FileRows(str(file), file.parent, named, columns_of(named), tally, facts)


def _lines(file: Path) -> list[str]:
    # Not splitlines(): it also splits at characters that a name may hold.
    text = text_of(file, MAX_TABLE_BYTES).replace("\r\n", "\n").replace("\r", "\n")
    return [line.strip() for line in text.split("\n") if line.strip()]
