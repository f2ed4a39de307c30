"""`LatentPipeline`: prompts -> images by way of Gaussian latents. Knows both stages' interfaces,
not their insides.

Legend: N images, n latent dimensions of an image, C features of a context, M random numbers per
sample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from pipeline.inference.base import BasePipeline, check_at_least_one, checked_prompts, image_seed
from pipeline.inference.bundle import Card
from pipeline.inference.known_prompts import KnownPrompts
from pipeline.inference.likelihood import LikelihoodMixin
from pipeline.inference.output import TextToImageOutput
from pipeline.runtime.threads import free_threads
from stage1_tokenizer import TokenizerModule, to_uint8
from stage1_tokenizer.caller import warn_user
from stage1_tokenizer.pixels import to_pil
from stage2_prior import LatentPriorModule, SamplingOptions, TextTokenizer
from stage2_prior.sampling import per_seed_normals

_OFF: dict[str, tuple[object, ...]] = {
    "best_of": (1,),
    "judge": ("likelihood",),
    "compile": ("auto", "off"),
}
"""Values that ask for nothing, of options that only pipelines over codes have."""


def _needs_codes(name: str) -> Callable[..., NoReturn]:
    """A method that pipelines over codes have."""

    def refuse(self: LatentPipeline, *arguments: object, **options: object) -> NoReturn:
        raise ValueError(
            f"this bundle has Gaussian latents, and {name} needs codes; train one with "
            "tokenizer.model.quantizer=vq"
        )

    return refuse


class LatentPipeline(LikelihoodMixin, BasePipeline):
    """Both stages chained, where latents are Gaussian.

    Args:
        tokenizer: latents -> images.
        prior: density of latents, given a caption or not.
        text: caption -> text ids.
        defaults: sampling options where a call gives none, of which `temperature` is read.
        trained_on: the bundle's description of its data.
        known_prompts: styles and names of icons, by which prompts are checked.
        card: the model card that was read with the parts.

    Raises:
        ValueError: there are codes, or the prior is one of other latents, or of another vocabulary.
    """

    prior: LatentPriorModule

    def __init__(
        self,
        tokenizer: TokenizerModule,
        prior: LatentPriorModule,
        text: TextTokenizer,
        defaults: SamplingOptions | None = None,
        trained_on: dict[str, Any] | None = None,
        known_prompts: KnownPrompts | None = None,
        card: Card | None = None,
    ) -> None:
        super().__init__(tokenizer, prior, text, defaults, trained_on, known_prompts, card)
        if tokenizer.latent_dim != prior.latent_features:
            raise ValueError(
                f"the tokenizer has {tokenizer.latent_dim} latent dimensions per image (0 where it "
                f"has codes) and the prior {prior.latent_features}; give both from one bundle"
            )
        known = prior.config.text_vocab_size
        if prior.context_features and text.vocab_size != known:
            raise ValueError(
                f"the text tokenizer has {text.vocab_size} entries and the prior {known}; "
                "give both from one bundle"
            )

    @torch.no_grad()
    def __call__(
        self,
        prompts: str | Sequence[str],
        *,
        num_images_per_prompt: int = 1,
        seed: int = 0,
        temperature: float | None = None,
        batch_size: int = 64,
        truncate: bool = False,
        **others: object,
    ) -> TextToImageOutput:
        """Samples images. The same seed gives the same images for a prompt, whatever else the call
        asks for, up to the rounding of another batch size: one level of a few pixels. An
        unconditional prior ignores prompts, with a warning.

        Args:
            temperature: scale of the noise that becomes latents, not of the number that chooses a
                mixture's component; 0 gives the image of no noise. The bundle's default when
                absent.
            batch_size: images at a time.
            truncate: truncate prompts that are too long.
            others: options of `TextToImagePipeline`, which are refused unless they ask for nothing.

        Raises:
            ValueError: an option is out of range or needs codes; a prompt is too long (unless
                `truncate`); or it is empty, and the prior is conditional and was trained without
                caption dropout.
        """
        prompts = checked_prompts(prompts)
        check_at_least_one("num_images_per_prompt", num_images_per_prompt)
        check_at_least_one("batch_size", batch_size)
        for name, value in others.items():
            if value is not None and value not in _OFF.get(name, ()):
                raise ValueError(
                    f"{name} is for bundles with codes, and this one has Gaussian latents, whose "
                    "one sampling option is temperature; leave it out"
                )
        scale = self.defaults.temperature if temperature is None else temperature
        SamplingOptions(temperature=scale)  # refuses what is out of range
        seeds = [image_seed(seed, i) for _ in prompts for i in range(num_images_per_prompt)]
        context = self._context(prompts, truncate)
        if context is not None:
            context = context.repeat_interleave(num_images_per_prompt, dim=0)
        output = TextToImageOutput(
            [], torch.zeros(len(seeds), 0, dtype=torch.long), torch.empty(0), seeds
        )
        latents = []
        log_likelihood = []
        for first in range(0, len(seeds), batch_size):
            rows = slice(first, first + batch_size)
            given = None if context is None else context[rows]
            sampled = self._sample(seeds[rows], scale, given)
            latents.append(sampled.cpu())
            log_likelihood.append(self.prior.log_prob(sampled, given).cpu())
            output.images += to_pil(to_uint8(self.tokenizer.decode_latents(sampled)))
        output.latents = torch.cat(latents)
        output.log_likelihood = torch.cat(log_likelihood)
        return output

    edit = _needs_codes("edit")
    outpaint = _needs_codes("outpaint")
    vary = _needs_codes("vary")
    complete = _needs_codes("complete")
    score = _needs_codes("score")
    caption = _needs_codes("caption")
    compile = _needs_codes("compile")

    @property
    def reads_prompts(self) -> bool:
        """Whether images depend on prompts."""
        return self.prior.context_features > 0

    def _context(self, prompts: Sequence[str], truncate: bool) -> Tensor | None:
        """A context (prompts,C); None for an unconditional prior."""
        if self.prior.context_features:
            ids = self.text_ids(prompts, truncate)
            self._warn_of(prompts)
            return self.prior.encode_text(ids)
        if any(prompt.strip() for prompt in prompts):
            warn_user(
                "this bundle's prior is unconditional (prior.latent.context_features is 0) and "
                "ignores prompts; give an empty one"
            )
        return None

    @free_threads()
    def _sample(self, seeds: Sequence[int], temperature: float, context: Tensor | None) -> Tensor:
        """Latents (N,n), each of its own seed."""
        noise = per_seed_normals(seeds, self.prior.noise_features)
        noise[:, : self.prior.latent_features] *= temperature
        return self.prior.from_noise(noise, context)
