"""Samples of shards or of a data set, one after another, undecoded. Knows files and columns; judges
no image and no caption."""

from __future__ import annotations

import itertools
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from pipeline.config.data import SYNTHETIC_SOURCES, CaptionLines, DataConfig
from pipeline.data.readers.base import (
    Record,
    SkipCounter,
    bytes_signature,
    existing_column,
    file_signature,
    image_column,
    reason_of,
)
from pipeline.data.readers.files import MAX_IMAGE_BYTES, MAX_TEXT_BYTES, check_regular
from pipeline.data.readers.hub import (
    content_of,
    is_saved_dataset,
    label_names,
    load,
    load_files,
    splits_of,
)
from pipeline.data.readers.locate import (
    check_links,
    files_of_rows,
    in_braces,
    is_hub_name,
    is_remote,
    not_found,
    refuse_pointers,
)
from pipeline.data.readers.paths import NamedFiles
from pipeline.data.readers.splits import Role, SplitName, files_by_split, roles
from pipeline.data.readers.tables import TABLE_SUFFIXES
from pipeline.data.readers.tar_index import tar_members
from pipeline.data.readers.webdataset import (
    DAMAGED,
    LEADS_OUT,
    LONG_TEXT,
    columns_of,
    facts_of,
    images_of,
    is_caption,
    is_compressed,
    is_outside,
    member_name,
    no_image,
    record_of,
)
from pipeline.runtime.network import require_online

_FIRST = 20
"""Samples that say which members and columns there are."""
_KEYS = 100_000
"""Names of a shard that are remembered, to find members that lie apart."""
_MOST_BYTES = 2**33
"""Most bytes of a member of a shard."""
_SHARDS = 64
"""Shards in which a data set on this disk is streamed."""


class MembersApart(ValueError):
    """The members of a sample do not lie together in a shard."""


@dataclass(frozen=True)
class RawSample:
    """A sample as it was read.

    Attributes:
        name: unique within its shard.
        image: reads its file, and raises what `content_of` does; None where there is none.
        record: what is written of it.
    """

    name: str
    image: Callable[[], bytes] | None
    record: Record


class SampleStream(Protocol):
    """Samples that are read from beginning to end, shard by shard."""

    columns: list[str]
    num_shards: int
    layout: str
    facts: list[tuple[str, str]]
    """As `Rows.facts`."""
    image: str
    """What is called the image, for messages."""

    def samples(self, shard: int) -> Iterator[RawSample]:
        """The samples of a shard. Raises whatever networks and readers do, and ValueError where a
        sample does not lie together."""
        ...

    def captions_apart(self) -> str:
        """Where the captions of the first samples lie, and what to do, where they have them
        elsewhere in their shard; or ''."""
        ...


class DatasetStream:
    """A data set of `datasets`, streamed.

    Args:
        files: that its paths name.

    Raises:
        ValueError: it does not say which columns it has, or lacks that of the images.
    """

    def __init__(self, name: str, data: Any, column: str | None, files: NamedFiles) -> None:
        self._files = files
        self._data = data.decode(False)
        self.num_shards = int(self._data.num_shards)
        features = self._data.features or {}
        if not features:
            raise ValueError(
                f"{name} does not say which columns it has, so it cannot be streamed; set "
                "data.streaming=false"
            )
        self.image = image_column(name, column, list(features))
        # Members in JSON have columns of their own.
        inner = [own for value in features.values() if isinstance(value, dict) for own in value]
        self.columns = [own for own in dict.fromkeys([*features, *inner]) if own != self.image]
        self.layout = f"a data set, images in the column {self.image}"
        self.facts: list[tuple[str, str]] = []
        self._named = label_names(features)

    def samples(self, shard: int) -> Iterator[RawSample]:
        rows = self._data.shard(num_shards=self.num_shards, index=shard)
        for number, row in enumerate(rows):
            record = {key: self._named(key, value) for key, value in row.items()}
            cell = record.pop(self.image)
            image = None if cell is None else partial(content_of, cell, self._files)
            name = str(row.get("__key__") or f"shard {shard} row {number}")
            yield RawSample(name, image, record)

    def captions_apart(self) -> str:
        return ""


