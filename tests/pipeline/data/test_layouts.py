"""Every layout gives the same images and captions; columns, templates, several captions; errors of
each."""

from __future__ import annotations

import base64
import io
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.config.data import DataConfig
from pipeline.data.load import load_source, load_sources
from pipeline.data.readers.base import SkipCounter
from pipeline.data.readers.folder import folder_rows
from pipeline.data.readers.paths import NamedFiles
from pipeline.data.streaming.source import StreamSource
from tests.helpers.data import config, encoded, write_shard, write_shards

ROWS = [("red", 200), ("dim", 50), ("mid", 120)]


def everything(source: object, **options: object) -> dict[str, int]:
    """First caption -> red of the image, over both splits, which must not overlap."""
    found: dict[str, int] = {}
    for split in load_sources(config(source, **options)):
        rows = range(len(split))
        if rows:
            captions, images = split.captions(rows), split.images(rows)
            assert (
                not set(captions) & set(found)
                and images.shape[1:] == (16, 16, 3)
                and images.dtype == np.uint8
            )
            found |= {
                caption: int(image[0, 0, 0])
                for caption, image in zip(captions, images, strict=True)
            }
    return found


def write_layout(layout: str, folder) -> object:
    """The three images in one layout; returns its source."""
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    images = {name: encoded((shade, 0, 0)) for name, shade in ROWS}
    if layout in ("csv", "jsonl", "absolute"):
        (folder / "images").mkdir()
        for name, content in images.items():
            (folder / "images" / f"{name}.png").write_bytes(content)
        start = folder if layout == "absolute" else ""
        lines = [(f"{start}{'/' if start else ''}images/{name}.png", name) for name in images]
        if layout == "jsonl":
            (folder / "t.jsonl").write_text(
                "\n".join(json.dumps({"image": p, "text": t}) for p, t in lines)
            )
            return folder / "t.jsonl"
        (folder / "t.csv").write_text("path,text\n" + "".join(f"{p},{t}\n" for p, t in lines))
        return folder / "t.csv"
    if layout == "base64":
        rows = [
            {
                "image": "data:image/png;base64," + base64.b64encode(c + b"\0" * 500).decode(),
                "text": n,
            }
            for n, c in images.items()
        ]
        (folder / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return folder / "t.jsonl"
    if layout == "parquet":
        pq.write_table(
            pa.table({"image": list(images.values()), "text": list(images)}), folder / "t.parquet"
        )
        return folder / "t.parquet"
    if layout in ("shards", "glob", "braces"):
        for number, (name, content) in enumerate(images.items()):
            write_shard(
                folder / f"{number:02d}.tar",
                [(f"a/{name}", {"png": content, "txt": name.encode()})],
            )
        return {"shards": folder, "glob": folder / "*.tar", "braces": folder / "{00..02}.tar"}[
            layout
        ]
    rows = {"image": [{"bytes": c, "path": None} for c in images.values()], "text": list(images)}
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    data = datasets.Dataset.from_dict(rows, features=features)
    (datasets.DatasetDict({"train": data}) if layout == "saved dict" else data).save_to_disk(
        str(folder / "saved")
    )
    return folder / "saved"


@pytest.mark.parametrize(
    "layout",
    [
        "csv",
        "jsonl",
        "absolute",
        "base64",
        "parquet",
        "shards",
        "glob",
        "braces",
        "saved",
        "saved dict",
    ],
)
def test_each_layout_gives_the_same_images_and_captions(tmp_path, layout, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    source = write_layout(layout, tmp_path)
    assert everything(source) == dict(ROWS)
    assert (
        load_source(config(source), "train").fingerprint
        == load_source(config(source), "train").fingerprint
    )


def test_class_folders_get_templated_captions(tmp_path):
    for folder in ("red_fox", "owl"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "1.png").write_bytes(encoded((len(folder), 0, 0)))
    assert everything(tmp_path, caption_template="a photo of a {folder}, {name}") == {
        "a photo of a red_fox, 1": 7,
        "a photo of a owl, 1": 3,
    }
    with pytest.raises(
        ValueError,
        match=r"holds 2 images and no captions; accepted are(?s:.*)a photo of a \{folder\}",
    ):
        load_source(config(tmp_path), "train")


def test_class_labels_become_captions(tmp_path):
    import datasets

    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
    )
    rows = {
        "image": [{"bytes": encoded((i, 0, 0)), "path": None} for i in range(4)],
        "label": [0, 1, 1, 0],
    }
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "saved"))
    captions = [
        c
        for split in load_sources(config(tmp_path / "saved", text_column="label"))
        for c in split.captions(range(len(split)))
    ]
    assert sorted(captions) == ["cat", "cat", "dog", "dog"]
    by_template = load_sources(config(tmp_path / "saved", caption_template="one {label}"))
    assert sorted(c for split in by_template for c in split.captions(range(len(split)))) == [
        "one cat",
        "one cat",
        "one dog",
        "one dog",
    ]


