"""A list of paths: a .txt file with one image per line. Knows lines and files; decodes nothing."""

from __future__ import annotations

import itertools
from pathlib import Path

from pipeline.config.data import DataConfig
from pipeline.data.readers.base import NoCaptions, SkipCounter, text_of
from pipeline.data.readers.files import MAX_TABLE_BYTES
from pipeline.data.readers.folder import FileRows, columns_of, of_path, rows_of_paths
from pipeline.data.readers.paths import FileFinder, ImageNames

LIST_SUFFIX = ".txt"
_TWICE = "paths that are listed several times read once"
_LOOKED_AT = 20
"""Lines by which a list of paths is told from a list of captions."""


def is_path_list(file: Path) -> bool:
    """Whether a .txt file lists paths: one of its first lines as a whole leads to a file.

    Raises:
        ValueError: it is no text, or no regular file; or several files match a line.
    """
    if file.suffix.lower() != LIST_SUFFIX:
        return False
    finder = FileFinder(file.parent)
    first = itertools.islice(_lines(file), _LOOKED_AT)
    return any("\0" not in line and finder.find(line) is not None for line in first)


def path_list_rows(file: Path, config: DataConfig, *, require_captions: bool = True) -> FileRows:
    """The images of a list. Paths are absolute, or relative to the list's folder; blank lines are
    skipped. The text file next to an image has its captions, as in a folder.

    Raises:
        NoCaptions: no image has a caption, and they are required.
        ValueError: several files match a line.
    """
    tally = SkipCounter()
    names = ImageNames(file, file.parent, tally)
    found: dict[str, None] = {}
    for number, line in enumerate(_lines(file), start=1):
        image = names.find(line, number)
        if image in found:
            tally.add(_TWICE, image)
        elif image is not None:
            found[image] = None
    captions_tally = tally if require_captions else SkipCounter()
    named, facts = rows_of_paths(file.parent, list(found), captions_tally, config)
    if not named and require_captions:
        raise NoCaptions(
            f"{file} lists {len(found)} images and no caption; put NAME.txt next to NAME.png, or "
            "set data.caption_template"
        )
    if not require_captions:
        named = {image: named.get(image, [of_path(image)]) for image in found}
    return FileRows(str(file), file.parent, named, columns_of(named), tally, facts)


def _lines(file: Path) -> list[str]:
    # Not splitlines(): it also splits at characters that a name may hold.
    text = text_of(file, MAX_TABLE_BYTES).replace("\r\n", "\n").replace("\r", "\n")
    return [line.strip() for line in text.split("\n") if line.strip()]
