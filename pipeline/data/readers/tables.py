"""Files of rows -> records: .csv, .tsv, .jsonl, .json and lists of captions in .txt. Knows how rows
are written; knows no image and no folder."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from pipeline.data.readers.base import IMAGE_COLUMNS, Record, listed, printable, text_of
from pipeline.data.readers.coco import CocoFile, coco_file, karpathy_rows
from pipeline.data.readers.conversations import conversation_column, with_first_answer
from pipeline.data.readers.files import parse_json
from pipeline.data.readers.images import EXTENSIONS

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".txt")
MARKS = {",": "comma", "\t": "tab", ";": "semicolon", "|": "bar"}
"""Delimiters that are recognized, and what to call them."""
_ENDINGS = "|".join(re.escape(ending) for ending in EXTENSIONS)
_SEPARATOR_LINE = re.compile(r"""sep=(.)\s*\n""")
"""Excel's first line, which names the delimiter."""


def _image_first(line: str, delimiter: str | None) -> re.Match[str] | None:
    """Matches a line that starts with the name of an image, with or without the number of its
    caption as in Flickr8k's `1.jpg#0`."""
    marks = re.escape("".join(MARKS) if delimiter is None else delimiter)
    return re.match(
        rf"""\s*(?P<quote>"?)(?P<name>[^{marks}"]+?({_ENDINGS}))(\#\d+)?(?P=quote)\s*(?P<mark>[{marks}]|$)""",
        line,
        re.IGNORECASE,
    )


@dataclass(frozen=True)
class Table:
    """The rows of a file.

    Attributes:
        rows: a record each.
        columns: of all rows, in order.
        kind: what the file is, for the user.
        image_column: the column of the images, where the kind of file says it.
        images: all images, where the file lists them apart from its rows.
    """

    rows: list[Record]
    columns: list[str]
    kind: str
    image_column: str | None = None
    images: Sequence[str] = ()


def read_table(path: Path, delimiter: str | None = None) -> Table:
    """The rows of a file, by its ending.

    Args:
        delimiter: between the columns of .csv, .tsv and .txt; None finds it.

    Raises:
        ValueError: a row is corrupted, or the file holds no rows; names the line or what it holds.
    """
    text = text_of(path)
    delimiter = delimiter and as_character(delimiter)
    match path.suffix.lower():
        case ".jsonl" | ".ndjson":
            return _table(_rows_of_jsonl(path, text), "rows in JSON, one per line")
        case ".json":
            return _table_of_json(path, text)
        case ".txt":
            return _table_of_list(path, text, delimiter)
        case _:
            return _table_of_csv(path, text, delimiter)


def as_character(delimiter: str) -> str:
    """The character that a delimiter in settings stands for."""
    return "\t" if delimiter == r"\t" else delimiter


def _table(rows: list[Record], kind: str, image_column: str | None = None) -> Table:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    if (turns := conversation_column(columns)) is not None:
        rows = [with_first_answer(row, turns) for row in rows]
        columns = [*(column for column in columns if column != turns), "text"]
        kind += f", captions from the first answers of {turns}"
    return Table(rows, columns, kind, image_column)


def _table_of_csv(path: Path, text: str, delimiter: str | None) -> Table:
    if (stated := _SEPARATOR_LINE.match(text)) is not None:
        delimiter = delimiter or stated[1]
        text = text[stated.end() :]
    first = _first_line(text)
    listed_first = _image_first(first, delimiter)
    if delimiter is None and listed_first is not None and listed_first["mark"]:
        delimiter = listed_first["mark"]
    delimiter = delimiter or _delimiter_of(path, first)
    rows = _cells(path, text, delimiter)
    header = [cell.strip("\ufeff \t") for cell in rows[0]] if rows else []
    called = f"columns separated by {MARKS.get(delimiter, repr(delimiter))}"
    if listed_first is not None and not set(header) & set(IMAGE_COLUMNS):
        header = ["image", "text"]
        called += ", without a header line"
    else:
        rows = rows[1:]
    records = []
    for number, row in enumerate(rows, start=1):
        if len(row) > len(header):
            raise ValueError(
                f"{path} row {number} has more fields than its columns {listed(header)}; texts "
                f"with {MARKS.get(delimiter, repr(delimiter))}s belong in double quotes"
            )
        records.append(_record(header, row))
    return Table(records, list(dict.fromkeys(header)), called)


def _record(header: list[str], row: list[str]) -> Record:
    """The cells of a row by their columns; those of a column that occurs twice are a list."""
    cells: dict[str, list[str | None]] = {}
    for column, cell in zip_longest(header, row):
        cells.setdefault(column, []).append(cell)
    return {
        column: own[0] if len(own) == 1 else [cell for cell in own if cell and cell.strip()]
        for column, own in cells.items()
    }


def _cells(path: Path, text: str, delimiter: str) -> list[list[str]]:
    csv.field_size_limit(2**31 - 1)  # images in base64 are long
    # Tables with tabs often have texts with single quotes inside, which need no doubling there.
    for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_NONE):
        reader = csv.reader(
            io.StringIO(text, newline=""),
            delimiter=delimiter,
            quoting=quoting,
            skipinitialspace=True,
            strict=True,
        )
        try:
            return [row for row in reader if row]
        except csv.Error as error:
            if delimiter != "\t" or quoting == csv.QUOTE_NONE:
                raise ValueError(
                    f"{path} is no CSV ({error}); texts with commas or line ends belong in double "
                    "quotes"
                ) from error
    return []