def test_an_image_keeps_all_its_captions(tmp_path):
    """Lines of a text file, rows that name it again, lists in a column; each once, within the
    lengths that are wanted."""
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(encoded())
    (tmp_path / "a.txt").write_text("first\n\nsecond  \nfirst\n")
    (tmp_path / "b.txt").write_text("x\nlonger than wanted\nfits\n")
    sources = load_sources(config(tmp_path, filter={"min_caption": 2, "max_caption": 8}))
    assert sorted(c for split in sources for c in split.all_captions(range(len(split)))) == [
        ["first", "second"],
        ["fits"],
    ]
    rows = [
        {"file_name": "a.png", "text": ["one", "two"]},
        {"file_name": "b.png", "text": "x"},
        {"file_name": "a.png", "text": "three"},
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sources = load_sources(config(tmp_path))
    assert sorted(c for split in sources for c in split.all_captions(range(len(split)))) == [
        ["one", "two", "three"],
        ["x"],
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"caption_template": "a {colr} thing"},
            "has no column 'colr'; it has folder, name, colour, text; did you mean 'colour'?",
        ),
        ({"caption_template": "a thing"}, "data.caption_template 'a thing' names no column"),
        ({"caption_template": "a {colour"}, "data.caption_template 'a {colour' is no template"),
        (
            {"text_column": "Text"},
            "has no column 'Text'; it has folder, name, colour, text; did you mean 'text'? "
            "(data.text_column)",
        ),
    ],
)
def test_columns_that_are_not_there_are_named_with_the_nearest(tmp_path, options, message):
    (tmp_path / "a.png").write_bytes(encoded())
    (tmp_path / "metadata.csv").write_text("file_name,colour,text\na.png,red,x\n")
    with pytest.raises(ValueError, match=re.escape(message)):
        load_source(config(tmp_path, **options), "train")


def test_a_template_takes_no_attributes_and_skips_rows_without_its_columns(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.png").write_bytes(encoded())
    (tmp_path / "metadata.csv").write_text("file_name,colour\na.png,red\nb.png,\nc.png,blue\n")
    with pytest.raises(ValueError, match=r"has no column 'colour\.__class__'"):
        load_source(config(tmp_path, caption_template="{colour.__class__}"), "train")
    source = load_source(config(tmp_path, caption_template="{{a}} {colour} one"), "train")
    assert source.problems == ["1 images without a caption left out: b.png"]
    assert set(source.captions(range(len(source)))) <= {"{a} red one", "{a} blue one"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "t.csv",
            "photo,text\na.png,x\n",
            "has no column 'image'; it has photo, text (data.image_column)",
        ),
        (
            "t.csv",
            "filename,text\na.png,x\n",
            "has no column 'image'; it has filename, text; did you mean 'filename'?",
        ),
        (
            "t.csv",
            "image,text\na.png,a cat, and a dog\n",
            "row 1 has more fields than its columns image, text; texts with commas",
        ),
        ("t.csv", 'image,text\na.png,"a cat\n', "is no CSV (unexpected end of data)"),
        (
            "t.csv",
            "image,text\ngone.png,x\n",
            "no usable image with a caption: 1 captions of images that are not there left out: "
            "gone.png",
        ),
        ("t.jsonl", '{"image": 3, "text": "x"}\n', "1 rows that name no image left out: row 1"),
        ("t.jsonl", "{" * 5000, "line 1 is no JSON"),
        ("t.jsonl", '{"image": "' + "@" * 2000 + '", "text": "x"}\n', "1 of 1 images in"),
    ],
)
def test_table_errors_are_named(tmp_path, name, content, message):
    (tmp_path / "a.png").write_bytes(encoded())
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        load_source(config(tmp_path / name), "train")


