"""How often the image that `best_of` keeps is right, by the number of images that it chooses from,
on shapes.

    python -m benchmarks.best_of --bundle runs/shapes/bundle --config configs/shapes.yaml
        [--prompts 300] [--first 0] [--options guidance_scale=1.3 temperature=0.8]

Each prompt has 12 images. An accuracy for N takes the 12 in groups of N, so that every row has the
same images. The other rules choose by the likelihood alone, or by the PMI alone.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline import TextToImagePipeline
from pipeline.config.load import load_experiment
from pipeline.data.builtin.shapes_captions import ShapesSource
from pipeline.data.builtin.shapes_oracle import check
from pipeline.inference.reranking import choice_scores
from pipeline.inference.scoring import score_codes_batched

IMAGES = 12
"""Of each prompt."""
GROUPS = (2, 3, 4, 6, 12)
"""Numbers to choose from. Each divides `IMAGES`."""


def chosen(correct: Tensor, scores: Tensor) -> float:
    """Accuracy of the images (B,N) with the highest scores (B,N)."""
    return float(correct.gather(1, scores.argmax(1, keepdim=True)).double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--config", required=True)
    parser.add_argument("--prompts", type=int, default=300)
    parser.add_argument("--first", type=int, default=0, help="number of the first prompt")
    parser.add_argument("--options", nargs="*", default=[], help="sampling options, NAME=VALUE")
    asked = parser.parse_args()
    data = load_experiment(["--config", asked.config]).data
    pipe = TextToImagePipeline.from_pretrained(asked.bundle).compile()
    options = {name: float(value) for name, value in (o.split("=") for o in asked.options)}
    for split in ("held_out", "new_pairs"):
        prompts = ShapesSource(data, split).prompts(range(asked.first, asked.first + asked.prompts))
        texts = [prompt.text for prompt in prompts]
        output = pipe(texts, num_images_per_prompt=IMAGES, **options)
        claims = [prompt.claims for prompt in prompts for _ in range(IMAGES)]
        verdicts = [
            check(np.asarray(image), claim).correct
            for image, claim in zip(output.images, claims, strict=True)
        ]
        codes = output.codes.flatten(1)
        null_ids = pipe.prior.stream.null_caption(len(codes))
        null = score_codes_batched(pipe.prior, null_ids, codes, 64)
        correct = torch.tensor(verdicts)
        given = output.log_likelihood
        print(f"{split}, {asked.prompts} prompts: {float(correct.double().mean()):.1%} of all")
        print(f"{'N':>4} {'best_of':>9} {'likelihood':>11} {'PMI':>9} {'any right':>10}")
        for count in GROUPS:
            groups = [values.view(-1, count) for values in (correct, given, null)]
            right, log_p, log_null = groups
            rules = [choice_scores(log_p, log_null), log_p, log_p - log_null]
            row = [chosen(right, scores) for scores in rules]
            row.append(float(right.any(1).double().mean()))
            print(f"{count:>4} " + " ".join(f"{value:>9.1%}" for value in row), flush=True)


if __name__ == "__main__":
    main()
