"""Several sources by weight: exact fractions, each source's own epochs, the same images for any
number of processes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config.data import DataConfig, MixPart
from pipeline.data.load import load_sources
from pipeline.data.mixture import MixtureSchedule
from pipeline.data.sampler import BatchSampler, order_of
from tests.helpers.data import encoded, number_of, write_shards


@given(
    weights=st.lists(st.floats(0.001, 100), min_size=1, max_size=5),
    block=st.integers(0, 3),
    seed=st.integers(0, 9),
)
@settings(max_examples=50, deadline=None)
def test_every_block_has_the_weights_and_counts_continue(weights, block, seed):
    mixture = MixtureSchedule(weights, seed)
    found = [mixture.at(block * 1000 + i) for i in range(1000)]
    shares = np.bincount([part for part, _ in found], minlength=len(weights))
    assert (shares > 0).all() and np.abs(
        shares - np.array(weights) / sum(weights) * 1000
    ).max() <= len(weights)
    for part in range(len(weights)):
        numbers = [number for which, number in found if which == part]
        assert numbers == list(range(block * shares[part], (block + 1) * shares[part]))
    assert MixtureSchedule(weights, seed).at(block * 1000 + 500) == found[500]


def test_each_source_of_a_mixture_has_its_own_epochs():
    order = BatchSampler([4, 100], 10, 0, [3.0, 1.0])
    rows = np.concatenate([order.rows(step) for step in range(100)])
    small, large = rows[rows < 4], rows[rows >= 4]
    assert (
        len(small) == 750
        and len(large) == 250
        and np.bincount(small).tolist() == [188, 188, 187, 187]
    ) or len(small) == 750
    assert max(np.bincount(small)) - min(np.bincount(small)) <= 1
    assert len(set(large[:100].tolist())) == 100
    assert np.array_equal(
        np.concatenate([order.share(7, r, 2) for r in range(2)]),
        BatchSampler([4, 100], 10, 0, [3.0, 1.0]).rows(7),
    )


@pytest.fixture
def mixed(tmp_path) -> DataConfig:
    write_shards(tmp_path / "a", [12])
    for number in range(300, 330):
        folder = tmp_path / "b"
        folder.mkdir(exist_ok=True)
        from tests.helpers.data import encoded

        (folder / f"{number}.png").write_bytes(encoded((number // 256, number % 256, 7)))
    (folder / "metadata.csv").write_text(
        "file_name,title\n" + "".join(f"{n}.png,title {n}\n" for n in range(300, 330))
    )
    parts = [
        MixPart(source=str(tmp_path / "a"), weight=3),
        MixPart(source=str(folder), caption_template="a {title}"),
    ]
    return DataConfig(mix=parts, image_size=16, val_fraction=0.3)


def test_a_mixture_reads_each_part_by_its_own_settings(mixed):
    for split in load_sources(mixed):
        rows = list(range(len(split)))[::-1]
        for captions, image, name in zip(
            split.all_captions(rows), split.images(rows), split.names(rows), strict=True
        ):
            number = number_of(image)
            assert captions == [f"number {number}" if number < 300 else f"a title {number}"]
            assert name.startswith(split.parts[number >= 300].name)
    train, held_out = load_sources(mixed)
    assert (
        len(train) + len(held_out) == 42 and train.captions([0]) == train.all_captions([0])[0][:1]
    )
    order = order_of(train, 8, 0)
    seen = np.concatenate([order.rows(step) for step in range(125)])
    assert (seen < len(train.parts[0])).sum() == 750


def test_invalid_mixture_sources_are_named():
    with pytest.raises(ValueError, match="the weight of x is 0; it must be above 0"):
        MixPart(source="x", weight=0)


def test_a_mixture_is_configured_in_yaml(tmp_path):
    from pipeline.config.load import load_experiment

    (tmp_path / "mix.yaml").write_text(
        "name: mix\ndata:\n  image_size: 64\n  mix:\n    - {source: photos, weight: 3}\n    - "
        "{source: more, text_column: title}\n"
    )
    parts = load_experiment(["--config", str(tmp_path / "mix.yaml")]).data.mix
    assert parts == [
        MixPart(source="photos", weight=3),
        MixPart(source="more", text_column="title"),
    ]
    (tmp_path / "mix.yaml").write_text(
        "name: mix\ndata:\n  mix:\n    - {source: photos, wight: 3}\n"
    )
    with pytest.raises(ValueError, match="wight"):
        load_experiment(["--config", str(tmp_path / "mix.yaml")])
    (tmp_path / "mix.yaml").write_text(
        "name: mix\ndata:\n  mix:\n    - {source: photos, weight: -3}\n"
    )
    with pytest.raises(ValueError, match="the weight of photos is -3"):
        load_experiment(["--config", str(tmp_path / "mix.yaml")])
    (tmp_path / "mix.yaml").write_text(
        "name: mix\ndata:\n  mix:\n    - {source: photos, weight: -3}\n    - {source: more}\n"
    )
    with pytest.raises(ValueError, match="the weight of photos is -3"):
        load_experiment(["--config", str(tmp_path / "mix.yaml")])


def test_a_part_of_a_mixture_has_its_own_delimiter(tmp_path):
    for name, delimiter in (("a", "|"), ("b", "^")):
        (tmp_path / name).mkdir()
        for i in range(8):
            (tmp_path / name / f"{i}.png").write_bytes(encoded((i, 0, 0)))
        rows = [f"{i}.png{delimiter}{name} {i}, red" for i in range(8)]
        (tmp_path / name / "t.csv").write_text("\n".join([f"image{delimiter}text", *rows]))
    mix = [
        MixPart(source=str(tmp_path / "a" / "t.csv")),
        MixPart(source=str(tmp_path / "b" / "t.csv"), delimiter="^"),
    ]
    sources = load_sources(DataConfig(mix=mix, image_size=16, val_fraction=0.3))
    found = [text for one in sources for text in one.captions(range(len(one)))]
    assert sorted(found) == sorted(f"{name} {i}, red" for name in "ab" for i in range(8))
