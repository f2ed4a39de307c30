"""Streams: every sample once per epoch for any number of readers and processes, exact resume,
mixtures, errors."""

from __future__ import annotations

import functools
import gc
import http.server
import shutil
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.config.data import MixPart, data_settings
from pipeline.data.codes.dataset import ShardPlan
from pipeline.data.load import load_sources
from pipeline.data.mixture import MixedSource
from pipeline.data.readers.base import content_fingerprint, file_signature, is_held_out
from pipeline.data.streaming.feed import (
    ShardLengthCache,
    ShardReader,
    ShuffleBuffer,
    StreamBatchLoader,
    batch_loader,
)
from pipeline.data.streaming.source import StreamSource
from tests.helpers.data import config, encoded, number_of, write_shard, write_shards

COUNTS = [30, 7, 0, 18, 25, 11]


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder, [count for count in COUNTS if count])
    return str(folder)


def stream(source: object, **options: Any) -> StreamSource:
    reading = {"shuffle_buffer": 8, "shards_per_worker": 2, **options.pop("stream", {})}
    options = {"val_fraction": 0.1, **options}
    return StreamSource(config(source, streaming=True, stream=reading, **options))


def names(shuffled: ShuffleBuffer, count: int) -> list[str]:
    found = []
    for position in range(count):
        block, within = shuffled.place(position)
        found.append(shuffled.block(block)[within].name)
    return found


def of_training(source: StreamSource) -> list[str]:
    return [sample.name for shard in range(source.num_shards) for sample in source.samples(shard)]


def test_streaming_gives_the_splits_and_captions_of_random_access(shards):
    mapped = load_sources(config(shards, val_fraction=0.1))
    streamed, held_out = load_sources(config(shards, val_fraction=0.1, streaming=True))
    assert isinstance(streamed, StreamSource)
    assert held_out.names(range(len(held_out))) == mapped[1].names(range(len(mapped[1])))
    assert of_training(streamed) == mapped[0].names(range(len(mapped[0])))
    rows = range(len(held_out))
    assert np.array_equal(held_out.images(rows), mapped[1].images(rows)) and held_out.captions(
        rows
    ) == mapped[1].captions(rows)


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
def test_every_epoch_has_each_sample_once_for_any_number_of_processes(shards, processes):
    """Lanes roll on to the next pass on their own, so counts differ by what a shard's length makes
    the lanes differ by, and no more."""
    source = stream(shards)
    everything = of_training(source)
    passes = 6
    each = passes * len(everything) // processes
    seen = Counter(
        name
        for r in range(processes)
        for name in names(ShuffleBuffer(source, 0, r, processes), each)
    )
    assert (
        set(seen) == set(everything)
        and min(seen.values()) >= passes // 2
        and max(seen.values()) <= 2 * passes
    )
    if processes == 1:
        first = names(ShuffleBuffer(source, 0, 0, 1), len(everything))
        assert len(set(first)) > 0.8 * len(everything)


def test_one_shard_reader_yields_each_sample_once_per_epoch(shards):
    source = stream(shards, stream={"shards_per_worker": 1, "shuffle_buffer": 1})
    everything = of_training(source)
    found = names(ShuffleBuffer(source, 0, 0, 1), 3 * len(everything))
    for number in range(3):
        assert sorted(found[number * len(everything) :][: len(everything)]) == sorted(everything)
    assert found[: len(everything)] != everything  # shards in random order


def test_fewer_shards_than_readers_repeat_no_sample(tmp_path):
    write_shards(tmp_path, [40])
    source = stream(tmp_path, stream={"shards_per_worker": 4})
    everything = of_training(source)
    seen = names(ShuffleBuffer(source, 0, 0, 1), len(everything))
    assert max(Counter(seen).values()) <= 2 and len(set(seen)) >= 0.9 * len(everything)


