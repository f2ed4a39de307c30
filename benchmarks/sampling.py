"""Sampling 64 codes: pictures a second of ours, dalle-pytorch's generate_images and transformers' generate(), batch 1 and 64.

benchmarks/.venv/bin/python -m benchmarks.sampling [--batch N] [--compile] [--peers-fp32] [--out FILE]
No guidance; every side at its defaults otherwise (dalle-pytorch's cache is off by default), fp32 weights. With --compile ours is made
ready for many pictures as by `TextToImagePipeline.compile`: bf16 weights, the step compiled; the peers have bf16 weights too,
or with --peers-fp32 those that they come with.
"""

from __future__ import annotations

import argparse

import torch

from benchmarks import peers
from benchmarks.timing import interleave, report
from stage2_prior import SamplingOptions, sample


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--peers-fp32", action="store_true")
    options = parser.parse_known_args()[0]
    batch = options.batch
    torch.manual_seed(0)
    text = torch.randint(3, peers.VOCABULARY, (batch, peers.TEXT))
    ours, dalle, llama = (model.eval() for model in (peers.ours(), peers.dalle(), peers.llama()))

    if options.compile:
        for model in (ours,) if options.peers_fp32 else (ours, dalle, llama):
            model.to(torch.bfloat16)

    @torch.no_grad()
    def generate():
        return llama.generate(
            text, attention_mask=torch.ones_like(text), do_sample=True, max_new_tokens=peers.CODES, min_new_tokens=peers.CODES,
        )  # fmt: skip

    seconds = interleave(
        {
            "ours": lambda: sample(ours, text, range(batch), SamplingOptions(), compiled=options.compile),
            "dalle-pytorch": lambda: dalle.generate_images(text),
            "Llama generate()": generate,
        },
        rounds=5 if batch == 1 else 3,
    )
    kind = ", ours compiled, " + ("bf16, peers in fp32" if options.peers_fp32 else "all bf16") if options.compile else ""
    report(
        f"sampling, batch {batch}{kind}",
        "pictures/s",
        {k: batch / v for k, v in seconds.items()},
    )


if __name__ == "__main__":
    main()
