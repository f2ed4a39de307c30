"""Images that are files: a folder with captions, or a table of paths. Knows layouts; decodes
nothing.

A folder's captions come from metadata.csv and the like, from NAME.txt or NAME.caption next to
NAME.png, from a list such as captions.txt, or from the names of its subfolders by
`data.caption_template`. A table (tables.py) has a column of paths, or of images in base64.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TypeGuard

from pipeline.config.data import DataConfig
from pipeline.data.readers.base import (
    BAD_CAPTION,
    LONG_CAPTION,
    NO_FILE,
    OUTSIDE,
    NoCaptions,
    Record,
    SkipCounter,
    existing_column,
    image_column,
    is_text,
    printable,
    text_of,
    unread_caption,
)
from pipeline.data.readers.captions import CAPTION_FILES, LINES_READ, CaptionReader, lines_of
from pipeline.data.readers.file_rows import FileRows, is_inline, of_path
from pipeline.data.readers.files import MAX_TEXT_BYTES, LeavesFolder, check_link, leaves, parse_json
from pipeline.data.readers.images import EXTENSIONS, UNREAD
from pipeline.data.readers.paths import FOLDED, FileFinder, ImageNames, image_folder, is_file
from pipeline.data.readers.tables import Table, read_table

LAYOUTS = """accepted are
  images/metadata.csv with the columns file_name,text      (cat.png,a cat on a mat)
  images/metadata.jsonl, one row per line                  ({"file_name": "cat.png", "text": "a cat on a mat"})
  images/cat.png next to images/cat.txt or cat.caption     (a cat on a mat)
  images/captions.txt, one caption per line                (cat.png,a cat on a mat)
  images/cat/1.png with data.caption_template              ("a photo of a {folder}")
  a COCO or other .json of captions, given as data.source itself"""
LINKED = "links to folders not followed (give each as a part of data.mix, or copy it there)"
NO_CAPTION = "images that no caption names left out"
CLOSED = "folders that cannot be read left out"
CAPTION_ENDINGS = (".txt", ".caption", ".json")
"""Of the text file next to an image; the first that is there counts."""
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.tsv", "metadata.json")
"""Lists of a folder's images and their captions; the first that is there counts."""
CAPTION_LISTS = tuple(f"captions.{ending}" for ending in ("txt", "csv", "tsv", "jsonl", "json"))
"""Tables in a folder that are read where no image has a caption next to it."""
_TEXT_ENDINGS = (
    *(".txt", ".caption", ".captions", ".cap", ".text", ".csv", ".tsv", ".json", ".jsonl"),
    *(".ndjson", ".xml", ".yaml", ".yml", ".xlsx", ".parquet", ".tar", ".list", ".lst", ".token"),
)
"""Files that an error names where no caption is found."""
_JSON_KEYS = ("text", "caption", "captions", "prompt")
"""Of the caption in the JSON file next to an image; the first that is there counts."""
_SAMPLED = 100
"""Names of a table by which its folder of images is found."""


def folder_rows(
    folder: Path, config: DataConfig, *, require_captions: bool = True, root: Path | None = None
) -> FileRows:
    """A folder in whichever layout it has. Without `require_captions`, images that have none are
    among its rows.

    Args:
        config: of the captions.
        root: the whole source, which links may not leave; the folder itself where absent.

    Raises:
        NoCaptions: there are no captions, and they are required.
        ValueError: a column is missing, or a path leads out of the source.
    """
    tally = SkipCounter()
    root = root or folder
    images = _images_below(folder, root, tally, config.follow_links)
    if (metadata := file_of(folder, METADATA)) is not None:
        check_link(metadata, root, config.follow_links)
        return _rows_of_metadata(folder, metadata, images, tally, config, require_captions)
    captions = file_of(folder, CAPTION_LISTS)
    named: dict[str, list[Record]] = {}
    facts: list[tuple[str, str]] = []
    if captions is None or not _needs_table(config):
        named, facts = rows_of_paths(folder, images, tally, config, root)
    if not named and captions is not None:
        check_link(captions, root, config.follow_links)
        tally.drop(NO_CAPTION)  # those without a text file
        inside = InFolder(root, images, tally)
        return table_rows(captions, config, require_captions=require_captions, inside=inside)
    if not require_captions:
        tally.drop(NO_CAPTION)
        named = {image: named.get(image, [of_path(image)]) for image in images}
    if not named:
        why = (BAD_CAPTION, LONG_CAPTION, NO_FILE, OUTSIDE, CLOSED)
        unread = [line for line in tally.lines() if any(reason in line for reason in why)]
        raise NoCaptions(
            f"{folder} holds {len(images)} images and no captions; {_texts_in(folder)}"
            f"{'; '.join(unread) or LAYOUTS}"
        )
    return FileRows(str(folder), folder, named, columns_of(named), tally, facts)


