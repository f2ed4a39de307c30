"""Which rows are trained on and which are held out, where the data themselves say so. Knows names
of splits; reads no image.

A split is named by a folder (train/, valid/, test/), by a word in the name of a file of many rows
(train-00000-of-00002.parquet, val-000.tar), by `datasets`, by a column, or by a second source. The
name of a single image names none. Where both a validation and a test split exist, validation is
held out, to choose by, and test is left out.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath
from typing import Literal

import numpy as np

from pipeline.config.data import DataConfig
from pipeline.data.readers.base import (
    Record,
    Rows,
    SkipCounter,
    content_fingerprint,
    existing_column,
    printable,
)
from pipeline.data.readers.captions import TEXT_COLUMNS, caption_reader

SplitName = Literal["train", "validation", "test", ""]
"""A split that data name; '' for rows that no split names."""
Role = Literal["train", "held_out", "left_out"]
_NAMES: dict[str, SplitName] = {
    "train": "train",
    "training": "train",
    "trainset": "train",
    "valid": "validation",
    "validation": "validation",
    "val": "validation",
    "dev": "validation",
    "eval": "validation",
    "holdout": "validation",
    "heldout": "validation",
    "held_out": "validation",
    "test": "test",
    "testing": "test",
    "testset": "test",
}
_GENERIC = ("image", "images", "img", "imgs", "set", "data", "split", "dataset")
"""Words beside a split's name in the name of a folder, such as test_images."""
COPIES = "images to train on that are copies of held-out ones left out"
_ORDER: tuple[SplitName, ...] = ("", "train", "validation", "test")


def split_of_value(value: object) -> SplitName | None:
    """The split that a cell names; None where it names none."""
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
    return _NAMES.get(text.strip().lower())


def split_of_image(records: Sequence[Record], column: str) -> SplitName | None:
    """The split that a column names for an image: of several, that furthest from training. None
    where a value names none, or all cells are empty."""
    names = [split_of_value(value) for value in _values(records, column)]
    if None in names or not names:
        return None
    return max((name for name in names if name is not None), key=_ORDER.index)


def split_of_folder(name: str) -> SplitName:
    """The split that a folder's name is: train, Valid, test2017, train_images."""
    words = _words(name)
    own = [word for word in words if word not in _GENERIC]
    return _NAMES.get(own[0], "") if len(own) == 1 else ""


def split_of_file(path: str) -> SplitName:
    """The split of a file of many rows: by its folders, or else by a word of its name."""
    *folders, name = PurePosixPath(path).parts
    for folder in folders:
        if split := split_of_folder(folder):
            return split
    words = _words(name.partition(".")[0])
    found = {_NAMES[word] for word in words if word in _NAMES}
    return found.pop() if len(found) == 1 else ""


def _words(name: str) -> list[str]:
    """The words of a name; held_out and the like are one."""
    return re.findall(r"[a-z]+", re.sub(r"(held|hold)[ _-]out", "heldout", name.lower()))


def splits_of_paths(paths: Sequence[str]) -> list[SplitName]:
    """The split of each image, by the folders that it lies in.

    Folders at any depth count where some are named for training and others not. Otherwise only
    the outermost do, as `test` may be one of many classes.
    """
    parts = [PurePath(path).parts[:-1] for path in paths]
    found = [_first_split(folders) for folders in parts]
    if "train" not in found:
        found = [_first_split(folders[:1]) for folders in parts]
    return found


def _first_split(folders: Iterable[str]) -> SplitName:
    return next((split for name in folders if (split := split_of_folder(name))), "")


def roles(present: Collection[SplitName]) -> dict[SplitName, Role] | None:
    """What each split is for; None where they do not say what is held out and what is trained on.

    Rows that no split names are trained on only where no split is named for training.
    """
    held_out: SplitName = "validation" if "validation" in present else "test"
    train: SplitName = "train" if "train" in present else ""
    if held_out not in present or train not in present:
        return None
    return {
        name: "train" if name == train else "held_out" if name == held_out else "left_out"
        for name in present
    }


def column_splits(rows: Rows, column: str, *, strict: bool) -> list[SplitName] | None:
    """The split of each row by a column (`split_of_image`). One whose records lack the column, such
    as an image that no row of a list names, is in no split.

    Args:
        strict: whether values that name no split are an error; otherwise None is returned.

    Raises:
        ValueError: the column does not exist, or `check_column` does not pass.
    """
    existing_column(rows.name, column, rows.columns, "data.split_column")
    found: list[SplitName] = []
    unknown: Counter[str] = Counter()
    for records in rows.records([column]):
        if not any(column in record for record in records):
            found.append("")
            continue
        split = split_of_image(records, column)
        if split is not None:
            found.append(split)
        elif strict:
            unknown.update(values_of_no_split(records, column))
        else:
            return None
    if strict:
        check_column(rows.name, column, set(found), unknown)
    return found


def values_of_no_split(records: Sequence[Record], column: str) -> list[str]:
    """The values of an image for which `split_of_image` is None, as text."""
    return [str(value) for value in _values(records, column)] or ["(empty)"]


