"""Images per second of encoding at 64x64, factor 8, 1,024 codes: ours and dalle-pytorch's
DiscreteVAE.

    benchmarks/.venv/bin/python -m benchmarks.encoding [--batch 64] [--peers-fp32] [--out FILE]

Both networks cost the same. Our encoder's width is chosen so that an image takes at least as many
operations as in the peer's encoder, by torch's own counter. Both encode the same images in bf16
autocast; `--peers-fp32` gives the peer its default fp32. Ours is compiled by `compile_networks`.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import peers
from benchmarks.timing import interleave, report
from stage1_tokenizer import TokenizerConfig, TokenizerModule

NUM_CODES = 1024


def operations(work: Any, pixels: Tensor) -> int:
    """Floating-point operations of encoding these images."""
    with FlopCounterMode(display=False) as counter:
        work(pixels)
    return counter.get_total_flops()


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch", type=int, default=64, help="images at a time")
    parser.add_argument("--peers-fp32", action="store_true", help="the peer in fp32, its default")
    options, _ = parser.parse_known_args()
    batch = options.batch
    torch.manual_seed(0)
    pixels = (
        torch.rand(batch, 3, 64, 64).mul(2).sub(1).contiguous(memory_format=torch.channels_last)
    )
    vae = peers.discrete_vae(64, 3, NUM_CODES).eval()
    theirs = lambda x: vae.get_codebook_indices((x + 1) / 2)  # noqa: E731
    goal = operations(theirs, pixels)
    width = 64
    ours = None
    while ours is None or operations(ours.encode, pixels) < goal:
        width += 32
        config = TokenizerConfig(num_codes=NUM_CODES, downsample_factor=8, width=width)
        ours = TokenizerModule(config).eval()

    cost = {
        "ours, million operations per image": operations(ours.encode, pixels) / batch / 1e6,
        "dalle-pytorch, million operations per image": goal / batch / 1e6,
        "ours, width": float(width),
    }
    ours.compile_networks()

    def encode(work: Any, bf16: bool) -> Any:
        def run() -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                work(pixels)

        return run

    seconds = interleave(
        {
            "ours": encode(ours.encode, True),
            "dalle-pytorch": encode(theirs, not options.peers_fp32),
        },
        rounds=20,
        warm_up=3,
    )
    rates = {side: batch / value for side, value in seconds.items()}
    report(
        f"encoding, batch {batch}" + (", peers in fp32" if options.peers_fp32 else ""),
        "images/s",
        rates,
        cost,
    )


if __name__ == "__main__":
    main()
