"""The codes dataset: every image as codes, once, in Arrow files. Knows files and fingerprints;
trains and samples nothing.

The rows of a split lie in shards (shards.py) of equally many rows; the last shard is shorter. A
stream has one shard for each of its own. `codes.json` is written last and completes the folder. It
has the fingerprints of the tokenizer and of the source, and the size and hash of every file. Until
then `plan.json` says what is being made, and each finished shard has a JSON file with its size and
hash next to it.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, islice
from pathlib import Path
from threading import Lock
from types import NoneType
from typing import Any

import numpy as np

from pipeline.config.json_file import check_types, read_json
from pipeline.data.codes.shards import OpenShard, Shard, verify_shard
from pipeline.runtime.atomic_io import atomic_write_text, clean_partial_writes

MANIFEST = "codes.json"
PLAN = "plan.json"
FORMAT = 1
"""Of the folder."""
_PLAN_TYPES: dict[str, type | tuple[type, ...]] = {
    "tokenizer": str,
    "levels": list,
    "levels.*": dict,
    "levels.*.num_codes": int,
    "sources": dict,
    "sources.train": str,
    "sources.held_out": str,
    "num_images": (dict, NoneType),
    "augmentations_per_image": int,
    "bf16": bool,
    "parts": dict,
    "parts.*": list,
    "parts.*.*": dict,
    "parts.*.*.*": (int, NoneType),
    "weights": list,
    "weights.*": (int, float),
    "images_per_shard": int,
    "settings": dict,
    "settings.data": dict,
    "settings.data.mix": (list, NoneType),
    "settings.data.mix.*": dict,
}
"""What is read of a plan or a manifest."""
_SHARD_TYPES = {"name": str, "rows": int, "captions": int, "bytes": int, "sha256": str}
_FILE_TYPES = {
    "files": dict,
    "files.*": list,
    "files.*.*": dict,
    **{f"files.*.*.{name}": kind for name, kind in _SHARD_TYPES.items()},
}
HASHED_BYTES = 4 * 2**30
"""Folders of at most so many bytes are hashed when they are opened, which takes two seconds. Of
larger folders only sizes are checked."""
_OPEN = 256
"""Files that are mapped at the same time."""
_READ = 8
"""After so many rows read, one of the mapped files, in rotation, releases its pages. Reading a row
maps 64 KiB around it, so all data would count as this process's memory in time."""


