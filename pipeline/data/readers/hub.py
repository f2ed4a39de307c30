"""A `datasets` name, a folder saved by `datasets`, or Parquet files. Knows columns and splits;
decodes nothing."""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.config.data import DataConfig
from pipeline.data.readers.base import (
    Record,
    Rows,
    SkipCounter,
    content_fingerprint,
    file_signature,
    image_column,
    reason_of,
)
from pipeline.data.readers.files import MAX_IMAGE_BYTES, read_file
from pipeline.data.readers.locate import check_links, is_remote, nearest_here, refuse_pointers
from pipeline.data.readers.parquet_limits import check_inflated
from pipeline.data.readers.paths import NamedFiles
from pipeline.data.readers.splits import (
    Part,
    SplitName,
    SplitRows,
    roles,
    rows_by_file,
    split_of_folder,
)

_BATCH = 1000


class HubRows(Rows):
    """The rows of one data set of `datasets`.

    Args:
        name: of the source, for messages.
        rows: the data set; the library's types are not known here.
        column: of the images (`data.image_column`).
        files: that its paths name.
        layout: what it was read from, for the user.
    """

    def __init__(
        self,
        name: str,
        rows: Any,
        column: str | None,
        files: NamedFiles,
        layout: str = "a data set",
    ) -> None:
        from datasets import Image

        self.name = name
        self.tally = SkipCounter()
        self._image = image_column(self.name, column, rows.column_names)
        self.columns = [column for column in rows.column_names if column != self._image]
        self.layout = f"{layout}, images in the column {self._image}"
        paths = not isinstance(rows.features[self._image], Image) and getattr(
            rows.features[self._image], "dtype", ""
        ) in ("string", "large_string")
        if isinstance(rows.features[self._image], Image):
            # Undecoded, so that a corrupted image is reported here.
            rows = rows.cast_column(self._image, Image(decode=False))
        self._rows = rows
        # A table of its own, so that reading captions does not read images.
        self._images = rows.select_columns([self._image])
        self._files = files
        # The library's fingerprint does not cover files that rows only name.
        named = (
            (
                file_signature(files.path(str(self._images[row][self._image])))
                for row in range(len(rows))
            )
            if paths
            else ()
        )
        self.stamp = content_fingerprint([rows._fingerprint, self._image, *named])

    def __len__(self) -> int:
        return len(self._rows)

    def label(self, row: int) -> str:
        return f"row {row}"

    def image(self, row: int) -> bytes:
        return content_of(self._images[row][self._image], self._files)

    def records(self, columns: Sequence[str]) -> Iterator[list[Record]]:
        rows = self._rows.select_columns(list(columns))
        named = label_names(rows.features)
        for batch in rows.iter(_BATCH):
            for i in range(len(batch[columns[0]])):
                yield [{column: named(column, batch[column][i]) for column in columns}]


def hub_rows(config: DataConfig) -> Rows:
    """The rows of a `datasets` name, or of a folder saved by it, by its splits.

    Raises:
        FileNotFoundError: it cannot be loaded.
    """
    loaded, left_out = splits_of(load(config.source), config)
    files = NamedFiles([Path(config.source).expanduser()])
    of_split = roles(set(loaded)) if config.split_column == "auto" else None

    def rows(split: SplitName) -> HubRows:
        return HubRows(config.source, loaded[split], config.image_column, files)

    if of_split is None:
        found = rows(next(iter(loaded)))
        found.note = left_out
        return found
    parts = [
        Part(rows(split), split, "" if role == "train" else f"{split}/")
        for split, role in of_split.items()
    ]
    return SplitRows(config.source, parts, "the data set")


def parquet_rows(config: DataConfig, files: Sequence[Path]) -> Rows:
    """The rows of Parquet or Arrow files, by the splits that they name.

    Raises:
        ValueError: a file is a pointer of Git LFS.
        FileNotFoundError: the library cannot read them.
    """
    check_links(config.source, files, config.follow_links)
    refuse_pointers(files)

    def read(own: list[Path]) -> HubRows:
        layout = f"{len(own)} {own[0].suffix} files"
        rows = load_files(config.source, own)
        return HubRows(config.source, rows, config.image_column, NamedFiles(own), layout)

    return rows_by_file(config.source, files, read, config, prefixed=True)


def content_of(cell: object, files: NamedFiles) -> bytes:
    """The file in a cell of images: bytes, a path, or the pair of both that `datasets` uses.

    Raises:
        ValueError: it is none of these, or several files match a path.
        OSError: the file cannot be read.
    """
    if isinstance(cell, dict):
        cell = cell.get("bytes") or cell.get("path")
    if isinstance(cell, bytes):
        return cell
    if isinstance(cell, str) and cell and "\0" not in cell:
        return read_file(files.path(cell), MAX_IMAGE_BYTES)
    raise ValueError(f"it holds {type(cell).__name__} and no image")


