"""Adds peers to a comparison of tokenizers: dalle-pytorch's DiscreteVAE, and
vector-quantize-pytorch's VectorQuantize in our network.

    benchmarks/.venv/bin/python -m benchmarks.tokenizers --config configs/bakeoff-emoji.yaml
        [--minutes 8] [--row NAME]

Each peer has its default settings, and the data, steps (or minutes), prior and bf16 autocast of the
comparison's first variant. DiscreteVAE also trains in its default fp32. The results are written to
the comparison's folder, and `minidalle compare-tokenizers` shows them below its own.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import pipeline.stages.compare_tokenizers as comparison
import stage1_tokenizer.model as model
from benchmarks import peers
from pipeline.config.experiment import Experiment
from pipeline.data.sampler import BatchSampler
from pipeline.runtime.devices import uses_bf16
from pipeline.stages.sources import sources_of
from stage1_tokenizer import (
    Level,
    Quantized,
    TokenizerConfig,
    TokenizerModule,
    codebook_statistics,
    to_model_range,
)
from stage1_tokenizer.metrics import peak_signal_to_noise
from stage1_tokenizer.quantizers.base import SingleLevel


class PeerQuantizer(SingleLevel):
    """vector-quantize-pytorch's VectorQuantize, all but sizes as it comes, under our contract."""

    def __init__(self, config: TokenizerConfig) -> None:
        from vector_quantize_pytorch import VectorQuantize

        super().__init__(config.num_codes, config.code_dim, config.code_dim)
        self.inner = VectorQuantize(dim=config.code_dim, codebook_size=config.num_codes)

    def forward(self, features: Tensor, temperature: float | None = None) -> Quantized:
        with torch.autocast(features.device.type, enabled=False):
            b, d, h, w = features.shape
            quantized, codes, loss = self.inner(features.float().flatten(2).transpose(1, 2))
            codes = codes.reshape(b, h, w)
            metrics = {}
            if self.training:
                self.count(codes)
                metrics = self.usage_metrics()
        return Quantized(
            quantized.transpose(1, 2).reshape(b, d, h, w), codes, loss.sum(), metrics=metrics
        )

    def look_up(self, codes: Tensor) -> Tensor:
        return self.inner.get_output_from_indices(codes)


class PeerTokenizer(nn.Module):
    """dalle-pytorch's DiscreteVAE behind as much of `TokenizerModule` as the stages ask for."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.own_config = config
        self.vae = peers.discrete_vae(
            config.size[0], config.downsample_factor.bit_length() - 1, config.num_codes
        )
        self.size = config.size
        self.num_codes = config.num_codes

    @property
    def quantizer(self) -> PeerTokenizer:
        return self

    @property
    def fingerprint(self) -> str:
        """Another one for other weights, so that codes and a prior of an earlier try are not taken
        for this one's."""
        digest = hashlib.sha256()
        for tensor in self.state_dict().values():
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def layout_of(self, grid: tuple[int, int]) -> tuple[Level, ...]:
        return (Level(grid=grid, num_codes=self.num_codes),)

    class _Layout(tuple):
        """Both the tokenizer's `layout` and its quantizer's `layout(grid)`."""

        def __call__(self, grid: tuple[int, int]) -> tuple[Level, ...]:
            return (Level(grid=tuple(grid), num_codes=self[0].num_codes),)

    @property
    def layout(self) -> Any:
        return self._Layout(self.layout_of(self.own_config.grid))

    @property
    def code_vectors(self) -> Tensor:
        return self.vae.codebook.weight.detach()

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        return self.vae.get_codebook_indices((pixels + 1) / 2).reshape(
            len(pixels), *self.own_config.grid
        )

    @torch.no_grad()
    def decode(self, codes: Tensor, grid: Any = None) -> Tensor:
        return self.vae.decode(codes.flatten(1)).float().clamp(-1, 1)

    def to_images(self, codes: Tensor) -> list[Any]:
        from stage1_tokenizer import to_uint8
        from stage1_tokenizer.pixels import to_pil

        return to_pil(to_uint8(self.decode(codes)))