def check_column(
    name: str, column: str, found: Collection[SplitName], unknown: Counter[str]
) -> None:
    """Raises ValueError where a column that is to name the splits does not.

    Args:
        name: of the source.
        found: the splits that it names.
        unknown: its values that name none.
    """
    if unknown:
        some = ", ".join(printable(value) for value, _ in unknown.most_common(5))
        raise ValueError(
            f"{name}: the column {column!r} has values that name no split ({some}); write "
            "train, validation or test, or choose another column (data.split_column)"
        )
    if roles(found) is None:
        raise ValueError(
            f"{name}: the column {column!r} names {', '.join(sorted(found))} alone; "
            "it needs images to train on and images to hold out (data.split_column)"
        )


def _values(records: Sequence[Record], column: str) -> list[object]:
    cells = [record.get(column) for record in records]
    flat = [one for cell in cells for one in (cell if isinstance(cell, list) else [cell])]
    return [one for one in flat if one is not None and str(one).strip()]


@dataclass(frozen=True)
class Part:
    """Rows of one or of several splits.

    Attributes:
        rows: the rows.
        splits: that of all rows, or of each.
        prefix: what their labels start with.
    """

    rows: Rows
    splits: SplitName | Sequence[SplitName]
    prefix: str = ""

    def role(self, row: int, of_split: dict[SplitName, Role]) -> Role:
        return of_split[self.splits if isinstance(self.splits, str) else self.splits[row]]

    def column(self, wanted: str) -> str | None:
        """What the part itself calls a column of all parts: captions are `txt` in shards, and
        `caption` elsewhere."""
        captions = TEXT_COLUMNS if wanted.rpartition(".")[2] in TEXT_COLUMNS else ()
        for name in (wanted, *captions):
            try:
                return existing_column(self.rows.name, name, self.rows.columns, "")
            except ValueError:
                continue
        return None

    def counts(self) -> Counter[SplitName]:
        if isinstance(self.splits, str):
            return Counter({self.splits: len(self.rows)})
        return Counter(self.splits)


class SplitRows(Rows):
    """Parts one after another, of which some rows are held out because the data say so. Rows of a
    split that is neither trained on nor held out are not among them.

    Attributes:
        held_out: whether each row is held out (N).
        note: what is held out and why, for the user.
    """

    held_out: np.ndarray

    def __init__(
        self,
        name: str,
        parts: Sequence[Part],
        named_by: str,
        called: Mapping[SplitName, str] | None = None,
    ) -> None:
        self.name = name
        self.tally = SkipCounter()
        self.columns = list(dict.fromkeys(c for part in parts for c in part.rows.columns))
        counts: Counter[SplitName] = Counter()
        for part in parts:
            counts.update(part.counts())
        of_split = roles(set(counts))
        assert of_split is not None, "the splits say nothing; ask `roles` first"
        self._parts: list[Part] = []
        self._kept: list[np.ndarray] = []
        held_out = [np.zeros(0, bool)]
        for part in parts:
            self.tally.merge(part.rows.tally, part.prefix)
            of_rows = [part.role(row, of_split) for row in range(len(part.rows))]
            kept = np.flatnonzero([role != "left_out" for role in of_rows])
            if len(kept):
                self._parts.append(part)
                self._kept.append(kept)
                held_out.append(np.array([of_rows[row] == "held_out" for row in kept], bool))
        self._ends = np.cumsum([len(kept) for kept in self._kept])
        self.held_out = np.concatenate(held_out)
        self.note = _note(counts, of_split, named_by, called or {})
        self.layout = " and ".join(dict.fromkeys(part.rows.layout for part in parts))
        self.facts = _facts(parts)
        stamps = [part.rows.stamp for part in self._parts]
        self.stamp = content_fingerprint([*stamps, self.held_out.tobytes().hex()])

    def __len__(self) -> int:
        return len(self.held_out)

    def label(self, row: int) -> str:
        part, own = self._of(row)
        return part.prefix + part.rows.label(own)

    def image(self, row: int) -> bytes:
        part, own = self._of(row)
        return part.rows.image(own)

    def records(self, columns: Sequence[str]) -> Iterator[list[Record]]:
        for part, kept in zip(self._parts, self._kept, strict=True):
            wanted = set(kept.tolist())
            own = {column: name for column in columns if (name := part.column(column)) is not None}
            if not own:
                for _ in wanted:
                    yield [{}]
                continue
            for row, records in enumerate(part.rows.records(list(own.values()))):
                if row in wanted:
                    yield [
                        record | {column: record.get(name) for column, name in own.items()}
                        for record in records
                    ]

    def _of(self, row: int) -> tuple[Part, int]:
        """A part, and the row in it."""
        number = int(np.searchsorted(self._ends, row, side="right"))
        first = int(self._ends[number - 1]) if number else 0
        return self._parts[number], int(self._kept[number][row - first])


def _facts(parts: Sequence[Part]) -> list[tuple[str, str]]:
    """The details of all parts; those that are not of all alike name their part."""
    own = [[(name, fact) for name, fact in part.rows.facts] for part in parts]
    common = [one for one in own[0] if all(one in others for others in own)]
    return common + [
        (name, f"{part.prefix or part.rows.name}: {fact}")
        for part, facts in zip(parts, own, strict=True)
        for name, fact in facts
        if (name, fact) not in common
    ]