class ShardStream:
    """Webdataset shards, local or remote, by the members of `readers/webdataset.py`.

    Local shards that are not compressed are read by their checked headers, as those that are read
    in any order: one that is damaged is read up to there. Of all shards, no member takes more
    memory than its kind may have.

    Args:
        tally: counts what of the shards is left out, once each.

    Raises:
        FileNotFoundError: a shard cannot be read.
        ValueError: no shard has a sample, or the first samples have no image.
    """

    def __init__(
        self,
        name: str,
        shards: Sequence[str],
        wanted: str | None,
        lines: CaptionLines,
        tally: SkipCounter,
    ) -> None:
        self._shards = shards
        self._lines = lines
        self._wanted = wanted
        self._tally = tally
        self._counted: set[str] = set()
        self.renames = False
        """Whether earlier versions had other names for the samples."""
        self.image = wanted or "of an image"
        self.num_shards = len(shards)
        start = 0
        first: list[tuple[str, dict[str, bytes]]] = []
        try:
            if any(map(is_remote, shards)):
                _check_remote(shards)
            for start in range(self.num_shards):
                if first := list(itertools.islice(self._groups(start), _FIRST)):
                    break
        except Exception as error:  # the library and what it reads through raise many kinds
            raise FileNotFoundError(
                f"the {len(shards)} shards of {name} cannot be read ({reason_of(error)}); "
                "check data.source, or copy them again"
            ) from error
        if not first:
            raise no_image(name, len(shards), tally.lines() or ["they are empty"])
        members = list(dict.fromkeys(member for _, own in first for member in own))
        if not images_of(members, wanted):
            existing_column(name, wanted or "image", members, "data.image_column")
        self.columns = columns_of(members, [record_of(own, lines) for _, own in first])
        self._first = (start, {key for key, _ in first})
        self.layout = f"{len(shards)} webdataset shards, members {', '.join(members)}"
        self.facts = facts_of(members, lines)

    def samples(self, shard: int) -> Iterator[RawSample]:
        known: dict[str, frozenset[str]] = {}
        for key, members in self._groups(shard):
            own = frozenset(members)
            if key in known and known[key].isdisjoint(own):
                raise MembersApart(_apart(self._shards[shard], key))
            if len(known) < _KEYS:
                known[key] = own
            images = images_of(members, self._wanted)
            image = partial(members.__getitem__, images[0]) if images else None
            yield RawSample(key, image, record_of(members, self._lines))

    def captions_apart(self) -> str:
        start, keys = self._first
        for path, _, _ in self._members(self._shards[start], SkipCounter()):
            name = member_name(path)
            if name is not None and name[0] in keys and is_caption(name[1]):
                return _apart(self._shards[start], name[0])
        return ""

    def _groups(self, shard: int) -> Iterator[tuple[str, dict[str, bytes]]]:
        """(sample, member -> content) of what lies together."""
        held: tuple[str, dict[str, bytes]] | None = None
        tally = SkipCounter()
        for path, length, read in self._members(self._shards[shard], tally):
            if is_outside(path):
                tally.add(LEADS_OUT, ascii(path))
                continue
            if (name := member_name(path)) is None:
                continue
            self.renames = self.renames or path.startswith("./")
            key, member = name
            if held is None or held[0] != key or member in held[1]:
                if held is not None:
                    yield held
                held = (key, {})
            most = MAX_TEXT_BYTES if is_caption(member) else MAX_IMAGE_BYTES
            if length > most and is_caption(member):
                tally.add(LONG_TEXT, f"{key}.{member}")
            # An empty image counts as unreadable.
            held[1][member] = read(length) if length <= most else b""
        if held is not None:
            yield held
        if self._shards[shard] not in self._counted:  # shards are read several times
            self._counted.add(self._shards[shard])
            self._tally.merge(tally)

    def _members(
        self, shard: str, tally: SkipCounter
    ) -> Iterator[tuple[str, int, Callable[[int], bytes]]]:
        """(name, length, how to read so many bytes) of each file of a shard that is not hidden."""
        if is_remote(shard) or (Path(shard).is_file() and is_compressed(shard)):
            yield from _unpacked(shard, tally)
            return
        try:
            check_regular(shard)
            with open(shard, "rb") as file:
                for one in tar_members(shard, tally):
                    if not PurePosixPath(one.name).name.startswith("."):
                        file.seek(one.start)
                        yield one.name, one.length, file.read
        except ValueError as error:
            tally.add(DAMAGED, f"{shard} ({error})")


