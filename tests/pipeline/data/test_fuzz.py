"""Corrupted and hostile data: loading ends with images or with one of our errors, in time, and
writes nothing.

MINIDALLE_FUZZ=400 runs so many cases per test instead of a few (six tests: 2,400 cases)."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import signal
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.data.load import load_sources
from pipeline.data.streaming.feed import batch_loader
from tests.helpers.data import config, photo

pytestmark = pytest.mark.slow

CASES = int(os.environ.get("MINIDALLE_FUZZ", "25"))
SECONDS = 60
fuzzed = settings(
    max_examples=CASES,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    database=None,
    derandomize=True,
)


FORMS: list[tuple[str, str, dict[str, object]]] = [
    ("PNG", "RGB", {}),
    ("PNG", "RGBA", {}),
    ("PNG", "P", {}),
    ("JPEG", "RGB", {}),
    ("JPEG", "CMYK", {}),
    ("JPEG", "L", {"progressive": True}),
    ("GIF", "P", {"save_all": True}),
    ("WEBP", "RGB", {}),
    ("BMP", "RGB", {}),
    ("TIFF", "RGB", {"compression": "tiff_lzw"}),
    ("TIFF", "I;16", {}),
]


def _files() -> list[bytes]:
    found = []
    for form, mode, options in FORMS:
        buffer = io.BytesIO()
        image = photo(1, (24, 20))
        image = Image.new("I;16", (24, 20), 40000) if mode == "I;16" else image.convert(mode)
        if form == "GIF":
            options = {**options, "append_images": [photo(2, (24, 20)).convert("P")]}
        exif = Image.Exif()
        exif[0x0112] = 6
        image.save(
            buffer,
            form,
            **({"exif": exif.tobytes()} if form in ("JPEG", "WEBP") else {}),
            **options,
        )
        found.append(buffer.getvalue())
    return found


FILES = _files()
IMAGES = st.sampled_from(FILES)


@st.composite
def damaged(draw, contents=IMAGES) -> bytes:
    """A file with bytes changed, cut out or put in, most often near its beginning where the headers
    are."""
    content = bytearray(draw(contents))
    for _ in range(draw(st.integers(0, 5))):
        where = draw(st.one_of(st.integers(0, 64), st.integers(0, max(len(content) - 1, 0))))
        how = draw(st.sampled_from(["change", "cut", "insert", "end"]))
        if how == "change":
            content[where : where + 1] = draw(st.binary(min_size=1, max_size=4))
        elif how == "cut":
            del content[where : where + draw(st.integers(1, 40))]
        elif how == "insert":
            content[where:where] = draw(st.binary(max_size=12))
        else:
            del content[where:]
    return bytes(content)


LETTERS = st.characters(blacklist_categories=["Cs"], blacklist_characters="/\0")
OWN = st.one_of(
    st.sampled_from(["a.png", "b.jpg", ".hidden.png", "-.png"]),
    st.text(LETTERS, min_size=1, max_size=12).map(lambda name: name + ".png"),
)
NAMES = st.one_of(
    OWN, st.sampled_from(["../out.png", "/etc/passwd", "..\\x.png", "x/../../y.png", "loop/a.png"])
)
TEXTS = st.one_of(
    st.text(max_size=30),
    st.sampled_from(["", " ", "{name}", "\ud800", "a\0b", "x" * 5000, "é\n\nß", '"', "=cmd()"]),
)
FORMATS = st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
LINKS = st.sampled_from(["loop", "a.png", "b.png", "deep/loop", "self"])
TARGETS = st.sampled_from(
    [".", "..", "../..", "a.png", "self", "/dev/zero", "/nowhere", "../out.png"]
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXTS, NAMES),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=4,
)


@contextmanager
def sandbox() -> Iterator[Path]:
    """A folder with a secret beside the data; fails where loading takes too long or writes anything
    at all."""
    outer = Path(tempfile.mkdtemp(prefix="fuzz"))

    def too_long(*_: object) -> None:
        pytest.fail(f"loading hangs: over {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(SECONDS)
    try:
        (outer / "data").mkdir()
        (outer / "out.png").write_bytes(FILES[0])
        yield outer / "data"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        shutil.rmtree(outer)


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.lstat().st_size, p.lstat().st_mtime_ns) for p in sorted(folder.rglob("*"))}


def loads_or_says_why(source: Path, folder: Path, **options: object) -> None:
    """Loading and reading everything raises nothing but what the command line shows as one line,
    and leaves the folder as it was."""
    before = listing(folder.parent)
    try:
        train, held_out = load_sources(
            config(source, filter={"max_corrupt_fraction": 0.9}, upscale=True, **options)
        )
        for split in (train, held_out):
            if options.get("streaming") and split is train:
                assert batch_loader(train, 4, 0, 0, 1).images(0).shape == (4, 16, 16, 3)
            elif len(split):
                rows = range(len(split))
                assert split.images(rows, list(rows)).shape == (len(split), 16, 16, 3)
                assert all(captions and all(captions) for captions in split.all_captions(rows))
                assert all(isinstance(text.encode(), bytes) for text in split.captions(rows))
    except (ValueError, OSError) as error:
        assert str(error).strip() and not isinstance(error, UnicodeError)
    assert listing(folder.parent) == before


def put(path: Path, content: bytes) -> None:
    """Writes a file where the file system takes its name."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    except (OSError, ValueError):
        pass


