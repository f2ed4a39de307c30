"""`minidalle likelihood`: how likely images are. Computes nothing itself. A command has as many
parameters as options."""

from __future__ import annotations

from pathlib import Path

import pipeline
from pipeline.cli.log import print_rank0
from pipeline.cli.options import UsageError, check_at_least


def likelihood_command(
    files: tuple[Path, ...],
    *,
    bundle: str,
    prompt: tuple[str, ...] = (),
    samples: int = 1,
    naive: bool = False,
    out: Path | None = None,
    seed: int = 0,
    batch_size: int = 64,
    truncate: bool = False,
) -> None:
    """Shows how likely images are under a bundle, in nats per image and bits per dimension.

    Args:
        files: images of the bundle's size
        bundle: folder that `minidalle run` made (runs/NAME/bundle), or user/name of the Hub
        prompt: what each image shows, or one prompt for all; without it images have no caption
        samples: samples per image; several of a posterior that is a distribution give the
            importance-weighted bound
        naive: sample from the prior, not from the posterior: plain Monte Carlo
        out: folder for likelihood.json and a surprise map of each image
        seed: the same seed gives the same samples
        batch_size: samples at a time
        truncate: truncate prompts that are too long
    """
    check_at_least("--samples", samples, 1)
    check_at_least("--batch-size", batch_size, 1)
    if prompt and len(prompt) not in (1, len(files)):
        raise UsageError(
            f"there are {len(files)} images and {len(prompt)} prompts; give one --prompt for all, "
            "or one per image"
        )
    table = pipeline.likelihood_report(
        bundle,
        files,
        prompt,
        out,
        num_samples=samples,
        method="naive" if naive else "bound",
        seed=seed,
        batch_size=batch_size,
        truncate=truncate,
    )
    print_rank0(table)
    if out is not None:
        print_rank0(f"wrote likelihood.json and surprise maps to {out}")
