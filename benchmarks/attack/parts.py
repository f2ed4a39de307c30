"""What hostile inputs are made of: texts, names, damaged bytes, images, values. Each is chosen by a
random generator."""

from __future__ import annotations

import io
import os
from pathlib import Path
from random import Random

from PIL import Image

from benchmarks.attack.trial import FORGED
from pipeline.config.data import DataConfig, FilterOptions, StreamOptions
from pipeline.data.load import load_sources

TEXTS = (
    "a red heart",
    "",
    " \t ",
    "\0",
    "a\0b",
    f"a\n{FORGED}: line",
    f"a\r{FORGED}",
    "\x1b[2J\x1b]0;title\x07",
    "\u202egnp.exe",
    "\u2028",
    "\ufeffa",
    "\ud800",
    "é" * 300,
    "𝕏👩‍👩‍👧‍👦" * 20,
    "a" * 10_000,
    "<pad>",
    "<start> <end> <unk>",
    "nan",
    "null",
    "['a', 'b']",
    "['a', " * 200,
    "{folder} {0} {name!r:>99999999}",
    "=cmd()",
    '"',
    "'\"\"'",
    "a,b;c|d\te",
    "%s%n" * 50,
    "../../etc/passwd",
    "<img src=x onerror=alert(1)>",
)
"""Texts for captions, prompts and cells."""
NAMES = (
    "0.png",
    "1.png",
    "missing.png",
    "../outside/named.txt",
    "/etc/passwd",
    "/dev/zero",
    "/proc/self/environ",
    "..",
    ".",
    "",
    "link.png",
    "fifo.png",
    "loop.png",
    "C:\\x.png",
    "..\\0.png",
    "http://localhost/0.png",
    "data:image/png;base64,AAAA",
    "0.png#0",
    "0.PNG",
    "*.png",
    "{0..999999999999}.png",
    "~root/0.png",
    "a\0.png",
    f"a\n{FORGED}.png",
    "n" * 5000 + ".png",
    "a/" * 1000 + "0.png",
)
"""Names of images, as tables and tars write them."""
NUMBERS = (0, -1, 1, 2**31, 2**62, 2**64, 10**400, 1.5, 1e308, float("nan"), float("inf"), True)
ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1", "cp1252", "utf-7")


def text(chance: Random) -> str:
    """A text, or some after one another."""
    return "".join(chance.choices(TEXTS, k=chance.choice((1, 1, 1, 2, 3))))


def value(chance: Random, depth: int = 3) -> object:
    """A JSON value of any type."""
    match chance.randrange(7):
        case 0:
            return chance.choice(NUMBERS)
        case 1:
            return None
        case 2 if depth:
            return [value(chance, depth - 1) for _ in range(chance.randrange(4))]
        case 3 if depth:
            return {text(chance): value(chance, depth - 1) for _ in range(chance.randrange(4))}
        case 4:
            return chance.choice(NAMES)
        case _:
            return text(chance)


def nested(chance: Random) -> str:
    """JSON that is deep."""
    depth = chance.choice((90, 200, 5_000, 200_000))
    return chance.choice(
        ("[" * depth, "[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth)
    )


def damaged(chance: Random, content: bytes, changes: int = 3) -> bytes:
    """The content with bytes changed, removed or added, most often near its beginning."""
    changed = bytearray(content)
    for _ in range(chance.randint(1, changes)):
        limit = chance.choice((16, 64, 256, len(changed) + 1))
        at = chance.randrange(min(limit, len(changed) + 1))
        match chance.randrange(5):
            case 0:
                del changed[at:]
            case 1:
                del changed[at : at + chance.randint(1, 40)]
            case 2:
                changed[at:at] = chance.randbytes(chance.randint(1, 12))
            case 3:
                changed[at : at + 4] = chance.choice((b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff"))
            case _:
                changed[at : at + 1] = bytes([chance.randrange(256)])
    return bytes(changed)


def encoded_text(chance: Random, content: str) -> bytes:
    """A text in some encoding, seldom with damaged bytes."""
    encoding = chance.choice((*("utf-8",) * 8, *ENCODINGS))
    written = content.encode(encoding, "surrogatepass" if encoding[:3] == "utf" else "replace")
    return damaged(chance, written) if chance.random() < 0.15 else written


def plain_image(form: str = "PNG", mode: str = "RGB", size: tuple[int, int] = (18, 16)) -> bytes:
    """A small image's file."""
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize(size).convert(mode).save(buffer, form)
    return buffer.getvalue()


def write_images(folder: Path, *, odd: bool) -> None:
    """Two images; and odd files next to them: links out of the folder, in circles, FIFOs."""
    for number in range(2):
        (folder / f"{number}.png").write_bytes(plain_image(size=(16 + number, 16)))
    if odd:
        (folder / "link.png").symlink_to("../outside/secret.txt")
        (folder / "loop.png").symlink_to("loop.png")
        os.mkfifo(folder / "fifo.png")


def misplace(chance: Random, file: Path, *, named: bool = False) -> str:
    """Puts something that is no regular file in the place of a file; returns what.

    Args:
        named: the user names the file itself, which may be a link to anywhere.
    """
    kinds = ("fifo", "zeros", "loop", "folder", "huge", "closed", "outside")
    kind = chance.choice(kinds[:-1] if named else kinds)
    content = file.read_bytes()
    file.unlink()
    match kind:
        case "fifo":
            os.mkfifo(file)
        case "zeros":
            file.symlink_to("/dev/zero")
        case "outside":
            file.symlink_to("../outside/secret.csv")
        case "loop":
            file.symlink_to(file.name)
        case "folder":
            file.mkdir()
        case "huge":
            file.write_bytes(content)
            os.truncate(file, 2**36)
        case "closed":
            file.write_bytes(content)
            file.chmod(0)
    return kind


def read_everything(source: Path | str, **options: object) -> list[str]:
    """Opens a source as a training does and reads all of its images; returns its captions and
    names.

    Args:
        options: of `DataConfig`.
    """
    settings: dict[str, object] = {
        "source": str(source),
        "image_size": 16,
        "workers": 1,
        "cache_gb": 0.0,
        "val_fraction": 0.5,
        "upscale": True,
        "filter": FilterOptions(max_corrupt_fraction=1.0),
        "stream": StreamOptions(shuffle_buffer=4, shards_per_worker=1),
    }
    config = DataConfig(**(settings | options))  # type: ignore[arg-type]
    train, held_out = load_sources(config)
    texts = [*train.problems, *held_out.problems]
    for one in (train, held_out):
        if one.num_images is None:
            stream = one.first(8)  # type: ignore[attr-defined]
            texts += [caption for sample in stream for caption in sample.captions]
            continue
        rows = range(len(one))
        if rows:
            one.images(rows)
        texts += [*one.names(rows), *(text for own in one.all_captions(rows) for text in own)]
    return texts
