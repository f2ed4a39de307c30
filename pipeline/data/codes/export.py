"""A codes dataset in other forms, for other programs: Parquet, or webdataset shards. Knows files;
trains and encodes nothing.

Parquet: one file per shard with the columns `codes`, `text` (the first caption), `more_texts` (the
others) and `row`. Webdataset: tar shards of NAME.codes.npy (int32) and NAME.txt (one caption per
line). `codes.json` next to them has the tokenizer's fingerprint and the layout of the codes.
"""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pipeline.data.codes.dataset import MANIFEST, read_manifest, shards_of
from pipeline.data.codes.shards import described, read_batches, schema_of
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
                        _write_tar(codes / shard.name, path)
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

    with pq.ParquetWriter(path, schema_of(shard)) as writer:
        for batch in read_batches(shard):
            writer.write_batch(batch)


def _write_tar(shard: Path, path: Path) -> None:
    with tarfile.open(path, "w") as tar:
        for row in (row for batch in read_batches(shard) for row in batch.to_pylist()):
            buffer = io.BytesIO()
            np.save(buffer, np.asarray(row["codes"], dtype=np.int32), allow_pickle=False)
            texts = [row["text"], *row["more_texts"]]
            if len(texts) > 1:  # otherwise a line break inside a caption would split it
                texts = [text.replace("\n", " ") for text in texts]
            content = {"codes.npy": buffer.getvalue(), "txt": "\n".join(texts).encode()}
            for suffix, data in content.items():
                entry = tarfile.TarInfo(f"{row['row']:09d}.{suffix}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