class _Member(tarfile.TarInfo):
    """A member whose size is checked: Python would step over 2^80 bytes in small reads, past the
    end of the file."""

    @property
    def size(self) -> int:
        return self._size

    @size.setter
    def size(self, size: int) -> None:
        if not 0 <= size <= _MOST_BYTES:
            raise ValueError(f"a member says {size:,} bytes; at most {_MOST_BYTES:,} are read")
        self._size = size


def _unpacked(shard: str, tally: SkipCounter) -> Iterator[tuple[str, int, Callable[[int], bytes]]]:
    """As `_members`, of a shard that is remote or compressed: one byte after another."""
    from datasets.utils.file_utils import xopen

    with xopen(shard, "rb") as file, tarfile.open(fileobj=file, mode="r|*", tarinfo=_Member) as tar:
        for member in tar:
            name = PurePosixPath(member.name).name
            if member.isreg() and not member.issparse() and not name.startswith((".", "__")):
                if member.size > MAX_IMAGE_BYTES:
                    # To go on, all of it would be unpacked.
                    tally.add(DAMAGED, f"{shard} ({member.name!a} has {member.size:,} bytes)")
                    return
                content = tar.extractfile(member)
                assert content is not None
                yield member.name, member.size, content.read
            tar.members = []  # type: ignore[attr-defined]  # they would be kept


def _apart(shard: str, key: str) -> str:
    return (
        f"the members of {key!r} do not lie together in {shard}, and a stream reads only what "
        "does; write the shard in the order of its names (tar --sort=name), or set "
        "data.streaming=false, which joins members wherever they lie"
    )


def _check_remote(shards: Sequence[str]) -> None:
    """Asks for each remote file, so that a missing one is reported at the start."""
    from datasets.data_files import DataFilesList

    DataFilesList.from_patterns(list(shards))


@dataclass(frozen=True)
class OpenedStreams:
    """The samples to train on and, where the data say what is held out, those.

    Attributes:
        train, held_out: the samples.
        identity: what identifies the files, wherever they lie.
        earlier: what earlier versions identified them by.
        note: what is held out, for the user.
        shard_names: of the shards to train on, where they are known.
    """

    train: SampleStream
    held_out: SampleStream | None
    identity: list[object]
    earlier: list[object] | None
    note: str
    shard_names: list[str]


def open_streams(config: DataConfig, tally: SkipCounter) -> OpenedStreams:
    """Opens the source that `config` names as streams, by the splits that it names.

    Args:
        tally: counts what shards leave out.

    Raises:
        FileNotFoundError: there is no such shard or data set.
        ValueError: the source cannot be streamed, or lacks the column of the images.
    """
    source = config.source
    if is_remote(source):
        require_online(f"data.source {source}", "download the shards and give their path")
        return _open_files(config, list(in_braces(source)), tally)
    path = Path(source).expanduser()
    if not is_saved_dataset(path) and (files := files_of_rows(source)):
        check_links(source, files, config.follow_links)
        refuse_pointers(files)
        return _open_files(config, [str(file) for file in files], tally)
    if path.is_dir() and not is_saved_dataset(path):
        raise ValueError(_NOT_STREAMED.format(source))
    if path.suffix.lower() in TABLE_SUFFIXES and path.is_file():
        raise ValueError(_NOT_STREAMED.format(source))
    if not path.is_dir() and (path.exists() or not is_hub_name(source)):
        raise not_found(source)
    return _open_named(config, path)


