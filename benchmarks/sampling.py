"""Images per second of sampling 64 codes: ours, dalle-pytorch's generate_images and transformers'
generate() with its static cache.

    benchmarks/.venv/bin/python -m benchmarks.sampling [--batch N] [--compile] [--peers-fp32]
        [--alone] [--out FILE]

There is no guidance, weights are fp32, and every side has its defaults (dalle-pytorch's cache is
off by default). With `--compile`, ours is prepared as by `TextToImagePipeline.compile`: bf16
weights and a compiled step. The peers then have bf16 weights too, or their own with `--peers-fp32`.

Then ours is measured with guidance, and a step is compared with the time to read its bytes once or
to compute its products. `--alone` leaves the peers out.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.timing import interleave, report
from pipeline.runtime.devices import tune_malloc
from stage2_prior import SamplingOptions, sample


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--peers-fp32", action="store_true")
    parser.add_argument("--alone", action="store_true")
    options = parser.parse_known_args()[0]
    tune_malloc()  # for every side alike
    batch = options.batch
    torch.manual_seed(0)
    text = torch.randint(3, peers.VOCABULARY, (batch, peers.TEXT))
    ours, dalle, llama = (m.eval() for m in (peers.ours(), peers.dalle(), peers.llama()))
    if options.compile:
        for model in (ours,) if options.peers_fp32 else (ours, dalle, llama):
            model.to(torch.bfloat16)

    def draw(**how):
        return lambda: sample(
            ours, text, range(batch), SamplingOptions(**how), compiled=options.compile
        )

    @torch.no_grad()
    def generate():
        return llama.generate(
            text,
            attention_mask=torch.ones_like(text),
            do_sample=True,
            max_new_tokens=peers.CODES,
            min_new_tokens=peers.CODES,
            cache_implementation="static",
        )

    sides = {"ours": draw()}
    if not options.alone:
        sides |= {
            "dalle-pytorch": lambda: dalle.generate_images(text),
            "Llama generate()": generate,
        }
    rounds = 7 if batch == 1 else 3
    kind = (
        ", ours compiled, " + ("bf16, peers in fp32" if options.peers_fp32 else "all bf16")
        if options.compile
        else ""
    )
    seconds = interleave(sides, rounds=rounds)
    report(f"sampling, batch {batch}{kind}", "images/s", {k: batch / v for k, v in seconds.items()})

    own = {"ours": draw(), "guided": draw(guidance_scale=2.0)}
    seconds = interleave(own, rounds=max(rounds, 5), warm_up=2)
    step = seconds["ours"] / peers.CODES
    floor, why = step_floor(ours, batch)
    print(f"  guidance costs {seconds['guided'] / seconds['ours']:.2f}x")
    print(
        f"  a step takes {step * 1e3:.2f} ms, {step / floor:.1f}x of the {floor * 1e3:.2f} ms that "
        f"{why}"
    )


def step_floor(prior, batch: int) -> tuple[float, str]:
    """The least seconds for a step: its weights and its cache read once at the rate of a copy, or
    its products at that of a large one."""
    cache = prior.new_cache(batch)
    weights = [prior.image_head.own, *(p for p in prior.blocks.parameters() if p.ndim == 2)]
    count = sum(w.numel() for w in weights)
    held = sum(w.numel() * w.element_size() for w in weights)
    held += sum(t.numel() * t.element_size() for t in (*cache.keys, *cache.values))
    attention = 4 * sum(t.numel() for t in cache.keys)
    read = held / copy_rate()
    product = (2 * batch * count + attention) / product_rate(prior.dtype)
    if read > product:
        return read, f"{held / 1e6:.0f} MB take at the rate of a copy, {copy_rate() / 1e9:.0f} GB/s"
    return product, f"the products take at {product_rate(prior.dtype) / 1e9:.0f} GFLOP/s"


def _fastest(call) -> float:
    def once() -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    return min(once() for _ in range(10))


def copy_rate() -> float:
    """Bytes per second, read and written, of copying 256 MB."""
    source = torch.ones(2**26)
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / _fastest(lambda: target.copy_(source))


def product_rate(dtype: torch.dtype) -> float:
    """Operations per second of a product of two 2048 x 2048 matrices."""
    matrix: Tensor = torch.randn(2048, 2048).to(dtype)
    return 2 * 2048**3 / _fastest(lambda: matrix @ matrix)


if __name__ == "__main__":
    main()
