"""Members of shards: one rule for named parts, mapped and streamed, and members that lie apart."""

from __future__ import annotations

import io
import re
import tarfile
from pathlib import Path

import pytest

from pipeline.data.load import load_sources
from pipeline.data.readers import webdataset
from pipeline.data.readers.base import NoCaptions
from pipeline.data.readers.webdataset import ShardRows, images_of, member_name
from tests.helpers.data import config, encoded, write_shard


def write_members(path: Path, members: list[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


def both(source: Path, **options: object) -> list[dict[str, str]]:
    """Name -> caption of all samples, mapped and streamed."""
    found = []
    for streaming in (False, True):
        train, held_out = load_sources(config(source, streaming=streaming, **options))
        rows = range(len(held_out))
        own = dict(zip(held_out.names(rows), held_out.captions(rows), strict=True))
        if streaming:
            shards = range(train.num_shards)
            own |= {s.name: s.captions[0] for shard in shards for s in train.samples(shard)}
        else:
            rows = range(len(train))
            own |= dict(zip(train.names(rows), train.captions(rows), strict=True))
        found.append(own)
    return found


IMAGES = [(f"./{i:03d}.jpg", encoded((i, 0, 9), form="JPEG")) for i in range(12)]
TEXTS = [(f"./{i:03d}.txt", f"number {i}".encode()) for i in range(12)]
EXPECTED = {f"{i:03d}": f"number {i}" for i in range(12)}


def test_members_belong_to_the_name_before_the_first_dot():
    assert member_name("a/b.input.JPG") == ("a/b", "input.jpg")
    assert member_name("./000.txt") == ("000", "txt")
    assert member_name("a.b/c.png") == ("a.b/c", "png")
    for path in ("noending", ".hidden", "a/.x.jpg", "__MACOSX.jpg", "name."):
        assert member_name(path) is None, path


def test_plain_image_members_come_before_named_parts():
    members = ["mask.png", "input.jpg", "txt", "png"]
    assert images_of(members, None) == ["png", "mask.png", "input.jpg"]
    assert images_of(members, "jpg") == ["input.jpg"]
    assert images_of(members, "mask.png") == ["mask.png"]
    assert images_of(["txt"], None) == []


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"image_column": "jpg", "text_column": "txt"},
        {"image_column": "input.jpg", "text_column": "outputs.txt"},
    ],
)
def test_named_parts_are_read_the_same_mapped_and_streamed(tmp_path, options):
    samples = [
        (
            f"{i:03d}",
            {"input.jpg": encoded((i, 0, 9), form="JPEG"), "outputs.txt": f"number {i}".encode()},
        )
        for i in range(12)
    ]
    write_shard(tmp_path / "0.tar", samples)
    assert both(tmp_path, **options) == [EXPECTED, EXPECTED]
    assert "input.jpg 12, outputs.txt 12" in ShardRows("x", [str(tmp_path / "0.tar")], None).layout


@pytest.mark.parametrize("streaming", [False, True])
def test_two_named_texts_are_to_be_chosen_from(tmp_path, streaming):
    texts = {"short.txt": b"a", "long.txt": b"b"}
    samples = [(f"{i}", {"png": encoded((i, 0, 9)), **texts}) for i in range(12)]
    write_shard(tmp_path / "0.tar", samples)
    with pytest.raises(ValueError, match=r"it has short\.txt, long\.txt.*data\.text_column"):
        load_sources(config(tmp_path, streaming=streaming))
    _, held_out = load_sources(config(tmp_path, streaming=streaming, text_column="long.txt"))
    assert set(held_out.captions(range(len(held_out)))) == {"b"}


def test_sorted_shards_with_dots_before_their_names_are_the_same_mapped_and_streamed(tmp_path):
    members = [member for pair in zip(IMAGES, TEXTS, strict=True) for member in pair]
    write_members(tmp_path / "0.tar", members)
    assert both(tmp_path) == [EXPECTED, EXPECTED]


