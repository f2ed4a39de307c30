"""`TextToImagePipeline`: prompts -> images, images in part, scores. Knows both stages'
interfaces, not their insides."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from PIL import Image
from torch import Tensor

from pipeline.inference.base import check_at_least_one, checked_prompts, image_seed
from pipeline.inference.batching import Compile
from pipeline.inference.bundle import Card
from pipeline.inference.editing import EditPlan, warn_if_trivial
from pipeline.inference.hub import load_bundle
from pipeline.inference.known_prompts import KnownPrompts
from pipeline.inference.latent_pipeline import LatentPipeline
from pipeline.inference.likelihood import LikelihoodMixin
from pipeline.inference.output import Scores, TextToImageOutput
from pipeline.inference.plan import SamplingPlan
from pipeline.inference.planning import PlanningPipeline, SamplingValue
from pipeline.inference.reranking import Judge, JudgeName, best_rows, consensus_scores, highest
from pipeline.inference.scoring import checked_pairs, score_codes_batched
from pipeline.runtime.threads import free_threads
from stage1_tokenizer import TokenizerModule
from stage2_prior import (
    LatentPriorModule,
    PriorModule,
    SamplingOptions,
    TextTokenizer,
    caption_log_likelihood,
    sample_captions,
)

CAPTIONS_AT_A_TIME = 64
"""Candidate captions that are scored together."""


class TextToImagePipeline(LikelihoodMixin, PlanningPipeline):
    """Both stages chained.

    Args:
        tokenizer: codes -> images.
        prior: caption -> codes.
        text: caption -> text ids.
        defaults: sampling options where a call gives none.
        trained_on: the bundle's description of its data.
        known_prompts: styles and names of icons, by which prompts are checked.
        card: the model card that was read with the parts.

    Raises:
        ValueError: there are no codes, or the prior models others, or another vocabulary.
    """

    def __init__(
        self,
        tokenizer: TokenizerModule,
        prior: PriorModule,
        text: TextTokenizer,
        defaults: SamplingOptions | None = None,
        trained_on: dict[str, Any] | None = None,
        known_prompts: KnownPrompts | None = None,
        card: Card | None = None,
    ) -> None:
        tokenizer.require_codes("TextToImagePipeline")
        super().__init__(tokenizer, prior, text, defaults, trained_on, known_prompts, card)
        self._compile: Compile = "auto"
        stream = prior.stream.config
        own = [(tuple(level.grid), level.num_codes) for level in tokenizer.layout]
        expected = [(tuple(level.grid), level.num_codes) for level in stream.levels]
        if own != expected:
            raise ValueError(
                f"the tokenizer makes codes (grid, count) {own} and the prior models {expected}; "
                "give both from one bundle"
            )
        if (text.vocab_size, text.length) != (stream.text_vocab_size, stream.text_length):
            raise ValueError(
                f"the text tokenizer has {text.vocab_size} entries and {text.length} slots, the "
                f"prior {stream.text_vocab_size} and {stream.text_length}; give both from one "
                "bundle"
            )

    def compile(self) -> TextToImagePipeline:
        """Prepares for many images; returns itself. The prior computes in bf16 where the device
        does so natively, and its steps are compiled, which takes about ten seconds per batch size.
        Likelihoods and codes may differ a little from those of fp32.
        """
        # Here, since it imports accelerate, which sampling needs for nothing else
        from pipeline.runtime.devices import uses_bf16

        if uses_bf16("auto", self.prior.device):
            self.prior.to(torch.bfloat16)
        self._compile = "on"
        return self

    def __call__(
        self,
        prompts: str | Sequence[str],
        *,
        num_images_per_prompt: int = 1,
        best_of: int = 1,
        judge: Judge = "likelihood",
        seed: int = 0,
        batch_size: int = 64,
        truncate: bool = False,
        compile: Compile | None = None,
        **sampling: SamplingValue,
    ) -> TextToImageOutput:
        """Samples images. The same seed gives the same images for a prompt, whatever else the call
        asks for. An empty prompt samples without a caption, with a warning.

        The parameters are eight because each is an option of its own that users name.

        Args:
            best_of: images sampled for each one returned.
            judge: what chooses: the prior's likelihoods (`reranking.choice_scores`); "consensus",
                the image nearest to the mean of all (`reranking.consensus_scores`); or (images,
                prompts) -> a score each, such as `pipeline.CLIPScorer`.
            batch_size: images at a time; fewer where memory is short.
            compile: whether the steps are compiled; `auto` does so where many images make it pay.
            sampling: fields of `SamplingOptions`; one left out, or None, takes the bundle's
                default.

        Raises:
            ValueError: a prompt is too long (unless `truncate`), an option is out of range, or
                guidance (or an empty prompt, or `best_of` without a scorer) is asked of a prior
                that was trained without caption dropout.
        """
        prompts = checked_prompts(prompts)
        check_at_least_one("num_images_per_prompt", num_images_per_prompt)
        check_at_least_one("batch_size", batch_size)
        check_at_least_one("best_of", best_of)
        if judge != "likelihood" and best_of == 1:
            raise ValueError(
                "a scorer chooses among several images, and best_of is 1; ask for more (best_of=4)"
            )
        if isinstance(judge, str) and judge not in get_args(JudgeName):
            raise ValueError(
                f"judge is {judge!r}; give 'likelihood', 'consensus', or a function of images and "
                "prompts"
            )
        if judge == "likelihood":
            self.check_best_of(best_of)
        count = num_images_per_prompt * best_of
        plan = self.plan(prompts, num_images=count, seed=seed, truncate=truncate, **sampling)
        self._warn_of(prompts)
        drawn = plan.sample(self.prior, batch_size=batch_size, compile=compile or self._compile)
        seeds = plan.seeds
        if best_of == 1:
            return self.decode(drawn, seeds)
        if judge == "likelihood":
            best = best_rows(self.prior, drawn, best_of, batch_size=batch_size)
            return self.decode(drawn.rows(best), [seeds[i] for i in best])
        output = self.decode(drawn, seeds)
        if judge == "consensus":
            return output.rows(highest(consensus_scores(output.images, best_of)).tolist())
        asked = [prompt for prompt in prompts for _ in range(count)]
        scores = torch.as_tensor(judge(output.images, asked)).flatten().cpu()
        if len(scores) != len(seeds):
            raise ValueError(
                f"the scorer gave {len(scores)} scores for {len(seeds)} images; it must give one "
                "for each"
            )
        return output.rows(highest(scores.view(-1, best_of)).tolist())

    def check_best_of(self, best_of: int) -> None:
        """Raises ValueError where the prior cannot choose among `best_of` images."""
        if best_of > 1 and not self.prior.config.trained_with_caption_dropout:
            raise ValueError(
                f"best_of is {best_of}, and this prior cannot compare images: it was trained "
                "without caption dropout; choose by judge consensus or by a CLIP model "
                "(clip_scorer), or train with prior.objective.caption_dropout=0.1"
            )

    def edit(
        self,
        image: Image.Image,
        mask: Image.Image,
        prompt: str,
        *,
        num_images: int = 1,
        seed: int = 0,
        truncate: bool = False,
        **sampling: SamplingValue,
    ) -> TextToImageOutput:
        """Resamples the masked part of an image. Codes of cells without a white pixel are kept
        exactly, and so is every pixel outside the mask. The log-likelihood is that of the resampled
        codes.

        Args:
            image: an image of the size that the prior draws.
            mask: of the same size, mode L or 1; white is replaced.
            prompt: what the whole image shall show.

        Raises:
            ValueError: the mask's size or mode, or the image's size, does not fit; or the prior was
                not trained on random orders.
        """
        plan = self.plan_edit(
            image, mask, prompt, num_images=num_images, seed=seed, truncate=truncate, **sampling
        )
        return self._edited(plan, prompt, seed)

    def outpaint(
        self,
        image: Image.Image,
        prompt: str,
        *,
        at: tuple[int, int] = (0, 0),
        num_images: int = 1,
        seed: int = 0,
        truncate: bool = False,
        **sampling: SamplingValue,
    ) -> TextToImageOutput:
        """Extends an image that is smaller than those of the prior. Its top left corner comes to
        `at` (x, y). Options as `edit`.

        Raises:
            ValueError: the image does not lie on the canvas, or fills it; and what `edit` raises.
        """
        plan = self.plan_outpaint(
            image, prompt, at=at, num_images=num_images, seed=seed, truncate=truncate, **sampling
        )
        return self._edited(plan, prompt, seed)

    def _edited(self, plan: EditPlan, prompt: str, seed: int) -> TextToImageOutput:
        if warn_if_trivial(plan.known):
            count = len(plan.seeds)
            images = [plan.original.copy() for _ in range(count)]
            codes = self.in_layout(plan.codes)
            return TextToImageOutput(images, codes, torch.zeros(count), plan.seeds)
        output = self._sampled(plan, prompt)
        output.images = plan.composite(output.images)
        return output

    def vary(
        self,
        image: Image.Image,
        strength: float = 0.5,
        prompt: str = "",
        *,
        num_images: int = 1,
        seed: int = 0,
        truncate: bool = False,
        **sampling: SamplingValue,
    ) -> TextToImageOutput:
        """Images like the given one: a fraction `strength` of its codes, scattered by the seed, is
        resampled.

        Raises:
            ValueError: the strength is not above 0 and at most 1; and what `complete` raises.
        """
        plan = self.plan_variation(
            image, strength, prompt, num_images=num_images, seed=seed, truncate=truncate, **sampling
        )
        return self._sampled(plan, prompt)

    def complete(
        self,
        image: Image.Image | Tensor,
        known: Tensor,
        prompt: str,
        *,
        num_images: int = 1,
        seed: int = 0,
        truncate: bool = False,
        **sampling: SamplingValue,
    ) -> TextToImageOutput:
        """Samples the codes that are not known.

        Args:
            image: an image of the prior's size, or its codes as the tokenizer gives them, without a
                batch.
            known: bool, which codes are kept, but not all: in the codes' shape, or flat, or a row
                per image with as many in each. A prior in raster order needs the known codes to
                come first.
            prompt: what the whole image shall show; '' leaves it open.

        Raises:
            ValueError: `known` or the codes have another shape, or `known` is not what the prior's
                order allows.
        """
        plan = self.plan_completion(
            image, known, prompt, num_images=num_images, seed=seed, truncate=truncate, **sampling
        )
        return self._sampled(plan, prompt)

    def _sampled(self, plan: SamplingPlan, prompt: str) -> TextToImageOutput:
        self._warn_of([prompt])
        return self.decode(plan.sample(self.prior, compile=self._compile), plan.seeds)

    def score(
        self,
        images: Image.Image | Sequence[Image.Image],
        prompts: str | Sequence[str],
        *,
        batch_size: int = 64,
        truncate: bool = False,
    ) -> Scores:
        """How likely each image is given its prompt, and how much likelier than without one. A
        prior trained on random orders takes the mean over four of them (`score_codes`), others
        raster order. A score does not depend on the other images of the call.

        Args:
            images: images of the prior's size, of any mode. Transparency is kept by a tokenizer of
                four channels, and put on white for others.
            prompts: one per image. An empty one scores without a caption.
            batch_size: images at a time.

        Raises:
            ValueError: no image is given, there are not as many prompts as images, an image has
                another size than the prior's, a prompt is too long (unless `truncate`), or it is
                empty and the prior was trained without caption dropout.
        """
        check_at_least_one("batch_size", batch_size)
        images, prompts = checked_pairs(images, prompts, self.tokenizer.own_config)
        ids = self.text_ids(prompts, truncate)
        batches = [images[i : i + batch_size] for i in range(0, len(images), batch_size)]
        codes = torch.cat([self.codes_of(batch).flatten(1) for batch in batches])
        given = score_codes_batched(self.prior, ids, codes, batch_size)
        if not self.prior.config.trained_with_caption_dropout:
            return Scores(given, None)
        null = self.prior.stream.null_caption(len(ids))
        return Scores(given, given - score_codes_batched(self.prior, null, codes, batch_size))

    @free_threads()
    def caption(
        self,
        image: Image.Image,
        candidates: Sequence[str] | None = None,
        *,
        num: int = 1,
        seed: int = 0,
        temperature: float = 1.0,
        top_p: float | None = None,
        truncate: bool = False,
    ) -> list[tuple[str, float]]:
        """Captions with log p(caption | codes) in nats, the likeliest first: the candidates, or
        `num` sampled ones where there are none.

        Raises:
            ValueError: the prior was not trained with codes first (`sequence.captioning_fraction`),
                or the image has another size.
        """
        codes = self.codes_of([image]).flatten(1)
        if candidates is not None:
            captions = [candidates] if isinstance(candidates, str) else list(candidates)
            check_at_least_one("the number of candidates", len(captions))
            ids = self.text.encode(captions, truncate=truncate)
            parts = ids.split(CAPTIONS_AT_A_TIME)
            values = torch.cat(
                [caption_log_likelihood(self.prior, part, codes[0]) for part in parts]
            )
        else:
            check_at_least_one("num", num)
            SamplingOptions(temperature=temperature, top_p=top_p)  # refuses what is out of range
            seeds = [image_seed(seed, i) for i in range(num)]
            ids, values = sample_captions(
                self.prior, codes.expand(num, -1), seeds, temperature=temperature, top_p=top_p
            )
            captions = self.text.decode(ids)
        return sorted(zip(captions, values.tolist(), strict=True), key=lambda pair: -pair[1])

    @classmethod
    def from_pretrained(
        cls, name: str | Path, *, revision: str | None = None, token: str | bool | None = None
    ) -> Any:
        """Loads a bundle from a folder, by its name in the package (`icons`), or from the
        repository `user/name` of the Hub. `Any`, since it is a `LatentPipeline` where latents are
        Gaussian.

        Args:
            name: a bundle of that name in the working directory comes first. A folder of the name
                of a repository is never looked up, nor is a `Path`.
            revision: branch, tag or commit of a repository (main).
            token: of the Hub; None takes the one of `hf auth login`, or of HF_TOKEN.

        Raises:
            FileNotFoundError: the folder is no bundle, the installation lacks that of the name, or
                no such repository can be had.
            ValueError: a part is missing, truncated, of another format, or swapped for another
                bundle's; names it.
        """
        bundle = load_bundle(name, revision=revision, token=token)
        kind: Any = LatentPipeline if isinstance(bundle.prior, LatentPriorModule) else cls
        return kind(*bundle)
