"""A codes dataset in other forms, for other programs: Parquet, or webdataset shards. Knows files;
trains and encodes nothing.

Parquet: one file per shard with the columns `codes`, `text` (the first caption), `more_texts` (the
others) and `name` (the image's file or row in its source). Webdataset: tar shards of KEY.codes.npy
(int32), KEY.json (the `name`) and KEY.txt (one caption per line, if there is one). `codes.json`
next to them has the tokenizer's fingerprint and the layout of the codes.
"""

from __future__ import annotations

import io
import json
import re
import shutil
import tarfile
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import Any, Literal
from urllib.parse import quote

import numpy as np

from pipeline.data.codes.dataset import MANIFEST, read_manifest, shards_of
from pipeline.data.codes.shards import described, read_batches, schema_of
from pipeline.data.readers.images import EXTENSIONS
from pipeline.runtime.atomic_io import atomic_write_dir, check_output_dir

Format = Literal["arrow", "parquet", "webdataset"]


def export_codes(codes: Path, out: Path, form: Format) -> list[str]:
    """Writes the codes dataset in folder `codes` to `out`, atomically; returns the files' names.

    Raises:
        ValueError: `codes` holds no complete codes dataset.
        FileExistsError: `out` already holds something else.
    """
    manifest = read_manifest(codes)
    check_output_dir(out, MANIFEST, "codes")
    names: list[str] = []
    keys = _Keys()

    def write(beside: Path) -> None:
        written: dict[str, list[dict[str, Any]]] = {}
        for split, shards in shards_of(manifest).items():
            written[split] = []
            for shard in shards:
                path = beside / shard.name
                match form:
                    case "arrow":
                        shutil.copyfile(codes / shard.name, path)
                    case "parquet":
                        path = path.with_suffix(".parquet")
                        _write_parquet(codes / shard.name, path)
                    case "webdataset":
                        path = path.with_suffix(".tar")
                        _write_tar(codes / shard.name, path, keys)
                written[split].append(
                    asdict(described(path, rows=shard.rows, captions=shard.captions))
                )
                names.append(path.name)
        (beside / MANIFEST).write_text(
            json.dumps({**manifest, "files": written, "form": form}, indent=2) + "\n"
        )

    atomic_write_dir(out, write)
    return names


def _write_parquet(shard: Path, path: Path) -> None:
    import pyarrow.parquet as pq
    from datasets import Features

    # Without `row`: its numbers leave out unusable images, and would be taken for the source's.
    features = Features.from_arrow_schema(schema_of(shard))
    del features["row"]
    schema = features.arrow_schema
    with pq.ParquetWriter(path, schema) as writer:
        for batch in read_batches(shard):
            writer.write_batch(batch.select(schema.names).cast(schema))


class _Keys:
    """Names of images -> keys of a webdataset: the name without its ending, as other shards of the
    same images have it. Whatever would end a key, or leave the shard, is percent-encoded."""

    def __init__(self) -> None:
        self._used: set[str] = set()

    def of(self, name: str) -> str:
        stem = name
        if (ending := PurePosixPath(name).suffix).lower() in EXTENSIONS:
            stem = name.removesuffix(ending)
        key = _UNSAFE.sub(lambda match: quote(match.group(), safe="").replace(".", "%2E"), stem)
        if key in self._used:  # cat.png next to cat.jpg
            key = quote(name, safe=" ").replace(".", "%2E")
        self._used.add(key)
        return key


_UNSAFE = re.compile(r"[%.\\\x00-\x1f\x7f-\x9f\u2028\u2029]|^/")


def _write_tar(shard: Path, path: Path, keys: _Keys) -> None:
    with tarfile.open(path, "w") as tar:
        for row in (row for batch in read_batches(shard) for row in batch.to_pylist()):
            buffer = io.BytesIO()
            np.save(buffer, np.asarray(row["codes"], dtype=np.int32), allow_pickle=False)
            texts = [row["text"], *row["more_texts"]] if row["text"] is not None else []
            # A caption per line, so that none may have a line break inside.
            texts = [" ".join(text.splitlines()) for text in texts]
            content = {"codes.npy": buffer.getvalue()}
            content["json"] = json.dumps({"name": row["name"]}).encode()
            if texts:
                content["txt"] = "\n".join(texts).encode()
            key = keys.of(row["name"])
            for suffix, data in content.items():
                entry = tarfile.TarInfo(f"{key}.{suffix}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
