"""Vector quantization: the nearest code of a learned codebook. Knows vectors; nothing of pictures.

Legend: B batch, D features of a code, h w code grid, K codes, N = B h w vectors.

VQ-VAE, van den Oord et al. 2017 (https://arxiv.org/abs/1711.00937): eq. 1 nearest code, eq. 3 the losses, appendix A.1 the moving
averages. Normalised low-dimensional codes: ViT-VQGAN, Yu et al. 2022. Dead codes restart as in Jukebox, Dhariwal et al. 2020.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from stage1_tokenizer.config import VectorOptions
from stage1_tokenizer.quantizers.base import Quantized, Quantizer, sum_over_processes

_SMOOTHING = 1e-5
_CANDIDATES = 4096
"""Vectors a process offers for restarts, at least; four a code where the codebook is large."""


def nearest(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Index (N,) of the codebook row (K,D) nearest to each vector (N,D). |v|^2 is the same for all codes and left out."""
    return (codebook.square().sum(1) - 2 * vectors @ codebook.T).argmin(1)


class VectorQuantizer(Quantizer):
    """VQ-VAE's quantizer with the straight-through gradient: the decoder's gradient goes to the encoder unchanged."""

    initialized: Tensor
    steps: Tensor
    sums: Tensor

    def __init__(self, num_codes: int, code_dim: int, options: VectorOptions) -> None:
        super().__init__(num_codes, options.decay)
        self.options = options
        self.input_dim = code_dim
        codebook = self._onto_sphere(torch.randn(num_codes, code_dim, generator=torch.Generator().manual_seed(0)))
        if options.codebook == "gradient":
            self.codebook = nn.Parameter(codebook)
        else:
            self.register_buffer("codebook", codebook)
        self.register_buffer("sums", torch.zeros(num_codes, code_dim))
        self.register_buffer("initialized", torch.tensor(False))
        self.register_buffer("steps", torch.tensor(0))

    def forward(self, features: Tensor, temperature: float | None = None) -> Quantized:
        """Features (B,D,h,w) -> the nearest codes; `temperature` is gumbel's and not used."""
        with torch.autocast(features.device.type, enabled=False):
            return self._quantize(features.float())

    def embed(self, codes: Tensor) -> Tensor:
        return F.embedding(codes, self._table()).permute(0, 3, 1, 2)

    def _quantize(self, features: Tensor) -> Quantized:
        b, d, h, w = features.shape
        vectors = self._onto_sphere(features.permute(0, 2, 3, 1).reshape(-1, d))
        if self.training and not self.initialized:
            self._start_from(vectors.detach())
        codes = nearest(vectors.detach(), self._table().detach())
        chosen = F.embedding(codes, self._table())
        commitment = F.mse_loss(vectors, chosen.detach())
        loss = self.options.commitment * commitment
        metrics = {"commitment": commitment.detach()}
        if self.options.codebook == "gradient":
            loss = loss + F.mse_loss(chosen, vectors.detach())
        if self.training:
            self._learn(vectors.detach(), codes, self.count(codes))
            metrics |= self.use()
        latents = vectors + (chosen - vectors).detach()
        return Quantized(latents.reshape(b, h, w, d).permute(0, 3, 1, 2), codes.reshape(b, h, w), loss, metrics)

    def _table(self) -> Tensor:
        return self._onto_sphere(self.codebook)

    def _onto_sphere(self, vectors: Tensor) -> Tensor:
        """With `normalize`, vectors of root mean square 1; otherwise as they are."""
        if not self.options.normalize:
            return vectors
        return F.normalize(vectors, dim=1) * vectors.shape[1] ** 0.5

    @torch.no_grad()
    def _learn(self, vectors: Tensor, codes: Tensor, weight: Tensor) -> None:
        """Moving averages of counts and sums (eq. 6-8), over all processes; then dead codes restart."""
        self.steps += 1
        if self.options.codebook == "ema":
            total = torch.zeros_like(self.sums).index_add_(0, codes, vectors)
            # By the counts' own weight (the first step counts whole), or sums and counts would not belong together.
            self.sums.lerp_(sum_over_processes(total), weight)
            n = self.counts.sum()
            smoothed = (self.counts + _SMOOTHING) / (n + self.num_codes * _SMOOTHING) * n
            means = self._onto_sphere(self.sums / smoothed.clamp(min=1e-12)[:, None])
            # A code that was never used has no mean; it stays where it was put.
            self.codebook.copy_(torch.where((self.counts > _SMOOTHING)[:, None], means, self.codebook))
        if self.options.restart_below and int(self.steps) % self.options.restart_every == 0:
            dead = self.counts < self.options.restart_below * self.counts.mean()
            self._place(dead, *self._candidates(vectors, self._error(vectors, codes)))

    @torch.no_grad()
    def _start_from(self, vectors: Tensor) -> None:
        """The first batch's vectors become the codebook."""
        everywhere = torch.ones(self.num_codes, dtype=torch.bool, device=vectors.device)
        self._place(everywhere, *self._candidates(vectors, torch.ones_like(vectors[:, 0])))
        self.initialized.fill_(True)
        self.counts.zero_()

    def _error(self, vectors: Tensor, codes: Tensor) -> Tensor:
        """Squared distance (N,) of each vector to its code."""
        return (vectors - F.embedding(codes, self._table())).square().sum(1)

    @torch.no_grad()
    def _place(self, which: Tensor, pool: Tensor, weights: Tensor) -> None:
        """Puts the chosen codes at vectors of the pool drawn by weight, the same ones on every process, with average counts.

        Weighted by error, codes go where the codebook is poorest, as in k-means++: a batch is mostly plain background, which
        needs no further code. Where there are fewer vectors than codes they repeat, told apart by a little noise.
        """
        generator = torch.Generator().manual_seed(int(self.steps))
        enough = len(pool) >= self.num_codes
        picks = torch.multinomial(weights.cpu() + 1e-12, self.num_codes, replacement=not enough, generator=generator)
        noise = torch.randn(self.num_codes, pool.shape[1], generator=generator).to(pool.device)
        spread = pool.std(dim=0, correction=0).mean()
        placed = self._onto_sphere(pool[picks.to(pool.device)] + 0.01 * spread * noise)
        count = self.counts.mean().clamp(min=1.0)
        self.codebook.data = torch.where(which[:, None], placed, self.codebook.data)
        self.counts.copy_(torch.where(which, count, self.counts))
        self.sums.copy_(torch.where(which[:, None], placed * count, self.sums))

    def _candidates(self, vectors: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors (M,D) of each process's batch, no more than needed, and their weights (M,), gathered from all."""
        generator = torch.Generator().manual_seed(int(self.steps))
        limit = max(4 * self.num_codes, _CANDIDATES)
        # In the order of the batch: then any number of processes gathers the same pool.
        mine = torch.randperm(len(vectors), generator=generator)[:limit].sort().values.to(vectors.device)
        share = torch.cat([vectors[mine], weights[mine, None]], dim=1).contiguous()
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            shares = [torch.empty_like(share) for _ in range(dist.get_world_size())]
            dist.all_gather(shares, share)
            share = torch.cat(shares)
        return share[:, :-1], share[:, -1]