def _note(
    counts: Counter[SplitName],
    of_split: dict[SplitName, Role],
    named_by: str,
    called: Mapping[SplitName, str],
) -> str:
    """What is held out and why, in words."""

    def of(role: Role) -> str:
        each = [name for name in _ORDER if of_split.get(name) == role]
        return " and ".join(
            f"{counts[name]:,} of {called.get(name, name or 'no split')}" for name in each
        )

    left_out = of("left_out")
    return (
        f"splits by {named_by}: held out are {of('held_out')}, and not data.val_fraction; trained "
        f"on are {of('train')}" + (f"; left out of both are {left_out}" if left_out else "")
    )


def rows_by_file(
    name: str,
    files: Sequence[Path],
    read: Callable[[list[Path]], Rows],
    config: DataConfig,
    *,
    prefixed: bool,
) -> Rows:
    """Rows of files of many rows each, by the splits that folders and files name.

    Args:
        name: of the source, for messages.
        read: opens some of the files together.
        prefixed: whether labels of different files may be the same, so that those that are not
            trained on start with their split's name.
    """
    groups = files_by_split([str(file) for file in files], config)
    if roles(set(groups)) is None:
        return read(list(files))
    parts = [
        Part(
            read([Path(file) for file in own]),
            split,
            f"{split}/" if prefixed and split not in ("train", "") else "",
        )
        for split, own in groups.items()
    ]
    return SplitRows(name, parts, "names of files")


def files_by_split(files: Sequence[str], config: DataConfig) -> dict[SplitName, list[str]]:
    """The files, or their URLs, of each split that their folders and names say; in the order of
    `_ORDER`."""
    groups: dict[SplitName, list[str]] = {}
    paths = [PurePosixPath(file) for file in files]
    root = os.path.commonpath([path.parent for path in paths])
    for file, path in zip(files, paths, strict=True):
        named = config.split_column == "auto"
        split = split_of_file(path.relative_to(root).as_posix()) if named else ""
        groups.setdefault(split, []).append(file)
    return {split: groups[split] for split in _ORDER if split in groups}


def with_named_splits(rows: Rows, config: DataConfig) -> Rows:
    """Rows whose table or folders name splits, with these; others as they are.

    Raises:
        ValueError: `data.split_column` names a column that does not exist or names no splits.
    """
    column = config.split_column
    if column == "none" or (column == "auto" and rows.held_out is not None):
        return rows
    if column != "auto":
        named = column_splits(rows, column, strict=True)
        assert named is not None
        return SplitRows(rows.name, [Part(rows, named)], f"the column {column}")
    if "split" in rows.columns and config.text_column != "split":
        named = column_splits(rows, "split", strict=False)
        if named is not None and roles(set(named)) is not None:
            return SplitRows(rows.name, [Part(rows, named)], "the column split")
        if others := _values_beside_splits(rows):
            rows.note = (
                f"splits by a hash of names: the column split is not used, since {others} name no "
                "split; write train, validation or test into each row"
            )
    return rows


def _values_beside_splits(rows: Rows) -> str:
    """The values of a column `split` that name none, where others name one to hold out; or ''."""
    values = Counter(
        str(value) for records in rows.records(["split"]) for value in _values(records, "split")
    )
    others = [value for value, _ in values.most_common() if split_of_value(value) is None]
    held_out = {split_of_value(value) for value in values} & {"validation", "test"}
    return ", ".join(printable(value) for value in others[:5]) if held_out else ""


def copies_of_held_out(rows: Rows, digest: np.ndarray, tally: SkipCounter) -> np.ndarray:
    """Whether each row is a training image whose file is that of a held-out one (N), where the
    data say what is held out. They are counted, and are to be left out.

    Args:
        digest: a hash of each row's file (N).
    """
    if rows.held_out is None or not rows.note:
        return np.zeros(len(rows), bool)
    copies = ~rows.held_out & np.isin(digest, digest[rows.held_out]) & (digest != 0)
    for row in np.flatnonzero(copies):
        tally.add(COPIES, rows.label(int(row)))
    return copies


def with_held_out_source(
    rows: Rows, second: Rows, config: DataConfig, *, require_captions: bool
) -> SplitRows:
    """The rows of a source with all of a second one as the held-out ones. What the first source
    itself names as validation or test is not trained on.

    Raises:
        NoCaptions: one of the two has none, and they are required.
        ValueError: one of the two lacks the column of captions that the settings name.
    """
    for own_rows in (rows, second):
        caption_reader(own_rows.name, own_rows.columns, config, required=require_captions)
    if rows.held_out is not None:
        own: list[SplitName] = ["test" if held_out else "train" for held_out in rows.held_out]
        first = Part(rows, own)
    else:
        first = Part(rows, "train")
    called: dict[SplitName, str] = {
        "train": rows.name,
        "validation": second.name,
        "test": "its own held-out split",
    }
    parts = [first, Part(second, "validation")]
    return SplitRows(rows.name, parts, "data.held_out_source", called)