def test_shuffle_buffer_depends_on_the_seed(shards):
    source = stream(shards)
    one, two = names(ShuffleBuffer(source, 0, 0, 1), 40), names(ShuffleBuffer(source, 1, 0, 1), 40)
    assert one != two and one == names(ShuffleBuffer(source, 0, 0, 1), 40)
    unshuffled = names(ShuffleBuffer(stream(shards, stream={"shuffle_buffer": 1}), 0, 0, 1), 40)
    assert one != unshuffled and sorted(one) == sorted(unshuffled)


def test_loader_with_another_batch_size_reads_the_same_streams(shards):
    for source in (stream(shards), load_sources(config(shards, val_fraction=0.1))[0]):
        few = batch_loader(source, 2, 0, 1, 2)
        many = batch_loader(source, 12, 0, 1, 2)
        first = few.images(0)
        same = few.with_batch_size(12)
        for step in (0, 3):
            np.testing.assert_array_equal(same.images(step), many.images(step))
            assert same.names(step) == many.names(step)
        np.testing.assert_array_equal(few.images(0), first)


def test_loader_with_another_batch_size_opens_no_stream(shards, monkeypatch):
    loader = batch_loader(stream(shards), 1, 0, 0, 1)
    monkeypatch.setattr(ShuffleBuffer, "__init__", None)
    assert len(loader.with_batch_size(3).images(0)) == 3


def test_resumed_loader_skips_shards_of_known_length(shards, tmp_path, monkeypatch):
    source = stream(shards)
    whole = StreamBatchLoader(source, 6, 0, 0, 1, tmp_path)
    expected = [(whole.images(step), whole.names(step)) for step in range(40)]
    assert list(tmp_path.glob("lengths-*.json"))
    opened: list[int] = []
    samples = StreamSource.samples
    monkeypatch.setattr(
        StreamSource, "samples", lambda self, *given: counted(opened, samples(self, *given))
    )
    for folder, most in ((tmp_path, 104), (None, 10**6)):
        opened.clear()
        resumed = StreamBatchLoader(stream(shards), 6, 0, 0, 1, folder)
        for step in (33, 34, 39, 35):  # and back again
            assert (
                np.array_equal(resumed.images(step), expected[step][0])
                and resumed.names(step) == expected[step][1]
            )
            if step == 33:
                read = len(opened)
                assert read <= most
    assert read > 104  # without the lengths, a whole pass is read to find them


def counted(opened: list[int], samples):
    for sample in samples:
        opened.append(1)
        yield sample


def test_truncated_length_cache_is_rebuilt(tmp_path):
    (tmp_path / "l.json").write_text('{"0/0/1": 3')
    lengths = ShardLengthCache(tmp_path / "l.json")
    assert lengths.get("0/0/1") is None
    lengths.add("0/0/1", 4)
    assert ShardLengthCache(tmp_path / "l.json").get("0/0/1") == 4


