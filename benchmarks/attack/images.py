"""Hostile image files: headers that lie, damaged and deep ones, bombs, polyglots."""

from __future__ import annotations

import io
import struct
import zlib
from functools import partial
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image

from benchmarks.attack.parts import damaged, misplace, plain_image, read_everything, text
from benchmarks.attack.trial import Input

_PLAIN = (
    ("PNG", "RGB"),
    ("PNG", "RGBA"),
    ("PNG", "P"),
    ("PNG", "1"),
    ("PNG", "LA"),
    ("PNG", "I;16"),
    ("JPEG", "RGB"),
    ("JPEG", "CMYK"),
    ("JPEG", "L"),
    ("GIF", "P"),
    ("WEBP", "RGBA"),
    ("BMP", "RGB"),
    ("BMP", "P"),
    ("TIFF", "RGB"),
    ("TIFF", "F"),
    ("TIFF", "I;16"),
    ("AVIF", "RGB"),
)
_SIZES = (0, 1, 2**15, 2**16 - 1, 2**28, 2**31 - 1, 2**31, 2**32 - 1)
_ENDINGS = (".png", ".jpg", ".webp", ".bmp", ".gif", ".tif", ".avif", ".jpeg")


def make(chance: Random, folder: Path) -> Input:
    """A folder with a good image and a hostile one, or a hostile one alone, with captions."""
    name = f"hostile{chance.choice(_ENDINGS)}"
    what, content = _content(chance)
    (folder / name).write_bytes(content)
    if chance.random() < 0.02:
        what += f", {misplace(chance, folder / name)}"
    (folder / "hostile.txt").write_text("a caption")
    if chance.random() < 0.5:
        (folder / "good.png").write_bytes(plain_image())
        (folder / "good.txt").write_text("a caption")
    if chance.random() < 0.3:
        return Input(f"{what}, alone", partial(_opened, folder / name), names=True)
    options: dict[str, object] = {
        "value_range": chance.choice(("auto", "auto", "16bit", [0.0, 1.0])),
        "crop": chance.choice(("centre", "random")),
        "crop_scale": 0.5,
    }
    return Input(what, partial(read_everything, folder, **options))


def _opened(path: Path) -> list[str]:
    """Reads a file as `edit`, `reconstruct` and `compress` do."""
    from pipeline.data.readers.images import open_8_bit, open_image
    from stage1_tokenizer import resize_and_crop, to_rgb

    resize_and_crop(to_rgb(open_image(path)), (16, 16))
    np.asarray(open_8_bit(path))
    return []


def _content(chance: Random) -> tuple[str, bytes]:
    """What it is, and the file."""
    form, mode = chance.choice(_PLAIN)
    try:
        content = _plain(chance, form, mode)
    except (OSError, KeyError, ValueError):  # Pillow was built without this format
        form, mode, content = "PNG", "RGB", plain_image()
    match chance.randrange(10):
        case 0 | 1 | 2:
            return f"{form} {mode}, damaged", damaged(chance, content)
        case 3:
            return f"{form} {mode}, truncated", content[: chance.randrange(len(content) + 1)]
        case 4 | 5:
            return "PNG, chunks", _png(chance)
        case 6:
            return f"{form} {mode}, sizes", _other_sizes(chance, form, content)
        case 7:
            front, back = chance.sample(
                (b"%PDF-1.4\n", b"GIF89a", b"\x89PNG\r\n\x1a\n", b"%!PS\n", content, b"PK\3\4"), 2
            )
            return f"{form}, polyglot", front + content + back
        case 8:
            return f"{form}, EXIF", _with_exif(chance)
        case _:
            return f"{form} {mode}", content


