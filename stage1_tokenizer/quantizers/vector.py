"""Vector quantization: the nearest code of a learned codebook. Knows vectors; nothing of images.

Legend: B batch, D features of a code, h w code grid, K codes, N = B h w vectors.

VQ-VAE, van den Oord et al. 2017 (https://arxiv.org/abs/1711.00937): eq. 1 nearest code, eq. 3 the
losses, appendix A.1 the moving averages. Normalised low-dimensional codes: ViT-VQGAN, Yu et al.
2022. Dead codes restart as in Jukebox, Dhariwal et al. 2020. SimVQ: Zhu et al. 2024
(https://arxiv.org/abs/2411.02038). Entropy term: Yu et al. 2023 (MAGVIT-v2), eq. 4-5, on soft
assignments.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from stage1_tokenizer.caller import warn_user
from stage1_tokenizer.options import VectorOptions
from stage1_tokenizer.quantizers.base import (
    Quantized,
    SingleLevel,
    from_first_process,
    mean_over_processes,
    sum_over_processes,
)
from stage1_tokenizer.quantizers.gradients import pass_gradient

_SMOOTHING = 1e-5
_TABLE = 2**21
"""Distances computed at a time on a CPU, whose cache holds them."""
_TABLE_ON_GPU = 2**28
"""The same on a GPU, where each call costs time and memory is the limit (1 GiB)."""
_CANDIDATES = 4096
"""Vectors that each process offers for restarts, at least; four per code for large codebooks."""
_EQUAL = 1e-5
"""Squared distance of vectors, as a fraction of their mean square, up to which they are equal."""
_DOUBLE = 0.25
"""Codes whose squared distance is below this fraction of the mean squared error are doubles."""


def squared_distances(vectors: Tensor, codebook: Tensor) -> Tensor:
    """(N,K), less |v|^2, which is the same for all codes; in one product, since what is written and
    read costs more than it."""
    return torch.addmm(codebook.square().sum(1), vectors, codebook.T, alpha=-2)


def nearest(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Index (N,) of the codebook row (K,D) nearest to each vector (N,D), some vectors at a time: a
    table of distances that fits the processor's cache takes half the time."""
    rows = max((_TABLE if vectors.device.type == "cpu" else _TABLE_ON_GPU) // len(codebook), 1)
    return torch.cat([squared_distances(part, codebook).argmin(1) for part in vectors.split(rows)])


def entropy_penalty(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Scalar, in nats: entropy of a vector's soft assignment softmax(-|v - c|^2), less that of the
    batch's mean assignment."""
    log_p = (-squared_distances(vectors, codebook)).log_softmax(1)
    mean = mean_over_processes(log_p.exp().mean(0))
    return -(log_p.exp() * log_p).sum(1).mean() + (mean * mean.clamp(min=1e-12).log()).sum()


def kmeans(pool: Tensor, centres: Tensor, iterations: int) -> Tensor:
    """Lloyd's rounds from `centres` (K,D) over `pool` (M,D); a centre without vectors stays."""
    for _ in range(iterations):
        codes = nearest(pool, centres)
        counts = torch.bincount(codes, minlength=len(centres))[:, None]
        sums = torch.zeros_like(centres).index_add_(0, codes, pool)
        centres = torch.where(counts > 0, sums / counts.clamp(min=1), centres)
    return centres


def spread(pool: Tensor, errors: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Vectors (count,D) drawn from the pool (M,D), far from one another: by squared distance (M,)
    to the nearest that is there already, in rounds that each draw as many as all before (k-means||,
    Bahmani et al. 2012).

    By frequency, most codes would go to what is most frequent, such as plain background, which
    needs one code alone. Where the pool has fewer distinct vectors than `count` they repeat.

    Args:
        errors: (M,) squared distances to the vectors that are there before.
    """
    rows = _TABLE // max(count, 1) or 1
    scale = pool.square().sum(1).mean()
    left = errors
    drawn = torch.empty(0, dtype=torch.long)
    while len(drawn) < count:
        size = min(max(len(drawn), 1), count - len(drawn))
        # Distances of equal vectors differ from 0 by rounding, which differs between processes.
        left = torch.where(left > _EQUAL * scale, left, 0.0)
        # Weights that are not finite come from a loss that is not, which training reports.
        weights = left.cpu().nan_to_num(0.0, 0.0, 0.0) + 1e-12
        new = torch.multinomial(weights, size, replacement=size > len(pool), generator=generator)
        drawn = torch.cat([drawn, new])
        there = pool[new.to(pool.device)]
        distances = [
            (squared_distances(part, there).amin(1) + part.square().sum(1))
            for part in pool.split(rows)
        ]
        left = torch.minimum(left, torch.cat(distances))
    return pool[drawn.to(pool.device)]


def l2_normalize(vectors: Tensor) -> Tensor:
    """Vectors (N,D) scaled to a root mean square of 1."""
    return F.normalize(vectors, dim=1) * vectors.shape[1] ** 0.5


def deviation(pool: Tensor) -> Tensor:
    """Mean standard deviation () of the features of vectors (M,D)."""
    return pool.std(dim=0, correction=0).mean()


@dataclass
class Assigned:
    """Vectors and their codes."""

    codes: Tensor
    """(N,) int64."""
    chosen: Tensor
    """(N,D) the codes' vectors."""
    loss: Tensor
    """Scalar."""
    metrics: dict[str, Tensor]


class VectorQuantizer(SingleLevel):
    """VQ-VAE's quantizer."""

    initialized: Tensor
    steps: Tensor
    sums: Tensor
    usage_ema: Tensor

    def __init__(self, num_codes: int, code_dim: int, options: VectorOptions) -> None:
        super().__init__(num_codes, code_dim, code_dim, options.decay)
        self.options = options
        codebook = torch.randn(num_codes, code_dim, generator=torch.Generator().manual_seed(0))
        if not codebook.is_meta:  # computing on the meta device imports torch's compiler
            codebook = self._normalize(codebook)
        if options.codebook == "gradient":
            self.codebook = nn.Parameter(codebook)
        else:
            self.register_buffer("codebook", codebook)
        # From the identity: at the start the codes are the vectors that the first batch put there.
        self.map = nn.Parameter(torch.eye(code_dim)) if options.codebook == "linear" else None
        self.register_buffer("sums", torch.zeros(num_codes, code_dim))
        # The counts that belong to the sums give a restarted code an average use, whether it comes
        # to be used or not; these do not.
        self.register_buffer("usage_ema", torch.zeros(num_codes))
        self.register_buffer("initialized", torch.tensor(False))
        self.register_buffer("steps", torch.tensor(0))

    def forward(self, features: Tensor, temperature: float | None = None) -> Quantized:
        """Features (B,D,h,w) -> the nearest codes; there is nothing to relax, so `temperature` is
        not used."""
        b, d, h, w = features.shape
        with torch.autocast(features.device.type, enabled=False):
            vectors = self._flat(features)
            assigned = self.assign(vectors)
            metrics = assigned.metrics
            if self.training:
                self.update_codebook(vectors.detach(), assigned.codes)
                metrics |= self.usage_metrics()
            latents = pass_gradient(vectors, assigned.chosen, self.options.gradient)
        latents = latents.reshape(b, h, w, d).permute(0, 3, 1, 2)
        return Quantized(latents, assigned.codes.reshape(b, h, w), assigned.loss, metrics=metrics)

    def encode(self, features: Tensor) -> Tensor:
        """The nearest codes (B,h,w), without looking up their vectors or taking a loss."""
        with torch.autocast(features.device.type, enabled=False):
            found = nearest(self._flat(features), self.vectors())
        return found.reshape(len(features), *features.shape[2:])

    def log_assignment(self, features: Tensor) -> Tensor:
        """Features (B,D,h,w) -> log-probabilities (B,h,w,K) of a soft assignment: the softmax of
        negative squared distances, in units of the codebook's variance per feature.

        The likeliest code is the nearest one. Gradients reach the features.
        """
        with torch.autocast(features.device.type, enabled=False):
            table = self.vectors().detach()
            unit = table.var(0, correction=0).mean().clamp(min=1e-12)
            logits = -squared_distances(self._flat(features), table) / unit
        return logits.log_softmax(1).reshape(len(features), *features.shape[2:], -1)

    def _flat(self, features: Tensor) -> Tensor:
        """Features (B,D,h,w) -> vectors (N,D), where codes live."""
        return self._normalize(features.float().permute(0, 2, 3, 1).reshape(-1, features.shape[1]))

    def vectors(self) -> Tensor:
        # A copy, since restarts write to the codebook between a step's forward and backward pass.
        codebook = self.codebook.float().clone()
        return self._normalize(codebook if self.map is None else codebook @ self.map.float())

    def usage(self) -> list[Tensor]:
        return [self.usage_ema]

    def usage_buffers(self) -> list[Tensor]:
        return [self.counts, self.usage_ema]

    def ema_excluded_parameters(self) -> list[nn.Parameter]:
        """Parameters excluded from the EMA: a restarted code jumps, and its average would lie
        between the old and the new position, near no data."""
        return (
            [self.codebook]
            if isinstance(self.codebook, nn.Parameter) and self.options.dead_code_threshold
            else []
        )

    def assign(self, vectors: Tensor) -> Assigned:
        """The nearest codes of vectors (N,D), with the losses; the first vectors in training start
        the codebook."""
        if self.training and not self.initialized:
            self._init_codebook(vectors.detach())
        table = self.vectors()
        options = self.options
        codes = nearest(vectors.detach(), table.detach())
        chosen = F.embedding(codes, table)
        commitment = F.mse_loss(vectors, chosen.detach())
        loss = options.commitment * commitment
        metrics = {"commitment": commitment.detach()}
        if options.codebook != "ema":
            loss = loss + F.mse_loss(chosen, vectors.detach())
        if options.entropy_weight and self.training:
            penalty = entropy_penalty(vectors, table)
            loss = loss + options.entropy_weight * penalty
            metrics["entropy_penalty"] = penalty.detach()
        return Assigned(codes, chosen, loss, metrics)

    def _normalize(self, vectors: Tensor) -> Tensor:
        """Where vectors and codes live: on the sphere with `normalize`, otherwise where they
        are."""
        return l2_normalize(vectors) if self.options.normalize else vectors

    @torch.no_grad()
    def update_codebook(self, vectors: Tensor, codes: Tensor) -> None:
        """Moving averages of counts and sums (eq. 6-8), over all processes; then dead codes
        restart."""
        weight = self.count(codes)
        self.steps += 1
        if self.options.codebook == "ema":
            total = torch.zeros_like(self.sums).index_add_(0, codes, vectors)
            # By the counts' own weight (the first step counts whole), or sums and counts would not
            # belong together.
            self.sums.lerp_(sum_over_processes(total), weight)
            n = self.counts.sum()
            smoothed = (self.counts + _SMOOTHING) / (n + self.num_codes * _SMOOTHING) * n
            means = self._normalize(self.sums / smoothed.clamp(min=1e-12)[:, None])
            # A code that was never used has no mean; it stays where it was put.
            self.codebook.copy_(
                torch.where((self.counts > _SMOOTHING)[:, None], means, self.codebook)
            )
        if (
            self.options.dead_code_threshold
            and int(self.steps) % self.options.dead_code_check_every == 0
        ):
            errors = self._error(vectors, codes)
            candidates = self._candidates(torch.cat([vectors, errors[:, None]], dim=1))
            pool = candidates[:, :-1]
            errors = candidates[:, -1]
            dead = self.counts < self.options.dead_code_threshold * self.counts.mean()
            dead |= self._doubles(_DOUBLE * errors.mean())
            dead = from_first_process(dead)
            generator = self._generator()
            there = from_first_process(spread(pool, errors, int(dead.sum()), generator))
            self._place(dead, there, 0.01 * deviation(pool), generator)

    def _doubles(self, limit: Tensor) -> Tensor:
        """Which codes (K,) lie within a squared distance () of a code that is used more.

        Vectors differ more from their codes than such codes from one another: they draw the same.
        """
        table = self.vectors()
        counts = self.counts
        number = torch.arange(self.num_codes, device=counts.device)
        found = []
        for rows in number.split(max(_TABLE // self.num_codes, 1)):
            squared = squared_distances(table[rows], table) + table[rows].square().sum(1)[:, None]
            more = counts > counts[rows, None]
            equal = (counts == counts[rows, None]) & (number < rows[:, None])
            found.append(((squared < limit) & (more | equal)).any(1))
        return torch.cat(found)

    @torch.no_grad()
    def _init_codebook(self, vectors: Tensor) -> None:
        """Vectors of the first batch, far from one another, or their k-means become the codebook.

        Raises:
            ValueError: k-means over fewer vectors than codes.
        """
        everywhere = torch.ones(self.num_codes, dtype=torch.bool, device=vectors.device)
        pool = self._candidates(vectors)
        rounds = self.options.kmeans_iterations
        if len(pool) < self.num_codes:
            problem = (
                f"the first batch has {len(pool)} vectors (images times codes per image) and the "
                f"codebook {self.num_codes} codes; "
                f"raise tokenizer.train.batch_size {-(-self.num_codes // len(pool))}-fold, or "
                "lower tokenizer.model.num_codes"
            )
            if rounds:
                raise ValueError(
                    f"k-means needs a vector per code: {problem}, or set "
                    "tokenizer.model.vq.kmeans_iterations to 0"
                )
            warn_user(f"codes start as copies: {problem}")
        generator = self._generator()
        errors = (pool - pool.mean(0)).square().sum(1)
        there = from_first_process(spread(pool, errors, self.num_codes, generator))
        centres = kmeans(pool, there, rounds)
        # Noise tells copies apart; means are distinct.
        self._place(everywhere, centres, (0.0 if rounds else 0.01) * deviation(pool), generator)
        self.initialized.fill_(True)
        self.counts.zero_()

    def _error(self, vectors: Tensor, codes: Tensor) -> Tensor:
        """Squared distance (N,) of each vector to its code."""
        return (vectors - F.embedding(codes, self.vectors())).square().sum(1)

    @torch.no_grad()
    def _place(
        self, which: Tensor, vectors: Tensor, noise: Tensor, generator: torch.Generator
    ) -> None:
        """Puts the chosen codes (K,) at vectors (as many,D) plus noise of a deviation (), with
        average counts."""
        drawn = torch.randn(vectors.shape, generator=generator).to(vectors.device)
        placed = self._normalize(vectors + noise * drawn)
        mean = self.counts.mean()
        count = torch.where(mean > 0, mean, 1.0)
        # Under a map, what the map carries there.
        rows = placed if self.map is None else placed @ torch.linalg.pinv(self.map)
        self.codebook.data[which] = rows
        self.counts[which] = count
        self.sums[which] = placed * count

    def _candidates(self, rows: Tensor) -> Tensor:
        """Rows (M,...) of each process's batch, no more than needed, gathered from all."""
        limit = max(4 * self.num_codes, _CANDIDATES)
        # In the order of the batch, so that any number of processes gathers the same pool.
        chosen = torch.randperm(len(rows), generator=self._generator())[:limit].sort().values
        mine = rows[chosen.to(rows.device)].contiguous()
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return mine
        gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, mine)
        return torch.cat(gathered)

    def _generator(self) -> torch.Generator:
        """The same random numbers at a step on every process, whatever else was drawn before."""
        return torch.Generator().manual_seed(int(self.steps))