def test_streams_mix_with_map_sources(shards, tmp_path):
    folder = tmp_path / "own"
    folder.mkdir()
    for number in range(300, 320):
        (folder / f"{number}.png").write_bytes(encoded((number // 256, number % 256, 7)))
        (folder / f"{number}.txt").write_text(f"own {number}")
    parts = [MixPart(source=shards, weight=1), MixPart(source=str(folder), weight=3)]
    source, held_out = load_sources(
        config("", mix=parts, streaming=True, stream={"shuffle_buffer": 8})
    )
    assert len(held_out.parts) == 2
    feeds = [batch_loader(source, 20, 0, r, 2) for r in range(2)]
    found: Counter[int] = Counter()
    for step in range(100):
        for feed in feeds:
            images = feed.images(step)
            assert [
                str(number_of(p)) in name for p, name in zip(images, feed.names(step), strict=True)
            ] == [True] * 10
            found.update(map(number_of, images))
    own = {number: count for number, count in found.items() if number >= 300}
    # Both processes deal the same passes
    assert sum(own.values()) == 1500 and max(own.values()) - min(own.values()) <= 1


def test_a_stream_has_no_length_and_no_images_by_number(shards, tmp_path):
    source = stream(shards)
    mixture = MixedSource([source, stream(shards)], [1, 1])
    assert source.num_images is None
    assert mixture.num_images is None
    for read in (len, lambda s: s.images([0]), lambda s: s.all_captions([0])):
        with pytest.raises(TypeError, match=r"is streamed, .*set data\.streaming=false"):
            read(source)
    with pytest.raises(TypeError, match="is streamed"):
        len(mixture)


def test_images_of_streams_have_numbers_of_their_own_in_a_mixture(shards):
    """Numbers are seeds of augmentations and are written to codes datasets: they never change."""
    mixture = MixedSource([stream(shards), stream(shards)], [1, 1])
    numbers = []
    for part, (source, first) in enumerate(zip(mixture.parts, mixture.starts, strict=True)):
        for shard in range(2):
            unit = ShardPlan(part, shard=shard, most=3)
            for batch in source.batches(unit, first, 2):
                assert batch.view(None).shape == (len(batch.numbers), 16, 16, 3)
                assert len(batch.captions) == len(batch.numbers)
                numbers += batch.numbers
    within = [0, 1, 2, 2**32, 2**32 + 1, 2**32 + 2]
    assert numbers == [*within, *(2**48 + number for number in within)]


def test_a_limit_of_encoded_images_is_shared_by_the_shards(shards):
    assert stream(shards).encoding_plan(0, None) == {"shards": 5, "most": None}
    assert stream(shards).encoding_plan(0, 11) == {"shards": 5, "most": 3}
    mapped, _ = load_sources(config(shards))
    assert mapped.encoding_plan(7, None) == {"first": 7, "rows": len(mapped)}
    assert mapped.encoding_plan(7, 11) == {"first": 7, "rows": 11}


def test_parquet_and_saved_data_stream_too(tmp_path, monkeypatch):
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    images = [encoded((0, number, 7)) for number in range(40)]
    pq.write_table(
        pa.table({"image": images, "text": [f"number {n}" for n in range(40)]}),
        tmp_path / "t.parquet",
    )
    rows = {
        "image": [{"bytes": c, "path": None} for c in images],
        "text": [f"number {n}" for n in range(40)],
    }
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "saved"))
    for source in ("t.parquet", "saved"):
        train, held_out = load_sources(
            config(tmp_path / source, streaming=True, stream={"shuffle_buffer": 4})
        )
        feed = batch_loader(train, 10, 0, 0, 1)
        assert isinstance(feed, StreamBatchLoader)
        numbers = {number_of(p) for step in range(20) for p in feed.images(step)}
        assert numbers | {number_of(p) for p in held_out.images(range(len(held_out)))} == set(
            range(40)
        )


@pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
def test_shards_are_read_over_http(shards, tmp_path):
    served = Path(shutil.copytree(shards, tmp_path / "served"))
    quiet = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(quiet, directory=str(served))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_port}"
        source = stream(f"{address}/{{000..004}}.tar")
        assert of_training(source) == of_training(stream(shards))
        with pytest.raises(
            FileNotFoundError, match=r"the 6 shards of http://127.* cannot be read \(.*005\.tar"
        ):
            stream(f"{address}/{{000..005}}.tar")
        (served / "004.tar").unlink()
        with pytest.raises(
            OSError,
            match=r"reading shard http://127.*004\.tar of .* failed .*; run the same command "
            r"again: it resumes from what is saved",
        ):
            of_training(source)
    finally:
        server.shutdown()
        server.server_close()
        del source
        # the library's connections end here, and not in a later test, where a warning of theirs
        # would be an error
        gc.collect()


