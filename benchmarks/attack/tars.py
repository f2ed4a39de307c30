"""Hostile webdataset shards: .tar files whose headers, names or contents are not what they should
be."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from functools import partial
from pathlib import Path
from random import Random

from benchmarks.attack.parts import (
    NAMES,
    damaged,
    encoded_text,
    misplace,
    nested,
    plain_image,
    read_everything,
    text,
    value,
)
from benchmarks.attack.trial import Input

_BLOCK = 512
_TYPES = b"0\0001234567xgLKSDMVNA\xff"
_FIELDS = {
    "mode": (100, 8),
    "size": (124, 12),
    "time": (136, 12),
    "type": (156, 1),
    "link": (157, 100),
}
_SIZES = (
    b"77777777777\0",
    b"-0000000001\0",
    b"\x80" + b"\xff" * 11,
    b"\xff" * 12,
    b"\x80" + (2**63).to_bytes(11, "big"),
    b"            ",
    b"9999999999\0\0",
    b"0" * 12,
    b"\0" * 12,
    b"00000001000\0",
)
_PAX = (
    {"size": "9" * 30},
    {"size": "-1"},
    {"size": "x"},
    {"path": "../../outside/a.png"},
    {"path": "/etc/a.png"},
    {"path": "0.png\nFORGED.png"},
    {"path": ""},
    {"GNU.sparse.map": "0,1,2", "GNU.sparse.size": "9" * 20},
    {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "x"},
    {"mtime": "nan"},
    {"uid": "9" * 400},
    {"hdrcharset": "BINARY"},
    {"\ud800": "\ud800"},
)


def make(chance: Random, folder: Path) -> Input:
    """A shard or two, often with a changed header, damaged, compressed or no regular file."""
    path = folder / "0.tar"
    content = _shard(chance)
    what = "members"
    for _ in range(chance.choice((0, 1, 1, 2))):
        content = _other_header(chance, content)
        what = "headers"
    match chance.randrange(12):
        case 0 | 1:
            content = damaged(chance, content)
            what += ", damaged"
        case 2:
            content = content[: chance.randrange(len(content))]
            what += ", truncated"
        case 3:
            content = gzip.compress(content)
            what += ", compressed"
        case 4:
            content = content * chance.choice((2, 20))
            what += ", repeated"
    path.write_bytes(content)
    source = chance.choice((folder, path, f"{folder}/*.tar", f"{folder}/{{0..1}}.tar"))
    if chance.random() < 0.03:
        what += f", {misplace(chance, path, named=source != folder)}"
    if chance.random() < 0.1:
        (folder / "1.tar").write_bytes(_shard(chance))
    options: dict[str, object] = {"streaming": chance.random() < 0.25}
    if chance.random() < 0.2:
        options["image_column"] = chance.choice(("png", "jpg", "missing", "a.png"))
    if chance.random() < 0.2:
        options["text_column"] = chance.choice(("text", "txt", "json", "caption", ""))
    return Input(f"{what}, {options}", partial(read_everything, source, **options))


def _shard(chance: Random) -> bytes:
    buffer = io.BytesIO()
    form = chance.choice((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for number in range(chance.randint(1, 3)):
            members = {
                "png": plain_image(),
                chance.choice(("txt", "caption", "cls")): encoded_text(chance, text(chance)),
            }
            if chance.random() < 0.4:
                members["json"] = _json(chance)
            for ending, content in members.items():
                _add(chance, tar, f"{number}.{ending}", content)
    return buffer.getvalue()


def _json(chance: Random) -> bytes:
    if chance.random() < 0.2:
        return nested(chance).encode()
    content = value(chance) if chance.random() < 0.3 else {"text": value(chance)}
    return encoded_text(chance, json.dumps(content))


def _add(chance: Random, tar: tarfile.TarFile, name: str, content: bytes) -> None:
    if chance.random() < 0.15:
        name = chance.choice(
            (*NAMES, f"../outside/{name}", f"/tmp/{name}", f"{name}/", f"a//./{name}")
        )
    entry = tarfile.TarInfo(name.replace("\0", "") or "x")
    entry.size = len(content)
    if tar.format == tarfile.PAX_FORMAT and chance.random() < 0.3:
        entry.pax_headers = dict(chance.choice(_PAX))
    if chance.random() < 0.1:
        entry.type = chance.choice((b"1", b"2", b"3", b"4", b"5", b"6"))
        entry.linkname = chance.choice(("../outside/secret.txt", "/etc/passwd", name, "0.png"))
        entry.size = 0
        content = b""
    try:
        tar.addfile(entry, io.BytesIO(content))
    except (ValueError, UnicodeError):  # not to be written in this format
        entry = tarfile.TarInfo("0.png")
        tar.addfile(entry)


def _other_header(chance: Random, content: bytes) -> bytes:
    """Another value in one field of a header. Its checksum fits, most often."""
    blocks = [
        at for at in range(0, len(content), _BLOCK) if content[at + 257 : at + 262] == b"ustar"
    ]
    if not blocks:
        return content
    at = chance.choice(blocks)
    header = bytearray(content[at : at + _BLOCK])
    name = chance.choice(("size", "size", "size", "type", "type", *_FIELDS))
    first, length = _FIELDS[name]
    match name:
        case "size":
            new = chance.choice(_SIZES)
        case "type":
            new = bytes([chance.choice(_TYPES)])
        case _:
            new = chance.randbytes(length)
    header[first : first + length] = new.ljust(length, b"\0")[:length]
    if chance.random() < 0.9:
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
    return content[:at] + bytes(header) + content[at + _BLOCK :]
