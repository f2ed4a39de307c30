"""Opening every image: what is cached and how long it is valid, work shared by processes, and what
is reported of each image."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from pipeline.config.data import DataConfig
from pipeline.data.readers import scan
from pipeline.data.readers.folder import folder_rows
from pipeline.data.readers.scan import scan_images
from pipeline.data.worker_info import WorkerInfo
from tests.helpers.data import photo


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for number in range(9):
        photo(number, (30 + number, 24)).save(tmp_path / "images" / f"{number}.png")
        (tmp_path / "images" / f"{number}.txt").write_text(f"number {number}")
    (tmp_path / "images" / "9.png").write_bytes(b"none")
    (tmp_path / "images" / "9.txt").write_text("broken")
    return tmp_path / "images"


def rows(folder):
    return folder_rows(folder, DataConfig(source=str(folder)))


@pytest.fixture
def opened(monkeypatch) -> list[int]:
    """Rows that were really read."""
    read: list[int] = []
    one = scan._examined
    monkeypatch.setattr(
        scan, "_examined", lambda source, row, most: read.append(row) or one(source, row, most)
    )
    return read


def test_each_image_is_described(folder):
    found = scan_images(rows(folder), 2)
    assert found.width.tolist() == [*range(30, 39), 0] and found.height.tolist() == [24] * 9 + [0]
    assert found.mode == ["RGB"] * 9 + [""] and [bool(problem) for problem in found.problem] == [
        False
    ] * 9 + [True]
    assert len(set(found.digest.tolist())) == 10


def test_scan_is_cached_while_files_are_unchanged(folder, tmp_path, monkeypatch, opened):
    """Of slow sources. A file that changed, was added or has a truncated record is read again."""
    kept = tmp_path / "kept"
    scan_images(rows(folder), 2, kept)
    assert not kept.exists()  # ten images are read again in no time
    monkeypatch.setattr(scan, "_SLOW", 5)
    first = scan_images(rows(folder), 2, kept)
    opened.clear()
    again = scan_images(rows(folder), 2, kept)
    assert not opened and all(
        np.array_equal(getattr(first, name), getattr(again, name)) for name in vars(first)
    )
    photo(77, (50, 50)).save(folder / "3.png")
    os.utime(folder / "3.png", ns=(1, 1))
    assert scan_images(rows(folder), 2, kept).width[3] == 50 and len(opened) == 10
    opened.clear()
    (file,) = kept.iterdir()  # what was found of the source as it was is gone
    file.write_bytes(file.read_bytes()[:100])
    assert scan_images(rows(folder), 2, kept).width[3] == 50 and len(opened) == 10
    assert not [file for file in kept.iterdir() if file.name.startswith(".")]


def test_scan_of_a_moved_folder_is_cached(folder, tmp_path, monkeypatch, opened):
    monkeypatch.setattr(scan, "_SLOW", 5)
    first = scan_images(rows(folder), 2, tmp_path / "kept")
    opened.clear()
    folder.rename(tmp_path / "moved")
    again = scan_images(rows(tmp_path / "moved"), 2, tmp_path / "kept")
    assert not opened and np.array_equal(first.digest, again.digest)


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_scan_disjoint_images_and_share_results(
    folder, tmp_path, monkeypatch, opened, processes
):
    monkeypatch.setattr(scan, "_SLOW", 5)
    alone = scan_images(rows(folder), 1)
    opened.clear()
    meeting, told = threading.Barrier(processes), [None] * processes

    def gather(index):
        def everybodys(own):
            told[index] = own
            meeting.wait(timeout=30)
            result = list(told)
            meeting.wait(timeout=30)
            return result

        return everybodys

    def one(index):
        return scan_images(
            rows(folder), 1, tmp_path / f"of{index}", WorkerInfo(index, processes, gather(index))
        )

    with ThreadPoolExecutor(processes) as pool:
        found = list(pool.map(one, range(processes)))
    assert sorted(opened) == list(range(10))
    for each in found:
        assert all(
            np.array_equal(getattr(each, name), getattr(alone, name)) for name in vars(alone)
        )
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("of")] == ["of0"]
    opened.clear()
    with ThreadPoolExecutor(
        processes
    ) as pool:  # one has the record and the others have not: all read, and none waits for ever
        list(pool.map(one, range(processes)))
    assert len(opened) == 10


def test_truncated_animation_is_read_as_its_first_frame(tmp_path):
    frames = [photo(i, (30, 24)) for i in range(3)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    content = (tmp_path / "a.gif").read_bytes()
    (tmp_path / "a.txt").write_text("moves")
    for end in range(len(content) // 2, len(content), 7):
        (tmp_path / "a.gif").write_bytes(content[:end])
        found = scan_images(rows(tmp_path), 1)
        assert (
            found.width.tolist() == [30]
            and found.problem == [""]
            and found.mode[0].startswith(("P", "RGB"))
        )