def test_unusable_samples_are_counted_and_skipped(tmp_path):
    whole = encoded((0, 1, 7), size=(40, 40))
    samples = [(f"good{i}", {"png": encoded((0, i, 7)), "txt": b"x"}) for i in range(30)]
    samples += [
        ("cut", {"png": whole[:-30], "txt": b"x"}),
        ("small", {"png": encoded(size=(8, 8)), "txt": b"x"}),
        ("none", {"png": b"no image", "txt": b"x"}),
        ("mute", {"png": whole, "txt": b" "}),
    ]
    write_shard(tmp_path / "0.tar", samples)
    assert not is_held_out("cut", 0.1)
    source = stream(tmp_path)
    feed = StreamBatchLoader(source, 10, 0, 0, 1, None)
    for step in range(12):
        assert feed.images(step).shape == (10, 16, 16, 3)
    problems = "\n".join(source.problems)
    for expected in (
        "without a caption left out: mute",
        "1 images smaller than 16 pixels left out (data.upscale=true keeps them): small",
        "unreadable images left out: none",
        "images that cannot be decoded left out: cut",
    ):
        assert expected in problems
    strict = StreamBatchLoader(
        stream(tmp_path, filter={"max_corrupt_fraction": 0.0}), 10, 0, 0, 1, None
    )
    with pytest.raises(
        ValueError,
        match=r"images of .* cannot be decoded \(the last: cut, .*raise "
        r"data\.filter\.max_corrupt_fraction \(now 0\.0\)",
    ):
        for step in range(12):
            strict.images(step)


