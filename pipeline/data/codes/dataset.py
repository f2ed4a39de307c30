"""The codes dataset: every image as codes, once, in Arrow files. Knows files and fingerprints;
trains and draws nothing.

A split is one row after another in shards (code_shards.py): of equally many rows, the last one
shorter, and of a stream one for each of its own. `codes.json` is written last and makes the folder
whole; it holds the fingerprints of the tokenizer and of the source, and size and hash of every
file. Until then `plan.json` says what is being made, and beside each finished shard lies a JSON
file with its size and hash.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, islice
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from pipeline.data.codes.shards import OpenShard, Shard, verify_shard
from pipeline.runtime.atomic_io import atomic_write_text

MANIFEST, PLAN = "codes.json", "plan.json"
FORMAT = 1
"""Of the folder; 1 was a file a process, without hashes."""
HASHED_BYTES = 4 * 2**30
"""A folder of at most so many bytes is hashed when it is opened, which takes two seconds; of a
larger one sizes alone are checked."""
_OPEN = 256
"""Files that are mapped at the same time."""
_READ = 8
"""Rows that are read before one of the mapped files, each in its turn, gives its pages back:
with a row 64 KiB around it are mapped, and in time all of the data would count as this process's
memory."""


class CodesDataset:
    """One split of a codes folder, memory-mapped. Opening it verifies it: every file is there and
    has its size, and its hash too where all files of the folder together are at most
    `HASHED_BYTES`; of larger folders a changed file of the right size goes unnoticed.

    Raises:
        ValueError: the folder is not whole, is of another format, or holds a missing, cut or
            changed file, which is named.
    """

    def __init__(self, folder: Path, split: str) -> None:
        self.manifest = read_manifest(folder)
        check_form(self.manifest, folder)
        self._folder, self._shards = folder, shards_of(self.manifest)[split]
        hashed = are_hashed(self.manifest)
        for shard in self._shards:
            if wrong := verify_shard(folder / shard.name, shard, hashed=hashed):
                raise ValueError(
                    f"{folder / shard.name} {wrong}; run `minidalle encode` again, which makes "
                    "just that file anew"
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
        """Rows of each part of a mixture, which lie one after another."""
        self.weights: list[float] = self.manifest["weights"]
        self._opened: dict[int, OpenShard] = {}
        self._read, self._lock = 0, Lock()

    def __len__(self) -> int:
        return self._ends[-1]

    def captions(self, indices: Sequence[int], draws: Sequence[float] | None = None) -> list[str]:
        """A caption an image: its first one, or with `draws`, a number in [0, 1) an image, any of
        its own, all equally likely."""
        if draws is None:
            return [shard.text(row) for shard, row in map(self._find, indices)]
        every = self.all_captions(indices)
        return [texts[int(draw * len(texts))] for texts, draw in zip(every, draws, strict=True)]

    def all_captions(self, indices: Sequence[int]) -> list[list[str]]:
        """All captions of each image, the first one first."""
        return [shard.texts(row) for shard, row in map(self._find, indices)]

    def source_rows(self, indices: Sequence[int]) -> list[int]:
        """The images' numbers in the source they came from."""
        return [shard.number(row) for shard, row in map(self._find, indices)]

    def codes(self, indices: Sequence[int], views: Sequence[int] | None = None) -> np.ndarray:
        """(B,N) int64; `views` chooses an encoding an image, the first one by default."""
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
            self._opened[number] = shard  # the one used last comes last
            if len(self._opened) > _OPEN:
                del self._opened[next(iter(self._opened))]
            self._read += 1
            if self._read % _READ == 0:
                turn = self._read // _READ % len(self._opened)
                next(islice(self._opened.values(), turn, None)).release()
        return shard, index - (self._ends[number - 1] if number else 0)


