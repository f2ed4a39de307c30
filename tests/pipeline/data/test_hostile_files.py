"""What data files may not do: hang, fill the memory, or lead out of their folder."""

from __future__ import annotations

import gzip
import io
import os
import socket
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.config.data import DataConfig
from pipeline.data.load import load_source, load_sources
from pipeline.data.readers import base, captions, files, parquet_limits
from pipeline.data.readers.base import SkipCounter
from pipeline.data.readers.files import check_regular, parse_json, read_file
from pipeline.data.readers.images import prepared
from pipeline.data.readers.memory import MemoryBudget
from pipeline.data.readers.tar_index import tar_members
from pipeline.data.streaming import samples
from pipeline.data.streaming.source import StreamSource
from tests.helpers.data import config, encoded, photo, write_shard


def images(folder: Path, count: int = 6) -> Path:
    """Images with captions."""
    folder.mkdir(exist_ok=True)
    for number in range(count):
        photo(number, (20, 20)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"number {number}")
    return folder


def problems(folder: Path, **options: object) -> list[str]:
    return load_source(config(folder, **options), "train").problems


def test_only_regular_files_are_opened(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "fifo")
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")  # a longer path would be refused
        for name, kind in (("fifo", "a FIFO"), ("socket", "a socket")):
            with pytest.raises(ValueError, match=f"{name} is {kind} and no regular file"):
                check_regular(tmp_path / name)
    for path, kind in ((tmp_path / "fifo", "a FIFO"), ("/dev/zero", "a device"), (tmp_path, "a f")):
        with pytest.raises(ValueError, match=f"is {kind}.* and no regular file"):
            read_file(path, 10)
    (tmp_path / "file").write_bytes(b"12345")
    assert read_file(tmp_path / "file", 5) == b"12345"
    with pytest.raises(ValueError, match="has 5 bytes; at most 4 are read"):
        read_file(tmp_path / "file", 4)


def test_a_fifo_as_an_image_caption_or_shard_hangs_nothing(tmp_path):
    folder = images(tmp_path / "a")
    (folder / "0.txt").unlink()
    os.mkfifo(folder / "0.txt")
    os.mkfifo(folder / "7.png")
    found = problems(folder)
    assert "1 captions that are no regular files left out: 0.txt" in found
    assert "1 links to images that are not there left out: 7.png" in found
    (tmp_path / "shards").mkdir()
    write_shard(
        tmp_path / "shards" / "a.tar",
        [(f"{i}", {"png": encoded((i, 99, 99)), "txt": b"a"}) for i in range(9)],
    )
    os.mkfifo(tmp_path / "shards" / "b.tar")
    assert any("b.tar is a FIFO" in line for line in problems(tmp_path / "shards"))
    stream = load_source(config(tmp_path / "shards", streaming=True), "train")
    found = [sample.name for shard in range(stream.num_shards) for sample in stream.samples(shard)]
    assert found and any("b.tar is a FIFO" in line for line in stream.problems)


def test_captions_beyond_the_limits_are_skipped_and_counted(tmp_path):
    folder = images(tmp_path / "a")
    (folder / "0.txt").write_text("x" * (files.MAX_TEXT_BYTES + 1))
    (folder / "1.txt").write_text("x" * (captions.LONGEST + 1))
    found = problems(folder)
    assert f"1 {base.LONG_CAPTION}: 0.txt" in found and f"1 {base.LONG_CAPTION}: 1.png" in found


def test_nested_json_is_refused_in_one_line(tmp_path):
    for depth in (10**5, 500):
        nested = "[" * depth + "]" * depth
        with pytest.raises(ValueError, match="more than 100 deep"):
            parse_json(nested)
        folder = images(tmp_path / f"a{depth}")
        (folder / "metadata.jsonl").write_text(f'{{"file_name": "0.png", "text": {nested}}}\n')
        with pytest.raises(ValueError, match=r"metadata\.jsonl line 1 .*more than 100 deep"):
            problems(folder)
    assert parse_json("[" * 100 + "]" * 100)
    write_shard(
        tmp_path / "a.tar",
        [(f"{i}", {"png": encoded(), "txt": b"a", "json": nested.encode()}) for i in range(9)],
    )
    assert problems(tmp_path / "a.tar") == []


