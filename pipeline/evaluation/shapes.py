"""How often a drawn image of the embedded world is what its caption says, by the oracle. Knows
prompts and verdicts.

Accuracies are shares of images fully right; `new_pairs` are captions with a (shape, colour) pair
that training never saw.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image

from pipeline.config.experiment import Experiment
from pipeline.data.builtin.shapes import COLOURS, NEW_PAIRS, SHAPES, Scene, sprite
from pipeline.data.builtin.shapes_captions import Prompt, ShapesSource, describe
from pipeline.data.builtin.shapes_oracle import Verdict, accuracy, check
from pipeline.inference.pipeline import TextToImagePipeline

STEPS = 16
"""Steps in which parallel decoding is judged."""
EDITS = 200
"""Edits that are judged, at most."""


def shapes_figures(
    figures: dict[str, float],
    pipe: TextToImagePipeline,
    experiment: Experiment,
    true: np.ndarray,
    reconstructed: np.ndarray,
    count: int,
) -> None:
    """Adds the oracle's figures: on true images, on reconstructions, and on one drawn image a
    prompt, seed 0."""
    held_out = ShapesSource(experiment.data, "held_out")
    prompts = held_out.prompts(range(count))
    figures["oracle_accuracy_real"] = accuracy(_judge(true, prompts))["correct"]
    figures["oracle_accuracy_reconstructed"] = accuracy(_judge(reconstructed, prompts))["correct"]
    verdicts = _judge(_draw(pipe, prompts), prompts)
    shares = accuracy(verdicts)
    figures["prompt_accuracy"] = shares.pop("correct")
    for objects in (1, 2, 3):
        own = [
            v.correct
            for v, p in zip(verdicts, prompts, strict=True)
            if len(p.claims.objects) == objects
        ]
        if own:
            figures[f"prompt_accuracy_{objects}_objects"] = float(np.mean(own))
    figures |= {f"prompt_accuracy_of_{kind}": share for kind, share in shares.items()}
    new = ShapesSource(experiment.data, "new_pairs").prompts(range(count))
    figures["prompt_accuracy_new_pairs"] = accuracy(_judge(_draw(pipe, new), new))["correct"]
    if pipe.prior.config.trained_order == "random":
        steps = min(STEPS, pipe.prior.stream.image_length)
        figures[f"prompt_accuracy_{STEPS}_steps"] = accuracy(
            _judge(_draw(pipe, prompts, num_inference_steps=steps), prompts)
        )["correct"]
        if experiment.data.shapes.max_objects > 1:
            figures["edit_accuracy"] = edit_accuracy(pipe, experiment, min(count, EDITS))


def edit_accuracy(pipe: TextToImagePipeline, experiment: Experiment, count: int) -> float:
    """Share of edits after which the oracle finds all that the new caption says, and no object
    more: in held-out images of two objects one is masked, by a box of whole cells, and the prompt
    puts another shape in another colour of the same size in its place."""
    held_out = ShapesSource(experiment.data, "held_out")
    size, met, done = experiment.data.image_size, 0, 0
    for index in range(len(held_out)):
        scene = held_out.world.scene(index)
        if len(scene.items) != 2:
            continue
        rng = np.random.default_rng([EDITS, index])
        old, kept = (scene.items[i] for i in rng.permutation(2))
        shape, colour = (
            rng.choice([s for s in SHAPES if s != old.shape]),
            rng.choice([c for c in COLOURS if c != old.colour]),
        )
        while (shape, colour) in NEW_PAIRS:
            colour = rng.choice([c for c in COLOURS if c != old.colour])
        prompt = describe(
            Scene(scene.background, (replace(old, shape=str(shape), colour=str(colour)), kept)),
            size,
            rng,
        )
        half, cell = (
            sprite(old.shape, old.size, size).shape[0] // 2,
            pipe.tokenizer.own_config.downsample_factor,
        )
        # Whole cells of codes, so that nothing is cut off that is drawn a little aside.
        top, left = (max(centre - half, 0) // cell * cell for centre in (old.y, old.x))
        bottom, right = (-(-(centre + half + 1) // cell) * cell for centre in (old.y, old.x))
        mask = np.zeros((size, size), np.uint8)
        mask[top:bottom, left:right] = 255
        before = Image.fromarray(held_out.images([index])[0])
        after = pipe.edit(before, Image.fromarray(mask), prompt.text, truncate=True).images[0]
        met += check(np.asarray(after), prompt.claims).correct
        done += 1
        if done == count:
            break
    return met / max(done, 1)


def _judge(pictures: np.ndarray, prompts: Sequence[Prompt]) -> list[Verdict]:
    return [
        check(picture, prompt.claims) for picture, prompt in zip(pictures, prompts, strict=True)
    ]


def _draw(pipe: TextToImagePipeline, prompts: Sequence[Prompt], **sampling: Any) -> np.ndarray:
    return np.stack(
        [
            np.asarray(image)
            for image in pipe([p.text for p in prompts], truncate=True, **sampling).images
        ]
    )
