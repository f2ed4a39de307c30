"""`minidalle finetune`: a bundle learns a new style from a few drawings. Trains nothing itself."""

from __future__ import annotations

import shlex
from pathlib import Path

import pipeline
from pipeline.cli.log import print_rank0


def finetune_command(
    *, settings: list[str], bundle: str, data: Path, style: str | None = None
) -> None:
    """Trains a bundle on 20 to 50 drawings of a new style, so that other names come nearer to it;
    run again, it resumes. Settings of `minidalle run` may be given, too: --name is the style's.

    Args:
        bundle: folder of a bundle, user/name of the Hub, or icons, which comes with the package
        data: folder of .svg or .png files, or an Iconify JSON file; names of files are names of
            drawings, unless captions lie beside them
        style: what prompts call it (the name of --data)
    """
    from pipeline.inference.hub import find_bundle
    from pipeline.stages.style import style_experiment

    experiment = style_experiment(find_bundle(bundle), data, style=style, settings=settings)
    made = pipeline.run(experiment)
    prompt = f"a red heart, {experiment.data.icons.sets[-1]} style"
    command = ["generate", "--bundle", str(made), prompt, "--num-images", "4", "--out", "images"]
    print_rank0(
        f"wrote {made}\nother names in this style, for example: minidalle {shlex.join(command)}"
    )
