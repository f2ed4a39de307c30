"""Several sources as one, by weight. Knows numbers of rows; reads nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from pipeline.data.source import Source, in_places

_BLOCK = 1000
"""Positions among which each part has exactly its share."""


class MixedSource(Source):
    """Parts one after another, and the `weights` by which training mixes them."""

    def __init__(self, parts: Sequence[Source], weights: Sequence[float]) -> None:
        self._parts = parts
        self.weights = weights
        self.name = " + ".join(part.name for part in parts)
        self.fingerprint = _joined([part.fingerprint for part in parts])
        self.earlier_fingerprint = _joined(
            [part.earlier_fingerprint or part.fingerprint for part in parts]
        )
        counts = [part.num_images for part in parts]
        self.num_images = None if None in counts else sum(filter(None, counts))
        self.starts = list(accumulate((part.number_limit for part in parts[:-1]), initial=0))

    @property
    def parts(self) -> Sequence[Source]:
        return self._parts

    @property
    def problems(self) -> list[str]:
        return [f"{part.name}: {problem}" for part in self.parts for problem in part.problems]

    def images(self, indices: Sequence[int], draws: Sequence[int] | None = None) -> np.ndarray:
        """Images (N,H,W,C) uint8; see `Source`."""
        found = (
            (places, part.images(rows, None if draws is None else [draws[i] for i in places]))
            for part, places, rows in self._by_part(indices)
        )
        return np.stack(in_places(found))

    def all_captions(self, indices: Sequence[int]) -> list[list[str]]:
        by_part = self._by_part(indices)
        return in_places((places, part.all_captions(rows)) for part, places, rows in by_part)

    def names(self, indices: Sequence[int]) -> list[str]:
        return in_places(
            (places, [f"{part.name}: {name}" for name in part.names(rows)])
            for part, places, rows in self._by_part(indices)
        )

    def _by_part(self, indices: Sequence[int]) -> list[tuple[Source, list[int], list[int]]]:
        rows = np.asarray(indices, np.int64)
        which = np.searchsorted(self.starts, rows, side="right") - 1
        found = []
        for number, part in enumerate(self.parts):
            places = np.flatnonzero(which == number)
            if len(places):
                found.append((part, places.tolist(), (rows[places] - self.starts[number]).tolist()))
        return found


def _joined(fingerprints: Sequence[str]) -> str:
    return hashlib.sha256(" ".join(fingerprints).encode()).hexdigest()[:16]


class MixtureSchedule:
    """Which part each position of an endless stream comes from, and how many positions before it
    are of that part: a pure function of the position.

    Args:
        weights: of the parts.
        seed: start of the shuffles.
    """

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        exact = np.array(weights) / sum(weights) * _BLOCK
        counts = np.floor(exact).astype(int)
        # The remainder goes to the parts that lost most by rounding. Each part gets at least one.
        for part in np.argsort(counts - exact)[: _BLOCK - counts.sum()]:
            counts[part] += 1
        while (counts == 0).any():
            counts[counts.argmax()] -= 1
            counts[counts.argmin()] += 1
        self._counts = counts
        self._seed = seed
        self._held = (-1, counts, counts)

    def at(self, position: int) -> tuple[int, int]:
        """(part, number of the part's images before it)."""
        block, within = divmod(position, _BLOCK)
        held = self._held  # read once and written once, as several threads ask
        if held[0] != block:
            parts = np.random.default_rng([self._seed, block, 1]).permutation(
                np.repeat(np.arange(len(self._counts)), self._counts)
            )
            before = np.empty(_BLOCK, np.int64)
            for part, count in enumerate(self._counts):
                before[parts == part] = np.arange(count)
            held = self._held = (block, parts, before)
        part = int(held[1][within])
        return part, int(block * self._counts[part] + held[2][within])
