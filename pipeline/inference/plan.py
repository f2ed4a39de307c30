"""What is to be sampled for a call: captions, seeds, options, known codes. Knows ids and codes; no
prompts, no images."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pipeline.inference.batching import Compile, sample_codes_batched
from stage2_prior import PriorModule, SampleRequest, Samples, SamplingOptions, sampling_schedule


@dataclass(frozen=True, eq=False)
class SamplingPlan:
    """B images: all that decides their codes."""

    text_ids: Tensor
    """(B,T)"""
    seeds: list[int]
    options: SamplingOptions
    known: Tensor | None = None
    """(N,) or (B,N) bool, which codes are given."""
    codes: Tensor | None = None
    """(B,N) the given codes."""

    def num_known(self, length: int) -> int:
        """Codes of each image, of `length`, that are given: as many in each."""
        return 0 if self.known is None else int(self.known.reshape(-1, length)[0].sum())

    def num_sampled(self, length: int) -> int:
        """Codes that are sampled for all images, of `length` each."""
        return len(self.seeds) * (length - self.num_known(length))

    def check(self, prior: PriorModule) -> None:
        """Raises ValueError, as `sample` does, where the prior cannot sample this."""
        sampling_schedule(prior, self.seeds, self.options, known=self.known, codes=self.codes)

    def sample(
        self, prior: PriorModule, *, batch_size: int = 64, compile: Compile = "auto"
    ) -> Samples:
        """Samples all images now; see `sample_codes_batched`."""
        return sample_codes_batched(
            prior,
            self.text_ids,
            self.seeds,
            self.options,
            batch_size=batch_size,
            compile=compile,
            known=self.known,
            codes=self.codes,
        )

    def requests(self) -> list[SampleRequest]:
        """The images one by one, for an engine. Their codes are those of `sample`."""
        known = self.known
        return [
            SampleRequest(
                text_ids=self.text_ids[i],
                seed=seed,
                options=self.options,
                known=known if known is None or known.ndim == 1 else known[i],
                codes=None if self.codes is None else self.codes[i],
            )
            for i, seed in enumerate(self.seeds)
        ]