@fuzzed
@given(files=st.lists(st.tuples(OWN, damaged(), st.binary(max_size=20)), max_size=4))
def test_damaged_images_and_captions(files):
    with sandbox() as folder:
        for name, content, text in files:
            put(folder / name, content)
            put((folder / name).with_suffix(".txt"), text)
        put(folder / "good.png", FILES[0])
        put(folder / "good.txt", b"good")
        loads_or_says_why(folder, folder, crop="random", crop_scale=0.5, flip=True)


@fuzzed
@given(
    rows=st.lists(
        st.dictionaries(
            st.sampled_from(["file_name", "image", "text", "caption", ""]), VALUES, max_size=4
        ),
        max_size=5,
    ),
    ending=st.binary(max_size=6),
    form=st.sampled_from(["metadata.csv", "metadata.jsonl", "table.csv", "table.jsonl"]),
    template=st.sampled_from([None, "{text}", "{caption} {name}", "{", "{0}", "{text!r:>{x}}"]),
)
def test_damaged_tables(rows, ending, form, template):
    with sandbox() as folder:
        for name in ("a.png", "b.jpg"):
            put(folder / name, FILES[0])
        if form.endswith("csv"):
            buffer = io.StringIO()
            writer = csv.DictWriter(
                buffer, ["file_name", "image", "text", "caption", ""], extrasaction="ignore"
            )
            writer.writeheader()
            for row in rows:
                writer.writerow({key: str(value) for key, value in row.items()})
            content = buffer.getvalue().encode("utf-8", "surrogatepass")
        else:
            content = "\n".join(json.dumps(row) for row in rows).encode()
        put(folder / form, content + ending)
        loads_or_says_why(
            folder if form.startswith("metadata") else folder / form,
            folder,
            caption_template=template,
        )


@st.composite
def tars(draw) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=draw(FORMATS)) as tar:
        for _ in range(draw(st.integers(0, 5))):
            name = draw(
                st.one_of(
                    NAMES, st.sampled_from(["a.txt", "a.json", "a.cls", "a.png", "b.jpg", "b.txt"])
                )
            )
            try:
                entry = tarfile.TarInfo(name)
                kind = draw(
                    st.sampled_from(
                        [tarfile.REGTYPE] * 6
                        + [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.CHRTYPE]
                    )
                )
                entry.type = kind
                entry.linkname = draw(st.sampled_from(["", "../../out.png", "/etc/passwd", name]))
                content = draw(
                    st.one_of(
                        damaged(),
                        st.binary(max_size=20),
                        TEXTS.map(lambda t: json.dumps({"alt": t}).encode()),
                    )
                )
                entry.size = len(content) if kind == tarfile.REGTYPE else 0
                tar.addfile(entry, io.BytesIO(content))
            except (ValueError, UnicodeError):
                continue
    return buffer.getvalue()


@fuzzed
@given(first=damaged(tars()), second=tars(), column=st.sampled_from(["text", "alt", "cls"]))
def test_damaged_shards(first, second, column):
    with sandbox() as folder:
        put(folder / "0.tar", first)
        put(folder / "1.tar", second)
        loads_or_says_why(folder, folder, text_column=column)


@settings(fuzzed, max_examples=max(CASES // 4, 5))
@given(first=damaged(tars()), second=tars())
def test_damaged_streams(first, second):
    with sandbox() as folder:
        put(folder / "0.tar", first)
        put(folder / "1.tar", second)
        loads_or_says_why(
            folder, folder, streaming=True, stream={"shuffle_buffer": 4, "shards_per_worker": 2}
        )


@fuzzed
@given(links=st.lists(st.tuples(LINKS, TARGETS), max_size=5))
def test_symbolic_links_and_loops_are_handled(links):
    with sandbox() as folder:
        put(folder / "deep" / "c.png", FILES[0])
        put(folder / "deep" / "c.txt", b"good")
        for name, target in links:
            try:
                (folder / name).symlink_to(target)
                put((folder / name).with_suffix(".txt"), b"linked")
            except OSError:
                continue
        loads_or_says_why(folder, folder)


@fuzzed
@given(content=damaged(), limit=st.sampled_from([1, 64, 4096]))
def test_damaged_images_alone(content, limit):
    """Each of the functions that take an image's file."""
    from pipeline.config.data import MAX_PIXELS
    from pipeline.data.readers.images import decoded, open_image, prepared
    from pipeline.data.readers.scan import _examined

    class One:
        def image(self, row: int) -> bytes:
            return content

    assert len(_examined(One(), 0, MAX_PIXELS)) == 11  # type: ignore[arg-type]

    def judge() -> None:
        with decoded(content, limit, value_range="own"):
            pass

    reads: list[Callable[[], object]] = [
        lambda: open_image(content),
        judge,
        lambda: prepared(content, config("x", crop="random", crop_scale=0.5)),
        lambda: prepared(content, config("x")),
    ]
    for read in reads:
        try:
            read()
        except ValueError as error:
            # Damaged values may be in doubt, and a damaged header may declare any size.
            known = ("cannot be read as an image", "which of them is white", "are decoded")
            assert any(words in str(error) for words in known)