@pytest.mark.parametrize("size", [(4, 4), (20, 20), (500, 500)])
@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_base64_images_of_any_length_are_read(tmp_path, size, form):
    """Shorter than many paths, and longer than what Python's csv takes by itself."""
    noise = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    cell = base64.b64encode(buffer.getvalue()).decode()
    assert len(cell) < 200 or (size[0] > 4 and (len(cell) > 131_072) == (size[0] == 500))
    if form == "csv":
        (tmp_path / "t.csv").write_text(f"image,text\n{cell},noise\n")
    else:
        (tmp_path / "t.jsonl").write_text(json.dumps({"image": cell, "text": "noise"}))
    assert list(everything(tmp_path / f"t.{form}", upscale=True)) == ["noise"]


def test_a_path_that_is_too_long_is_no_image(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded())
    (tmp_path / "t.csv").write_text(f"image,text\n{'x' * 400}.png,lost\na.png,found\n")
    assert list(everything(tmp_path / "t.csv")) == ["found"]


def test_image_paths_in_parquet_are_part_of_the_fingerprint(tmp_path, monkeypatch):
    """They are relative to it, mapped and streamed, and other files are another source; texts that
    are bytes are decoded."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    names = [f"{i}.png" for i in range(12)]
    for i, name in enumerate(names):
        (tmp_path / name).write_bytes(encoded((i, 0, 0)))
    pq.write_table(
        pa.table({"path": names, "text": [f"caf\u00e9 {i}".encode() for i in range(12)]}),
        tmp_path / "t.parquet",
    )
    before = load_source(config(tmp_path / "t.parquet"), "train")
    assert everything(tmp_path / "t.parquet") == {f"caf\u00e9 {i}": i for i in range(12)}
    held_out = load_sources(config(tmp_path / "t.parquet", streaming=True))[1]
    assert set(held_out.captions(range(len(held_out)))) <= {
        f"caf\u00e9 {i}" for i in range(12)
    } and len(held_out)
    os.utime(tmp_path / "3.png", ns=(1, 1))
    (tmp_path / "4.png").write_bytes(encoded((99, 0, 0)))
    assert load_source(config(tmp_path / "t.parquet"), "train").fingerprint != before.fingerprint


@pytest.mark.parametrize("streaming", [False, True])
def test_image_paths_in_parquet_are_relative_to_its_own_folder(tmp_path, monkeypatch, streaming):
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for place, numbers in (("one", range(9)), ("two", range(9, 18))):
        (tmp_path / place / "images").mkdir(parents=True)
        (tmp_path / place / "lists").mkdir()
        for number in numbers:
            path = tmp_path / place / "images" / f"{number}.png"
            path.write_bytes(encoded((number, 0, 0)))
        table = {"image": [f"../images/{n}.png" for n in numbers], "text": list(map(str, numbers))}
        pq.write_table(pa.table(table), tmp_path / place / "lists" / "0.parquet")

    def found(source: Path) -> set[str]:
        train, held_out = load_sources(config(source, streaming=streaming))
        captions = set(held_out.captions(range(len(held_out))))
        if isinstance(train, StreamSource):
            samples = (one for shard in range(train.num_shards) for one in train.samples(shard))
            return captions | {sample.captions[0] for sample in samples}
        return captions | set(train.captions(range(len(train))))

    assert found(tmp_path / "one" / "lists" / "0.parquet") == set(map(str, range(9)))
    assert found(tmp_path / "one" / "lists") == set(map(str, range(9)))
    assert found(tmp_path / "*" / "lists" / "*.parquet") == set(map(str, range(18)))
    # The name of another file would be a wrong image.
    (tmp_path / "two" / "images" / "0.png").write_bytes(encoded())
    named = NamedFiles(sorted(tmp_path.glob("*/lists/*")))
    with pytest.raises(
        ValueError, match=r"may mean .*one.*0\.png or .*two.*0\.png; write absolute"
    ):
        named.path("../images/0.png")


def test_file_names_with_lone_surrogates_are_reported(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded())
    (tmp_path / "metadata.jsonl").write_text(
        '{"file_name": "\\ud800.png", "text": "x"}\n{"file_name": "a.png", "text": "y"}'
    )
    assert load_source(config(tmp_path), "train").problems == [
        r"1 captions of images that are not there left out: \ud800.png"
    ]


def test_unmatched_captions_and_images_are_counted(tmp_path):
    for i in range(6):
        (tmp_path / f"{i}.png").write_bytes(encoded((i, 0, 0)))
    (tmp_path / "metadata.csv").write_text(
        "file_name,text\n" + "".join(f"{i}.png,t{i}\n" for i in range(4, 12))
    )
    assert load_source(config(tmp_path), "train").problems == [
        "6 captions of images that are not there left out: 6.png, 7.png, 8.png, ...",
        "4 images that no caption names left out: 0.png, 1.png, 2.png, ...",
    ]


def test_other_files_in_a_folder_are_counted_or_skipped(tmp_path):
    """Images of other kinds and links to nothing are; what is hidden was not meant."""
    for name in ("a.png", "b.JFIF", "c.avif"):
        Image.new("RGB", (20, 20)).save(
            tmp_path / name, {"png": "PNG", "JFIF": "JPEG", "avif": "AVIF"}[name.split(".")[1]]
        )
    for name in ("d.heic", "e.svg", "._a.png", "._a.heic", "notes.md"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ValueError, match=r"holds 3 images and no captions; accepted are"):
        folder_rows(tmp_path, DataConfig(source=str(tmp_path)))
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.txt").write_text(name)
    (tmp_path / "f.jpg").symlink_to(tmp_path / "gone.jpg")
    found = folder_rows(tmp_path, DataConfig(source=str(tmp_path)))
    assert [found.label(row) for row in range(len(found))] == ["a.png", "b.JFIF", "c.avif"]
    kinds = (
        "images of kinds that are not read (.png, .jpg, .jpeg, .jfif, .jpe, .webp, "
        ".avif, .bmp, .gif, .tif, .tiff are) left out"
    )
    assert found.tally.counts() == {kinds: 2, "links to images that are not there left out": 1}
    assert sorted(everything(tmp_path)) == ["a", "b", "c"]


def test_unusual_characters_in_captions_and_names_are_kept(tmp_path):
    """A line separator inside a text ends no row, half a surrogate pair becomes a question mark,
    names that are no UTF-8 are counted."""
    for name in ("a", "b"):
        (tmp_path / f"{name}.png").write_bytes(encoded())
    rows = [
        '{"file_name": "a.png", "text": "one\u2028two"}',
        '{"file_name": "b.png", "text": "half \\ud800"}',
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    sources = load_sources(config(tmp_path))
    assert sorted(c for split in sources for c in split.captions(range(len(split)))) == [
        "half ?",
        "one\u2028two",
    ]
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png")).write_bytes(encoded())
    assert load_source(config(tmp_path), "train").problems == [
        "1 images whose names are not UTF-8 left out: '\\udcff.png'"
    ]


def test_shards_with_text_json_and_labels_are_read(tmp_path):
    samples = [
        ("x/one", {"jpg": encoded(form="JPEG"), "json": b'{"alt": "from json"}', "cls": b"cat"}),
        ("two", {"jpg": encoded(form="JPEG"), "json": b"broken", "cls": b"dog"}),
        ("notes", {"txt": b"no image"}),
    ]
    write_shard(tmp_path / "0.tar", samples)
    source, held_out = load_sources(config(tmp_path, caption_template="{cls}"))
    assert sorted(
        source.captions(range(len(source))) + held_out.captions(range(len(held_out)))
    ) == ["cat", "dog"]
    assert source.problems == ["1 samples without an image left out: notes"]
    source, held_out = load_sources(config(tmp_path, text_column="alt"))
    assert source.captions(range(len(source))) + held_out.captions(range(len(held_out))) == [
        "from json"
    ]
    with pytest.raises(ValueError, match=r"has no column 'png'; it has .*(data\.image_column)"):
        load_source(config(tmp_path, image_column="png"), "train")


def test_truncated_shard_is_read_until_its_end_and_compressed_one_refused(tmp_path):
    import gzip

    captions = write_shards(tmp_path, [5, 5])
    whole = (tmp_path / "001.tar").read_bytes()
    (tmp_path / "001.tar").write_bytes(whole[: 512 * 9])
    found = [
        split.captions(range(len(split)))
        for split in load_sources(config(tmp_path, filter={"max_corrupt_fraction": 0.5}))
    ]
    assert {*found[0], *found[1]} < set(captions) and len(found[0]) + len(found[1]) >= 6
    assert any(
        "shards that are truncated or corrupted" in line
        for line in load_source(
            config(tmp_path, filter={"max_corrupt_fraction": 0.5}), "train"
        ).problems
    )
    # In the middle of an image: its header says more bytes than follow.
    start = whole.rindex(b"\x89PNG")
    (tmp_path / "001.tar").write_bytes(whole[: start + 30])
    problems = load_source(config(tmp_path), "train").problems
    assert re.search(r"001\.tar \(the header at \d+ says \d+ bytes, and 30 follow\)", problems[0])
    (tmp_path / "001.tar").write_bytes(gzip.compress(whole))
    with pytest.raises(
        ValueError,
        match=r"001\.tar is compressed; unpack it to a plain \.tar, or set data\.streaming=true",
    ):
        load_source(config(tmp_path), "train")
    (tmp_path / "000.tar").write_bytes(b"")
    (tmp_path / "001.tar").write_bytes(b"")
    with pytest.raises(ValueError, match="has 2 shards and no image"):
        load_source(config(tmp_path), "train")


def test_member_names_outside_the_shard_are_skipped(tmp_path):
    image = {"png": encoded(), "txt": b"x"}
    write_shard(tmp_path / "0.tar", [("../../evil", image), ("/abs", image), ("good", image)])
    source, held_out = load_sources(config(tmp_path))
    assert len(source) + len(held_out) == 1 and sorted(p.name for p in tmp_path.iterdir()) == [
        "0.tar"
    ]
    assert source.problems[0].startswith(
        "4 members of shards whose names lead out of them left out: '../../evil.png'"
    )


def test_missing_shards_are_named(tmp_path):
    with pytest.raises(
        FileNotFoundError,
        match=r"no files match .*none\*\.tar; .* holds nothing; give .* \.tar shards",
    ):
        load_source(config(tmp_path / "none*.tar"), "train")
    with pytest.raises(
        ValueError, match=r"https://host/0\.tar is not on this disk; set data\.streaming=true"
    ):
        load_source(config("https://host/0.tar"), "train")


def test_skip_counter_counts_all_and_names_the_first():
    tally = SkipCounter()
    for i in range(1500):
        tally.add("left out", str(i))
    assert (
        tally.lines() == ["1,500 left out: 0, 1, 2, ..."]
        and tally.count("left out") == 1500
        and tally.count("other") == 0
    )