def _needs_table(config: DataConfig) -> bool:
    """Whether the settings name columns that no path says."""
    if not _names_columns(config):
        return False
    try:
        CaptionReader("", list(of_path("")), config)
    except ValueError:
        return True
    return False


def _names_columns(config: DataConfig) -> bool:
    return config.text_column != "text" or config.caption_template is not None


def _rows_of_metadata(
    folder: Path,
    metadata: Path,
    images: list[str],
    tally: SkipCounter,
    config: DataConfig,
    require_captions: bool,
) -> FileRows:
    table = read_table(metadata, config.delimiter)
    named = _named(metadata, table, set(images), tally)
    for image in images:
        if image not in named and require_captions:
            tally.add(NO_CAPTION, image)
        elif image not in named:
            named[image] = [of_path(image)]
    column = table.image_column or "file_name"
    columns = ["folder", "name", *(c for c in table.columns if c != column)]
    facts = [("table", f"{metadata.name}, {table.kind}"), ("image column", column)]
    return FileRows(
        str(folder), folder, dict(sorted(named.items())), list(dict.fromkeys(columns)), tally, facts
    )


def columns_of(named: Mapping[str, list[Record]]) -> list[str]:
    """The columns of rows."""
    return list(dict.fromkeys(column for records in named.values() for column in records[0]))


def rows_of_paths(
    folder: Path, images: Sequence[str], tally: SkipCounter, config: DataConfig, root: Path
) -> tuple[dict[str, list[Record]], list[tuple[str, str]]]:
    """Image -> what the text file next to it or its path says; and where that is from. With the
    default column, images without a text file are left out. Links may not leave `root`."""
    if _names_columns(config):
        facts = [("folders", "their names are the column folder")]
        return {image: [of_path(image)] for image in images}, facts
    return _captions_beside(folder, images, tally, config, root)


def _captions_beside(
    folder: Path, images: Sequence[str], tally: SkipCounter, config: DataConfig, root: Path
) -> tuple[dict[str, list[Record]], list[tuple[str, str]]]:
    """Image -> what the text file next to it says; and which files there are."""
    finder = FileFinder(folder)
    named: dict[str, list[Record]] = {}
    endings: Counter[str] = Counter()
    for image in images:
        file = _file_beside(finder, image, tally)
        if file is None:
            tally.add(*_no_caption(folder, image))
            continue
        try:
            check_link(folder / file, root, config.follow_links)
            text = text_of(folder / file, MAX_TEXT_BYTES)
        except LeavesFolder:
            tally.add(OUTSIDE, file)
            continue
        except (OSError, ValueError) as error:
            tally.add(unread_caption(error), file)
            continue
        ending = PurePosixPath(file).suffix.lower()
        texts = _texts_of_json(text) if ending == ".json" else [text]
        if not texts:
            tally.add(NO_CAPTION, image)
            continue
        endings[ending] += 1
        lines = [line for one in texts for line in lines_of(one, config.caption_lines)]
        named[image] = [of_path(image) | {"text": lines}]
    if not named:
        return {}, []
    files = ", ".join(f"{count:,} {ending}" for ending, count in endings.most_common())
    how = LINES_READ[config.caption_lines]
    return named, [(CAPTION_FILES, f"{files} next to the images; {how}")]


