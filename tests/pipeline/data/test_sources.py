"""Folders in every layout, datasets by name, and the errors of each."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.config.builtin import ShapesOptions
from pipeline.config.data import DataConfig, FilterOptions
from pipeline.data.load import load_source
from pipeline.data.source import more_held_out
from tests.helpers.data import config


def write_image(
    path: Path, colour: object = (200, 30, 40), size: tuple[int, int] = (20, 20), mode: str = "RGB"
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)  # type: ignore[arg-type]


def everything(folder: Path | str, **options: object) -> dict[str, np.ndarray]:
    """Caption -> image over both splits, which must not overlap."""
    found: dict[str, np.ndarray] = {}
    for split in ("train", "held_out"):
        source = load_source(config(folder, **options), split)  # type: ignore[arg-type]
        rows = range(len(source))
        if len(source):
            found |= dict(zip(source.captions(rows), source.images(rows), strict=True))
    return found


@pytest.mark.parametrize("layout", ["csv", "jsonl", "txt"])
def test_each_layout_gives_the_same_images_and_captions(tmp_path, layout):
    rows = [
        (f"{folder}/cat.png", f"{folder} cat", shade)
        for folder, shade in (("red", 200), ("dim", 50), ("mid", 120))
    ]
    for file, text, shade in rows:
        write_image(tmp_path / file, (shade, 0, 0))
        if layout == "txt":
            (tmp_path / file).with_suffix(".txt").write_text(text + "\n")
    if layout == "csv":
        (tmp_path / "metadata.csv").write_text(
            "file_name,text\n" + "".join(f"{f},{t}\n" for f, t, _ in rows)
        )
    if layout == "jsonl":
        (tmp_path / "metadata.jsonl").write_text(
            "".join(json.dumps({"file_name": f, "text": t}) + "\n" for f, t, _ in rows)
        )
    found = everything(tmp_path)
    assert {text: int(image[0, 0, 0]) for text, image in found.items()} == {
        "red cat": 200,
        "dim cat": 50,
        "mid cat": 120,
    }
    assert all(image.shape == (16, 16, 3) and image.dtype == np.uint8 for image in found.values())


def test_splits_do_not_move_when_images_are_added(tmp_path):
    for i in range(30):
        write_image(tmp_path / f"{i}.png", (i, 0, 0))
        (tmp_path / f"{i}.txt").write_text(f"image {i}")
    before = load_source(config(tmp_path), "held_out")
    kept = set(before.captions(range(len(before))))
    write_image(tmp_path / "new.png")
    (tmp_path / "new.txt").write_text("new")
    after = load_source(config(tmp_path), "held_out")
    assert kept <= set(after.captions(range(len(after)))) and 2 <= len(kept) <= 18
    assert (
        before.fingerprint
        != after.fingerprint
        == load_source(config(tmp_path), "held_out").fingerprint
    )


def test_skipped_images_are_counted_and_named(tmp_path):
    for name in ("good", "small", "uncaptioned", "empty"):
        write_image(tmp_path / f"{name}.png", size=(8, 8) if name == "small" else (20, 20))
        if name != "uncaptioned":
            (tmp_path / f"{name}.txt").write_text("" if name == "empty" else name)
    (tmp_path / "broken.png").write_bytes(b"not an image")
    (tmp_path / "broken.txt").write_text("broken")
    source = load_source(config(tmp_path, filter={"max_corrupt_fraction": 0.5}), "train")
    problems = "\n".join(source.problems)
    for expected in (
        "1 unreadable images left out: broken.png",
        "1 images smaller than 16 pixels left out (data.upscale=true keeps them): small.png",
        "1 images that no caption names left out: uncaptioned.png",
        "1 images without a caption left out: empty.png",
    ):
        assert expected in problems
    assert set(everything(tmp_path, filter={"max_corrupt_fraction": 0.5})) == {"good"}
    assert set(everything(tmp_path, filter={"max_corrupt_fraction": 0.5}, upscale=True)) == {
        "good",
        "small",
    }
    with pytest.raises(ValueError, match=r"1 of 4 images in .* cannot be read \(broken\.png: "):
        load_source(config(tmp_path), "train")


def test_captions_of_missing_images_are_counted(tmp_path):
    write_image(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,a\ngone.png,b\n")
    assert load_source(config(tmp_path), "train").problems == [
        "1 captions of images that are not there left out: gone.png"
    ]


def test_any_mode_is_read_as_rgb(tmp_path):
    for mode, colour in (
        ("L", 128),
        ("RGBA", (1, 2, 3, 0)),
        ("CMYK", (0, 0, 0, 0)),
        ("P", 0),
        ("I;16", 65535),
        ("1", 1),
    ):
        file = tmp_path / f"{mode.replace(';', '')}.tif"
        write_image(file, colour, mode=mode)
        file.with_suffix(".txt").write_text(mode)
    shades = {text: tuple(image[5, 5].tolist()) for text, image in everything(tmp_path).items()}
    white = (255, 255, 255)
    assert (
        shades["RGBA"] == shades["CMYK"] == shades["I;16"] == shades["1"] == white
        and shades["L"] == (128,) * 3
    )


def test_a_folder_without_captions_says_what_is_needed(tmp_path):
    write_image(tmp_path / "a.png")
    with pytest.raises(
        ValueError,
        match=r"(?s)holds 1 images and no captions; accepted are.*metadata\.csv.*cat\.txt",
    ):
        load_source(config(tmp_path), "train")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "metadata.csv",
            "file,text\na.png,a\n",
            "row 1 has no column 'file_name'; it has file, text; did you mean 'file'?",
        ),
        (
            "metadata.csv",
            "file_name,title\na.png,a\n",
            "has no column 'text'; it has folder, name, title; did you mean 'title'?",
        ),
        (
            "metadata.csv",
            "file_name,text\n../b.png,a\n",
            "names '../b.png', which lies outside the folder",
        ),
        ("metadata.jsonl", "{broken\n", "line 1 is no JSON"),
        ("metadata.jsonl", "[1]\n", "line 1 is no row"),
        (
            "metadata.jsonl",
            '{"file_name": null, "text": "x"}\n',
            "row 1 names no image: file_name is None",
        ),
        ("metadata.csv", "text,file_name\na cat\n", "row 1 names no image: file_name is None"),
        (
            "metadata.csv",
            "file_name,text\na.png,\n",
            "holds 1 images and no captions: 1 images without a caption left out: a.png; add",
        ),
    ],
)
def test_unreadable_captions_are_named(tmp_path, name, content, message):
    write_image(tmp_path / "a.png")
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        load_source(config(tmp_path), "train")


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_captions_in_another_encoding_are_named(tmp_path, name):
    write_image(tmp_path / "a.png")
    (tmp_path / name).write_bytes("file_name,text\na.png,caf\u00e9\n".encode("latin-1"))
    with pytest.raises(ValueError, match=rf"{name} is not UTF-8 \(line 2: "):
        load_source(config(tmp_path), "train")


def test_a_caption_in_another_encoding_is_counted_and_utf16_is_read(tmp_path):
    for name in "ab":
        write_image(tmp_path / f"{name}.png")
    (tmp_path / "a.txt").write_bytes("caf\u00e9".encode("latin-1"))
    with pytest.raises(
        ValueError, match=r"1 captions that are not UTF-8 left out \(save them as UTF-8\): a\.txt"
    ):
        load_source(config(tmp_path), "train")
    (tmp_path / "b.txt").write_bytes("caf\u00e9".encode("utf-16"))
    assert set(everything(tmp_path)) == {"caf\u00e9"}


def saved(folder: Path, column: str = "text") -> Path:
    import datasets

    rows = {"image": [], column: []}  # type: ignore[var-annotated]
    for i in range(12):
        write_image(folder / "raw" / f"{i}.png", (i * 20, 0, 0))
        rows["image"].append(str(folder / "raw" / f"{i}.png"))
        rows[column].append(f"shade {i}")
    data = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    data.save_to_disk(str(folder / "saved"))
    return folder / "saved"


def test_saved_dataset_is_read(tmp_path):
    found = everything(saved(tmp_path))
    assert {text: int(image[3, 3, 0]) for text, image in found.items()} == {
        f"shade {i}": i * 20 for i in range(12)
    }
    assert load_source(config(tmp_path / "saved"), "train").fingerprint


def test_a_missing_column_suggests_the_nearest(tmp_path):
    with pytest.raises(
        ValueError, match=r"has no column 'text'; it has texts; did you mean 'texts'\?"
    ):
        load_source(config(saved(tmp_path, "texts")), "train")
    assert len(everything(tmp_path / "saved", text_column="texts")) == 12


def test_a_source_that_does_not_exist_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    with pytest.raises(
        FileNotFoundError, match=r"there is no .*nothing; .* holds nothing; give shapes"
    ):
        load_source(config(str(tmp_path / "nothing")), "train")


def test_configuration_errors_are_all_named():
    with pytest.raises(
        ValueError,
        match=r"(?s)data\.source is empty.*image_size is 4.*val_fraction is "
        r"1.*max_corrupt_fraction is 2.*min_objects 3.*num_scenes",
    ):
        DataConfig(
            source="",
            image_size=4,
            val_fraction=1,
            filter=FilterOptions(max_corrupt_fraction=2),
            shapes=ShapesOptions(min_objects=3, max_objects=2, num_scenes=0),
        )
    with pytest.raises(ValueError, match="the shapes need at least 32"):
        DataConfig(source="shapes", image_size=16)


def test_an_error_of_icons_advises_no_setting_that_icons_ignore():
    assert more_held_out("icons", 0.05) == "add drawings of other names"
    assert "raise data.val_fraction (now 0.05)" in more_held_out("emoji", 0.05)


def test_a_folder_of_svgs_and_an_iconify_file_are_told_which_source_reads_them(tmp_path):
    (tmp_path / "drawings").mkdir()
    (tmp_path / "drawings/cup.svg").write_text("<svg/>")
    with pytest.raises(ValueError, match="a folder of SVGs is read by data"):
        load_source(config(tmp_path / "drawings"), "train")
    (tmp_path / "set.json").write_text('{"prefix": "mine", "icons": {}}')
    with pytest.raises(ValueError, match=r"set data\.source=icons and data\.icons\.sets=\["):
        load_source(config(tmp_path / "set.json"), "train")
