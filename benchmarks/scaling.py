"""Priors of 100M to 10B parameters on 1 to 1,000 GPUs, and codes of a billion images, on paper.
Prints the tables of docs/scaling.md.

    python -m benchmarks.scaling [--images 16] [--rate 989e12] [--utilisation 0.4]
        [--link 400e9] [--between 50e9]

Nothing large is allocated: networks are made of fake tensors. A step's activations are counted as
it goes through them, in bf16 autocast with fused attention, not compiled.

Operations are those of `benchmarks.gpu_parts`: 6 for each parameter that a token is multiplied by,
and 12 for each pair of positions that attention sees, feature and block. With activation
checkpointing they are 8 and 16.

The options are assumptions: bf16 operations per second of a GPU, the fraction of them that training
reaches, and bytes per second between two GPUs of a machine and, for each GPU, between two machines.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from pipeline.config.train import PriorTrainConfig
from pipeline.training.memory_estimate import LiveTensorTracker, state_bytes
from stage2_prior import (
    Level,
    PriorConfig,
    PriorModule,
    PriorObjective,
    PriorObjectiveConfig,
    StreamConfig,
    transformer,
)

GIB = 2**30
SIZES = {
    "100M": PriorConfig(width=768, depth=12, heads=12),
    "300M": PriorConfig(width=1024, depth=24, heads=16),
    "1B": PriorConfig(width=1792, depth=26, heads=28),
    "3B": PriorConfig(width=2816, depth=32, heads=44),
    "10B": PriorConfig(width=4096, depth=48, heads=64),
}
STREAM = StreamConfig(
    text_vocab_size=8192,
    text_length=64,
    levels=(Level(grid=(16, 16), num_codes=16384),),
    code_dim=8,
)
GPUS = (1, 8, 64, 1000)


def weightless(config: PriorConfig) -> PriorModule:
    """A prior in training on the CPU; within a FakeTensorMode it takes no memory."""
    return PriorModule(config, STREAM).train()


def step_bytes(config: PriorConfig, images: int, *, again: bool, gradients: bool) -> int:
    """Peak bytes of a step beyond weights, moments and EMA: activations, and the bf16 copies of the
    weights that autocast makes. With `gradients` those too; otherwise each is freed at once, as
    under FSDP, which scatters it."""
    fused = partial(F.scaled_dot_product_attention, is_causal=True)
    held = transformer.attend
    transformer.attend = lambda query, key, value, allowed=None: fused(query, key, value)
    try:
        with FakeTensorMode():
            prior = weightless(config)
            for parameter in () if gradients else prior.parameters():
                parameter.register_post_accumulate_grad_hook(
                    lambda gone: setattr(gone, "grad", None)
                )
            objective = PriorObjective(
                prior, PriorObjectiveConfig(caption_dropout=0.0), activation_checkpointing=again
            )
            batch = {
                "text_ids": torch.zeros(images, STREAM.text_length, dtype=torch.long),
                "codes": torch.zeros(images, 256, dtype=torch.long),
            }
            with LiveTensorTracker(torch.device("cpu")) as live:
                with torch.autocast("cpu", torch.bfloat16):
                    loss = next(objective.losses(batch, 0))
                loss.value.backward()
            return live.peak
    finally:
        transformer.attend = held


def operations(prior: PriorModule, *, again: bool) -> float:
    """Of a training step, per image."""
    stream = prior.stream
    config = prior.model_config
    tokens = stream.length - 1
    blocks = sum(p.numel() for p in prior.blocks.parameters()) * tokens
    heads = (
        prior.text_head.weight.numel() * (stream.text_length - 1)
        + prior.image_head.own.numel() * stream.image_length
    )
    pairs = tokens**2 / 2 * config.width * config.depth
    return (8 if again else 6) * blocks + 6 * heads + (16 if again else 12) * pairs


def main() -> None:
    parser = argparse.ArgumentParser()
    given = {"images": 16, "rate": 989e12, "utilisation": 0.4, "link": 400e9, "between": 50e9}
    for name, value in given.items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    options = parser.parse_args()
    counted = {}
    for name, config in SIZES.items():
        with FakeTensorMode():
            prior = weightless(config)
            work = {again: operations(prior, again=again) for again in (False, True)}
            counted[name] = state_bytes({"prior": prior}, PriorTrainConfig()), work
    print(
        "| prior | width, depth, heads | parameters | weights | gradients | AdamW | average | "
        "together |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name, config in SIZES.items():
        state = counted[name][0]
        sizes = [state.parameters, state.gradients, state.optimizer, state.average]
        cells = " | ".join(f"{size / GIB:.2f}" for size in (*sizes, sum(sizes)))
        print(
            f"| {name} | {config.width}, {config.depth}, {config.heads} | "
            f"{state.entries / 1e6:,.0f}M | {cells} |"
        )

    print(
        f"\nGiB per GPU with {options.images} images on each; activations kept, and worked out "
        "again"
    )
    print(
        "| prior | activations kept | worked out again | DDP, 1 GPU | DDP | FSDP on 8 | on 64 | on "
        "1,000 |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name, config in SIZES.items():
        state, _ = counted[name]
        steps = [
            step_bytes(config, options.images, again=again, gradients=False)
            for again in (False, True)
        ]
        whole = [
            step_bytes(config, options.images, again=again, gradients=True)
            for again in (False, True)
        ]
        # The block at work and the one fetched ahead, in fp32
        unsharded = 2 * state.parameters / config.depth
        rows = [
            [state.kept + step for step in whole],
            [state.kept + state.gradients + step for step in whole],
        ]
        rows += [
            [(state.kept + state.gradients) / gpus + unsharded + step for step in steps]
            for gpus in GPUS[1:]
        ]
        cells = " | ".join(" / ".join(f"{size / GIB:,.1f}" for size in row) for row in rows)
        print(f"| {name} | {steps[0] / GIB:.1f} | {steps[1] / GIB:.1f} | {cells} |")

    speed = options.rate * options.utilisation
    rates = f"{options.link / 1e9:.0f} and {options.between / 1e9:.0f} GB/s"
    print(
        f"\nseconds per step of {options.images} images on each GPU: computing, and sending at "
        f"{rates}"
    )
    titles = (
        "computing",
        "worked out again",
        "DDP on 8, on more",
        "FSDP on 8, on more",
        "GPU hours for 100M images",
    )
    print(f"| prior | {' | '.join(titles)} | days on 8 | on 64 | on 1,000 |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in SIZES:
        state, work = counted[name]
        computing = [options.images * work[again] / speed for again in (False, True)]
        # A ring sends all gradients twice; FSDP gathers the weights forward and backward and
        # scatters the gradients.
        sending = [
            [times * state.gradients / rate for rate in (options.link, options.between)]
            for times in (2, 3)
        ]
        hours = 1e8 * work[False] / speed / 3600
        cells = [f"{second:.3f}" for second in computing] + [
            ", ".join(f"{second:.3f}" for second in pair) for pair in sending
        ]
        print(
            f"| {name} | {' | '.join(cells)} | {hours:,.0f} | "
            f"{' | '.join(f'{hours / 24 / gpus:,.2f}' for gpus in GPUS[1:])} |"
        )

    print(
        "\n1,000,000,000 images: codes of 2 bytes, as up to 65,536 codes are written; captions of "
        "60 letters and their ends; the row's number"
    )
    print("| codes per image | codes | in 4 bytes | captions | numbers | files of 1 GB |")
    print("|---|---|---|---|---|---|")
    for codes in (256, 1024):
        print(
            f"| {codes:,} | {codes * 2e-3:.2f} TB | {codes * 4e-3:.2f} TB | 0.064 TB | 0.008 TB | "
            f"{codes * 2 + 72:,} |"
        )


if __name__ == "__main__":
    main()
