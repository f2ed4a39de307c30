"""State dicts of published tokenizers, written down from their architectures."""

from __future__ import annotations

import torch
from torch import Tensor

Weights = dict[str, Tensor]


class Names:
    """Collects names and shapes; tensors are random, or without memory."""

    def __init__(self, *, meta: bool = False) -> None:
        self.weights: Weights = {}
        self.meta = meta
        self.generator = torch.Generator().manual_seed(0)

    def add(self, name: str, *shape: int, scale: float | None = None) -> None:
        if self.meta:
            self.weights[name] = torch.empty(shape, device="meta")
        else:
            fan_in = max(torch.Size(shape[1:]).numel(), 1)
            self.weights[name] = (scale or fan_in**-0.5) * torch.randn(
                shape, generator=self.generator
            )

    def conv(
        self,
        name: str,
        inputs: int,
        outputs: int,
        kernel: int,
        names: tuple[str, str] = ("weight", "bias"),
    ) -> None:
        self.add(f"{name}.{names[0]}", outputs, inputs, kernel, kernel)
        self.add(f"{name}.{names[1]}", outputs, scale=0.1)

    def norm(self, name: str, width: int) -> None:
        self.add(f"{name}.weight", width, scale=1.0)
        self.add(f"{name}.bias", width, scale=0.1)


def dvae(*, base: int, codes: int, first: int, blocks: int = 2, meta: bool = False) -> Weights:
    """OpenAI's encoder and decoder, of four groups."""
    names = Names(meta=meta)
    wb = ("w", "b")

    def block(stem: str, inputs: int, outputs: int, kernels: tuple[int, int, int, int]) -> None:
        if inputs != outputs:
            names.conv(f"{stem}.id_path", inputs, outputs, 1, wb)
        widths = [inputs, outputs // 4, outputs // 4, outputs // 4, outputs]
        for i, kernel in enumerate(kernels):
            names.conv(f"{stem}.res_path.conv_{i + 1}", widths[i], widths[i + 1], kernel, wb)

    names.conv("encoder.blocks.input", 3, base, 7, wb)
    inputs = base
    for group, width in enumerate((base, 2 * base, 4 * base, 8 * base), start=1):
        for i in range(blocks):
            block(f"encoder.blocks.group_{group}.block_{i + 1}", inputs, width, (3, 3, 3, 1))
            inputs = width
    names.conv("encoder.blocks.output.conv", 8 * base, codes, 1, wb)
    names.conv("decoder.blocks.input", codes, first, 1, wb)
    inputs = first
    for group, width in enumerate((8 * base, 4 * base, 2 * base, base), start=1):
        for i in range(blocks):
            block(f"decoder.blocks.group_{group}.block_{i + 1}", inputs, width, (1, 3, 3, 3))
            inputs = width
    names.conv("decoder.blocks.output.conv", base, 6, 1, wb)
    return names.weights


def vqgan(
    *,
    channels: int,
    multipliers: tuple[int, ...],
    blocks: int,
    latent: int,
    dim: int,
    codes: int,
    attention: bool = True,
    style: str = "taming",
    gumbel: bool = False,
    meta: bool = False,
) -> Weights:
    """taming-transformers' VQModel or GumbelVQ, or LlamaGen's VQModel."""
    names = Names(meta=meta)
    last = len(multipliers) - 1
    llama = style == "llamagen"

    def residual(stem: str, inputs: int, outputs: int) -> None:
        names.norm(f"{stem}.norm1", inputs)
        names.conv(f"{stem}.conv1", inputs, outputs, 3)
        names.norm(f"{stem}.norm2", outputs)
        names.conv(f"{stem}.conv2", outputs, outputs, 3)
        if inputs != outputs:
            names.conv(f"{stem}.nin_shortcut", inputs, outputs, 1)

    def attend(stem: str, width: int) -> None:
        names.norm(f"{stem}.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            names.conv(f"{stem}.{part}", width, width, 1)

    def middle(part: str, width: int) -> None:
        for number, name in enumerate(("block_1", "attn_1", "block_2")):
            stem = f"{part}.mid.{number if llama else name}"
            attend(stem, width) if name == "attn_1" else residual(stem, width, width)

    def ends(part: str, width: int, out: int) -> None:
        names.norm(f"{part}.norm_out", width)
        names.conv(f"{part}.conv_out", width, out, 3)

    names.conv("encoder.conv_in", 3, channels, 3)
    inputs = channels
    for i, multiplier in enumerate(multipliers):
        stage = f"encoder.conv_blocks.{i}" if llama else f"encoder.down.{i}"
        width = channels * multiplier
        for j in range(blocks):
            residual(f"{stage}.{'res' if llama else 'block'}.{j}", inputs, width)
            inputs = width
            if attention and i == last:
                attend(f"{stage}.attn.{j}", width)
        if i < last:
            names.conv(f"{stage}.downsample.conv", width, width, 3)
    middle("encoder", inputs)
    ends("encoder", inputs, latent)
    names.conv("decoder.conv_in", latent, inputs, 3)
    middle("decoder", inputs)
    for place, i in enumerate(range(last, -1, -1)):
        stage = f"decoder.conv_blocks.{place}" if llama else f"decoder.up.{i}"
        width = channels * multipliers[i]
        for j in range(blocks + 1):
            residual(f"{stage}.{'res' if llama else 'block'}.{j}", inputs, width)
            inputs = width
            if attention and i == last:
                attend(f"{stage}.attn.{j}", width)
        if i:
            names.conv(f"{stage}.upsample.conv", width, width, 3)
    ends("decoder", inputs, 3)
    names.conv("quant_conv", latent, dim, 1)
    names.conv("post_quant_conv", dim, latent, 1)
    if gumbel:
        names.conv("quantize.proj", dim, codes, 1)
        names.add("quantize.embed.weight", codes, dim)
    else:
        names.add("quantize.embedding.weight", codes, dim, scale=1.0)
    if llama:
        names.add("quantize.codebook_used", 65536)
    return names.weights
