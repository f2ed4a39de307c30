"""Hostile tables: lists of images and captions in every layout that is read, and Parquet."""

from __future__ import annotations

import csv
import io
import json
from functools import partial
from pathlib import Path
from random import Random

import pyarrow as pa
import pyarrow.parquet as pq

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
    write_images,
)
from benchmarks.attack.trial import Input

_OPTIONS: dict[str, tuple[object, ...]] = {
    "text_column": ("text", "text", "caption", "missing", "\0", ""),
    "image_column": (None, None, "image", "file_name", "a\nFORGED"),
    "delimiter": (None, None, ",", "\t", "\\t", ";", "|"),
    "caption_lines": ("each", "joined", "first"),
    "caption_template": (None, None, "{text}", "{folder}", "{text!r:>9}", "{0.__class__}", "{"),
    "split_column": ("auto", "none", "split", "image"),
    "follow_links": (False,),
    "streaming": (False, False, False, False, True),
}


def make(chance: Random, folder: Path) -> Input:
    """A table, alone or with its folder; often damaged, seldom no regular file."""
    form = chance.choice(
        ("csv", "csv", "tsv", "txt", "jsonl", "json", "coco", "named", "beside", "folders")
        if chance.random() < 0.93
        else ("parquet", "saved")
    )
    write_images(folder, odd=chance.random() < 0.3)
    source = _WRITERS[form](chance, folder)
    named = form != "saved" and source.stem == "table"
    of_folder = source.stem in ("metadata", "captions")
    what = form
    if source.is_file() and chance.random() < 0.25:
        source.write_bytes(damaged(chance, source.read_bytes()))
        what += ", damaged"
    elif source.is_file() and chance.random() < 0.06:
        what += f", {misplace(chance, source, named=not of_folder)}"
    options = {
        name: chance.choice(choices)
        for name, choices in _OPTIONS.items()
        if chance.random() < 0.3 or name == "streaming"
    }
    read = partial(read_everything, folder if of_folder else source, **options)
    return Input(f"{what}, {options}", read, names=named)


def _cells(chance: Random) -> list[str]:
    name = chance.choice(NAMES) if chance.random() < 0.5 else chance.choice(("0.png", "1.png"))
    long = "x" * chance.choice((10_000, 1_000_000)) if chance.random() < 0.02 else ""
    return [name, text(chance) + long, chance.choice(("train", "val", "test", "", text(chance)))]


def _header(chance: Random) -> list[str]:
    header = [chance.choice(("image", "file_name", "path")), chance.choice(("text", "caption"))]
    if chance.random() < 0.3:
        header.append("split")
    if chance.random() < 0.2:
        header[chance.randrange(len(header))] = text(chance)
    return header


def _records(chance: Random) -> list[object]:
    header = _header(chance)
    rows: list[object] = []
    for _ in range(chance.randint(1, 4)):
        row: dict[str, object] = dict(zip(header, _cells(chance), strict=False))
        if chance.random() < 0.4:
            row[chance.choice(header)] = value(chance)
        rows.append(row if chance.random() < 0.97 else value(chance))
    return rows


def _name(chance: Random, folder: Path, ending: str) -> Path:
    return folder / f"{chance.choice(('table', 'metadata', 'captions'))}.{ending}"


def _separated(chance: Random, folder: Path, ending: str) -> Path:
    path = _name(chance, folder, ending)
    mark = "\t" if ending == "tsv" else chance.choice((",", ",", ";", "|", "\t"))
    buffer = io.StringIO()
    quoting = chance.choice((csv.QUOTE_MINIMAL, csv.QUOTE_ALL))
    writer = csv.writer(buffer, delimiter=mark, quoting=quoting)
    if chance.random() < 0.9:
        writer.writerow(_header(chance))
    for _ in range(chance.randint(1, 4)):
        writer.writerow(_cells(chance)[: chance.choice((1, 2, 2, 2, 3))])
    content = buffer.getvalue()
    if chance.random() < 0.2:
        content = content.replace('"', "")
    if chance.random() < 0.1:
        content = chance.choice(("sep=,\n", "sep=\0\n", '"' * 1001, "\n" * 50, "\0")) + content
    path.write_bytes(encoded_text(chance, content))
    return path


def _list(chance: Random, folder: Path) -> Path:
    path = _name(chance, folder, "txt")
    mark = chance.choice((",", "\t", "|", "#0\t", "#" + "1" * 99, ""))
    lines = [mark.join(_cells(chance)[:2]) for _ in range(chance.randint(1, 4))]
    path.write_bytes(encoded_text(chance, "\n".join(lines)))
    return path


def _json(chance: Random, content: object) -> bytes:
    if chance.random() < 0.06:
        return nested(chance).encode()
    written = json.dumps(content, ensure_ascii=chance.random() < 0.5)
    if chance.random() < 0.04:
        written = written.replace('"', nested(chance), 1)
    return encoded_text(chance, written)


def _jsonl(chance: Random, folder: Path) -> Path:
    path = _name(chance, folder, "jsonl")
    path.write_bytes(b"\n".join(_json(chance, row) for row in _records(chance)))
    return path


