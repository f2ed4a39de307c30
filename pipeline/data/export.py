"""A codes dataset in other forms, for other programs: Parquet, or webdataset shards. Knows files; trains and encodes nothing.

Parquet: a file a part, columns `codes`, `text`, `row`. Webdataset: tar shards of NAME.codes.npy (int32) and NAME.txt. Beside them lies
`codes.json` with the tokenizer's fingerprint and the layout of the codes.
"""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pipeline.checkpoints import refuse_taken, write_folder
from pipeline.data.codes import MANIFEST, read_manifest

Format = Literal["arrow", "parquet", "webdataset"]
SHARD = 10_000
"""Rows of a shard."""


def export_codes(codes: Path, out: Path, form: Format) -> list[str]:
    """Writes the codes dataset in folder `codes` to `out`, whole or not at all; returns the files' names.

    Raises:
        ValueError: `codes` holds no whole codes dataset.
        FileExistsError: there is something else in `out` already.
    """
    from datasets import Dataset

    manifest = read_manifest(codes)
    refuse_taken(out, MANIFEST, "codes")
    written: dict[str, list[str]] = {}

    def write(beside: Path) -> None:
        for split, names in manifest["files"].items():
            written[split] = []
            for name in names:
                if form == "arrow":
                    shutil.copyfile(codes / name, beside / name)
                    written[split].append(name)
                    continue
                rows = Dataset.from_file(str(codes / name))
                stem = name.removesuffix(".arrow")
                if form == "parquet":
                    rows.to_parquet(str(beside / f"{stem}.parquet"))
                    written[split].append(f"{stem}.parquet")
                else:
                    written[split] += _write_shards(rows.with_format("numpy"), beside, stem)
        content = {**manifest, "files": written, "form": form}
        (beside / MANIFEST).write_text(json.dumps(content, indent=2) + "\n")

    write_folder(out, write)
    return [name for names in written.values() for name in names]


def _write_shards(rows: Any, folder: Path, stem: str) -> list[str]:
    names = []
    for first in range(0, len(rows), SHARD):
        names.append(f"{stem}-{first // SHARD:05d}.tar")
        with tarfile.open(folder / names[-1], "w") as tar:
            for row in (rows[i] for i in range(first, min(first + SHARD, len(rows)))):
                key, buffer = f"{int(row['row']):09d}", io.BytesIO()
                np.save(buffer, np.asarray(row["codes"], dtype=np.int32), allow_pickle=False)
                for suffix, data in (("codes.npy", buffer.getvalue()), ("txt", str(row["text"]).encode())):
                    entry = tarfile.TarInfo(f"{key}.{suffix}")
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
    return names
