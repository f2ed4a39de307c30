"""A list of paths: a .txt file with one image per line. Knows lines and files; decodes nothing."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from pipeline.config.data import DataConfig
from pipeline.data.readers.base import (
    BAD_CAPTION,
    NoCaptions,
    Record,
    SkipCounter,
    is_text,
    printable,
    text_of,
)
from pipeline.data.readers.folder import NO_CAPTION, FileRows

LIST_SUFFIX = ".txt"
_NOT_THERE = "paths that lead to no file left out"
_TWICE = "paths that are listed several times read once"


def path_list_rows(file: Path, config: DataConfig, *, require_captions: bool = True) -> FileRows:
    """The images of a list. Paths are absolute, or relative to the list's folder; blank lines are
    skipped. NAME.txt next to NAME.png has its captions, as in a folder.

    Raises:
        NoCaptions: no image has a caption, and they are required.
        ValueError: the list leads to no image.
    """
    tally = SkipCounter()
    named: dict[str, list[Record]] = {}
    beside = config.text_column == "text" and config.caption_template is None
    # Not splitlines(): it also splits at characters that a name may hold.
    text = text_of(file).replace("\r\n", "\n").replace("\r", "\n")
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    found: dict[str, None] = {}
    for line in lines:
        image = _existing(file.parent, line)
        if image is None:
            tally.add(_NOT_THERE, line)
        elif image in found:
            tally.add(_TWICE, image)
        else:
            found[image] = None
    if not found:
        first = f"; the first: {printable(lines[0])}" if lines else ""
        raise ValueError(
            f"{file} has {len(lines)} lines and none leads to an image{first}; write one path per "
            f"line, absolute or relative to {file.parent}"
        )
    for image in found:
        path = PurePosixPath(image)
        record: Record = {"folder": path.parent.name, "name": path.stem}
        captions = _captions(file.parent / image, tally) if beside else []
        if beside and not captions and require_captions:
            tally.add(NO_CAPTION, image)
            continue
        named[image] = [record | ({"text": captions} if captions else {})]
    if not named:
        raise NoCaptions(
            f"{file} lists {len(found)} images and no caption; put NAME.txt next to NAME.png, or "
            "set data.caption_template"
        )
    columns = ["folder", "name", *(["text"] if beside else [])]
    return FileRows(str(file), file.parent, named, columns, tally)


def _existing(folder: Path, line: str) -> str | None:
    """A line's path as it leads to a file, also where Windows wrote it; None where it does not."""
    for path in (line, line.replace("\\", "/")):
        try:
            if "\0" not in path and is_text(path) and (folder / path).is_file():
                return path
        except OSError:  # the name is too long
            continue
    return None


def _captions(image: Path, tally: SkipCounter) -> list[str]:
    caption = image.with_suffix(".txt")
    try:
        return [line.strip() for line in text_of(caption).splitlines() if line.strip()]
    except FileNotFoundError:
        return []
    except ValueError:
        tally.add(BAD_CAPTION, str(caption))
        return []