def label_names(features: Mapping[str, object]) -> Callable[[str, object], object]:
    """(column, value) -> the value, or its name where the column holds class labels."""
    from datasets import ClassLabel

    labels = {
        column: feature for column, feature in features.items() if isinstance(feature, ClassLabel)
    }

    def named(column: str, value: object) -> object:
        if column in labels and isinstance(value, int) and value >= 0:
            # A list, since a class "none" is no missing cell.
            return [labels[column].int2str(value)]
        return value

    return named


def load(source: str, *, streaming: bool = False) -> dict[str, Any]:
    """The splits of a data set by name, mapped or streamed; the library's types are not known
    here. One that was saved has its only split under ''.

    Raises:
        FileNotFoundError: it does not exist, or the library cannot read it.
        ValueError: a Parquet file inflates to many times its size.
    """
    import datasets

    from stage1_tokenizer.hub import hub_answers  # not above: it imports torch

    path = Path(source).expanduser()
    answers = not path.is_dir() and hub_answers(source, "dataset")
    try:
        with _library_online(answers):
            if path.is_dir():
                loaded = datasets.load_from_disk(str(path))
            else:
                loaded = datasets.load_dataset(source, streaming=streaming)
    except Exception as error:  # the library raises many kinds for a name that cannot be had
        raise FileNotFoundError(_cannot_load(source, error, answers)) from error
    return dict(loaded) if isinstance(loaded, dict) else {"": loaded}


def load_files(source: str, files: Sequence[str | Path], *, streaming: bool = False) -> Any:
    """Parquet or Arrow files as one data set, mapped or streamed.

    Raises:
        FileNotFoundError: the library cannot read them.
        ValueError: a Parquet file inflates to many times its size, or is no regular file.
    """
    import datasets

    for file in files:
        if Path(file).suffix.lower() == ".parquet" and not is_remote(str(file)):
            check_inflated(Path(file))
    kind = "arrow" if Path(files[0]).suffix.lower() == ".arrow" else "parquet"
    try:
        # The library takes names for patterns.
        own = {"train": [str(f) if is_remote(str(f)) else glob.escape(str(f)) for f in files]}
        with _library_online(any(is_remote(str(file)) for file in files)):
            return datasets.load_dataset(kind, data_files=own, streaming=streaming)["train"]
    except Exception as error:  # as in `load`
        raise FileNotFoundError(
            f"data.source {source!r}: the {len(files)} {kind} files cannot be read "
            f"({reason_of(error)}), e.g. {files[0]}; they must have the same columns"
        ) from error


@contextmanager
def _library_online(online: bool) -> Iterator[None]:
    """Lets `datasets` use the network, or its cache alone. It reports each load to a server
    otherwise, also of local files."""
    from datasets import config

    before = config.HF_HUB_OFFLINE
    config.HF_HUB_OFFLINE = not online
    config.HF_UPDATE_DOWNLOAD_COUNTS = False
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE = before


def splits_of(loaded: Mapping[str, Any], config: DataConfig) -> tuple[dict[SplitName, Any], str]:
    """The data sets of each split that a name of `datasets` stands for, joined, and a line on those
    that are not read. Only the training split is, where the data sets do not say what is held out;
    all as one, where a column says it."""
    from datasets import concatenate_datasets

    names: dict[SplitName, list[str]] = {}
    for name in loaded:
        split = split_of_folder(name) if config.split_column in ("auto", "none") else ""
        names.setdefault(split, []).append(name)
    left_out = ""
    if config.split_column == "none" or roles(set(names)) is None:
        first: SplitName = "train" if "train" in names else next(iter(names))
        others = [name for split, own in names.items() if split != first for name in own]
        names = {first: names[first]}
        if others:
            left_out = (
                f"of the data set, {', '.join(names[first])} is read, and not {', '.join(others)}"
            )
    found: dict[SplitName, Any] = {}
    for split, own in names.items():
        try:
            parts = [loaded[name] for name in own]
            found[split] = parts[0] if len(parts) == 1 else concatenate_datasets(parts)
        except ValueError as error:
            raise ValueError(
                f"data.source {config.source!r}: its data sets {', '.join(own)} cannot be joined "
                f"({reason_of(error)}); give them the same columns"
            ) from error
    return found, left_out


def is_saved_dataset(path: Path) -> bool:
    """Whether a folder was written by `datasets`' save_to_disk."""
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def _cannot_load(source: str, error: Exception, answers: bool) -> str:
    from stage1_tokenizer.hub import is_offline

    if Path(source).expanduser().is_dir():
        return (
            f"data.source {source!r} is a saved data set that cannot be read ({error}); copy it "
            "again"
        )
    near = nearest_here(source)
    hint = f"did you mean {near}, which lies here? " if near else ""
    if is_offline():
        return (
            f"data.source {source!r} is no folder or file here, and --offline or HF_HUB_OFFLINE "
            f"forbids to ask the Hub for it; {hint}give a path, or allow the network"
        )
    reason = reason_of(error) if answers else "the Hub does not answer"
    return (
        f"data.source {source!r} is no folder or file here and no data set that can be "
        f"loaded ({reason}); {hint}give shapes, emoji, a folder of images, a file or "
        "shards (docs/data.md), or a datasets name with network access"
    )