def _plain(chance: Random, form: str, mode: str) -> bytes:
    """A good file with random pixels, of some values that are seldom, perhaps animated."""
    size = (chance.choice((1, 2, 17, 40)), chance.choice((1, 3, 17, 40)))
    shape = size[::-1]
    random = np.random.default_rng(chance.randrange(2**32))
    if mode == "F":
        values = random.choice(np.array([0, 1, -1, 1e38, np.nan, np.inf], np.float32), shape)
        image = Image.fromarray(values)
    elif mode == "I;16":
        image = Image.fromarray(
            random.integers(0, chance.choice((2, 2**12, 2**16)), shape, np.uint16)
        )
    else:
        image = Image.fromarray(random.integers(0, 256, (*shape, 3), np.uint8)).convert(mode)
    buffer = io.BytesIO()
    options: dict[str, object] = {}
    if (
        form in ("GIF", "WEBP", "PNG", "TIFF")
        and chance.random() < 0.3
        and mode not in ("F", "I;16")
    ):
        frames = [Image.new(mode, size), Image.new(mode, size)]
        options = {"save_all": True, "append_images": frames}
    if mode == "P" and chance.random() < 0.5:
        options["transparency"] = chance.choice((0, 255))
    image.save(buffer, form, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def _chunk(kind: bytes, content: bytes) -> bytes:
    return (
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
    )


def _png(chance: Random) -> bytes:
    """A PNG of hostile chunks whose checksums fit: huge sizes, bombs of text and profiles."""
    bomb = zlib.compress(b"\0" * chance.choice((10**4, 10**7, 10**8)))
    width, height = (chance.choice((16, *_SIZES)) for _ in range(2))
    depth, colour = chance.choice(((8, 2), (8, 2), (16, 2), (16, 6), (1, 3), (16, 0), (99, 7)))
    chunks = [
        _chunk(
            b"IHDR",
            struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, chance.choice((0, 1))),
        ),
        _chunk(b"PLTE", chance.randbytes(chance.choice((3, 768, 7)))),
    ]
    others = (
        _chunk(b"zTXt", b"a\0\0" + bomb),
        _chunk(b"iTXt", b"a\0\1\0\0\0" + bomb),
        _chunk(b"iCCP", b"a\0\0" + bomb),
        _chunk(b"eXIf", b"MM\0*\0\0\0\x08" + b"\xff" * 40),
        _chunk(b"acTL", struct.pack(">II", chance.choice(_SIZES), 0)),
        _chunk(b"fcTL", chance.randbytes(26)),
        _chunk(b"tRNS", chance.randbytes(chance.randrange(9))),
        _chunk(b"gAMA", b"\0\0\0\0"),
        _chunk(b"pHYs", b"\0"),
        _chunk(b"tEXt", text(chance).encode("utf-8", "replace")),
        _chunk(chance.randbytes(4), b""),
    )
    chunks += chance.sample(others, chance.randint(1, 4))
    rows = bomb if chance.random() < 0.6 else zlib.compress(b"\0" * 16 * 49)
    chunks += [_chunk(b"IDAT", rows), _chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def _other_sizes(chance: Random, form: str, content: bytes) -> bytes:
    """A huge or odd size where a format's header has it."""
    changed = bytearray(content)
    size = chance.choice(_SIZES)
    little = (size % 2**32).to_bytes(4, "little")
    match form:
        case "PNG":
            changed[16:20] = size.to_bytes(5, "big")[-4:]
            changed[29:33] = zlib.crc32(changed[12:29]).to_bytes(4, "big")
        case "JPEG":
            for marker in (b"\xff\xc0", b"\xff\xc2"):
                if (at := changed.find(marker)) >= 0:
                    changed[at + 5 : at + 9] = chance.choice(
                        (b"\xff" * 4, b"\0\0\0\1", b"\xff\xff\0\1")
                    )
        case "GIF":
            changed[6:10] = little
        case "BMP":
            at = chance.choice((10, 14, 18, 22, 28, 30, 34, 46))
            changed[at : at + 4] = little
        case "WEBP":
            at = chance.choice((4, 16, 24, 26))
            changed[at : at + 4] = little
        case _:
            at = chance.randrange(max(len(changed) - 4, 1))
            changed[at : at + 4] = little
    return bytes(changed)


def _with_exif(chance: Random) -> bytes:
    """A JPEG with an orientation of another value or type, or with EXIF that is no EXIF."""
    exif = Image.Exif()
    exif[0x0112] = chance.choice((0, 2, 5, 6, 8, 9, 65535, "6", (1, 2), b"\0"))
    if chance.random() < 0.3:
        exif[0x8769] = 2**31
    try:
        block = exif.tobytes()
    except Exception:  # a value that cannot be written
        block = b"Exif\0\0"
    if chance.random() < 0.5:
        block = block[:6] + damaged(chance, block[6:] or b"\0")
    buffer = io.BytesIO()
    icc = chance.randbytes(chance.choice((1, 200, 70_000)))
    Image.new("RGB", (30, 20)).save(buffer, "JPEG", exif=block[:60_000], icc_profile=icc)
    return buffer.getvalue()