def test_a_sample_that_two_threads_skip_at_once_is_counted_once(shards):
    both = threading.Barrier(2)

    class Slow(set):
        def __contains__(self, item):
            known = super().__contains__(item)
            with suppress(threading.BrokenBarrierError):
                both.wait(0.2)
            return known

    source = stream(shards)
    source._left_out = Slow()
    threads = [threading.Thread(target=source._leave_out, args=("small", "a")) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert source.problems == ["1 small: a"]


def test_stream_without_usable_samples_raises(tmp_path):
    write_shard(tmp_path / "0.tar", [("a", {"png": encoded(), "txt": b" "})])
    with pytest.raises(
        ValueError,
        match=r"no shard of .* has an image to train on: .*without a caption left out: a; add",
    ):
        StreamBatchLoader(stream(tmp_path), 2, 0, 0, 1, None).images(0)


def test_failing_reader_stops_the_others(tmp_path, monkeypatch):
    """The next block is read ahead at once, by the same lanes."""
    write_shards(tmp_path, [6, 6, 6])
    source = stream(tmp_path, stream={"shards_per_worker": 3})
    shuffled, busy, met = ShuffleBuffer(source, 0, 0, 1), [0, 0, 0], []

    def slow(number):
        def read(_):
            met.append(busy[number])
            busy[number] += 1
            if number == 0:
                busy[number] -= 1
                raise OSError("gone")
            time.sleep(0.05)
            busy[number] -= 1

        return read

    for number, lane in enumerate(shuffled._lanes):
        monkeypatch.setattr(lane, "skip_to", slow(number))
    for block in range(4):
        with pytest.raises(OSError, match="gone"):
            shuffled.block(block)
    assert len(met) >= 12 and set(met) == {0}


def test_known_empty_shards_raise(tmp_path, monkeypatch):
    write_shard(tmp_path / "0.tar", [("a", {"png": encoded(), "txt": b" "})])
    lane, opened = ShardReader(stream(tmp_path), 0, 1, 0, ShardLengthCache(None)), []
    open_shard = lane._open

    def counted(number):
        opened.append(number)
        assert len(opened) < 20, "it goes round for ever"
        return open_shard(number)

    monkeypatch.setattr(lane, "_open", counted)
    for _ in range(2):  # the second time their lengths are known
        with pytest.raises(ValueError, match=r"no shard of .* has an image to train on"):
            lane.skip_to(1)


def test_unsupported_streams_are_reported(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded())
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(
        ValueError, match=r"data\.streaming is on, and .* is a folder or a table of image files"
    ):
        load_sources(config(tmp_path, streaming=True))
    write_shard(tmp_path / "s" / "0.tar", [("a", {"png": encoded(), "txt": b"x"})])
    with pytest.raises(ValueError, match=r"has no column 'label'; it has .*txt"):
        stream(tmp_path / "s", text_column="label")


def test_few_images_among_many_empty_shards_are_found(tmp_path):
    """A lane may meet more empty shards in a row than there are shards, as each pass is shuffled
    apart."""
    small = encoded(size=(8, 8))
    for number in range(40):
        image = encoded((0, number, 7)) if number in (3, 17) else small
        write_shard(
            tmp_path / f"{number:02d}.tar",
            [(f"{number}-{i}", {"png": image, "txt": b"x"}) for i in range(3)],
        )
    for seed in range(4):
        feed = StreamBatchLoader(
            stream(tmp_path, stream={"shards_per_worker": 4}), 6, seed, 0, 1, None
        )
        assert {number_of(image) for step in range(12) for image in feed.images(step)} == {3, 17}


def test_json_beside_an_image_may_have_any_keys(tmp_path):
    samples = [
        (
            f"{i}",
            {
                "png": encoded((0, i, 7)),
                "json": b'{"file_name": "x.jpg", "image": 3, "text": "words"}',
            },
        )
        for i in range(12)
    ]
    write_shard(tmp_path / "0.tar", samples)
    for streaming in (False, True):
        train, held_out = load_sources(config(tmp_path, streaming=streaming))
        assert set(held_out.captions(range(len(held_out)))) == {"words"}
        assert batch_loader(train, 4, 0, 0, 1).images(0).shape == (4, 16, 16, 3)


@pytest.mark.parametrize("streaming", [False, True])
def test_captions_that_are_no_utf8_are_counted(tmp_path, streaming):
    write_shard(
        tmp_path / "0.tar",
        [
            (f"{i}", {"png": encoded((0, i, 7)), "caption": b"caf\xe9" if i == 5 else b"tea"})
            for i in range(12)
        ],
    )
    train, _ = load_sources(
        config(tmp_path, streaming=streaming, text_column="caption", val_fraction=0.2)
    )
    assert set(batch_loader(train, 4, 0, 0, 1).names(0)) <= {str(i) for i in range(12)} - {"5"}
    assert "1 captions that are not UTF-8 left out (save them as UTF-8): 5" in train.problems


def test_rewritten_shards_change_the_fingerprint_and_moved_ones_do_not(tmp_path, monkeypatch):
    """A copy has other times, and its path may be spelled otherwise."""
    import os

    write_shards(tmp_path / "here", [5, 5])
    before = stream(tmp_path / "here").fingerprint
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    os.utime(tmp_path / "there" / "001.tar", ns=(1, 1))
    (tmp_path / "link").symlink_to("there")
    monkeypatch.chdir(tmp_path)
    for spelled in (tmp_path / "there", "there", "there/", "./there", "link", "there/*.tar"):
        assert stream(spelled).fingerprint == before, spelled
    content = bytearray((tmp_path / "there" / "001.tar").read_bytes())
    content[-2000] ^= 1
    (tmp_path / "there" / "001.tar").write_bytes(content)
    assert stream("there").fingerprint != before


def test_a_stream_has_the_fingerprint_that_earlier_versions_recorded(tmp_path):
    """Of paths, sizes and times, with all settings of that time."""
    write_shards(tmp_path, [5, 5])
    own = config(tmp_path, streaming=True)
    source = StreamSource(own)
    states = [file_signature(tmp_path / name) for name in ("000.tar", "001.tar")]
    settings = data_settings(asdict(own))
    assert not {"split_column", "held_out_source"} & set(settings)
    expected = content_fingerprint([*states, 2, sorted(settings.items())])
    assert source.earlier_fingerprint == expected != source.fingerprint
    assert StreamSource(replace(own, split_column="none")).fingerprint == source.fingerprint
