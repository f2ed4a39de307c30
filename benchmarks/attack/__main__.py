"""Hostile and damaged inputs by the seed: bundles, model folders, tables, tars, images, prompts,
compressed images and configurations, given to the functions that the commands call.

An input is right where it works, or is refused by an error that a command shows as one message.
Findings are: another error, more than 10 s of processor time, a process that ends, more than
2 GiB, a forged line in a message, or a file read or written outside of the input.

    python -m benchmarks.attack --inputs 10000 --seed 0
    python -m benchmarks.attack --kinds tars --inputs 1 --first 17   # that one again
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path

from benchmarks.attack.trial import Make, results

SHARES = {
    "bundles": 0.08,
    "folders": 0.04,
    "tables": 0.28,
    "tars": 0.2,
    "images": 0.24,
    "prompts": 0.08,
    "compressed": 0.04,
    "configurations": 0.04,
}
"""Parts of the inputs."""
SECONDS = 10.0


def kinds(folder: Path) -> dict[str, Make]:
    """What makes an input of each kind. Small bundles are written to the folder.

    Imports all libraries, so that the processes that try inputs begin with them.
    """
    import datasets
    import transformers

    from benchmarks.attack import bundles, configurations, folders, images, prompts, tables, tars
    from tests.helpers.pipelines import tiny_pipeline

    assert datasets and transformers
    datasets.disable_progress_bars()
    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    bundle = folder / "bundle"
    tiny_pipeline(any_order=True).save_pretrained(bundle)
    folders.write_text(folder / "text")
    folders.write_clip(folder / "clip")
    coder = folder / "coder"
    tiny_pipeline(likelihood="discretized_logistic").save_pretrained(coder)
    return {
        "bundles": partial(bundles.make, bundle),
        "folders": partial(folders.make, folder),
        "tables": tables.make,
        "tars": tars.make,
        "images": images.make,
        "prompts": partial(prompts.make, bundle),
        "compressed": partial(prompts.make_compressed, coder),
        "configurations": configurations.make,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.attack", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--inputs", type=int, default=10_000, help="of all kinds (10000)")
    parser.add_argument("--kinds", nargs="+", choices=SHARES, default=list(SHARES))
    parser.add_argument("--first", type=int, default=0, help="number of each kind's first input")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--seconds",
        type=float,
        default=SECONDS,
        help="processor time that an input may take; more on a machine that does other work",
    )
    options = parser.parse_args()
    began = time.perf_counter()
    found = 0
    with tempfile.TemporaryDirectory(prefix="attacks") as scratch:
        os.environ["HF_HOME"] = f"{scratch}/cache"  # before the libraries are imported
        os.environ["HF_HUB_OFFLINE"] = "1"
        makers = kinds(Path(scratch))
        print("| kind | inputs | refused | work | findings |\n|---|---|---|---|---|", flush=True)
        total = sum(SHARES[kind] for kind in options.kinds)
        for kind in options.kinds:
            count = round(options.inputs * SHARES[kind] / total)
            numbers = range(options.first, options.first + count)
            counts: Counter[str] = Counter()
            for result in results(kind, makers[kind], numbers, options.seed, options.seconds):
                counts["findings" if result.is_finding else result.outcome] += 1
                if result.is_finding:
                    print(f"{result!r}", file=sys.stderr, flush=True)
            found += counts["findings"]
            columns = [kind, count, counts["refused"], counts["works"], counts["findings"]]
            print(f"| {' | '.join(map(str, columns))} |", flush=True)
    print(f"{(time.perf_counter() - began) / 60:.1f} minutes, seed {options.seed}")
    return int(found > 0)


if __name__ == "__main__":
    sys.exit(main())
