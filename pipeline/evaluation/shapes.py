"""How often an image of the embedded world shows what its caption says, by the oracle. Knows
prompts and verdicts.

Accuracies are fractions of images that are right in full. `new_pairs` are captions with a
(shape, colour) pair that training never saw.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

import numpy as np
from PIL import Image

from pipeline.config.experiment import Experiment
from pipeline.data.builtin.shapes import COLOURS, NEW_PAIRS, SHAPES, Scene, sprite
from pipeline.data.builtin.shapes_captions import Prompt, ShapesSource, describe
from pipeline.data.builtin.shapes_oracle import Verdict, check
from pipeline.evaluation.accuracy import Accuracy
from pipeline.evaluation.metrics import Reconstructions, sampled
from pipeline.inference.pipeline import TextToImagePipeline
from stage1_tokenizer.pixels import pil_image, to_rgb
from stage1_tokenizer.transparency import on_background

STEPS = 16
"""Steps of parallel decoding in its evaluation."""
EDITS = 200
"""Most edits that are evaluated."""


def shapes_metrics(
    pipe: TextToImagePipeline, experiment: Experiment, reconstructions: Reconstructions
) -> dict[str, Accuracy]:
    """The oracle's metrics: of real images, of reconstructions, and of one image per prompt,
    seed 0."""
    count = len(reconstructions.real)
    prompts = ShapesSource(experiment.data, "held_out").prompts(range(count))
    texts = [prompt.text for prompt in prompts]
    verdicts = _judge(sampled(pipe, texts), prompts)
    by_kind = accuracies_by_kind(verdicts)
    metrics = {
        "oracle_accuracy_real": _correct(reconstructions.real, prompts),
        "oracle_accuracy_reconstructed": _correct(reconstructions.drawn, prompts),
        "prompt_accuracy": by_kind.pop("correct"),
    }
    for objects in (1, 2, 3):
        own = [
            verdict.correct
            for verdict, prompt in zip(verdicts, prompts, strict=True)
            if len(prompt.claims.objects) == objects
        ]
        if own:
            metrics[f"prompt_accuracy_{objects}_objects"] = Accuracy.of(own)
    metrics |= {f"prompt_accuracy_of_{kind}": value for kind, value in by_kind.items()}
    new = ShapesSource(experiment.data, "new_pairs").prompts(range(count))
    drawn = sampled(pipe, [prompt.text for prompt in new])
    metrics["prompt_accuracy_new_pairs"] = _correct(drawn, new)
    if pipe.prior.config.trained_order == "random":
        steps = min(STEPS, pipe.prior.stream.image_length)
        drawn = sampled(pipe, texts, num_inference_steps=steps)
        metrics[f"prompt_accuracy_{STEPS}_steps"] = _correct(drawn, prompts)
        if experiment.data.shapes.min_objects <= 2 <= experiment.data.shapes.max_objects:
            metrics["edit_accuracy"] = edit_accuracy(pipe, experiment, min(count, EDITS))
    return metrics


def edit_accuracy(pipe: TextToImagePipeline, experiment: Experiment, count: int) -> Accuracy:
    """Fraction of edits, up to `count`, after which the oracle finds all that the new caption says,
    and no object more.

    In held-out images of two objects, a box of whole cells masks one. The prompt puts another shape
    in another colour of the same size in its place.
    """
    held_out = ShapesSource(experiment.data, "held_out")
    cell = pipe.tokenizer.own_config.downsample_factor
    correct: list[bool] = []
    for index in range(len(held_out)):
        scene = held_out.world.scene(index)
        if len(scene.items) != 2:
            continue
        prompt, mask = _edit(scene, index, experiment.data.size[0], cell)
        before = pil_image(held_out.images([index])[0])
        after = pipe.edit(before, Image.fromarray(mask), prompt.text, truncate=True).images[0]
        correct.append(check(np.asarray(to_rgb(after)), prompt.claims).correct)
        if len(correct) == count:
            break
    return Accuracy.of(correct)


def _edit(scene: Scene, index: int, size: int, cell: int) -> tuple[Prompt, np.ndarray]:
    """The prompt that replaces one of a scene's objects, and its mask (size,size) uint8."""
    rng = np.random.default_rng([EDITS, index])
    old, kept = (scene.items[i] for i in rng.permutation(2))
    shape = rng.choice([s for s in SHAPES if s != old.shape])
    colour = rng.choice([c for c in COLOURS if c != old.colour])
    while (shape, colour) in NEW_PAIRS:
        colour = rng.choice([c for c in COLOURS if c != old.colour])
    new = replace(old, shape=str(shape), colour=str(colour))
    prompt = describe(Scene(scene.background, (new, kept)), size, rng)
    half = sprite(old.shape, old.size, size).shape[0] // 2
    # Whole cells of codes, so that an object drawn a little aside is not cut off.
    top, left = (max(centre - half, 0) // cell * cell for centre in (old.y, old.x))
    bottom, right = (-(-(centre + half + 1) // cell) * cell for centre in (old.y, old.x))
    mask = np.zeros((size, size), np.uint8)
    mask[top:bottom, left:right] = 255
    return prompt, mask


def _judge(images: np.ndarray, prompts: Sequence[Prompt]) -> list[Verdict]:
    shown = on_background(images)
    return [check(image, prompt.claims) for image, prompt in zip(shown, prompts, strict=True)]


def accuracies_by_kind(verdicts: Sequence[Verdict]) -> dict[str, Accuracy]:
    """Verdicts that hold: overall (`correct`), and of each kind among the captions that mention
    it."""
    by_kind = {}
    for field in fields(Verdict):
        own = [getattr(verdict, field.name) for verdict in verdicts]
        mentioned = [holds for holds in own if holds is not None]
        if mentioned:
            by_kind[field.name] = Accuracy.of(mentioned)
    return by_kind


def _correct(images: np.ndarray, prompts: Sequence[Prompt]) -> Accuracy:
    return Accuracy.of(verdict.correct for verdict in _judge(images, prompts))
