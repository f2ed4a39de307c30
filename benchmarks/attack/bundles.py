"""Changed bundles, by `benchmarks.attack_bundles`."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from random import Random

from benchmarks.attack.trial import Input
from benchmarks.attack_bundles import random_change


def make(bundle: Path, chance: Random, folder: Path) -> Input:
    """A copy of a bundle with one change, or with two."""
    copy = folder / "bundle"
    shutil.copytree(bundle, copy)
    names = []
    for _ in range(chance.choice((1, 1, 1, 2))):
        change = random_change(chance.randrange(2**40))
        try:
            change.apply(copy)
        except (OSError, ValueError, LookupError, StopIteration):
            continue  # the first change left nothing of the file
        names.append(change.name)

    def use() -> Sequence[str]:
        from pipeline.inference.pipeline import TextToImagePipeline

        pipe = TextToImagePipeline.from_pretrained(copy)
        pipe(["a red heart"])
        if (copy / "code-ran").exists():
            raise AssertionError("code of the bundle ran")
        return []

    return Input("; ".join(names), use)
