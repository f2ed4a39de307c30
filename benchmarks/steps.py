"""Images per second with several codes per step, relative to one code per step, of a bundle that
was trained on random orders.

    benchmarks/.venv/bin/python -m benchmarks.steps --config configs/shapes-edit.yaml [--batch N]

The number of resampled codes depends on what the prior has learned, so run
`minidalle run --config ...` first. Captions are held out, options are the bundle's, weights are
bf16, and nothing is compiled on either side. `minidalle evaluate` gives the prompt accuracy in 16
steps.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch

from benchmarks.timing import interleave, machine
from pipeline import TextToImagePipeline
from pipeline.config.load import load_experiment
from pipeline.data.builtin.shapes_captions import ShapesSource
from pipeline.runtime.devices import tune_malloc
from stage2_prior import sample

STEPS = (20, 16, 12)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch", type=int, default=1)
    options, rest = parser.parse_known_args()
    experiment = load_experiment(rest)
    tune_malloc()
    pipe = TextToImagePipeline.from_pretrained(experiment.folder / "bundle")
    prior = pipe.prior.to(torch.bfloat16)
    prompts = [
        prompt.text
        for prompt in ShapesSource(experiment.data, "held_out").prompts(range(options.batch))
    ]
    text = pipe.text.encode(prompts, truncate=True)
    codes = prior.stream.image_length

    def draw(guidance_scale: float, steps: int):
        how = replace(pipe.defaults, guidance_scale=guidance_scale, num_inference_steps=steps)
        return lambda: sample(prior, text, range(options.batch), how)

    for scale in (1.0, pipe.defaults.guidance_scale):
        sides = {f"{steps} steps": draw(scale, steps) for steps in (codes, *STEPS)}
        seconds = interleave(sides, rounds=15 if options.batch == 1 else 5, warm_up=2)
        print(f"batch {options.batch}, guidance {scale} (images/s), {machine()}")
        for side, value in seconds.items():
            print(
                f"  {side:<24} {options.batch / value:12,.1f}   "
                f"{seconds[f'{codes} steps'] / value:.2f}x those of {codes} steps"
            )


if __name__ == "__main__":
    main()