def test_links_out_of_a_folder_are_followed_only_when_asked(tmp_path):
    folder = images(tmp_path / "a")
    photo(9, (20, 20)).save(tmp_path / "outside.png")
    (tmp_path / "secret").write_text("secret")
    (folder / "7.png").symlink_to(tmp_path / "outside.png")
    (folder / "7.txt").write_text("outside")
    (folder / "8.png").symlink_to("0.png")
    (folder / "8.txt").symlink_to("../secret")
    (folder / "9.png").symlink_to("1.png")
    (folder / "9.txt").write_text("inside")
    assert problems(folder) == [f"2 {base.OUTSIDE}: 7.png, 8.txt"]
    assert problems(folder, follow_links=True) == []
    (tmp_path / "metadata.csv").write_text("file_name,text\n0.png,a\n1.png,b\n2.png,c\n")
    (folder / "metadata.csv").symlink_to("../metadata.csv")
    with pytest.raises(ValueError, match=r"metadata\.csv is a link to a file outside"):
        problems(folder)


def header_of(
    name: str, size: int, kind: bytes = tarfile.REGTYPE, pax: dict[str, str] | None = None
) -> bytes:
    """A tar header that says any size."""
    entry = tarfile.TarInfo(name)
    entry.type = kind
    entry.size = size
    entry.pax_headers = pax or {}
    form = tarfile.PAX_FORMAT if pax else tarfile.GNU_FORMAT
    return entry.tobuf(form)


HOSTILE = {
    "huge": header_of("a.png", 2**63),
    "larger": header_of("a.png", 2**80),
    "negative": header_of("a.png", -512),
    "lies": header_of("a.png", 10**6),
    "pax size": header_of("a.png", 0, pax={"size": "-512"}),
    "pax size of 2^63": header_of("a.png", 0, pax={"size": str(2**63)}),
    "pax without end": header_of("x", 2**40, tarfile.XHDTYPE),
    "pax records": header_of("x", 512, tarfile.XHDTYPE) + b"999 path=a\n".ljust(512, b"\0"),
    "long name": header_of("x", 2**62, tarfile.GNUTYPE_LONGNAME),
    "negative name": header_of("x", -1024, tarfile.GNUTYPE_LONGNAME),
    "sparse": header_of("a.png", 0, tarfile.GNUTYPE_SPARSE)[:482] + b"\1" + b"\0" * 29,
    "garbage": b"garbage!" * 64,
    "half": header_of("a.png", 0)[:300],
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_header_ends_its_shard_in_one_line(tmp_path, kind):
    image = {"png": encoded((9, 200, 9)), "txt": b"green"}
    samples_of = [(f"{i}", image | {"png": encoded((9, 200, i))}) for i in range(9)]
    write_shard(tmp_path / "a.tar", samples_of)
    content = (tmp_path / "a.tar").read_bytes()
    end = content.rindex(b"green") + 512 - content.rindex(b"green") % 512
    (tmp_path / "a.tar").write_bytes(content[:end] + HOSTILE[kind] + content[:1024])
    (line,) = [one for one in problems(tmp_path / "a.tar") if "a.tar" in one]
    assert line.startswith("1 shards that are truncated or corrupted") and "\n" not in line
    mapped = load_sources(config(tmp_path / "a.tar"))
    train, held_out = load_sources(config(tmp_path / "a.tar", streaming=True))
    streamed = [one.name for one in train.samples(0)]  # type: ignore[attr-defined]
    assert streamed == mapped[0].names(range(len(mapped[0])))
    assert held_out.names(range(len(held_out))) == mapped[1].names(range(len(mapped[1])))
    list(train.samples(0))  # type: ignore[attr-defined]
    assert line in train.problems


@pytest.mark.parametrize("kind", ["huge", "negative", "lies"])
def test_a_hostile_header_in_a_compressed_shard_ends_it(tmp_path, kind):
    image = {"png": encoded((9, 200, 9)), "txt": b"green"}
    write_shard(tmp_path / "a.tar", [(f"{i}", image) for i in range(9)])
    content = (tmp_path / "a.tar").read_bytes()
    end = content.rindex(b"green") + 512 - content.rindex(b"green") % 512
    content = content[:end] + HOSTILE[kind] + content[:1024]
    (tmp_path / "a.tar").write_bytes(gzip.compress(content))
    ended = threading.Event()

    def stream() -> None:
        try:
            train, _ = load_sources(config(tmp_path / "a.tar", streaming=True))
            list(train.samples(0))  # type: ignore[attr-defined]
        except (OSError, ValueError) as error:
            assert "a.tar" in str(error) and "\n" not in str(error)
        ended.set()

    threading.Thread(target=stream, daemon=True).start()
    assert ended.wait(60)


@pytest.mark.parametrize("compressed", [False, True])
def test_members_of_streamed_shards_have_a_size_limit(tmp_path, monkeypatch, compressed):
    """A compressed shard ends there, as the rest of the member would be unpacked."""
    small = {"png": encoded((9, 200, 9)), "txt": b"green"}
    large = {"bmp": encoded((9, 9, 9), (90, 90), "BMP"), "txt": b"x" * 3000}
    path = tmp_path / "a.tar"
    write_shard(path, [(f"{i}", large if i == 8 else small) for i in range(9)])
    if compressed:
        path.write_bytes(gzip.compress(path.read_bytes()))
    monkeypatch.setattr(samples, "MAX_IMAGE_BYTES", 2000)
    monkeypatch.setattr(samples, "MAX_TEXT_BYTES", 1000)
    train, held_out = load_sources(config(path, streaming=True))
    names = [one.name for one in train.samples(0)]  # type: ignore[attr-defined]
    assert sorted([*names, *held_out.names(range(len(held_out)))]) == [f"{i}" for i in range(8)]
    left_out = "; ".join(train.problems)
    assert ("'8.bmp' has " in left_out) == compressed
    assert ("texts of more than" in left_out) != compressed


def test_extensions_of_extensions_are_read_without_recursion(tmp_path):
    name = header_of("x", 4, tarfile.GNUTYPE_LONGNAME) + b"b.tx".ljust(512, b"\0")
    (tmp_path / "a.tar").write_bytes(name * 3000 + header_of("c.txt", 0) + b"\0" * 1024)
    assert [one.name for one in tar_members(tmp_path / "a.tar", SkipCounter())] == ["b.tx"]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_of_tarfile(tmp_path, form):
    names = ["a.png", "folder/" + "long" * 20 + "/b.png", "ünïcode.txt", "empty.txt"]
    names += [] if form == tarfile.USTAR_FORMAT else ["x" * 300 + ".png"]
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=form) as tar:
        for number, name in enumerate(names):
            entry = tarfile.TarInfo(name)
            entry.size = number * 700
            tar.addfile(entry, io.BytesIO(bytes(entry.size)))
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    with tarfile.open(path) as tar:
        expected = [(one.name, one.offset_data, one.size) for one in tar if one.isfile()]
    found = [(one.name, one.start, one.length) for one in tar_members(path, SkipCounter())]
    assert found == expected and len(found) == len(names)


