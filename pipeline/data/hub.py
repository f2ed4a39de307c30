"""A `datasets` name or a folder saved by `datasets`. Knows columns and splits; knows no training."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data.config import DataConfig
from pipeline.data.folder import Tally, is_held_out
from pipeline.data.pictures import TooSmall, open_picture, square


class HubSource:
    """One split of a data set with an image column and a text column. Its `train` split is divided by row number."""

    def __init__(self, config: DataConfig, split: str) -> None:
        self.name, self.config = config.source, config
        rows = _load(config)
        for column in (config.image_column, config.text_column):
            if column not in rows.column_names:
                near = difflib.get_close_matches(column, rows.column_names, n=1, cutoff=0.3)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ValueError(
                    f"{config.source} has no column {column!r}; it has {', '.join(rows.column_names)}{hint} "
                    "(data.image_column, data.text_column)"
                )
        from datasets import Image

        # Undecoded, so that a broken picture is ours to report.
        self._rows = rows.select_columns([config.image_column, config.text_column]).cast_column(config.image_column, Image(decode=False))
        tally, kept = Tally(), []
        digest = hashlib.sha256(f"{config.image_size} {config.upscale}".encode())
        for number in range(len(self._rows)):
            row = self._rows[number]
            text = str(row[config.text_column] or "").strip()
            if not text:
                tally.add("pictures without a caption left out", f"row {number}")
                continue
            try:
                self._read(number)
            except TooSmall:
                tally.add(f"pictures smaller than {config.image_size} pixels left out (data.upscale=true keeps them)", f"row {number}")
            except (OSError, ValueError, TypeError):
                tally.add("unreadable pictures left out", f"row {number}")
            else:
                digest.update(f"{text}\0".encode() + (row[config.image_column]["bytes"] or b""))
                kept.append(number)
        self.problems = tally.lines()
        bad = tally.count("unreadable pictures left out")
        if bad > config.max_bad * max(len(self._rows), 1):
            raise ValueError(
                f"{bad} of {len(self._rows)} pictures of {config.source} cannot be read "
                f"({tally.first('unreadable pictures left out')}); repair them, or raise data.max_bad (now {config.max_bad})"
            )
        if not kept:
            raise ValueError(f"{config.source} has no usable picture with a caption; {'; '.join(self.problems)}")
        self._kept = [n for n in kept if is_held_out(str(n), config.held_out) == (split == "held_out")]
        self.fingerprint = digest.hexdigest()[:16]

    def __len__(self) -> int:
        return len(self._kept)

    def images(self, indices: Sequence[int]) -> np.ndarray:
        """Pictures (N,S,S,3) uint8."""
        return np.stack([self._read(self._kept[int(i)]) for i in indices])

    def captions(self, indices: Sequence[int]) -> list[str]:
        return [str(self._rows[self._kept[int(i)]][self.config.text_column]).strip() for i in indices]

    def _read(self, number: int) -> np.ndarray:
        import io

        cell = self._rows[number][self.config.image_column]
        source = io.BytesIO(cell["bytes"]) if cell["bytes"] else Path(cell["path"])
        return np.asarray(square(open_picture(source), self.config.image_size, upscale=self.config.upscale, name=f"row {number}"))


def _load(config: DataConfig) -> Any:
    import datasets

    path = Path(config.source).expanduser()
    try:
        loaded = datasets.load_from_disk(str(path)) if path.is_dir() else datasets.load_dataset(config.source)
    except Exception as error:  # the library raises many kinds for a name that cannot be had
        raise FileNotFoundError(
            f"data.source {config.source!r} is no folder here and no data set that can be loaded ({str(error).splitlines()[0][:200]}); "
            "give shapes, emoji, a folder of pictures, or a datasets name with network access"
        ) from error
    if isinstance(loaded, dict):
        return loaded["train"] if "train" in loaded else next(iter(loaded.values()))
    return loaded