@dataclass(frozen=True)
class ShardPlan:
    """What one file holds: rows of the source, or what a shard of a stream gives.

    Attributes:
        part: of a mixture.
        rows: numbers in the source, or in the mixture.
        shard: of the stream.
        most: images of the shard that are encoded, if not all.
    """

    part: int
    rows: range | None = None
    shard: int = 0
    most: int | None = None


def planned_files(plan: Mapping[str, Any]) -> dict[str, dict[str, ShardPlan]]:
    """The files of each split in their order and what each holds. `plan["parts"]` names of each
    part of the source the `first` row and how many `rows`, or how many `shards` a stream has and
    the `most` images of each."""
    each, files = plan["images_per_shard"], {}
    for split, parts in plan["parts"].items():
        units: list[ShardPlan] = []
        for number, part in enumerate(parts):
            if "shards" in part:
                units += [
                    ShardPlan(number, shard=shard, most=part["most"])
                    for shard in range(part["shards"])
                ]
            else:
                first, end = part["first"], part["first"] + part["rows"]
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


def are_hashed(manifest: Mapping[str, Any]) -> bool:
    """Whether the files are few enough bytes to be hashed."""
    return (
        sum(shard.bytes for shards in shards_of(manifest).values() for shard in shards)
        <= HASHED_BYTES
    )


def read_manifest(folder: Path) -> dict[str, Any]:
    """What `complete` wrote.

    Raises:
        ValueError: the folder holds no whole codes dataset, or one of another format.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        made = manifest["format"]
    except FileNotFoundError:
        raise ValueError(
            f"{folder} holds no whole codes dataset; run `minidalle encode` first"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is truncated or corrupted ({error}); remove {folder} and run `minidalle "
            "encode` again"
        ) from error
    check_format(made, folder)
    return manifest


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
            f"{FORMAT}); remove that folder and run "
            "`minidalle encode` again"
        )


def mark_shard_done(folder: Path, shard: Shard) -> None:
    """Marks a shard of an unfinished folder as whole."""
    atomic_write_text((folder / shard.name).with_suffix(".json"), json.dumps(asdict(shard)) + "\n")


def recorded_shard(folder: Path, name: str) -> Shard | None:
    """What `mark_shard_done` wrote of a shard, if it did."""
    try:
        return Shard(**json.loads((folder / name).with_suffix(".json").read_text()))
    except (OSError, ValueError, TypeError):
        return None


def write_manifest(
    folder: Path, plan: Mapping[str, Any], shards: Mapping[str, Sequence[Shard]]
) -> None:
    """Marks the folder whole, and removes what was needed until then."""
    files = {split: [asdict(shard) for shard in of_split] for split, of_split in shards.items()}
    rows = {split: sum(shard.rows for shard in of_split) for split, of_split in shards.items()}
    atomic_write_text(
        folder / MANIFEST, json.dumps({**plan, "rows": rows, "files": files}, indent=2) + "\n"
    )
    for of_split in shards.values():
        for shard in of_split:
            (folder / shard.name).with_suffix(".json").unlink(missing_ok=True)
    (folder / PLAN).unlink(missing_ok=True)


def check_form(manifest: dict[str, Any], folder: Path) -> None:
    """Refuses codes that were written for other programs.

    Raises:
        ValueError: they are no Arrow files.
    """
    if (form := manifest.get("form", "arrow")) != "arrow":
        raise ValueError(
            f"the codes in {folder} are {form}, for other programs; remove that folder and run "
            "`minidalle encode` again"
        )


def check_tokenizer(manifest: dict[str, Any], fingerprint: str, folder: Path) -> None:
    """Refuses codes that another tokenizer made: their numbers mean something else.

    Raises:
        ValueError: naming both fingerprints.
    """
    if manifest["tokenizer"] != fingerprint:
        raise ValueError(
            f"the codes in {folder} were made by tokenizer {manifest['tokenizer']}, and this run's "
            f"tokenizer is {fingerprint}; "
            "remove that folder and run `minidalle encode` again"
        )
