"""Images per second of training a tokenizer at 32x32, factor 4, batch 64, and its PSNR after the
same wall time: ours and dalle-pytorch's DiscreteVAE.

    benchmarks/.venv/bin/python -m benchmarks.stage1_training [--seconds 60] [--out FILE]

Both train on the same images of the shapes world in bf16 autocast. PSNR is of hard codes on 500
held-out images.
"""

from __future__ import annotations

import argparse
import time

import torch

from benchmarks import peers
from benchmarks.timing import interleave, report
from pipeline.config.data import DataConfig
from pipeline.config.train import TrainConfig
from pipeline.data.builtin.shapes_captions import ShapesSource
from pipeline.training.optimizers import optimizers_for
from stage1_tokenizer import (
    ObjectiveConfig,
    TokenizerConfig,
    TokenizerModule,
    TokenizerObjective,
    to_model_range,
)
from stage1_tokenizer.metrics import peak_signal_to_noise

BATCH = 64
NUM_CODES = 512


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=60.0, help="training time of each side")
    seconds = parser.parse_known_args()[0].seconds
    torch.manual_seed(0)
    config = DataConfig(source="shapes", image_size=32)
    images = torch.from_numpy(ShapesSource(config, "train").images(range(20_000)))
    held_out = to_model_range(torch.from_numpy(ShapesSource(config, "held_out").images(range(500))))
    tokenizer = TokenizerModule(
        TokenizerConfig(
            image_size=32,
            downsample_factor=4,
            width=96,
            encoder_depth=1,
            decoder_depth=2,
            num_codes=NUM_CODES,
        )
    ).train()
    objective = TokenizerObjective(tokenizer, ObjectiveConfig())
    vae = peers.discrete_vae(32, 2, NUM_CODES)
    optimizers = {
        "ours": list(
            optimizers_for(
                "tokenizer", tokenizer, TrainConfig(optimizer="muon", learning_rate=8e-3)
            ).values()
        ),
        "dalle-pytorch": [torch.optim.Adam(vae.parameters(), lr=1e-3)],
    }
    generator = torch.Generator().manual_seed(0)

    def step(side: str) -> None:
        batch = images[torch.randint(len(images), (BATCH,), generator=generator)]
        with torch.autocast("cpu", torch.bfloat16):
            unit = (to_model_range(batch) + 1) / 2
            loss = (
                next(objective.losses(batch, 0)).value
                if side == "ours"
                else vae(unit, return_loss=True)
            )
        loss.backward()
        for optimizer in optimizers[side]:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    rates = {
        k: BATCH / v
        for k, v in interleave(
            {s: (lambda s=s: step(s)) for s in optimizers}, rounds=15, warm_up=3
        ).items()
    }
    for side in optimizers:
        start = time.perf_counter()
        while time.perf_counter() - start < seconds:
            step(side)
    tokenizer.eval(), vae.eval()
    with torch.no_grad():
        ours = tokenizer.decode(tokenizer.encode(held_out))
        # Its decoder draws in the normalised range it was trained in, which is ours.
        theirs = vae.decode(vae.get_codebook_indices((held_out + 1) / 2))
    psnr = {
        f"ours, dB after {seconds:.0f} s": float(peak_signal_to_noise(held_out, ours).mean()),
        f"dalle-pytorch, dB after {seconds:.0f} s": float(
            peak_signal_to_noise(held_out, theirs).mean()
        ),
    }
    report("stage 1 training", "images/s", rates, psnr)


if __name__ == "__main__":
    main()
