"""Prompts, images and masks -> plans of what to sample; sampled codes -> images. Knows both stages'
interfaces; samples nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace

import torch
from PIL import Image
from torch import Tensor

from pipeline.inference.base import BasePipeline, check_at_least_one, checked_prompts, image_seed
from pipeline.inference.editing import (
    EditPlan,
    check_image,
    keep_mask,
    place_on_canvas,
    random_keep_mask,
    replaced_pixels,
)
from pipeline.inference.output import TextToImageOutput
from pipeline.inference.plan import SamplingPlan
from pipeline.runtime.threads import free_threads
from stage2_prior import PriorModule, Samples, SamplingOptions

SamplingValue = float | tuple[float, float] | None
"""A field of `SamplingOptions`; None takes the bundle's default."""


class PlanningPipeline(BasePipeline):
    """What `TextToImagePipeline` does before and after it samples."""

    prior: PriorModule

    def plan(
        self,
        prompts: str | Sequence[str],
        *,
        num_images: int = 1,
        seed: int = 0,
        truncate: bool = False,
        **sampling: SamplingValue,
    ) -> SamplingPlan:
        """What `__call__` samples, of `num_images` per prompt, without its warnings. Options and
        errors as there."""
        prompts = checked_prompts(prompts)
        check_at_least_one("num_images", num_images)
        ids = self.text_ids(prompts, truncate).repeat_interleave(num_images, dim=0)
        seeds = [image_seed(seed, i) for _ in prompts for i in range(num_images)]
        return SamplingPlan(ids, seeds, self._options(sampling))

    def plan_completion(
        self,
        image: Image.Image | Tensor,
        known: Tensor,
        prompt: str,
        *,
        num_images: int = 1,
        seed: int = 0,
        truncate: bool = False,
        **sampling: SamplingValue,
    ) -> SamplingPlan:
        """What `complete` samples, without its warnings. Options and errors as there."""
        check_at_least_one("num_images", num_images)
        length = self.prior.stream.image_length
        if known.dtype != torch.bool or known.numel() not in (length, length * num_images):
            raise ValueError(
                f"known is {known.dtype} {tuple(known.shape)}; it must be bool and say for each of "
                f"the {length} codes if it is kept"
            )
        codes = image if isinstance(image, Tensor) else self.codes_of([image])
        if codes.numel() != length:
            raise ValueError(
                f"the codes are {tuple(codes.shape)}; this prior's images have {length}, "
                "give as many"
            )
        options = self._options(sampling)
        steps = options.num_inference_steps
        if sampling.get("num_inference_steps") is None and steps is not None:
            # The bundle's default is for whole images.
            unknown = length - int(known.reshape(-1, length)[0].sum())
            options = replace(options, num_inference_steps=max(min(steps, unknown), 1))
        return SamplingPlan(
            self.text_ids([prompt], truncate).repeat(num_images, 1),
            [image_seed(seed, i) for i in range(num_images)],
            options,
            known=known.reshape(-1, length) if known.numel() > length else known.reshape(length),
            codes=codes.reshape(1, length).cpu().repeat(num_images, 1),
        )

    def plan_edit(
        self,
        image: Image.Image,
        mask: Image.Image,
        prompt: str,
        *,
        num_images: int = 1,
        seed: int = 0,
        truncate: bool = False,
        **sampling: SamplingValue,
    ) -> EditPlan:
        """What `edit` samples, without its warnings. Options and errors as there. With an empty
        mask all codes are known, and nothing can be sampled."""
        original = check_image(image, self.tokenizer.size, self.tokenizer.own_config.channels)
        replaced = replaced_pixels(mask, original.size)
        known = keep_mask(replaced, self.tokenizer.layout)
        plan = self.plan_completion(
            original, known, prompt, num_images=num_images, seed=seed, truncate=truncate, **sampling
        )
        return EditPlan(**vars(plan), original=original, replaced=replaced)

    def plan_outpaint(
        self,
        image: Image.Image,
        prompt: str,
        *,
        at: tuple[int, int] = (0, 0),
        num_images: int = 1,
        seed: int = 0,
        truncate: bool = False,
        **sampling: SamplingValue,
    ) -> EditPlan:
        """What `outpaint` samples, without its warnings. Options and errors as there."""
        channels = self.tokenizer.own_config.channels
        canvas, mask = place_on_canvas(image, self.tokenizer.size, channels, at)
        return self.plan_edit(
            canvas, mask, prompt, num_images=num_images, seed=seed, truncate=truncate, **sampling
        )

    def plan_variation(
        self,
        image: Image.Image,
        strength: float = 0.5,
        prompt: str = "",
        *,
        num_images: int = 1,
        seed: int = 0,
        truncate: bool = False,
        **sampling: SamplingValue,
    ) -> SamplingPlan:
        """What `vary` samples, without its warnings. Options and errors as there."""
        check_at_least_one("num_images", num_images)
        seeds = [image_seed(seed, i) for i in range(num_images)]
        known = random_keep_mask(seeds, self.prior.stream.image_length, strength)
        return self.plan_completion(
            image, known, prompt, num_images=num_images, seed=seed, truncate=truncate, **sampling
        )

    @free_threads()
    def codes_of(self, images: Sequence[Image.Image]) -> Tensor:
        """Codes in the tokenizer's form, in the precision of those that the prior was trained on.

        In another precision near ties fall the other way, in plain areas for most of an image. The
        prior would see combinations of codes that it was never trained on. A pipeline that was put
        together without `trained_on` uses fp32.
        """
        own = self.tokenizer.own_config
        bf16 = self.trained_on.get("codes_in_bf16", False)
        with torch.autocast(self.tokenizer.device.type, torch.bfloat16, enabled=bf16):
            return self.tokenizer.to_codes(
                [check_image(image, own.size, own.channels) for image in images]
            )

    @free_threads()
    def decode(self, drawn: Samples, seeds: list[int]) -> TextToImageOutput:
        """Images of sampled codes; `seeds` are theirs."""
        grid = self.in_layout(drawn.codes)
        images = [image for part in grid.split(64) for image in self.tokenizer.to_images(part)]
        return TextToImageOutput(images, grid.cpu(), drawn.log_likelihood.cpu(), seeds)

    def in_layout(self, codes: Tensor) -> Tensor:
        """Flat codes of the stream in the tokenizer's form: (B,h,w) of one level, flat of
        several."""
        levels = self.tokenizer.layout
        return codes.reshape(len(codes), *levels[0].grid) if len(levels) == 1 else codes

    def _options(self, given: dict[str, SamplingValue]) -> SamplingOptions:
        defaults = asdict(self.defaults)
        if unknown := sorted(set(given) - set(defaults)):
            raise ValueError(f"{unknown} are no sampling options; choose among {list(defaults)}")
        chosen = {name: value for name, value in given.items() if value is not None}
        return SamplingOptions(**(defaults | chosen))
