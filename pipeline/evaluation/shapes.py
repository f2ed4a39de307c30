"""How often a drawn picture of the embedded world is what its caption says, by the oracle. Knows prompts and verdicts.

Accuracies are shares of pictures fully right; `new_pairs` are captions with a (shape, colour) pair that training never saw.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.config import Experiment
from pipeline.data.shapes_captions import Prompt, ShapesSource
from pipeline.data.shapes_oracle import Verdict, accuracy, check
from pipeline.text_to_image import TextToImagePipeline


def shapes_figures(
    figures: dict[str, float],
    pipe: TextToImagePipeline,
    experiment: Experiment,
    true: np.ndarray,
    reconstructed: np.ndarray,
    count: int,
) -> None:
    """Adds the oracle's figures: on true pictures, on reconstructions, and on one drawn picture a prompt, seed 0."""
    held_out = ShapesSource(experiment.data, "held_out")
    prompts = held_out.prompts(range(count))
    figures["oracle_on_true"] = accuracy(_judge(true, prompts))["correct"]
    figures["oracle_on_reconstructions"] = accuracy(_judge(reconstructed, prompts))["correct"]
    verdicts = _judge(_draw(pipe, prompts), prompts)
    shares = accuracy(verdicts)
    figures["prompt_accuracy"] = shares.pop("correct")
    for objects in (1, 2, 3):
        own = [v.correct for v, p in zip(verdicts, prompts, strict=True) if len(p.claims.objects) == objects]
        if own:
            figures[f"prompt_accuracy_{objects}_objects"] = float(np.mean(own))
    figures |= {f"prompt_accuracy_of_{kind}": share for kind, share in shares.items()}
    new = ShapesSource(experiment.data, "new_pairs").prompts(range(count))
    figures["prompt_accuracy_new_pairs"] = accuracy(_judge(_draw(pipe, new), new))["correct"]


def _judge(pictures: np.ndarray, prompts: Sequence[Prompt]) -> list[Verdict]:
    return [check(picture, prompt.claims) for picture, prompt in zip(pictures, prompts, strict=True)]


def _draw(pipe: TextToImagePipeline, prompts: Sequence[Prompt]) -> np.ndarray:
    return np.stack([np.asarray(image) for image in pipe([p.text for p in prompts], truncate=True).images])
