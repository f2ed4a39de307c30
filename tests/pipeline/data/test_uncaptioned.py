"""Images without captions, and lists of paths."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from pipeline.data.load import load_sources
from pipeline.data.readers.base import NoCaptions
from pipeline.data.readers.captions import LONGEST
from tests.helpers.data import config, encoded, write_shard


def write_images(folder, *, captioned: int, count: int = 12):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        (folder / f"{i:02}.png").write_bytes(encoded((i, 0, 0)))
        if i < captioned:
            (folder / f"{i:02}.txt").write_text(f"shade {i}")
    return folder


def names(sources) -> list[str]:
    return sorted(name for one in sources for name in one.names(range(len(one))))


def all_captions(sources) -> list[list[str]]:
    return sorted(texts for one in sources for texts in one.all_captions(range(len(one))))


def folder_source(folder):
    return config(write_images(folder, captioned=4))


def table_source(folder):
    write_images(folder, captioned=0)
    rows = [f"{i:02}.png,{f'shade {i}' if i < 4 else ''}" for i in range(12)]
    (folder / "t.csv").write_text("\n".join(["image,text", *rows]))
    return config(folder / "t.csv")


def metadata_source(folder):
    write_images(folder, captioned=0)
    rows = [f"{i:02}.png,shade {i}" for i in range(4)]
    (folder / "metadata.csv").write_text("\n".join(["file_name,text", *rows]))
    return config(folder)


def shard_source(folder):
    samples = [
        (f"{i:02}", {"png": encoded((i, 0, 0))} | ({"txt": f"shade {i}".encode()} if i < 4 else {}))
        for i in range(12)
    ]
    write_shard(folder / "0.tar", samples)
    return config(folder / "0.tar")


def list_source(folder):
    write_images(folder, captioned=4)
    (folder / "list.txt").write_text("".join(f"{i:02}.png\n" for i in range(12)))
    return config(folder / "list.txt")


def captions_list_source(folder):
    write_images(folder, captioned=0)
    (folder / "captions.txt").write_text("".join(f"{i:02}.png,shade {i}\n" for i in range(4)))
    return config(folder)


def coco_source(folder):
    write_images(folder / "val2017", captioned=0)
    content = {
        "images": [{"id": i, "file_name": f"{i:02}.png"} for i in range(12)],
        "annotations": [{"image_id": i, "caption": f"shade {i}"} for i in range(4)],
    }
    (folder / "captions_val2017.json").write_text(json.dumps(content))
    return config(folder / "captions_val2017.json")


LAYOUTS = [
    folder_source,
    table_source,
    metadata_source,
    shard_source,
    list_source,
    captions_list_source,
    coco_source,
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_images_without_captions_are_used_where_none_is_required(tmp_path, layout):
    options = layout(tmp_path / "data")
    required = load_sources(options)
    every = load_sources(options, require_captions=False)
    assert len(names(required)) == 4 and len(names(every)) == 12
    assert all_captions(every) == [[]] * 8 + all_captions(required)
    assert required[0].fingerprint != every[0].fingerprint
    assert not every[0].problems


def test_captioned_images_have_one_fingerprint(tmp_path):
    options = config(write_images(tmp_path / "data", captioned=12))
    found = [load_sources(options, require_captions=required)[0] for required in (True, False)]
    assert found[0].fingerprint == found[1].fingerprint


def test_no_caption_at_all_is_an_error_where_they_are_required(tmp_path):
    folder = write_images(tmp_path / "data", captioned=0)
    (folder / "list.txt").write_text("00.png\n05.png\n")
    (folder / "paths.csv").write_text("image\n00.png\n")
    for source in (folder, folder / "list.txt", folder / "paths.csv"):
        with pytest.raises(NoCaptions, match=r"images and no (caption|column of captions)"):
            load_sources(config(source))
    assert len(names(load_sources(config(folder), require_captions=False))) == 12


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lists_of_paths_are_read_as_editors_write_them(tmp_path, encoding, end):
    folder = write_images(tmp_path / "data" / "gr\u00fcn", captioned=0)
    elsewhere = write_images(tmp_path / "elsewhere", captioned=0)
    lines = [
        "gr\u00fcn/00.png",
        "",
        "gr\u00fcn\\01.png",
        "  ",
        str(elsewhere / "02.png"),
        "gone.png",
    ]
    lines += ["gr\u00fcn/00.png", ""]
    (folder.parent / "list.txt").write_bytes(end.join(lines).encode(encoding))
    sources = load_sources(config(folder.parent / "list.txt"), require_captions=False)
    expected = [str(elsewhere / "02.png"), "gr\u00fcn/00.png", "gr\u00fcn/01.png"]
    assert names(sources) == expected
    assert sources[0].problems == [
        "1 paths that lead to no file left out: gone.png",
        "1 paths that are listed several times read once: gr\u00fcn/00.png",
    ]


def test_a_list_that_leads_to_no_image_is_an_error(tmp_path):
    (tmp_path / "list.txt").write_text("nope.png\n\nneither\n")
    with pytest.raises(
        ValueError, match=r"has 2 lines and none leads to an image; the first: nope\.png; write one"
    ):
        load_sources(config(tmp_path / "list.txt"), require_captions=False)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_named_column_must_be_there_also_where_captions_are_optional(tmp_path, layout):
    options = layout(tmp_path / "data")
    for named in ({"text_column": "txet"}, {"caption_template": "{txet}"}):
        for required in (True, False):
            with pytest.raises(ValueError, match=r"no column 'txet'; it has .*data\."):
                load_sources(replace(options, **named), require_captions=required)


def test_what_is_wrong_with_optional_captions_is_counted(tmp_path):
    folder = write_images(tmp_path / "data", captioned=4)
    (folder / "00.txt").write_bytes(b"\xff\xfe\xfd")
    sources = load_sources(config(folder), require_captions=False)
    assert len(names(sources)) == 12
    assert sources[0].problems == [
        "1 captions that are not UTF-8 left out (save them as UTF-8): 00.txt"
    ]
    rows = ["00.png,\"['a', 'b']\"", "01.png,nan", "02.png," + "x" * (LONGEST + 1)]
    (folder / "t.csv").write_text("\n".join(["image,text", *rows]))
    sources = load_sources(config(folder / "t.csv"), require_captions=False)
    assert all_captions(sources) == [[], [], ["a", "b"]]
    assert [line.rpartition(":")[0] for line in sources[0].problems] == [
        "1 images whose caption is a list written as text, read item by item",
        "1 captions that are too long left out",
    ]


def uncaptioned_table(folder):
    write_images(folder, captioned=0)
    (folder / "t.csv").write_text("image,width\n" + "".join(f"{i:02}.png,3\n" for i in range(12)))
    return config(folder / "t.csv")


def empty_table(folder):
    write_images(folder, captioned=0)
    (folder / "t.csv").write_text("image,text\n" + "".join(f"{i:02}.png,\n" for i in range(12)))
    return config(folder / "t.csv")


def uncaptioned_shard(folder):
    write_shard(folder / "0.tar", [(f"{i:02}", {"png": encoded((i, 0, 0))}) for i in range(12)])
    return config(folder / "0.tar")


@pytest.mark.parametrize(
    ("layout", "streaming"),
    [
        (uncaptioned_table, False),
        (empty_table, False),
        (uncaptioned_shard, False),
        (uncaptioned_shard, True),
    ],
)
def test_sources_without_captions_say_so_where_captions_are_required(tmp_path, layout, streaming):
    options = replace(layout(tmp_path / "data"), streaming=streaming)
    with pytest.raises(NoCaptions, match=r"images and no (captions|column of captions): .*add"):
        load_sources(options)
    train, held_out = load_sources(options, require_captions=False)
    count = sum(1 for _ in train.samples(0)) if streaming else len(train)
    assert count + len(held_out) == 12


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("uncaptioned", ["source", "held_out_source"])
def test_either_source_may_lack_captions_where_none_is_required(tmp_path, uncaptioned, streaming):
    texts = {"source": b"a caption", "held_out_source": b"a caption", uncaptioned: None}
    for number, (name, text) in enumerate(texts.items()):
        members = {"txt": text} if text else {}
        samples = [(f"{i}", {"png": encoded((i, 9, number))} | members) for i in range(8)]
        write_shard(tmp_path / f"{name}.tar", samples)
    held_out = str(tmp_path / "held_out_source.tar")
    options = config(tmp_path / "source.tar", held_out_source=held_out, streaming=streaming)
    with pytest.raises(NoCaptions, match=f"{uncaptioned}.tar holds images and no column"):
        load_sources(options)
    train, held_out = load_sources(options, require_captions=False)
    found = [sample.captions for sample in train.samples(0)] if streaming else None
    found = found or train.all_captions(range(len(train)))
    assert found == [["a caption"] if uncaptioned == "held_out_source" else []] * 8
    expected = ["a caption"] if uncaptioned == "source" else []
    assert held_out.all_captions(range(len(held_out))) == [expected] * 8
