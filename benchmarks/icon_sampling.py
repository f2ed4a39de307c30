"""How well a bundle of icons draws held-out cells, by sampling options.

    python -m benchmarks.icon_sampling --bundle icons [--guidance 1 1.5 2] [--temperatures 0.2 0.6]
        [--best-of 1 8] [--judge consensus] [--steps 16] [--reported] [--trained 300]

One image per cell, seed 0, with the metrics of pipeline/evaluation/icons.py, for each combination
of the options. Cells are the tuning cells, or with `--reported` those that no option may be chosen
by. `--trained` adds so many drawings that the bundle was trained on, those with and without a skin
tone apart: a prior that misses these needs more training. The sets of icons that the bundle was
trained on are needed (`make icons`).
"""

from __future__ import annotations

import argparse
import itertools

from pipeline import TextToImagePipeline
from pipeline.config.data import DataConfig
from pipeline.config.load import from_dict
from pipeline.data.builtin.icon_captions import styled_captions
from pipeline.data.builtin.icon_split import without_tones
from pipeline.data.builtin.icons import Icon, IconSource, reported
from pipeline.evaluation.accuracy import Accuracy
from pipeline.evaluation.icons import judged, some
from pipeline.evaluation.metrics import stacked
from stage1_tokenizer.transparency import on_background


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", default="icons")
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.5])
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.2])
    parser.add_argument("--best-of", type=int, nargs="+", default=[1])
    parser.add_argument("--judge", choices=["likelihood", "consensus"], default="consensus")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--reported", action="store_true")
    parser.add_argument("--trained", type=int, default=0)
    asked = parser.parse_args()
    pipe = TextToImagePipeline.from_pretrained(asked.bundle)
    data = from_dict(DataConfig, pipe.trained_on["data"])
    source = IconSource(data, "train")
    cells = reported(data, tuning=not asked.reported) | trained(source, asked.trained)
    for guidance, temperature, best_of in itertools.product(
        asked.guidance, asked.temperatures, asked.best_of
    ):
        for kind, icons in cells.items():
            if not icons:
                continue
            output = pipe(
                [styled_captions(icon.name, icon.style)[0] for icon in icons],
                best_of=best_of,
                judge=asked.judge if best_of > 1 else "likelihood",
                truncate=True,
                guidance_scale=guidance,
                temperature=temperature,
                num_inference_steps=asked.steps,
            )
            found = judged(on_background(stacked(output.images)), icons, source.everything)
            values = [
                f"{name} {one.value:.1%} of {one.count}"
                for name, one in found.items()
                if isinstance(one, Accuracy)
            ]
            print(f"{guidance}, {temperature}, best of {best_of}: {kind}: {', '.join(values)}")


def trained(source: IconSource, count: int) -> dict[str, list[Icon]]:
    """`count` of the drawings to train on, chosen by a hash of their names, in two kinds."""
    kinds: dict[str, list[Icon]] = {"trained, no skin tone": [], "trained, skin tone": []}
    for icon in some(list(dict.fromkeys(source.icons)), count):  # repeats count once
        toned = without_tones(icon.key) != icon.key
        kinds["trained, skin tone" if toned else "trained, no skin tone"].append(icon)
    return kinds


if __name__ == "__main__":
    main()
