"""Names, families and held-out tones; images where the font is installed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.config.builtin import EmojiOptions
from pipeline.config.data import DataConfig, data_settings
from pipeline.config.experiment import to_dict
from pipeline.data.builtin import emoji
from pipeline.data.builtin.emoji import (
    ANNOTATIONS,
    FONT,
    TONES,
    EmojiSource,
    base_name,
    held_out_names,
    installed_names,
    load_emoji,
    read_names,
    tone_of,
)

installed = pytest.mark.skipif(
    not Path(FONT).is_file() or not Path(ANNOTATIONS).is_dir(),
    reason="the emoji font or names are not installed",
)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("red heart", ("red heart", None)),
        ("astronaut: dark skin tone", ("astronaut", "dark skin tone")),
        ("man: light skin tone, beard", ("man: beard", "light skin tone")),
        (
            "kiss: person, person, light skin tone, dark skin tone",
            ("kiss: person, person, light skin tone, dark skin tone", None),
        ),
        ("flag: France", ("flag: France", None)),
    ],
)
def test_family_and_skin_tone_are_parsed(name, expected):
    assert tone_of(name) == expected


@pytest.mark.parametrize(
    ("base", "names"),
    [
        ("cook", ["cook", "man cook: dark skin tone", "woman cook: light skin tone"]),
        (
            ": beard",
            ["man: light skin tone, beard", "woman: beard", "person: dark skin tone, beard"],
        ),
        ("old", ["older person", "old man: medium skin tone", "old woman"]),
        ("claus", ["Santa Claus", "Mrs. Claus: dark skin tone", "mx claus"]),
        ("merperson", ["mermaid: dark skin tone", "merman", "merperson"]),
        ("holding hands", ["women holding hands", "woman and man holding hands: dark skin tone"]),
        ("kiss", ["kiss", "kiss: woman, man, light skin tone, dark skin tone"]),
        ("woman’s hat", ["woman’s hat"]),
        ("red heart", ["red heart"]),
        ("light skin tone", ["light skin tone"]),
    ],
)
def test_siblings_share_their_base_name(base, names):
    assert {base_name(name) for name in names} == {base}


def test_another_seed_holds_out_other_names():
    names = [f"{base}: {tone}" for base in "abcdefgh" for tone in TONES]
    splits = [held_out_names(names, 0.1, seed) for seed in (0, 1, 2)]
    assert splits[0] == held_out_names(names, 0.1)
    assert all(len(split) == 4 for split in splits)
    assert splits[0] != splits[1] != splits[2] != splits[0]


def test_a_seed_of_0_is_no_part_of_settings_and_fingerprints():
    """Runs and streams are known by these values."""
    plain = data_settings(to_dict(DataConfig(source="emoji")))
    assert plain["emoji"] == {"font": None, "annotations": None}
    other = DataConfig(source="emoji", emoji=EmojiOptions(split_seed=3))
    assert data_settings(to_dict(other))["emoji"]["split_seed"] == 3


def test_held_out_skin_tones_are_of_complete_families():
    names = [
        f"{base}: {tone}" for base in ("cook", "judge", "pilot", "singer") for tone in TONES
    ] + ["boat: dark skin tone", "tree"]
    held = held_out_names(names, 0.1)
    assert len(held) == 2 and len({tone_of(n)[0] for n in held}) == 2
    assert held == held_out_names(names[::-1], 0.1)
    assert "boat: dark skin tone" not in held_out_names(names, 0.9)  # its other tones do not exist


def test_names_are_read_from_both_files(tmp_path):
    for folder, cp, name in (
        ("annotations", "♥", "heart"),
        ("annotationsDerived", "🧑🏿‍🚀", "astronaut: dark skin tone"),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "en.xml").write_text(
            f'<ldml><annotations><annotation cp="{cp}">a | b</annotation><annotation cp="{cp}" '
            f'type="tts">{name}</annotation>'
            "</annotations></ldml>",
            encoding="utf-8",
        )
    assert read_names(tmp_path) == {"♥": "heart", "🧑🏿‍🚀": "astronaut: dark skin tone"}


def test_a_missing_font_says_how_to_install_it(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"fonts-noto-color-emoji\) or give its path as data\.emoji\.font"
    ):
        load_emoji(64, str(tmp_path / "none.ttf"), None)


@installed
def test_missing_names_say_how_to_install_them(tmp_path, monkeypatch):
    monkeypatch.setattr(emoji, "ANNOTATIONS", str(tmp_path))
    monkeypatch.setattr(emoji, "names_of_package", dict)
    with pytest.raises(FileNotFoundError, match="unicode-cldr-core"):
        load_emoji(64, None, None)


def test_names_that_are_not_where_they_are_asked_for_are_one_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no names in annotations/en\.xml; give the"):
        installed_names(str(tmp_path))
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations/en.xml").write_text("<ldml>")
    with pytest.raises(ValueError, match=r"en\.xml is no XML .*; replace it by a whole copy"):
        installed_names(str(tmp_path))


@installed
def test_a_file_that_is_no_such_font_is_named(tmp_path):
    (tmp_path / "x.ttf").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"data\.emoji\.font needs NotoColorEmoji\.ttf"):
        load_emoji(64, str(tmp_path / "x.ttf"), None)


def names(source: EmojiSource) -> list[str]:
    return source.captions(range(len(source)))


@installed
@pytest.mark.slow
def test_the_splits_hold_thousands_of_distinct_images_and_new_combinations():
    train, held_out = (
        EmojiSource(DataConfig(source="emoji", image_size=32), split)
        for split in ("train", "held_out")
    )
    assert len(train) > 3000 and len(held_out) == round(0.05 * (len(train) + len(held_out)))
    assert not set(names(train)) & set(names(held_out))
    words = set(" ".join(names(train)).replace(":", "").replace(",", "").split())
    for row, name in enumerate(names(held_out)):
        assert set(name.replace(":", "").replace(",", "").split()) <= words
        images, own = held_out.tone_siblings(row)
        assert len(images) == 5 and np.array_equal(images[own], held_out.images([row])[0])
        siblings, own = held_out.siblings(row)
        assert len(siblings) > 5 and np.array_equal(siblings[own], held_out.images([row])[0])
        family = tone_of(name)[0]
        assert sum(tone_of(n)[0] == family and tone_of(n)[1] is not None for n in names(train)) == 4
    images = train.images(range(len(train)))
    # Distinct at 64, and nearly all so at 32
    assert len({p.tobytes() for p in images}) > 0.98 * len(train)
    assert images.std(axis=(1, 2, 3)).min() > 0
    other = DataConfig(source="emoji", image_size=32, emoji=EmojiOptions(split_seed=1))
    assert set(names(EmojiSource(other, "held_out"))) != set(names(held_out))
    assert train.fingerprint != held_out.fingerprint and train.captions([0]) == train.names([0])


@installed
def test_a_heart_is_red_on_white():
    source = EmojiSource(DataConfig(source="emoji"), "train")
    image = source.images([names(source).index("red heart")])[0]
    assert (image[0, 0] == 255).all() and image[32, 32, 0] > 200 > 90 > image[32, 32, 1]
    assert source.tone_siblings(names(source).index("red heart"))[0].shape == (1, 64, 64, 3)