def test_parquet_that_inflates_to_many_times_its_size_is_refused(tmp_path, monkeypatch):
    table = {"image": [b"\0" * 50_000 + bytes([i]) for i in range(9)], "text": ["a"] * 9}
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table(table), path, compression="zstd", use_dictionary=False)
    parquet_limits.check_inflated(path)  # it is small
    monkeypatch.setattr(parquet_limits, "_MOST_BYTES", 400_000)
    with pytest.raises(ValueError, match=r"a\.parquet: column image of row group 0 inflates from"):
        load_source(config(path), "train")
    os.mkfifo(tmp_path / "b.parquet")
    with pytest.raises(ValueError, match="is a FIFO"):
        parquet_limits.check_inflated(tmp_path / "b.parquet")


def test_images_of_many_pixels_are_skipped_and_counted(tmp_path):
    folder = images(tmp_path / "a")
    Image.new("L", (300, 300), 99).save(folder / "0.png")
    # Decoded at an eighth of its size, it is small.
    photo(1, (300, 300)).save(folder / "1.jpg")
    (folder / "1.png").unlink()
    assert problems(folder, max_pixels=10_000) == [
        "1 images of more than 10,000 pixels left out (data.max_pixels): 0.png"
    ]


@pytest.mark.parametrize("streaming", [False, True])
def test_images_are_judged_at_the_size_that_training_decodes(tmp_path, streaming):
    """A scan decodes them smaller. Its result is kept and holds at any image size."""
    photos = {"progressive": {"progressive": True}, "plain": {}}
    members = [(f"small {n}", {"jpg": encoded(n), "txt": b"small"}) for n in range(9)]
    for name, options in photos.items():
        content = encoded((9, 9, 9), (300, 300), "JPEG", **options)
        members.append((name, {"jpg": content, "txt": name.encode()}))
    write_shard(tmp_path / "shards" / "0.tar", members)
    reason = "images of more than 10,000 pixels left out (data.max_pixels)"
    for size, count, said in ((16, 10, "1"), (128, 9, "2")):
        found = config(
            tmp_path / "shards",
            image_size=size,
            upscale=True,
            max_pixels=10_000,
            streaming=streaming,
        )
        sources = load_sources(found, tmp_path / "kept")
        stream = sources[0]
        if isinstance(stream, StreamSource):
            assert len(list(stream.first(20))) == count
        else:
            assert sum(map(len, sources)) == count
            for source in sources:
                source.images(range(len(source)))
        assert any(line.startswith(f"{said} {reason}") for line in stream.problems)


def test_a_budget_bounds_what_is_taken_together():
    budget = MemoryBudget(100)
    started = threading.Event()
    with budget.taken(60):
        thread = threading.Thread(target=lambda: _take(budget, 50, started))
        thread.start()
        with budget.taken(40):
            assert not started.wait(0.2)
    assert started.wait(30)
    thread.join()
    with budget.taken(10**9):  # alone
        pass


