"""Files of prompts as editors write them."""

from __future__ import annotations

import logging

import pytest

from pipeline.inference.prompt_file import read_prompts


@pytest.mark.parametrize(
    "content",
    [
        b"a red circle\n\xe8\xb5\xa4\n",
        b"\xef\xbb\xbfa red circle\r\n\r\n  \r\n\xe8\xb5\xa4",
        b"\n\na red circle  \r\xe8\xb5\xa4\r",
        "a red circle\r\n\u8d64\r\n".encode("utf-16"),
        b"\xfe\xff" + "a red circle\n\n\u8d64".encode("utf-16-be"),
        b"\xef\xbb\xbfa red circle\n\xef\xbb\xbf\xe8\xb5\xa4\n",  # two files, one after another
    ],
)
def test_marks_line_ends_and_empty_lines_are_no_part_of_prompts(tmp_path, content):
    (tmp_path / "p.txt").write_bytes(content)
    assert [one.text for one in read_prompts(tmp_path / "p.txt")] == ["a red circle", "\u8d64"]


def test_skipped_lines_are_counted_and_lines_keep_their_numbers(tmp_path, caplog):
    (tmp_path / "p.txt").write_text("\none\n\n \ntwo\u2028half\n")
    with caplog.at_level(logging.INFO):
        prompts = read_prompts(tmp_path / "p.txt")
    assert [one.given_in for one in prompts] == [
        f"{tmp_path / 'p.txt'} line 2",
        f"{tmp_path / 'p.txt'} line 5",
    ]
    assert prompts[1].text == "two\u2028half"
    assert "empty lines skipped: 3" in caplog.text and "generate ''" in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a\ncaf\xe9\n", r"p\.txt is not UTF-8 \(line 2: "),
        (b"\n \n", r"p\.txt holds no prompt: all of its 2 lines are empty; write one prompt per"),
        (b"", r"p\.txt holds no prompt: it is empty"),
        (b"ok\na\0b\n", r"p\.txt line 2 holds a NUL character; save the file as text in UTF-8"),
        ("a red circle\n".encode("utf-16-le"), r"p\.txt line 1 holds a NUL character"),
    ],
)
def test_errors_name_file_and_line(tmp_path, content, message):
    (tmp_path / "p.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / "p.txt")


def test_what_is_no_text_file_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no prompt file .*none\.txt; give"):
        read_prompts(tmp_path / "none.txt")
    with pytest.raises(ValueError, match="is no text file; give a text file with one prompt"):
        read_prompts(tmp_path)
    with (tmp_path / "large.txt").open("wb") as file:
        file.truncate(2**27)
    with pytest.raises(ValueError, match="at most 67,108,864 are read; split it"):
        read_prompts(tmp_path / "large.txt")
