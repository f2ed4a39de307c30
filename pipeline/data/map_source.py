"""`MappedSource`: one split of rows that are read in any order. Knows crops and captions; knows no
layouts and no training."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

import numpy as np

from pipeline.config.data import DataConfig
from pipeline.data.readers.base import Rows, SkipCounter, held_out_of
from pipeline.data.readers.captions import captions_of
from pipeline.data.readers.images import crop_of, prepared
from pipeline.data.readers.scan import scan_images, usable
from pipeline.data.readers.splits import COPIES, copies_of_held_out
from pipeline.data.readers.value_range import dark_images, values_report, with_value_range
from pipeline.data.source import Source, check_usable
from pipeline.data.worker_info import SINGLE_PROCESS, WorkerInfo

_log = logging.getLogger(__name__)
_TOGETHER = 8
"""Images per task of a thread; with fewer, scheduling takes longer than decoding."""


class SourceIndex:
    """What both splits share: rows, their captions, which rows are usable, and a cache of decoded
    images. Without `require_captions`, images that have none are used, too.

    Raises:
        ValueError: a column is missing, too many images cannot be read, or none can be used.
    """

    def __init__(
        self,
        rows: Rows,
        config: DataConfig,
        folder: Path | None = None,
        share: WorkerInfo = SINGLE_PROCESS,
        *,
        require_captions: bool = True,
    ) -> None:
        self.rows = rows
        tally = SkipCounter()
        self.captions = captions_of(rows, config, tally, required=require_captions)
        found = scan_images(rows, config.workers, folder, share, config.max_pixels)
        self.digests = found.digest
        fit = usable(rows, found, config, tally)
        config = self.config = with_value_range(config, rows, found)
        if dark := dark_images(found, rows):
            _log.warning("%s", dark)
        if require_captions:
            fit &= np.array([bool(self.captions[row]) for row in range(len(rows))], bool)
        fit &= ~copies_of_held_out(rows, found.digest, tally)
        self.problems = rows.tally.lines() + tally.lines()
        check_usable(rows.name, int(fit.sum()), self.problems, require_captions=require_captions)
        digest = hashlib.sha256()
        kept: dict[bool, list[int]] = {False: [], True: []}
        self.problems += [note for note in (rows.note, values_report(config, found)) if note]
        held_out = held_out_of(rows, fit, config.val_fraction)
        for row in np.flatnonzero(fit).tolist():
            kept[bool(held_out[row])].append(row)
            entry = [rows.label(row), *self.captions[row], str(int(found.digest[row]))]
            # A split by hash follows from the labels.
            if rows.held_out is not None:
                entry.append("held out" if held_out[row] else "train")
            digest.update("\0".join(entry).encode() + b"\n")
        self.kept = {split: np.array(rows_of, np.int64) for split, rows_of in kept.items()}
        self.fingerprint = digest.hexdigest()[:16]
        self._decoded: dict[int, np.ndarray] = {}
        self._free = config.cache_gb * 2**30
        self._lock = Lock()
        self._pool = ThreadPoolExecutor(config.workers, thread_name_prefix="decode")

    def images(self, rows: Sequence[int], draws: Sequence[int] | None) -> np.ndarray:
        """(N,H,W,C) uint8, in parallel."""
        result = np.empty((len(rows), *self.config.size, self.config.channels), np.uint8)

        def fill(first: int) -> None:
            for i in range(first, min(first + _TOGETHER, len(rows))):
                result[i] = crop_of(
                    self._prepared(rows[i]), self.config, None if draws is None else draws[i]
                )

        for _ in self._pool.map(fill, range(0, len(rows), _TOGETHER)):
            pass
        return result

    def _prepared(self, row: int) -> np.ndarray:
        if (kept := self._decoded.get(row)) is not None:
            return kept
        config = self.config
        try:
            image = prepared(self.rows.image(row), config)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{self.rows.label(row)} of {self.rows.name} could be read before and cannot now "
                f"({error}); put it back as it was, and run the same command again"
            ) from error
        # Nothing is evicted: in shuffled epochs, each image is equally likely to be next.
        with self._lock:
            if row not in self._decoded and image.nbytes <= self._free:
                self._decoded[row] = image
                self._free -= image.nbytes
        return image


class MappedSource(Source):
    """One split."""

    def __init__(self, everything: SourceIndex, split: str) -> None:
        self._all = everything
        self._rows = everything.kept[split == "held_out"]
        self.num_images = len(self._rows)
        self.name = everything.rows.name
        self.fingerprint = everything.fingerprint
        self._tally = SkipCounter()

    @property
    def problems(self) -> list[str]:
        return [*self._all.problems, *self._tally.lines()]

    def leave_out_copies(self, digests: Iterable[int]) -> None:
        """Leaves images with these digests (`file_digest`) out."""
        copies = np.isin(self._all.digests[self._rows], list(digests))
        for row in self._rows[copies]:
            self._tally.add(COPIES, self._all.rows.label(int(row)))
        self._rows = self._rows[~copies]
        self.num_images = len(self._rows)

    def images(self, indices: Sequence[int], draws: Sequence[int] | None = None) -> np.ndarray:
        """Images (N,H,W,C) uint8; see `Source`."""
        return self._all.images([int(self._rows[int(i)]) for i in indices], draws)

    @property
    def digests(self) -> list[int]:
        """By which copies of the images' files are found (`file_digest`)."""
        return [int(self._all.digests[row]) for row in self._rows]

    def all_captions(self, indices: Sequence[int]) -> list[list[str]]:
        return [self._all.captions[int(self._rows[int(i)])] for i in indices]

    def names(self, indices: Sequence[int]) -> list[str]:
        return [self._all.rows.label(int(self._rows[int(i)])) for i in indices]