@pytest.mark.parametrize("order", ["images first", "captions first", "reversed"])
def test_mapped_members_are_joined_wherever_they_lie(tmp_path, order):
    members = {
        "images first": IMAGES + TEXTS,
        "captions first": TEXTS + IMAGES,
        "reversed": IMAGES + TEXTS[::-1],
    }[order]
    write_members(tmp_path / "0.tar", members)
    train, held_out = load_sources(config(tmp_path))
    found = {}
    for split in (train, held_out):
        rows = range(len(split))
        found |= dict(zip(split.names(rows), split.captions(rows), strict=True))
    assert found == EXPECTED and not train.problems


def test_mapped_captions_in_a_shard_of_their_own_are_joined(tmp_path):
    write_members(tmp_path / "0.tar", IMAGES)
    write_members(tmp_path / "1.tar", [*TEXTS, ("./999.txt", b"of nothing")])
    train, held_out = load_sources(config(tmp_path))
    assert len(train) + len(held_out) == 12
    assert train.problems == ["1 samples without an image left out: 999"]


def test_names_that_occur_again_with_the_same_members_are_samples_of_their_own(tmp_path):
    pairs = [IMAGES[0], TEXTS[0]]
    write_members(tmp_path / "0.tar", [*pairs, ("./000.jpg", IMAGES[1][1]), TEXTS[0]])
    rows = ShardRows("x", [str(tmp_path / "0.tar")], None)
    assert [rows.label(row) for row in range(len(rows))] == ["000", "000"]
    assert rows.image(0) != rows.image(1)


@pytest.mark.parametrize("images", [12, 40])
def test_streamed_members_that_lie_apart_name_cause_and_cure(tmp_path, images):
    """At the start, where the first samples have no captions; otherwise when they are read."""
    shard = tmp_path / "0.tar"
    expected = (
        r"the members of '000' do not lie together in .*0\.tar.*tar --sort=name.*"
        r"data\.streaming=false"
    )
    write_members(shard, IMAGES + TEXTS)
    with pytest.raises(ValueError, match=expected):
        load_sources(config(tmp_path, streaming=True))
    pairs = [
        member
        for i in range(100, 100 + images)
        for member in ((f"{i}.jpg", IMAGES[0][1]), (f"{i}.txt", b"x"))
    ]
    write_members(shard, pairs + IMAGES + TEXTS)
    with pytest.raises(ValueError, match=expected):
        load_sources(config(tmp_path, streaming=True))


def test_further_images_of_a_sample_are_counted(tmp_path):
    members = [("photo.v1.jpg", IMAGES[0][1]), ("photo.v2.jpg", IMAGES[1][1]), ("photo.txt", b"x")]
    write_members(tmp_path / "0.tar", members)
    rows = ShardRows("x", [str(tmp_path / "0.tar")], None)
    expected = "1 further images of a sample left out (a sample's name ends at its first dot)"
    assert len(rows) == 1 and re.escape(rows.tally.lines()[0]).startswith(re.escape(expected))


def test_a_text_that_is_too_long_is_counted_once(tmp_path, monkeypatch):
    monkeypatch.setattr(webdataset, "MAX_TEXT_BYTES", 9)
    write_members(tmp_path / "0.tar", [*IMAGES[:2], ("000.txt", b"x" * 10), ("001.txt", b"x")])
    rows = ShardRows("x", [str(tmp_path / "0.tar")], None)
    for _ in range(2):
        assert [record for (record,) in rows.records(["txt"])] == [{"txt": []}, {"txt": [b"x"]}]
    assert rows.tally.counts() == {webdataset.LONG_TEXT: 1}


def test_streamed_shards_whose_first_samples_alone_lack_captions_do_not_lie_apart(tmp_path):
    later = [(f"{i}.{end}", IMAGES[0][1]) for i in range(200, 203) for end in ("jpg", "txt")]
    images = [(f"{i:03d}.jpg", IMAGES[0][1]) for i in range(25)]
    write_members(tmp_path / "0.tar", images + later)
    with pytest.raises(NoCaptions, match="holds images and no column of captions"):
        load_sources(config(tmp_path, streaming=True))