class CodesDataset:
    """One split of a codes folder, memory-mapped. Opening verifies that every file exists and has
    its size, and its hash if the folder has at most `HASHED_BYTES`. In larger folders a changed
    file of the right size goes unnoticed.

    Raises:
        ValueError: the folder is incomplete or of another format, or a file is missing, truncated
            or changed; names the file.
    """

    def __init__(self, folder: Path, split: str) -> None:
        self.manifest = read_manifest(folder)
        check_form(self.manifest, folder)
        self._folder = folder
        self._shards = shards_of(self.manifest)[split]
        hashed = are_hashed(self.manifest)
        for shard in self._shards:
            if wrong := verify_shard(folder / shard.name, shard, hashed=hashed):
                raise ValueError(
                    f"{folder / shard.name} {wrong}; run `minidalle encode` again, which rebuilds "
                    "just that file"
                )
        self.views = int(self.manifest["augmentations_per_image"]) if split == "train" else 1
        self.captions_in_all = sum(shard.captions for shard in self._shards)
        self._ends = list(accumulate(shard.rows for shard in self._shards))
        parts = [unit.part for unit in planned_files(self.manifest)[split].values()]
        self.lengths = [
            sum(
                shard.rows
                for shard, part in zip(self._shards, parts, strict=True)
                if part == number
            )
            for number in range(max(parts) + 1)
        ]
        """Rows of each part of a mixture; the parts lie one after another."""
        self.weights: list[float] = self.manifest["weights"]
        self._opened: dict[int, OpenShard] = {}
        self._read = 0
        self._lock = Lock()

    def __len__(self) -> int:
        return self._ends[-1]

    def captions(self, indices: Sequence[int], draws: Sequence[float] | None = None) -> list[str]:
        """One caption per image: the first one, or '' where there is none. With `draws`, a number
        in [0, 1) per image chooses among all of its captions, with equal probability."""
        if draws is None:
            return [shard.text(row) for shard, row in map(self._find, indices)]
        every = self.all_captions(indices)
        return [texts[int(draw * len(texts))] for texts, draw in zip(every, draws, strict=True)]

    def all_captions(self, indices: Sequence[int]) -> list[list[str]]:
        """All captions of each image, the first one first."""
        return [shard.texts(row) for shard, row in map(self._find, indices)]

    def source_rows(self, indices: Sequence[int]) -> list[int]:
        """The images' numbers in their split of the source, where unusable images do not count."""
        return [shard.number(row) for shard, row in map(self._find, indices)]

    def names(self, indices: Sequence[int]) -> list[str]:
        """The images' files or rows in their source."""
        return [shard.name(row) for shard, row in map(self._find, indices)]

    def codes(self, indices: Sequence[int], views: Sequence[int] | None = None) -> np.ndarray:
        """(B,N) int64; `views` chooses one encoding per image, the first one by default."""
        chosen = [0] * len(indices) if views is None else views
        rows = [
            shard.codes(row).reshape(self.views, -1)[view]
            for (shard, row), view in zip(map(self._find, indices), chosen, strict=True)
        ]
        return np.stack(rows).astype(np.int64)

    def _find(self, index: int) -> tuple[OpenShard, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        number = bisect_right(self._ends, index)
        with self._lock:
            shard = self._opened.pop(number, None) or OpenShard(
                self._folder / self._shards[number].name
            )
            self._opened[number] = shard  # the last used one comes last
            if len(self._opened) > _OPEN:
                del self._opened[next(iter(self._opened))]
            self._read += 1
            if self._read % _READ == 0:
                turn = self._read // _READ % len(self._opened)
                next(islice(self._opened.values(), turn, None)).release()
        return shard, index - (self._ends[number - 1] if number else 0)


@dataclass(frozen=True)
class ShardPlan:
    """What one file holds: rows of the source, or samples of one shard of a stream.

    Attributes:
        part: of a mixture.
        rows: numbers in the source, or in the mixture; None for a stream.
        shard: of the stream.
        most: images of the shard that are encoded; None encodes all.
    """

    part: int
    rows: range | None = None
    shard: int = 0
    most: int | None = None


def planned_files(plan: Mapping[str, Any]) -> dict[str, dict[str, ShardPlan]]:
    """The files of each split in their order and what each holds. `plan["parts"]` has, for each
    part of the source, its `first` row and the number of `rows`; for a stream, its number of
    `shards` and the `most` images of each."""
    each = plan["images_per_shard"]
    files = {}
    for split, parts in plan["parts"].items():
        units: list[ShardPlan] = []
        for number, part in enumerate(parts):
            if "shards" in part:
                units += [
                    ShardPlan(number, shard=shard, most=part["most"])
                    for shard in range(part["shards"])
                ]
            else:
                first = part["first"]
                end = first + part["rows"]
                units += [
                    ShardPlan(number, range(start, min(start + each, end)))
                    for start in range(first, end, each)
                ]
        files[split] = {
            f"{split}-{k:05d}-of-{len(units):05d}.arrow": unit for k, unit in enumerate(units)
        }
    return files


def shards_of(manifest: Mapping[str, Any]) -> dict[str, list[Shard]]:
    """What the files of each split are known by."""
    return {split: [Shard(**file) for file in files] for split, files in manifest["files"].items()}


def are_captioned(manifest: Mapping[str, Any]) -> bool:
    """Whether no shard has fewer captions than images, as a prior needs."""
    shards = shards_of(manifest).values()
    return all(shard.captions >= shard.rows for own in shards for shard in own)


def are_hashed(manifest: Mapping[str, Any]) -> bool:
    """Whether the files are few enough bytes to be hashed."""
    return (
        sum(shard.bytes for shards in shards_of(manifest).values() for shard in shards)
        <= HASHED_BYTES
    )


def read_manifest(folder: Path) -> dict[str, Any]:
    """What `write_manifest` wrote.

    Raises:
        ValueError: the folder holds no complete codes dataset, or one of another format.
    """
    path = folder / MANIFEST
    try:
        manifest = read_json(path, f"move {folder} away and run `minidalle encode` again", "format")
    except FileNotFoundError:
        raise ValueError(
            f"{folder} holds no complete codes dataset; run `minidalle encode` first"
        ) from None
    check_plan(manifest, path)
    return manifest


def check_plan(made: Mapping[str, Any], path: Path) -> None:
    """Checks a manifest, or the plan of an unfinished folder.

    Args:
        path: its file.

    Raises:
        ValueError: it is of another format, or damaged.
    """
    check_format(made.get("format"), path.parent)
    try:
        check_types(made, _PLAN_TYPES | (_FILE_TYPES if path.name == MANIFEST else {}))
        for split, parts in made["parts"].items():
            if not all({"first", "rows"} <= part.keys() or "shards" in part for part in parts):
                raise ValueError(f"parts.{split} lack rows: {parts!a:.80}")
            count = sum(
                part["shards"]
                if "shards" in part
                else math.ceil(part["rows"] / made["images_per_shard"])
                for part in parts
            )
            if path.name == MANIFEST and count != len(made["files"][split]):
                raise ValueError(
                    f"files.{split} are {len(made['files'][split])} in place of {count}"
                )
    except (ValueError, TypeError, KeyError, ArithmeticError) as error:
        raise ValueError(
            f"{path} is truncated or corrupted ({error}); move {path.parent} away and run "
            "`minidalle encode` again"
        ) from error


def check_format(made: Any, folder: Path) -> None:
    """Refuses other formats than this version's.

    Raises:
        ValueError: naming both.
    """
    if made != FORMAT:
        version = (
            "a later version" if isinstance(made, int) and made > FORMAT else "an earlier version"
        )
        raise ValueError(
            f"the codes in {folder} were written by {version} (format {made}; this one reads "
            f"{FORMAT}); move that folder away and run `minidalle encode` again"
        )


def mark_shard_done(folder: Path, shard: Shard) -> None:
    """Marks a shard of an unfinished folder as complete."""
    atomic_write_text((folder / shard.name).with_suffix(".json"), json.dumps(asdict(shard)) + "\n")


def recorded_shard(folder: Path, name: str) -> Shard | None:
    """What `mark_shard_done` wrote of a shard, if it did."""
    try:
        recorded = read_json((folder / name).with_suffix(".json"), types=_SHARD_TYPES)
        return Shard(**recorded)
    except (OSError, ValueError, TypeError):
        return None


def write_manifest(
    folder: Path, plan: Mapping[str, Any], shards: Mapping[str, Sequence[Shard]]
) -> None:
    """Completes the folder, and removes the files that only an unfinished one needs."""
    files = {split: [asdict(shard) for shard in of_split] for split, of_split in shards.items()}
    rows = {split: sum(shard.rows for shard in of_split) for split, of_split in shards.items()}
    atomic_write_text(
        folder / MANIFEST, json.dumps({**plan, "rows": rows, "files": files}, indent=2) + "\n"
    )
    remove_progress(folder, (shard.name for of_split in shards.values() for shard in of_split))


def remove_progress(folder: Path, names: Iterable[str]) -> None:
    """Removes what only an unfinished folder needs, also after a kill.

    Args:
        names: those of its shards.
    """
    for name in names:
        (folder / name).with_suffix(".json").unlink(missing_ok=True)
    (folder / PLAN).unlink(missing_ok=True)
    clean_partial_writes(folder)


def check_form(manifest: dict[str, Any], folder: Path) -> None:
    """Refuses codes that were written for other programs.

    Raises:
        ValueError: they are no Arrow files.
    """
    if (form := manifest.get("form", "arrow")) != "arrow":
        raise ValueError(
            f"the codes in {folder} are {form}, for other programs; move that folder away "
            "and run `minidalle encode` again"
        )


def check_tokenizer(manifest: dict[str, Any], fingerprint: str, folder: Path) -> None:
    """Refuses codes that another tokenizer made: their numbers mean something else.

    Raises:
        ValueError: naming both fingerprints.
    """
    if manifest["tokenizer"] != fingerprint:
        raise ValueError(
            f"the codes in {folder} were made by tokenizer {manifest['tokenizer']}, and this run's "
            f"tokenizer is {fingerprint}; move that folder away and run `minidalle encode` again"
        )