def _take(budget: MemoryBudget, count: int, started: threading.Event) -> None:
    with budget.taken(count):
        started.set()


_MEASURED = """
import io, resource, sys
from concurrent.futures import ThreadPoolExecutor
from pipeline.config.data import DataConfig
from pipeline.data.readers import images
from stage1_tokenizer import pixels  # counts before
config = DataConfig(source="x", image_size=16)
content = open(sys.argv[1], "rb").read()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
images.DECODING.most = int(sys.argv[2])
with ThreadPoolExecutor(8) as pool:
    list(pool.map(lambda _: images.prepared(content, config), range(8)))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_memory_of_decoding_does_not_grow_with_workers(tmp_path):
    """Of eight threads, with a budget for one image of 16 bits."""
    pixels = 2000 * 2000
    Image.fromarray(np.full((2000, 2000), 40000, np.uint16)).save(tmp_path / "a.png")
    command = [sys.executable, "-c", _MEASURED, str(tmp_path / "a.png"), str(16 * pixels)]
    # glibc gives memory of this size back at once when told to.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    used = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    # Twice two bytes, as decoded and as read, then one, and four of RGB
    assert int(used.stdout) < 9 * pixels


def test_prepared_images_are_bounded_by_their_configuration():
    with pytest.raises(
        files.TooLarge,
        match=r"it has 20x20 pixels, and at most 100 are decoded; raise data\.max_pixels",
    ):
        prepared(encoded(), DataConfig(source="x", image_size=16, max_pixels=100))


@pytest.mark.parametrize("streaming", [False, True])
def test_shards_that_are_links_out_of_their_folder_are_refused(tmp_path, streaming):
    members = {"png": encoded(), "txt": b"a caption"}
    write_shard(tmp_path / "elsewhere" / "0.tar", [(str(n), members) for n in range(9)])
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "0.tar").symlink_to("../elsewhere/0.tar")
    with pytest.raises(ValueError, match=r"0.tar is a link to a file outside.*follow_links=true"):
        load_source(config(tmp_path / "data", streaming=streaming), "train")
    load_source(config(tmp_path / "data", streaming=streaming, follow_links=True), "train")
    # The user names the link itself.
    load_source(config(tmp_path / "data" / "0.tar", streaming=streaming), "train")


def test_the_cache_of_the_hub_may_link_to_its_own_files(tmp_path):
    blobs = tmp_path / "datasets--user--name" / "blobs"
    write_shard(blobs / "abc", [(str(n), {"png": encoded(), "txt": b"x"}) for n in range(9)])
    snapshot = blobs.parent / "snapshots" / "1f0"
    snapshot.mkdir(parents=True)
    (snapshot / "0.tar").symlink_to("../../blobs/abc")
    assert load_source(config(snapshot), "train").problems == []


@pytest.mark.parametrize("outside", ["/secret.png", "../secret.png"])
def test_a_list_in_a_folder_names_images_of_that_folder_alone(tmp_path, outside):
    (tmp_path / "secret.png").write_bytes(encoded())
    folder = tmp_path / "data"
    folder.mkdir()
    for number in range(5):
        (folder / f"{number}.png").write_bytes(encoded())
    if outside.startswith("/"):
        outside = str(tmp_path / "secret.png")
    rows = "".join(f"{n}.png,number {n}\n" for n in range(5))
    (folder / "captions.csv").write_text(f"image,text\n{rows}{outside},a secret\n")
    with pytest.raises(ValueError, match=r"secret.png', which lies outside the folder"):
        load_source(config(folder), "train")
    # One that the user names is trusted.
    load_source(config(folder / "captions.csv"), "train")
    (folder / "link.png").symlink_to("../secret.png")
    (folder / "captions.csv").write_text(f"image,text\n{rows}link.png,a secret\n")
    assert "links to files outside of the folder" in str(problems(folder))


@pytest.mark.parametrize("size", [2**80, -1])
@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_streams_do_not_step_over_sizes_that_no_file_has(tmp_path, size, format):
    members = {"png": encoded(), "txt": b"a caption"}
    write_shard(tmp_path / "0.tar", [(str(n), members) for n in range(9)])
    header = tarfile.TarInfo("9.png")
    header.size = size
    content = (tmp_path / "0.tar").read_bytes()[: -tarfile.RECORDSIZE // 2]
    (tmp_path / "0.tar").write_bytes(gzip.compress(header.tobuf(format) + content))
    with pytest.raises(OSError, match=f"cannot be read .a member says {size:,} bytes"):
        load_source(config(tmp_path / "0.tar", streaming=True), "train")
