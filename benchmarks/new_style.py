"""How well a bundle of icons draws in a style that it learned from a few drawings.

    python -m benchmarks.new_style --bundle runs/icons/bundle --set fxemoji --out runs/new-style
        [--counts 20 50 200] [--images 200] [--prior.train.steps 300 ...]

The bundle must not have been trained on the set. Of its drawings whose name the bundle knows from
other styles, `--images` are judged and never given, the same for every count. The table has the
metrics of pipeline/evaluation/icons.py before the fine-tuning and after it, by the number of
drawings given. A sheet per row shows images above the set's own drawings.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import pipeline
from pipeline import TextToImagePipeline
from pipeline.data.builtin.icon_captions import styled_captions
from pipeline.data.builtin.icon_sets import IconSet, key_index, read_set
from pipeline.data.builtin.icons import Icon, emoji_names, load_icons, locate_set
from pipeline.data.readers.transparency import composed
from pipeline.evaluation.accuracy import Accuracy
from pipeline.evaluation.icons import judged, some
from pipeline.evaluation.metrics import sampled
from pipeline.runtime.atomic_io import atomic_write_png
from pipeline.runtime.image_grid import grid_image, make_grid
from pipeline.stages.style import style_experiment

_SHOWN = 24


def _write_drawings(folder: Path, icons: Sequence[Icon], own: IconSet) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for icon in icons:
        (folder / f"{icon.key}.svg").write_text(own.drawings[icon.key])


def _row(
    label: str, drawn: np.ndarray, tested: Sequence[Icon], everything: Sequence[Icon], out: Path
) -> str:
    """The metrics of one bundle as a line, and its sheet."""
    shown = [drawn[:_SHOWN], np.stack([composed(one.image, "white") for one in tested[:_SHOWN]])]
    pairs = [image for part in np.split(np.stack(shown), _SHOWN // 8, axis=1) for image in part]
    grid = make_grid(np.concatenate(pairs), columns=8)
    atomic_write_png(out / f"{label.replace(' ', '-')}.png", grid_image(grid))
    found = judged(drawn, tested, everything)
    parts = [
        f"{name} {value.value:.1%} [{value.interval[0]:.1%}, {value.interval[1]:.1%}]"
        if isinstance(value, Accuracy)
        else f"{name} {value:.1%}"
        for name, value in found.items()
    ]
    return f"{label}: {', '.join(parts)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--set", required=True, help="name or path of a set of icons")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--counts", type=int, nargs="+", default=[20, 50, 200])
    parser.add_argument("--images", type=int, default=200)
    asked, settings = parser.parse_known_args()
    parent = TextToImagePipeline.from_pretrained(asked.bundle)
    data = parent.trained_on["data"]["icons"]
    size = parent.tokenizer.size[0]
    sets = (*data["sets"], asked.set)
    everything, _ = load_icons(data["folder"], sets, data["annotations"], size, 2)
    path = locate_set(Path(data["folder"]).expanduser(), asked.set)
    own = read_set(path, key_index(emoji_names(data["annotations"])))
    known = {icon.key for icon in everything if icon.style != own.style} & set(own.drawings)
    usable = [one for one in everything if one.style == own.style and one.key in known]
    order = some([one for one in usable if len(one.key) > 3], len(usable))
    tested = order[: asked.images]
    free = order[asked.images :]
    if len(tested) < _SHOWN or len(free) < max(asked.counts):
        parser.error(f"{asked.set} has {len(order)} drawings of known names; ask for fewer")
    prompts = [styled_captions(icon.name, own.style)[0] for icon in tested]
    print(_row("before", sampled(parent, prompts), tested, everything, asked.out), flush=True)
    for count in asked.counts:
        drawings = asked.out / f"drawings-{count}"
        _write_drawings(drawings, free[:count], own)
        start = time.perf_counter()
        more = [
            "--name",
            f"style-{count}",
            "--output-dir",
            str(asked.out / "runs"),
            "--trackers",
            "[]",
            *settings,
        ]
        experiment = style_experiment(asked.bundle, drawings, style=own.style, settings=more)
        made = TextToImagePipeline.from_pretrained(pipeline.run(experiment))
        label = f"after {count} drawings"
        line = _row(label, sampled(made, prompts), tested, everything, asked.out)
        print(f"{line}; {(time.perf_counter() - start) / 60:.1f} minutes", flush=True)


if __name__ == "__main__":
    main()
