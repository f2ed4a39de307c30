"""A folder of images with a folder per split: train/ and test/ as the `imagefolder` of `datasets`
has them. Knows folders; how each is read is `folder_rows`'s.

Captions lie beside the images, in a list in each split's folder, or in a list above them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from pipeline.config.data import DataConfig
from pipeline.data.readers.base import NoCaptions, Rows
from pipeline.data.readers.folder import CAPTION_LISTS, METADATA, file_of, folder_rows
from pipeline.data.readers.images import EXTENSIONS
from pipeline.data.readers.locate import files_below
from pipeline.data.readers.splits import (
    Part,
    SplitName,
    SplitRows,
    roles,
    split_of_folder,
    splits_of_paths,
)

_NAMED_BY = "names of folders"
_DEPTH = 2
"""Folders below the source in which split folders are looked for."""
OTHERS = "images in no folder of a split left out"


def split_folder_rows(
    folder: Path, config: DataConfig, require_captions: bool = True
) -> Rows | None:
    """The rows of a folder whose folders name splits; None where they name none.

    Raises:
        ValueError: as `folder_rows`, of a split's folder.
    """
    if config.split_column != "auto":
        return None
    found = list(_split_folders(folder, _DEPTH))
    if roles({split for _, split in found}) is not None and not _has_list(folder):
        try:
            return _each(folder, found, config, require_captions)
        except ValueError as error:
            # The captions may lie in a list of another kind above the splits.
            try:
                rows = _together(folder, config, require_captions)
            except ValueError as above:
                # Files above the splits are named only by the second error.
                uncaptioned = isinstance(error, NoCaptions) and isinstance(above, NoCaptions)
                raise (above if uncaptioned else error) from None
            if rows is None or rows.held_out is None:
                # A split without captions is not dropped silently: its images would be trained on.
                raise
            return rows
    if any(split not in ("", "train") for _, split in found):
        return _together(folder, config, require_captions)
    return None


def _each(
    folder: Path, found: list[tuple[Path, SplitName]], config: DataConfig, require_captions: bool
) -> SplitRows:
    """Each split's folder read on its own."""
    parts = [
        Part(
            folder_rows(own, config, require_captions=require_captions, root=folder),
            split,
            f"{own.relative_to(folder).as_posix()}/",
        )
        for own, split in found
    ]
    rows = SplitRows(str(folder), parts, _NAMED_BY)
    inside = {own for own, _ in found}
    for file in files_below(folder):
        if file.suffix.lower() in EXTENSIONS and inside.isdisjoint(file.parents):
            rows.tally.add(OTHERS, file.relative_to(folder).as_posix())
    return rows


def _together(folder: Path, config: DataConfig, require_captions: bool) -> Rows | None:
    """The folder read at once; its images are in the splits of the folders that they lie in."""
    rows = folder_rows(folder, config, require_captions=require_captions)
    splits = splits_of_paths([rows.label(row) for row in range(len(rows))])
    if roles(set(splits)) is None:
        return rows
    return SplitRows(str(folder), [Part(rows, splits)], _NAMED_BY)


def _has_list(folder: Path) -> bool:
    return file_of(folder, (*METADATA, *CAPTION_LISTS)) is not None


def _split_folders(folder: Path, depth: int) -> Iterator[tuple[Path, SplitName]]:
    """Folders that are named as splits, and these splits; none within another one."""
    for own in _folders(folder):
        if split := split_of_folder(own.name):
            yield own, split
        elif depth > 1:
            yield from _split_folders(own, depth - 1)


def _folders(folder: Path) -> list[Path]:
    try:
        entries = [entry for entry in os.scandir(folder) if not entry.name.startswith(".")]
    except OSError:  # counted where images are read
        return []
    # Links to folders are not followed, as in `folder_rows`.
    return sorted(Path(entry) for entry in entries if entry.is_dir(follow_symlinks=False))