def _texts_of_json(text: str) -> list[str]:
    """The captions in the JSON file next to an image; none where it has no such key."""
    try:
        content = parse_json(text)
    except ValueError:
        return []
    values = (
        [content[key] for key in _JSON_KEYS if key in content] if isinstance(content, dict) else []
    )
    first = values[0] if values else None
    texts = first if isinstance(first, list) else [first]
    return [one for one in texts if isinstance(one, str) and one.strip()]


def _no_caption(folder: Path, image: str) -> tuple[str, str]:
    """Why an image has no caption next to it, and what to name."""
    for ending in CAPTION_ENDINGS:
        name = PurePosixPath(image).with_suffix(ending)
        if (folder / name).exists():
            return NO_FILE, str(name)
    return NO_CAPTION, image


def _file_beside(finder: FileFinder, image: str, tally: SkipCounter) -> str | None:
    """The text file next to an image."""
    for ending in CAPTION_ENDINGS:
        name = str(PurePosixPath(image).with_suffix(ending))
        found = finder.find(name)
        if found is not None:
            if found != name:
                tally.add(FOLDED, f"{found} for {image}")
            return found
    return None


def file_of(folder: Path, names: Sequence[str]) -> Path | None:
    """The first of these files that a folder has, in any letter case."""
    try:
        present = {name.lower(): folder / name for name in os.listdir(folder)}
    except OSError:  # it cannot be read, which is counted
        return None
    files = (present[name] for name in names if name in present)
    return next((file for file in files if is_file(file)), None)


def _texts_in(folder: Path) -> str:
    """Which files lie there that may hold captions: their number by ending, and the first names."""
    found: dict[str, list[str]] = {}
    for where, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if Path(name).suffix.lower() in _TEXT_ENDINGS and not name.startswith("."):
                path = (Path(where) / name).relative_to(folder).as_posix()
                found.setdefault(Path(name).suffix.lower(), []).append(path)
    if not found:
        return ""
    kinds = [
        f"{len(names):,} {ending} ({printable(names[0])}{', ...' if len(names) > 1 else ''})"
        for ending, names in sorted(found.items(), key=lambda item: -len(item[1]))
    ]
    return f"other files there: {', '.join(kinds)}; "


@dataclass(frozen=True)
class InFolder:
    """The folder that a table came with. Such a table is not trusted as one that the user names.

    Attributes:
        root: the source, outside of which it may name no image.
        images: all images of the folder, relative to it.
        tally: what was left out of them.
    """

    root: Path
    images: Sequence[str]
    tally: SkipCounter


def table_rows(
    file: Path, config: DataConfig, *, require_captions: bool = True, inside: InFolder | None = None
) -> FileRows:
    """A table of images by paths relative to its own folder, or to a folder of images next to it.

    Args:
        config: names the column of the images and the delimiter, or neither.
        require_captions: count images that no row names, rather than keep them.
        inside: the folder whose table it is.

    Raises:
        ValueError: the column of the images is missing, or a row is corrupted; or a COCO file's
            images are not there; or an image lies outside of the folder.
    """
    table = read_table(file, config.delimiter)
    column = table.image_column or image_column(str(file), config.image_column, table.columns)
    cells = [_only(row.get(column)) for row in table.rows]
    paths = [cell for cell in table.images or cells if _is_path(cell)]
    root, tried = image_folder(file, paths[:_SAMPLED])
    if root is None and table.images:
        raise ValueError(
            f"{file} names {printable(', '.join(paths[:3]))}, ..., and none is in "
            f"{', '.join(map(str, tried))}; put the images into a folder images next to the file"
        )
    tally = inside.tally if inside is not None else SkipCounter()
    names = ImageNames(file, root or file.parent, tally)
    beside = os.path.relpath(root or file.parent, file.parent)
    named: dict[str, list[Record]] = {}
    spelled: dict[str, str] = {}  # an image that is written in several ways is one
    for number, (cell, row) in enumerate(zip(cells, table.rows, strict=True), start=1):
        if not isinstance(cell, str) or not cell.strip() or "\0" in cell or not is_text(cell):
            tally.add("rows that name no image left out", f"row {number}")
            continue
        image = cell if is_inline(cell) else names.find(cell, number)
        if image is None:
            continue
        if not is_inline(cell):
            image = image if beside == "." else os.path.join(beside, image)
            image = spelled.setdefault(os.path.normpath(image), image)
            if inside is not None and _leaves(file, image, inside.root, config.follow_links):
                continue
        of_row = {key: value for key, value in row.items() if key != column}
        named.setdefault(image, []).append((of_path(image) if inside else {}) | of_row)
    for image in _unnamed(file, table, root or file.parent, inside, named):
        if require_captions:
            tally.add(NO_CAPTION, image)
        else:
            named[image] = [of_path(image) if inside else {}]
    facts = [("table", f"{file.name}, {table.kind}"), ("image column", column)]
    if beside != ".":
        facts.append(("images in", beside))
    columns = [*(of_path("") if inside else ()), *(c for c in table.columns if c != column)]
    return FileRows(str(file), file.parent, named, list(dict.fromkeys(columns)), tally, facts)


