"""The codes dataset: every picture as codes, once, in Arrow files. Knows files and fingerprints; trains and draws nothing.

A row a picture: `codes` (all views one after another), `text`, `row` (its number in the source). `codes.json` is written last and
makes the folder whole; it holds the fingerprints of the tokenizer and of the source.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.checkpoints import write_file

MANIFEST = "codes.json"


class CodesDataset:
    """One split of a codes folder, memory-mapped."""

    def __init__(self, folder: Path, split: str) -> None:
        from datasets import Dataset, concatenate_datasets

        self.manifest = read_manifest(folder)
        check_form(self.manifest, folder)
        files = [folder / name for name in self.manifest["files"].get(split, [])]
        for file in files:
            if not file.is_file():
                raise ValueError(f"{file} is missing; remove {folder} and run `minidalle encode` again")
        parts = [Dataset.from_file(str(file)) for file in files]
        self.views = int(self.manifest["views"]) if split == "train" else 1
        rows = concatenate_datasets(parts)
        # A column each: reading captions must not decode the codes beside them.
        self._codes = rows.select_columns(["codes"]).with_format("numpy")
        self._text, self._row = rows.select_columns(["text"]), rows.select_columns(["row"])

    def __len__(self) -> int:
        return len(self._codes)

    def captions(self, indices: Sequence[int]) -> list[str]:
        return list(self._text[list(indices)]["text"])

    def source_rows(self, indices: Sequence[int]) -> list[int]:
        """The pictures' numbers in the source they came from."""
        return list(self._row[list(indices)]["row"])

    def codes(self, indices: Sequence[int], views: Sequence[int] | None = None) -> np.ndarray:
        """(B,N) int64; `views` chooses an encoding a picture, the first one by default."""
        rows = np.asarray(self._codes[list(indices)]["codes"]).astype(np.int64)
        rows = rows.reshape(len(rows), self.views, -1)
        return rows[np.arange(len(rows)), np.zeros(len(rows), int) if views is None else np.asarray(views)]


def read_manifest(folder: Path) -> dict[str, Any]:
    """What `complete` wrote.

    Raises:
        ValueError: the folder holds no whole codes dataset.
    """
    try:
        return json.loads((folder / MANIFEST).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder} holds no whole codes dataset ({error}); run `minidalle encode` first") from error


def write_part(folder: Path, split: str, part: int, parts: int, rows: Iterable[dict[str, Any]]) -> str:
    """Writes one process's rows; returns the file's name. Written beside and renamed."""
    from datasets import Features, List, Value
    from datasets.arrow_writer import ArrowWriter

    features = Features({"codes": List(Value("int32")), "text": Value("string"), "row": Value("int64")})
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{split}-{part:05d}-of-{parts:05d}.arrow"
    beside = folder / f".{name}.writing"
    writer = ArrowWriter(path=str(beside), features=features)
    try:
        for row in rows:
            writer.write(row)
        writer.finalize()
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    beside.rename(folder / name)
    return name


def complete(folder: Path, manifest: dict[str, Any]) -> None:
    """Marks the folder whole."""
    write_file(folder / MANIFEST, json.dumps(manifest, indent=2) + "\n")


def check_form(manifest: dict[str, Any], folder: Path) -> None:
    """Refuses codes that were written for other programs.

    Raises:
        ValueError: they are no Arrow files.
    """
    if (form := manifest.get("form", "arrow")) != "arrow":
        raise ValueError(f"the codes in {folder} are {form}, for other programs; remove that folder and run `minidalle encode` again")


def check_tokenizer(manifest: dict[str, Any], fingerprint: str, folder: Path) -> None:
    """Refuses codes that another tokenizer made: their numbers mean something else.

    Raises:
        ValueError: naming both fingerprints.
    """
    if manifest["tokenizer"] != fingerprint:
        raise ValueError(
            f"the codes in {folder} were made by tokenizer {manifest['tokenizer']}, and this run's tokenizer is {fingerprint}; "
            "remove that folder and run `minidalle encode` again"
        )