def _rows(chance: Random, folder: Path) -> Path:
    path = _name(chance, folder, "json")
    rows = _records(chance)
    path.write_bytes(_json(chance, rows if chance.random() < 0.7 else {"rows": rows}))
    return path


def _coco(chance: Random, folder: Path) -> Path:
    path = _name(chance, folder, "json")
    names = [chance.choice(NAMES) if chance.random() < 0.4 else f"{n}.png" for n in range(3)]
    images: list[object] = [{"id": n, "file_name": name} for n, name in enumerate(names)]
    notes: list[object] = [{"image_id": n % 3, "caption": text(chance)} for n in range(4)]
    content: dict[str, object] = {"images": images, "annotations": notes, "info": value(chance)}
    for entries in (images, notes):
        if chance.random() < 0.3:
            entry = entries[0]
            assert isinstance(entry, dict)
            entry[chance.choice(list(entry))] = value(chance)
        if chance.random() < 0.15:
            entries.append(value(chance))
    if chance.random() < 0.15:
        content[chance.choice(("images", "annotations"))] = value(chance)
    path.write_bytes(_json(chance, content))
    return path


def _named(chance: Random, folder: Path) -> Path:
    path = _name(chance, folder, "json")
    rows = {chance.choice(NAMES) + ".png": value(chance) for _ in range(3)}
    path.write_bytes(_json(chance, rows | {"0.png": text(chance)}))
    return path


def _beside(chance: Random, folder: Path) -> Path:
    """Captions next to their images."""
    for number in range(2):
        path = folder / f"{number}{chance.choice(('.txt', '.caption', '.json'))}"
        path.write_bytes(encoded_text(chance, text(chance) + "\n" + text(chance)))
        if chance.random() < 0.4:
            misplace(chance, path)
    return folder


def _folders(chance: Random, folder: Path) -> Path:
    """Folders of classes or splits, with hostile names; some lead out, or back."""
    names = (
        "a\x1b[2J",
        "a\nFORGED",
        "train",
        "val",
        "test",
        "\u202ea",
        "-rf",
        "\udcff",
        "*",
        "{0}",
    )
    for name in chance.sample(names, 3):
        (folder / name).mkdir()
        (folder / name / f"0{name}.png").write_bytes(plain_image())
        (folder / name / f"0{name}.txt").write_bytes(encoded_text(chance, text(chance)))
    (folder / "up").symlink_to("..")
    (folder / "out").symlink_to("../outside")
    return folder


def _features(chance: Random) -> dict[bytes, bytes]:
    """What `datasets` writes of its columns into a file's metadata, or something else."""
    features: object = {
        "image": {"_type": chance.choice(("Image", "Value", "Evil", "Sequence", "ClassLabel"))},
        "text": {"dtype": chance.choice(("string", "int64", "evil")), "_type": "Value"},
    }
    if chance.random() < 0.3:
        features = value(chance)
    content = json.dumps({"info": {"features": features}})
    return {
        b"huggingface": damaged(chance, content.encode())
        if chance.random() < 0.3
        else content.encode()
    }


def _arrow(chance: Random) -> pa.Table:
    cells: list[object] = [
        plain_image(),
        {"bytes": plain_image(), "path": None},
        {"bytes": None, "path": chance.choice(NAMES)},
        chance.choice(NAMES),
    ]
    image = [chance.choice(cells)] * 2
    words: list[object] = [text(chance).encode("utf-8", "replace").decode() for _ in range(2)]
    table = pa.table({"image": image, chance.choice(("text", "caption", "\n")): words})
    return table.replace_schema_metadata(_features(chance)) if chance.random() < 0.5 else table


def _parquet(chance: Random, folder: Path) -> Path:
    path = folder / "table.parquet"
    pq.write_table(_arrow(chance), path)
    return path


def _saved(chance: Random, folder: Path) -> Path:
    """A data set as `datasets` saves it, whose files lead out, or entries have other types."""
    saved = folder / "saved"
    saved.mkdir()
    table = _arrow(chance)
    for place in (saved / "0.arrow", folder.parent / "outside" / "0.arrow"):
        with pa.OSFile(str(place), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    filename = chance.choice(("0.arrow", "0.arrow", "../../outside/0.arrow", "/dev/zero", "\0", 5))
    state: dict[str, object] = {
        "_data_files": [{"filename": filename}],
        "_fingerprint": chance.choice(("0", "../x", 7)),
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": chance.choice((None, None, "torch", "evil")),
        "_output_all_columns": False,
        "_split": None,
    }
    if chance.random() < 0.3:
        state[chance.choice(list(state))] = value(chance)
    (saved / "state.json").write_bytes(_json(chance, state))
    (saved / "dataset_info.json").write_bytes(_json(chance, {"features": None}))
    return saved


_WRITERS = {
    "csv": partial(_separated, ending="csv"),
    "tsv": partial(_separated, ending="tsv"),
    "txt": _list,
    "jsonl": _jsonl,
    "json": _rows,
    "coco": _coco,
    "named": _named,
    "beside": _beside,
    "folders": _folders,
    "parquet": _parquet,
    "saved": _saved,
}