_NOT_STREAMED = (
    "data.streaming is on, and {} is a folder or a table of image files; streaming reads shards, "
    "Parquet and data sets; set data.streaming=false"
)


def streams(source: str) -> bool:
    """Whether a source can be read from beginning to end: shards, Parquet and data sets can."""
    path = Path(source).expanduser()
    if source in SYNTHETIC_SOURCES or path.suffix.lower() in TABLE_SUFFIXES:
        return False
    return not path.is_dir() or is_saved_dataset(path) or bool(files_of_rows(source))


def _open_files(config: DataConfig, files: list[str], tally: SkipCounter) -> OpenedStreams:
    """Shards, or Parquet or Arrow files."""
    groups = files_by_split(files, config)
    of_split = roles(set(groups))

    def of(role: Role) -> list[str]:
        if of_split is None:
            return files if role == "train" else []
        return [file for split, own in groups.items() if of_split[split] == role for file in own]

    def opened(own: list[str]) -> SampleStream:
        if Path(own[0].partition("?")[0]).suffix.lower() in (".parquet", ".arrow"):
            data = load_files(config.source, own, streaming=True)
            named = NamedFiles(list(map(Path, own)))
            return DatasetStream(config.source, data, config.image_column, named)
        return ShardStream(config.source, own, config.image_column, config.caption_lines, tally)

    train = opened(of("train"))
    held_out = opened(of("held_out")) if of("held_out") else None
    note = "" if of_split is None else _note(of_split, "names of files")
    identity = [
        file if is_remote(file) else (Path(file).name, bytes_signature(Path(file)))
        for file in files
    ]
    earlier: list[object] | None = [
        file if is_remote(file) else file_signature(Path(file)) for file in files
    ]
    if of_split is not None or (isinstance(train, ShardStream) and train.renames):
        earlier = None
    return OpenedStreams(train, held_out, [*identity, note], earlier, note, of("train"))


def _open_named(config: DataConfig, path: Path) -> OpenedStreams:
    """A data set that was saved, or one of the Hub."""
    import datasets

    loaded, left_out = splits_of(load(config.source, streaming=True), config)
    of_split = roles(set(loaded)) if config.split_column == "auto" else None
    files = NamedFiles([path])

    def opened(split: SplitName) -> SampleStream:
        rows = loaded[split]
        if isinstance(rows, datasets.Dataset):
            rows = rows.to_iterable_dataset(num_shards=min(_SHARDS, max(len(rows), 1)))
        return DatasetStream(config.source, rows, config.image_column, files)

    def of(role: Role) -> list[SplitName]:
        return [split for split, own in (of_split or {}).items() if own == role]

    if of_split is None:
        train, held_out, note = opened(next(iter(loaded))), None, left_out
    else:
        train, held_out = opened(of("train")[0]), opened(of("held_out")[0])
        note = _note(of_split, "the data set")
    if path.is_dir():
        arrow = sorted(path.rglob("*.arrow"))
        identity: list[object] = [
            (file.relative_to(path).as_posix(), bytes_signature(file)) for file in arrow
        ]
        earlier: list[object] = [file_signature(file) for file in arrow]
    else:
        identity = [config.source]
        earlier = [path]
    return OpenedStreams(train, held_out, [*identity, note], None if note else earlier, note, [])


def _note(of_split: dict[SplitName, Role], named_by: str) -> str:
    """What is held out, in words."""

    def of(role: Role) -> str:
        return " and ".join(name or "no split" for name, own in of_split.items() if own == role)

    left_out = of("left_out")
    return (
        f"splits by {named_by}: held out is {of('held_out')}, and not data.val_fraction; trained "
        f"on is {of('train')}" + (f"; left out of both is {left_out}" if left_out else "")
    )