def _delimiter_of(path: Path, header: str) -> str:
    """The delimiter of a header line.

    Raises:
        ValueError: several are possible.
    """
    plain = re.sub(r'"[^"]*"', "x", header)
    found = [mark for mark in MARKS if mark in plain]
    usual = "\t" if path.suffix.lower() == ".tsv" else ","
    if len(found) < 2:
        return found[0] if found else usual
    with_image = [
        mark
        for mark in found
        if {cell.strip('" \ufeff') for cell in header.split(mark)} & set(IMAGE_COLUMNS)
    ]
    for candidates in (with_image, found):
        if usual in candidates:
            return usual
        if len(candidates) == 1:
            return candidates[0]
    raise ValueError(
        f"{path} may separate its columns by {' or '.join(MARKS[mark] for mark in found)} "
        f"({printable(header)}); set data.delimiter"
    )


def _table_of_list(path: Path, text: str, delimiter: str | None) -> Table:
    """Lines of `1.jpg,a cat`, `1.jpg#0<TAB>a cat` or `1.jpg|a cat`, or a table with a header."""
    plain = text.replace("\r\n", "\n").replace("\r", "\n")
    first = _first_line(plain)
    found = _image_first(first, delimiter)
    if found is not None:
        delimiter = delimiter or found["mark"] or ","
        header = ["image", "text"] if found["mark"] else ["image"]
    else:
        delimiter = delimiter or _delimiter_of(path, first)
        header = [cell.strip('" \ufeff') for cell in first.split(delimiter)]
        if len(header) != 2:
            return _table_of_csv(path, text, delimiter)
    rows = []
    for number, line in enumerate(plain.split("\n"), start=1):
        if not line.strip() or (found is None and line == first):
            continue
        name, mark, caption = line.partition(delimiter)
        if not mark and len(header) > 1:
            called = MARKS.get(delimiter, delimiter)
            raise ValueError(
                f"{path} line {number} ({printable(line)}) has no {called} between "
                f"{listed(header)}; add it, or set data.delimiter"
            )
        cells = (_unquoted(re.sub(r"#\d+\s*$", "", name)), _unquoted(caption))
        rows.append(dict(zip(header, cells, strict=False)))
    called = f"lines separated by {MARKS.get(delimiter, repr(delimiter))}"
    return Table(rows, header, called if len(header) > 1 else "names of images, one per line")


def _unquoted(cell: str) -> str:
    cell = cell.strip().strip("\ufeff")
    quoted = len(cell) > 1 and cell.startswith('"') and cell.endswith('"')
    return cell[1:-1].replace('""', '"') if quoted else cell


def _first_line(text: str) -> str:
    return next((line.rstrip("\r") for line in text.split("\n") if line.strip()), "")


def _rows_of_jsonl(path: Path, text: str) -> list[Record]:
    rows = []
    # Not splitlines(): it also splits at characters that JSON allows inside a text.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                row = parse_json(line.strip("\ufeff"))
            except ValueError as error:
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


def _table_of_json(path: Path, text: str) -> Table:
    """COCO captions, also by Karpathy's splits; a list of rows, alone or as the only list of an
    object; an object of captions by the names of their images; or rows that each have a line."""
    try:
        content = parse_json(text)
    except ValueError as error:
        if _is_jsonl(text):
            return _table(_rows_of_jsonl(path, text), "rows in JSON, one per line")
        raise ValueError(
            f"{path} is no JSON ({error}); rows that each have a line belong in a .jsonl file"
        ) from error
    if isinstance(content, dict) and (coco := coco_file(path, content)) is not None:
        return _table_of_coco(coco)
    if isinstance(content, dict) and (split := karpathy_rows(content)) is not None:
        return _table(split, "captions by Karpathy's splits", "image")
    if isinstance(content, dict) and _is_named(content):
        return _table([_named_row(*item) for item in content.items()], "captions by name", "image")
    lists = [content] if isinstance(content, list) else []
    if isinstance(content, dict):
        lists = [value for value in content.values() if _is_list_of_rows(value)]
    if len(lists) != 1 or not _is_list_of_rows(lists[0]):
        held = listed(list(content)) if isinstance(content, dict) else type(content).__name__
        if isinstance(content, dict) and {"prefix", "icons"} <= content.keys():
            raise ValueError(
                f"{path} is a set of icons; set data.source=icons and data.icons.sets=[{path}]"
            )
        raise ValueError(
            f"{path} holds no rows ({held}); accepted are a list of rows "
            '([{"image": "cat.png", "text": "a cat"}]), COCO captions (images and annotations), '
            'and captions by name ({"cat.png": "a cat"})'
        )
    return _table(lists[0], "a list of rows in JSON")


def _is_jsonl(text: str) -> bool:
    """Whether the first line is a row by itself."""
    try:
        return isinstance(parse_json(_first_line(text)), dict)
    except ValueError:
        return False


def _table_of_coco(coco: CocoFile) -> Table:
    rows = [{"image": name, "caption": caption} for name, caption in coco.captions]
    return Table(rows, ["image", "caption"], "COCO captions", "image", coco.images)


def _is_list_of_rows(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def _is_named(content: Mapping[str, object]) -> bool:
    """Whether the keys are names of images."""
    return bool(content) and all(Path(key).suffix.lower() in EXTENSIONS for key in content)


def _named_row(name: str, value: object) -> Record:
    return {"image": name, **(value if isinstance(value, dict) else {"text": value})}
