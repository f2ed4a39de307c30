"""Which images are copies of each other, and which look alike, from hashes alone. Knows numbers;
opens no images.

Two looks are alike where at most `NEAR` of their 64 bits differ. Cut into `NEAR` + 2 parts, two
such looks agree in two parts at least, so it is enough to compare those that agree in some two
parts (Manku et al. 2007, "Detecting near-duplicates for web crawling"): they are sorted 15 times,
and never compared all with all.
"""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np

NEAR = 4
"""Bits in which looks that are alike may differ. Of emoji, shapes and coloured noise with the
spectrum of photographs, all copies of half or three times the size stay within it, 99% of those of
JPEG quality 50, 90% of those a third darker and 68 to 89% of those a third brighter, whose bright
parts are cut; different noise differs in 15 or more, and drawings of one kind, such as faces, look
alike to it."""
CROWD = 128
"""Looks that agree in two parts are compared with so many neighbours in their order, so that a
source of images that are all nearly the same takes no longer than others; beyond it, pairs may be
missed."""
_PENDING = 100_000


def alike(looks: np.ndarray, most: int = NEAR, crowd: int = CROWD) -> np.ndarray:
    """Looks uint64 (N) -> a number for each (N), the same for those that are linked by pairs that
    differ in at most `most` bits."""
    distinct, inverse = np.unique(looks, return_inverse=True)
    links = _Links(len(distinct))
    parts = most + 2
    edges = [64 * i // parts for i in range(parts + 1)]
    masks = [((1 << last) - 1) ^ ((1 << first) - 1) for first, last in pairwise(edges)]
    for one, other in combinations(masks, 2):
        keys = distinct & np.uint64(one | other)
        order = np.argsort(keys, kind="stable")
        keys, sorted_looks = keys[order], distinct[order]
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
    """Connected components, told pair by pair; pairs that say nothing new are forgotten at once."""

    def __init__(self, count: int) -> None:
        self.labels = np.arange(count)
        self._pending: list[tuple[np.ndarray, np.ndarray]] = []
        self._count = 0

    def add(self, ones: np.ndarray, others: np.ndarray) -> None:
        new = self.labels[ones] != self.labels[others]
        if new.any():
            self._pending.append((ones[new], others[new]))
            self._count += int(new.sum())
            if self._count > _PENDING:
                self.settle()

    def settle(self) -> None:
        if not self._pending:
            return
        ones, others = (np.concatenate(side) for side in zip(*self._pending, strict=True))
        self._pending, self._count = [], 0
        while True:
            first, second = self.labels[ones], self.labels[others]
            apart = first != second
            if not apart.any():
                return
            ones, others, first, second = ones[apart], others[apart], first[apart], second[apart]
            # The larger label, which is a member itself, now points to the smaller one; chains of
            # pointers are then followed to their end.
            np.minimum.at(self.labels, np.maximum(first, second), np.minimum(first, second))
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
