"""JSON files of which something is missing are refused in one line, with the remedy."""

from __future__ import annotations

import pytest

from pipeline.config.json_file import read_json


def test_objects_are_read(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"a": {"b": 1}, "c": null}')
    assert read_json(path, "copy it again", "a.b", "c") == {"a": {"b": 1}, "c": None}


@pytest.mark.parametrize("content", ["", '{"a"', "3", '{"a": {}}', '{"a": 3}', "{}"])
def test_truncated_files_and_missing_values_are_refused(content, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"a\.json is truncated or corrupted \(.+\); call me$"):
        read_json(path, "call me", "a.b")


def test_missing_file_is_no_corrupted_one(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "a.json")
