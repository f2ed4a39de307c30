"""A folder of pictures with captions beside them. Knows files and layouts; knows no training.

Captions come from metadata.jsonl or metadata.csv (columns file_name and text), or from NAME.txt beside NAME.png.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipeline.data.config import DataConfig
from pipeline.data.pictures import EXTENSIONS, TooSmall, open_picture, read_picture, square

LAYOUTS = """accepted are
  pictures/metadata.csv with the columns file_name,text      (cat.png,a cat on a mat)
  pictures/metadata.jsonl, a row a line                      ({"file_name": "cat.png", "text": "a cat on a mat"})
  pictures/cat.png with pictures/cat.txt beside it           (a cat on a mat)"""
_CACHE_BYTES = 1 << 30
_NAMED = 3


class Tally:
    """Counts what was left out, by reason, and remembers the first names."""

    def __init__(self) -> None:
        self._names: dict[str, list[str]] = {}

    def add(self, reason: str, name: str) -> None:
        self._names.setdefault(reason, []).append(name)

    def count(self, reason: str) -> int:
        return len(self._names.get(reason, []))

    def first(self, reason: str) -> str:
        names = self._names.get(reason, [])
        return ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")

    def lines(self) -> list[str]:
        """A line a reason."""
        return [f"{len(names)} {reason}: {self.first(reason)}" for reason, names in self._names.items()]


class FolderSource:
    """One split of a folder. Every picture is opened once at the start, so that what is left out is known before training."""

    def __init__(self, folder: Path, config: DataConfig, split: str) -> None:
        self.name, self.config = str(folder), config
        tally = Tally()
        captions = read_captions(folder, config, tally)
        rows: list[tuple[Path, str]] = []
        digest = hashlib.sha256(f"{config.image_size} {config.upscale}".encode())
        for relative, text in sorted(captions.items()):
            if not text.strip():
                tally.add("pictures without a caption left out", relative)
                continue
            path = folder / relative
            try:
                content = path.read_bytes()
                square(open_picture(path), config.image_size, upscale=config.upscale, name=relative)
            except TooSmall:
                tally.add(f"pictures smaller than {config.image_size} pixels left out (data.upscale=true keeps them)", relative)
            except (OSError, ValueError):
                tally.add("unreadable pictures left out", relative)
            else:
                digest.update(f"{relative}\0{text}\0".encode() + hashlib.sha256(content).digest())
                rows.append((path, text.strip()))
        self.problems = tally.lines()
        bad = tally.count("unreadable pictures left out")
        if captions and bad > config.max_bad * len(captions):
            raise ValueError(
                f"{bad} of {len(captions)} pictures in {folder} cannot be read ({tally.first('unreadable pictures left out')}); "
                f"repair or remove them, or raise data.max_bad (now {config.max_bad})"
            )
        if not rows:
            raise ValueError(f"{folder} has no usable picture with a caption; {'; '.join(self.problems) or LAYOUTS}")
        held = {path for path, _ in rows if is_held_out(path.relative_to(folder).as_posix(), config.held_out)}
        self._rows = [row for row in rows if (row[0] in held) == (split == "held_out")]
        self.fingerprint = digest.hexdigest()[:16]
        self._cache: OrderedDict[int, np.ndarray] = OrderedDict()

    def __len__(self) -> int:
        return len(self._rows)

    def images(self, indices: Sequence[int]) -> np.ndarray:
        """Pictures (N,S,S,3) uint8."""
        return np.stack([self._image(int(i)) for i in indices])

    def captions(self, indices: Sequence[int]) -> list[str]:
        return [self._rows[int(i)][1] for i in indices]

    def _image(self, index: int) -> np.ndarray:
        if index not in self._cache:
            picture = np.asarray(read_picture(self._rows[index][0], self.config.image_size, upscale=self.config.upscale))
            self._cache[index] = picture
            if len(self._cache) * picture.nbytes > _CACHE_BYTES:
                self._cache.popitem(last=False)
        return self._cache[index]


def is_held_out(name: str, share: float) -> bool:
    """By a hash of the name, so that pictures added later move no other one."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") < share * 2**64


def read_captions(folder: Path, config: DataConfig, tally: Tally) -> dict[str, str]:
    """Relative path -> caption, from whichever layout the folder has.

    Raises:
        ValueError: there are no captions, a column is missing, or a path leads out of the folder.
    """
    pictures = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.suffix.lower() in EXTENSIONS and p.is_file())
    for name, reader in (("metadata.jsonl", _rows_of_jsonl), ("metadata.csv", _rows_of_csv)):
        if (folder / name).is_file():
            captions = _named_captions(folder, name, reader(folder / name), config)
            break
    else:
        captions = {}
        for picture in pictures:
            beside = (folder / picture).with_suffix(".txt")
            if beside.is_file():
                captions[picture] = _text_of(beside).strip()
        if not captions:
            raise ValueError(f"{folder} holds {len(pictures)} pictures and no captions; {LAYOUTS}")
    for picture in pictures:
        if picture not in captions:
            tally.add("pictures that no caption names left out", picture)
    for named in sorted(set(captions) - set(pictures)):
        tally.add("captions of pictures that are not there left out", named)
        del captions[named]
    return captions


def _named_captions(folder: Path, name: str, rows: list[dict[str, str]], config: DataConfig) -> dict[str, str]:
    captions: dict[str, str] = {}
    for number, row in enumerate(rows, start=1):
        for column in ("file_name", config.text_column):
            if column not in row:
                raise ValueError(f"{folder / name} row {number} has no column {column!r}; it has {', '.join(map(str, row))}")
        if not isinstance(row["file_name"], str) or not row["file_name"]:
            raise ValueError(f"{folder / name} row {number} names no picture: file_name is {row['file_name']!r}")
        path = (folder / row["file_name"]).resolve()
        if not path.is_relative_to(folder.resolve()):
            raise ValueError(f"{folder / name} row {number} names {row['file_name']!r}, which lies outside the folder")
        captions[path.relative_to(folder.resolve()).as_posix()] = str(row[config.text_column] or "")
    return captions


def _rows_of_jsonl(path: Path) -> list[dict[str, str]]:
    rows = []
    for number, line in enumerate(_text_of(path).splitlines(), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path} line {number} is no JSON ({error}); each line must be one row") from error
            if not isinstance(row, dict):
                raise ValueError(f'{path} line {number} is no row; write {{"file_name": "cat.png", "text": "a cat"}}')
            rows.append(row)
    return rows


def _rows_of_csv(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(_text_of(path), newline="")))


def _text_of(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}); save it in that encoding") from error
