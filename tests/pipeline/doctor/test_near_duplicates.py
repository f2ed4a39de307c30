"""Perceptual hashes: copies are near, other images far. The search equals brute force."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance

from pipeline.data.readers.scan import perceptual_hash
from pipeline.doctor.near_duplicates import NEAR, alike, groups_of


def images(count: int) -> list[Image.Image]:
    """Coloured noise, large forms strongest, as in photographs."""
    random = np.random.default_rng(0)
    frequencies = np.fft.fftfreq(128)
    strength = 1 / np.maximum(np.hypot(frequencies[:, None], frequencies[None]), 1 / 128) ** 1.2
    made = []
    for _ in range(count):
        waves = [
            np.real(np.fft.ifft2(strength * np.exp(2j * np.pi * random.random((128, 128)))))
            for _ in range(3)
        ]
        values = np.stack(waves, -1) + 2 * waves[0][..., None]
        values = (values - values.mean()) / values.std() * 40 + 110
        made.append(Image.fromarray(np.clip(values, 0, 255).astype(np.uint8)))
    return made


def compressed(image: Image.Image) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=50)
    return Image.open(buffer)


def distance(a: int, b: int) -> int:
    return (a ^ b).bit_count()


@pytest.mark.parametrize(
    "change",
    [
        lambda image: image.resize((64, 64), Image.Resampling.BICUBIC),
        lambda image: image.resize((300, 300), Image.Resampling.BILINEAR),
        compressed,
        lambda image: ImageEnhance.Brightness(image).enhance(1.15),
        lambda image: ImageEnhance.Brightness(image).enhance(0.8),
    ],
    ids=["half", "twice", "jpeg", "brighter", "darker"],
)
def test_slightly_changed_copy_is_a_near_duplicate(change):
    distances = [
        distance(perceptual_hash(image), perceptual_hash(change(image))) for image in images(40)
    ]
    assert np.mean([d <= NEAR for d in distances]) >= 0.95 and max(distances) <= 2 * NEAR


def test_different_images_are_no_near_duplicates():
    looks = [perceptual_hash(image) for image in images(40)]
    assert min(distance(a, b) for i, a in enumerate(looks) for b in looks[:i]) > 2 * NEAR


def test_hash_depends_on_colour_and_plain_images_have_none():
    def disc(colour: str) -> Image.Image:
        image = Image.new("RGB", (64, 64), "white")
        image.paste(colour, (10, 10, 40, 40))
        return image

    red = disc("#c00000")
    grey = Image.merge("RGB", [red.convert("L")] * 3)
    # As light as each other everywhere
    assert distance(perceptual_hash(red), perceptual_hash(grey)) > NEAR
    for colour in ("white", "black", "#808080", "#c81e46", "blue"):
        assert (
            perceptual_hash(Image.new("RGB", (64, 48), colour)) == 0
            and perceptual_hash(compressed(Image.new("RGB", (64, 48), colour))) == 0
        )
    assert perceptual_hash(red) != 0


def by_comparing_all(looks: np.ndarray, most: int) -> set[frozenset[int]]:
    groups = [{i} for i in range(len(looks))]
    for i in range(len(looks)):
        for j in range(i):
            if distance(int(looks[i]), int(looks[j])) <= most:
                one, other = (next(g for g in groups if k in g) for k in (i, j))
                if one is not other:
                    one |= other
                    groups.remove(other)
    return {frozenset(group) for group in groups}


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(0, 2**64 - 1), max_size=12),
    st.lists(st.tuples(st.integers(0, 30), st.lists(st.integers(0, 63), max_size=6)), max_size=25),
    st.integers(0, 6),
)
def test_search_equals_brute_force(start, changes, most):
    looks = list(start)
    for of, bits in changes:
        if looks:
            look = looks[of % len(looks)]
            for bit in bits:
                look ^= 1 << bit
            looks.append(look)
    values = np.array(looks, np.uint64)
    labels = alike(values, most)
    found = {frozenset(np.flatnonzero(labels == label).tolist()) for label in np.unique(labels)}
    assert found == by_comparing_all(values, most)
    groups = groups_of(labels)
    assert {frozenset(group.tolist()) for group in groups} == {
        group for group in found if len(group) > 1
    }
    assert [len(group) for group in groups] == sorted(
        (len(group) for group in groups), reverse=True
    )


def test_search_in_chunks_gives_the_same_links(monkeypatch):
    random = np.random.default_rng(0)
    looks = random.integers(0, 2**12, 400, dtype=np.uint64)
    whole = alike(looks, 1, crowd=400)
    monkeypatch.setattr("pipeline.doctor.near_duplicates._PENDING", 3)
    assert np.array_equal(alike(looks, 1, crowd=400), whole) and len(np.unique(whole)) < 400


def test_large_hash_buckets_compare_neighbours_only():
    looks = np.arange(300, dtype=np.uint64) << np.uint64(40)
    near = alike(looks, 1, crowd=2)
    assert len(np.unique(near)) <= 300 and near[0] == near[1]
