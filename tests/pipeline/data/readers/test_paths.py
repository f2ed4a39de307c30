"""One rule for names of files: as written, then slashes, then letter case and Unicode form."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path

import pytest

from pipeline.data.load import load_source, load_sources
from pipeline.data.readers.base import SkipCounter
from pipeline.data.readers.paths import FOLDED, FileFinder, ImageNames, image_folder
from tests.helpers.data import config, encoded

COMPOSED = "gr\u00fcn.png"
DECOMPOSED = unicodedata.normalize("NFD", COMPOSED)


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    return path


@pytest.mark.parametrize(
    ("there", "named"),
    [
        ("a/b.png", "a/b.png"),
        ("a/b.png", "a\\b.png"),
        ("a/b.png", "./a/b.png"),
        ("a/b.png", ".\\a\\x\\..\\b.png"),
        ("a/b.png", " a/b.png "),
        ("a/b.png", "A/B.PNG"),
        ("Bilder/" + DECOMPOSED, "bilder\\" + COMPOSED),
        (COMPOSED, DECOMPOSED.upper()),
        ("stra\u00dfe.JPG", "STRASSE.jpg"),
    ],
)
def test_a_file_is_found_by_every_spelling_of_its_name(tmp_path, there, named):
    touch(tmp_path / there)
    found = FileFinder(tmp_path).find(named)
    assert found is not None and (tmp_path / found).samefile(tmp_path / there)
    absolute = FileFinder(tmp_path / "elsewhere").find(f"{tmp_path}/{named.strip()}")
    assert absolute is not None and Path(absolute).samefile(tmp_path / there)


def test_the_exact_name_and_then_the_same_characters_are_preferred(tmp_path):
    for name in ("a.png", "A.png", DECOMPOSED, DECOMPOSED.upper()):
        touch(tmp_path / name)
    assert FileFinder(tmp_path).find("A.png") == "A.png"
    assert FileFinder(tmp_path).find(COMPOSED) == DECOMPOSED


@pytest.mark.parametrize("folder", [True, False])
def test_an_ambiguous_name_is_refused_with_its_matches(tmp_path, folder):
    for name in ("CAT.png", "Cat.png"):
        (tmp_path / name).write_bytes(encoded())
    table = tmp_path / ("metadata.csv" if folder else "list.csv")
    table.write_text("file_name,text\ncat.png,x\n")
    message = f"{table} row 1: 'cat.png' may mean CAT.png or Cat.png in {tmp_path}; write the name"
    with pytest.raises(ValueError, match=re.escape(message)):
        load_source(config(tmp_path if folder else table), "train")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("C:\\data\\a.png", "of a Windows drive left out (write paths relative to the table)"),
        ("d:/a.png", "of a Windows drive"),
        ("\\\\server\\share\\a.png", "of a Windows drive"),
        ("file:///data/a.png", "by a file:// address left out (write its path alone)"),
        ("https://host/a.png", "an address and no file left out (download the images first)"),
        ("s3://bucket/a.png", "an address and no file"),
        ("gone.png", "captions of images that are not there left out"),
    ],
)
@pytest.mark.parametrize("folder", [True, False])
def test_names_of_no_file_here_are_counted_by_what_they_are(tmp_path, name, reason, folder):
    (tmp_path / "b.png").write_bytes(encoded())
    table = tmp_path / ("metadata.csv" if folder else "list.csv")
    table.write_text(f"file_name,text\n{name},x\nb.png,y\n")
    problems = load_source(config(tmp_path if folder else table), "train").problems
    assert len([line for line in problems if reason in line and line.endswith(f": {name}")]) == 1


def test_folders_and_tables_name_the_same_rows_alike(tmp_path):
    """A table made on Windows: the same images whether it is metadata.csv or a source itself."""
    for i in range(6):
        touch(tmp_path / "images" / f"{i}.png").write_bytes(encoded((i, 0, 0)))
    content = "file_name,text\r\n" + "".join(f"images\\{i}.png,t{i}\r\n" for i in range(6))
    (tmp_path / "list.csv").write_bytes(("\ufeff" + content).encode())
    (tmp_path / "metadata.csv").write_bytes(content.encode())
    by_source = [
        [
            (s.names([i])[0], s.captions([i])[0])
            for s in load_sources(config(source))
            for i in range(len(s))
        ]
        for source in (tmp_path, tmp_path / "list.csv")
    ]
    assert sorted(by_source[0]) == sorted(by_source[1])
    assert sorted(by_source[0]) == [(f"images/{i}.png", f"t{i}") for i in range(6)]


def test_absolute_names_inside_a_folder_are_its_own(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded())
    (tmp_path / "metadata.csv").write_text(f"file_name,text\n{tmp_path}/a.png,x\n")
    sources = load_sources(config(tmp_path))
    assert [name for s in sources for name in s.names(range(len(s)))] == ["a.png"]
    (tmp_path / "metadata.csv").write_text(f"file_name,text\n{tmp_path}x/a.png,x\n")
    with pytest.raises(ValueError, match=r"row 1 names '.*', which lies outside the folder"):
        load_source(config(tmp_path), "train")


def test_several_spellings_of_an_image_in_a_table_are_one_image(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded())
    (tmp_path / "t.csv").write_text("image,text\n./a.png,one\na.png,two\nA.PNG,three\n")
    sources = load_sources(config(tmp_path / "t.csv"))
    found = [
        pair
        for s in sources
        for pair in zip(s.names(range(len(s))), s.all_captions(range(len(s))), strict=True)
    ]
    assert found == [("./a.png", ["one", "two", "three"])]


@pytest.mark.parametrize(
    ("there", "named"), [(DECOMPOSED, COMPOSED), ("a.JPG", "a.jpg"), ("a.png", "A.png")]
)
def test_folded_names_are_counted_once_each(tmp_path, there, named):
    touch(tmp_path / there)
    tally = SkipCounter()
    names = ImageNames(tmp_path / "metadata.csv", tmp_path, tally, {there})
    assert names.find(named, 1) == there
    assert tally.lines() == [f"1 {FOLDED}: {there} for {named}"]


@pytest.mark.parametrize(
    ("table", "images"),
    [
        ("captions.json", "."),
        ("captions_val2017.json", "val2017"),
        ("annotations/captions_val2017.json", "val2017"),
        ("annotations/captions_val2017.json", "images/val2017"),
        ("captions.txt", "Images"),
        ("results.csv", "flickr30k_images"),
    ],
)
def test_the_folder_of_images_is_found_beside_the_table(tmp_path, table, images):
    touch(tmp_path / table)
    touch(tmp_path / images / "1.png")
    touch(tmp_path / "other" / "2.png")
    found, tried = image_folder(tmp_path / table, ["1.png"])
    assert found is not None and found.samefile(tmp_path / images) and found in tried
    missing, tried = image_folder(tmp_path / table, ["3.png"])
    assert missing is None and tmp_path / images in tried


def test_two_other_folders_with_the_same_names_are_refused(tmp_path):
    for folder in ("first", "second"):
        touch(tmp_path / folder / "1.png")
    with pytest.raises(ValueError, match="the folders first, second have images of such names"):
        image_folder(tmp_path / "list.csv", ["1.png"])
