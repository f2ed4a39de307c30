"""Which images are copies of each other, and which look alike, from hashes alone. Knows numbers;
opens no images.

Two hashes are alike where at most `NEAR` of their 64 bits differ. Split into `NEAR` + 2 parts, two
such hashes agree in at least two parts. So only those that agree in some two parts are compared
(Manku et al. 2007, "Detecting near-duplicates for web crawling"): the hashes are sorted 15 times,
and not every pair is compared.
"""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np

NEAR = 4
"""Most bits in which hashes that are alike may differ. Measured on emoji, shapes and coloured noise
with the spectrum of photographs, these copies stay within it: all of half or three times the size,
99% of those of JPEG quality 50, 90% of those a third darker, and 68 to 89% of those a third
brighter, whose bright parts are clipped. Different noise differs in 15 or more. Drawings of one
kind, such as faces, look alike to it."""
CROWD = 128
"""Neighbours in the order that each hash is compared with. It bounds the time on a source of images
that are nearly the same; beyond it, pairs may be missed."""
_PENDING = 100_000


def alike(looks: np.ndarray, most: int = NEAR, crowd: int = CROWD) -> np.ndarray:
    """Hashes uint64 (N) -> a number for each (N), the same for those that are linked by pairs that
    differ in at most `most` bits."""
    distinct, inverse = np.unique(looks, return_inverse=True)
    links = _Links(len(distinct))
    parts = most + 2
    edges = [64 * i // parts for i in range(parts + 1)]
    masks = [((1 << last) - 1) ^ ((1 << first) - 1) for first, last in pairwise(edges)]
    for one, other in combinations(masks, 2):
        keys = distinct & np.uint64(one | other)
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        sorted_looks = distinct[order]
        places = np.arange(len(order))
        for distance in range(1, crowd + 1):
            places = places[places < len(order) - distance]
            places = places[keys[places] == keys[places + distance]]
            if not len(places):
                break
            close = places[
                np.bitwise_count(sorted_looks[places] ^ sorted_looks[places + distance]) <= most
            ]
            links.add(order[close], order[close + distance])
        links.settle()
    return links.labels[inverse]


class _Links:
    """Connected components from pairs; pairs that are linked already are dropped at once."""

    def __init__(self, count: int) -> None:
        self.labels = np.arange(count)
        self._pending: list[np.ndarray] = []
        self._count = 0

    def add(self, ones: np.ndarray, others: np.ndarray) -> None:
        pairs = np.stack([ones, others])
        pairs = pairs[:, self.labels[ones] != self.labels[others]]
        if pairs.size:
            self._pending.append(pairs)
            self._count += pairs.shape[1]
            if self._count > _PENDING:
                self.settle()

    def settle(self) -> None:
        if not self._pending:
            return
        pairs = np.concatenate(self._pending, axis=1)
        self._pending = []
        self._count = 0
        while True:
            labels = self.labels[pairs]
            apart = labels[0] != labels[1]
            if not apart.any():
                return
            pairs = pairs[:, apart]
            labels = labels[:, apart]
            # The larger label, which is a member itself, now points to the smaller one. Then
            # chains of pointers are followed to their end.
            np.minimum.at(self.labels, labels.max(0), labels.min(0))
            while not np.array_equal(further := self.labels[self.labels], self.labels):
                self.labels = further


def groups_of(labels: np.ndarray) -> list[np.ndarray]:
    """Labels (N) -> the places of each label that occurs several times, the largest group first."""
    _, inverse, counts = np.unique(labels, return_inverse=True, return_counts=True)
    places = np.flatnonzero(counts[inverse] > 1)
    places = places[np.argsort(inverse[places], kind="stable")]
    starts = np.flatnonzero(np.diff(inverse[places])) + 1
    return sorted(
        (part for part in np.split(places, starts) if len(part)),
        key=lambda part: (-len(part), int(part[0])),
    )
