"""Images without captions, and lists of paths."""

from __future__ import annotations

import pytest

from pipeline.data.load import load_sources
from pipeline.data.readers.base import NoCaptions
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


LAYOUTS = [folder_source, table_source, metadata_source, shard_source, list_source]


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