def train_discrete_vae(
    experiment: Experiment, seconds: float | None, *, fp32: bool
) -> PeerTokenizer:
    """By Adam at 1e-3, as its training script does, for the experiment's steps or for so many
    seconds; writes its held-out metrics."""
    train = experiment.tokenizer.train
    torch.manual_seed(experiment.seed)
    source, held_out = sources_of(experiment.data, experiment.folder, experiment.process_timeout)
    tokenizer = PeerTokenizer(experiment.tokenizer.model)
    optimizer = torch.optim.Adam(tokenizer.parameters(), lr=1e-3)
    order = BatchSampler(len(source), train.resolved_batch("tokenizer")[0], experiment.seed)
    bf16 = not fp32 and uses_bf16(experiment.precision, torch.device("cpu"))
    start = time.perf_counter()
    step = 0
    while time.perf_counter() - start < seconds if seconds is not None else step < train.steps:
        pixels = to_model_range(torch.from_numpy(source.images(order.share(step, 0, 1).tolist())))
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = tokenizer.vae((pixels + 1) / 2, return_loss=True)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
    tokenizer.eval()
    print(f"DiscreteVAE: {step} steps in {time.perf_counter() - start:.0f} s", flush=True)
    true = to_model_range(
        torch.from_numpy(held_out.images(range(len(held_out))[: experiment.encode.max_val_images]))
    )
    codes = tokenizer.encode(true)
    statistics = codebook_statistics(torch.bincount(codes.flatten(), minlength=tokenizer.num_codes))
    metrics = {
        "psnr": float(peak_signal_to_noise(true, tokenizer.decode(codes)).mean()),
        "codebook_usage": statistics.usage,
        "codebook_perplexity": statistics.perplexity,
    }
    folder = experiment.folder / "tokenizer"
    folder.mkdir(parents=True, exist_ok=True)
    settled = {"train": {"steps": step}}
    (folder / "settings.json").write_text(json.dumps({"settings": settled, "held_out": metrics}))
    return tokenizer


def discrete_vae_row(experiment: Experiment, minutes: float | None, *, fp32: bool = False) -> None:
    """The row's metrics by the code that judges ours, with the peer in our tokenizer's place."""
    trained: list[PeerTokenizer] = []

    def train(given: Experiment) -> Path:
        trained.append(
            train_discrete_vae(given, None if minutes is None else 60 * minutes, fp32=fp32)
        )
        return given.folder / "tokenizer"

    comparison.train_tokenizer = train
    comparison.steps_in_budget = lambda given, seconds: 1
    TokenizerModule.from_pretrained = classmethod(lambda cls, folder: trained[0])  # type: ignore[assignment, method-assign]
    metrics = comparison.run_variant(experiment, minutes)
    steps = json.loads((experiment.folder / "tokenizer" / "settings.json").read_text())["settings"][
        "train"
    ]["steps"]
    metrics |= {
        "steps": steps,
        "training_rate": steps
        * experiment.tokenizer.train.resolved_batch("tokenizer")[0]
        / (60 * metrics["minutes"]),
    }
    comparison.write_metrics(experiment, minutes, metrics)


def vector_quantize_row(experiment: Experiment, minutes: float | None) -> None:
    model.build_quantizer = PeerQuantizer  # type: ignore[assignment]
    comparison.run_variant(experiment, minutes)


ROWS = {
    "discrete-vae": ("dalle-pytorch DiscreteVAE", discrete_vae_row),
    "discrete-vae-fp32": ("dalle-pytorch DiscreteVAE, fp32", partial(discrete_vae_row, fp32=True)),
    "vector-quantize": ("vector-quantize-pytorch", vector_quantize_row),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--row",
        choices=tuple(ROWS),
        help="one of them, in this process (all, each in a process of its own)",
    )
    options, rest = parser.parse_known_args()
    if options.row is None:
        import subprocess
        import sys

        for row in ROWS:
            subprocess.run(
                [sys.executable, "-m", "benchmarks.tokenizers", "--row", row, *rest], check=True
            )
        return
    given = comparison.load_comparison(rest)
    name, run = ROWS[options.row]
    base = next(iter(given.variants.values()))
    plain = TokenizerConfig(**{**vars(base.tokenizer.model), "vq": type(base.tokenizer.model.vq)()})
    row = replace(base, name=name, tokenizer=replace(base.tokenizer, model=plain))
    if comparison.is_complete(row, given.minutes):
        print(f"{name}: done already, in {row.folder}")
        return
    run(row, given.minutes)


if __name__ == "__main__":
    main()
