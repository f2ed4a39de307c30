"""A prior of LlamaGen-B's size on one GPU: pictures a second with guidance, and training as a share of the card's products.

python -m benchmarks.gpu [--pictures 8] [--batch 32] [--width 768 --depth 12 --heads 12 --side 24] [--device cuda]
111M parameters, 24x24 = 576 codes of 16,384, 120 text slots of 512 words, guidance 2, bf16. Sampling is compiled as by
`TextToImagePipeline.compile`. Training computes in bf16 autocast with AdamW, compiled; its operations are 6 for each parameter and token
and 12 for each pair of places that attention sees, feature and block; the card's rate is that of a product of two 8192 x 8192 matrices in
bf16. Other sizes and `--device cpu` try the script where there is no GPU.
"""

from __future__ import annotations

import argparse

import torch

from benchmarks.timing import interleave
from stage2_prior import ImagePrior, Level, PriorConfig, PriorObjective, PriorObjectiveConfig, SamplingOptions, StreamConfig, sample

TEXT, WORDS, CODES = 120, 512, 16384


def main() -> None:
    parser = argparse.ArgumentParser()
    sizes = {"pictures": 8, "batch": 32, "width": 768, "depth": 12, "heads": 12, "side": 24, "rounds": 5, "product": 8192}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    device = torch.device(options.device)
    stream = StreamConfig(text_vocab_size=WORDS, text_length=TEXT, levels=(Level(grid=(options.side, options.side), num_codes=CODES),))
    prior = ImagePrior(PriorConfig(width=options.width, depth=options.depth, heads=options.heads), stream).to(device)
    prior.config.trained_with_caption_dropout = True
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    print(f"{name}, torch {torch.__version__}: {sum(p.numel() for p in prior.parameters()) / 1e6:.1f}M parameters, {options.side**2} codes")

    def seconds(call) -> float:
        return interleave({"": lambda: (call(), _finish(device))}, rounds=options.rounds, warm_up=2)[""]

    step, tokens = _training(prior, options.batch, device)
    taken = seconds(step)
    share = _operations(prior, tokens, options.batch) / taken / _product_rate(options.product, device, seconds)
    print(f"training, {options.batch} pictures: {tokens / taken:,.0f} tokens/s, {share:.1%} of the bf16 rate of a product")
    prior.eval().to(torch.bfloat16)
    text = torch.randint(3, WORDS, (options.pictures, TEXT))
    how = SamplingOptions(guidance_scale=2.0)
    for compiled in (False, True):
        rate = options.pictures / seconds(lambda compiled=compiled: sample(prior, text, range(options.pictures), how, compiled=compiled))
        print(f"sampling {options.pictures} guided pictures, {'compiled' if compiled else 'plain'}: {rate:.2f} pictures/s")


def _training(prior: ImagePrior, batch: int, device: torch.device):
    """A step of AdamW, and the tokens that it sees."""
    text = torch.randint(3, WORDS, (batch, TEXT), device=device)
    codes = torch.randint(0, CODES, (batch, prior.stream.image_length), device=device)
    objective = PriorObjective(prior, PriorObjectiveConfig())
    prior.compile_networks()
    optimizer = torch.optim.AdamW(prior.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            value = next(objective.losses({"text_ids": text, "codes": codes}, 0)).value
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, batch * (prior.stream.length - 1)


def _operations(prior: ImagePrior, tokens: int, batch: int) -> float:
    """Of one training step: products forward and backward; each head sees its own kind of token. Attention is causal: half of its pairs."""
    stream, config = prior.stream, prior.model_config
    inside = sum(p.numel() for p in prior.blocks.parameters()) * tokens
    heads = batch * (prior.text_head.weight.numel() * (stream.text_length - 1) + prior.image_head.own.numel() * stream.image_length)
    return 6 * (inside + heads) + 12 * batch * (stream.length - 1) ** 2 / 2 * config.width * config.depth


def _product_rate(size: int, device: torch.device, seconds) -> float:
    """Operations a second of a product of two square bf16 matrices."""
    matrix = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    return 2 * size**3 / seconds(lambda: matrix @ matrix)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