def _leaves(table: Path, image: str, root: Path, follow_links: bool) -> bool:
    """Whether an image that a table of a folder names is a link to outside of the source, which was
    counted before. Raises ValueError where the name itself lies outside."""
    path = Path(os.path.abspath(table.parent / image))
    if not path.is_relative_to(os.path.abspath(root)):
        raise ValueError(
            f"{table} names {image!r}, which lies outside the folder; move the image into it, or "
            "give the table itself as data.source"
        )
    return not follow_links and leaves(path, root)


def _unnamed(
    file: Path, table: Table, root: Path, inside: InFolder | None, named: Mapping[str, object]
) -> list[str]:
    """The images that no row names: of the table's folder, or of those that a COCO file lists."""
    if inside is not None:
        images = list(inside.images)
    else:
        finder = ImageNames(file, root, SkipCounter())
        found = (finder.find(name, number) for number, name in enumerate(table.images, start=1))
        images = [
            os.path.relpath(root / image, file.parent) for image in found if image is not None
        ]
    known = {os.path.abspath(file.parent / image) for image in named if not is_inline(image)}
    return [image for image in images if os.path.abspath(file.parent / image) not in known]


def _only(cell: object) -> object:
    """What a cell holds, where it is a list of one."""
    return cell[0] if isinstance(cell, list) and len(cell) == 1 else cell


def _is_path(cell: object) -> TypeGuard[str]:
    return isinstance(cell, str) and bool(cell.strip()) and not is_inline(cell)


def _images_below(folder: Path, root: Path, tally: SkipCounter, follow_links: bool) -> list[str]:
    found = []

    def closed(error: OSError) -> None:
        tally.add(CLOSED, str(error.filename))

    # Links to folders are not followed: they may lead back here.
    for where, folders, files in os.walk(folder, onerror=closed):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        below = Path(where).relative_to(folder)
        for name in folders:
            if os.path.islink(os.path.join(where, name)):
                tally.add(LINKED, (below / name).as_posix())
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
            elif not is_file(Path(where) / name):
                tally.add("links to images that are not there left out", image)
            elif not follow_links and leaves(Path(where) / name, root):
                tally.add(OUTSIDE, image)
            else:
                found.append(image)
    return sorted(found)


def _named(
    metadata: Path, table: Table, images: set[str], tally: SkipCounter
) -> dict[str, list[Record]]:
    names = ImageNames(metadata, metadata.parent, tally, images)
    column = table.image_column or "file_name"
    named: dict[str, list[Record]] = {}
    for number, row in enumerate(table.rows, start=1):
        if not any(str(value or "").strip() for value in row.values()):
            continue
        where = f"{metadata} row {number}"
        existing_column(where, column, list(row), "it names the image")
        name = row[column]
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"{where} names no image: {column} is {name!r}; write a path there")
        image = names.find(name, number)
        if image is not None:
            record = {key: value for key, value in row.items() if key != column}
            named.setdefault(image, []).append(of_path(image) | record)
    return named
