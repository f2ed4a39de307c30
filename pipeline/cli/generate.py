"""The verbs that draw - generate, edit, reconstruct: their options. Draws nothing itself."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.cli.common import UsageError, print_rank0, require_single_process
from pipeline.config.option_names import spelled

_SAMPLING: dict[str, dict[str, Any]] = {
    "guidance_scale": {"type": float, "help": "how strongly the prompt steers; 1 is off"},
    "guidance_interval": {
        "type": float,
        "nargs": 2,
        "metavar": ("FROM", "TO"),
        "help": "shares of the codes between which it steers",
    },
    "guidance_power": {"type": float, "help": "let guidance rise by this power of a cosine"},
    "temperature": {"type": float, "help": "0 takes the most likely codes"},
    "top_k": {"type": int, "help": "keep the k most likely codes"},
    "top_p": {"type": float, "help": "keep the codes that reach this probability"},
    "min_p": {
        "type": float,
        "help": "drop codes that the caption makes less likely than this share of the likeliest",
    },
    "num_inference_steps": {
        "type": int,
        "help": "decide all codes in so many steps (priors trained on random orders)",
    },
}
"""The fields of `SamplingOptions`; one left out takes the bundle's default."""


def _add_sampling(reader: argparse.ArgumentParser) -> None:
    for name, how in _SAMPLING.items():
        reader.add_argument(f"--{name.replace('_', '-')}", **how)


def _sampling(options: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(options, name) for name in _SAMPLING}


def generate_verb(rest: Sequence[str]) -> int:
    reader = argparse.ArgumentParser(
        prog="minidalle generate", description="Draws images for prompts."
    )
    reader.add_argument("prompts", nargs="*", metavar="prompt", help="'' samples without a caption")
    reader.add_argument(
        "--bundle",
        type=Path,
        required=True,
        help="folder that `minidalle run` made: runs/NAME/bundle",
    )
    reader.add_argument("--prompts", dest="file", type=Path, help="text file with a prompt a line")
    reader.add_argument(
        "--num-images", dest="num", type=int, default=4, help="images per prompt (4)"
    )
    reader.add_argument(
        "--out", type=Path, default=Path("pictures"), help="folder for the images (pictures)"
    )
    reader.add_argument(
        "--seed", type=int, default=0, help="the same seed gives the same images (0)"
    )
    _add_sampling(reader)
    reader.add_argument(
        "--best-of",
        type=int,
        default=1,
        help="draw so many for each image and keep the one that shows the prompt best (1)",
    )
    reader.add_argument(
        "--clip-scorer",
        dest="judge",
        help="name or folder of a CLIP model that --best-of chooses by; without it the prior "
        "itself does",
    )
    reader.add_argument(
        "--compile",
        choices=("auto", "on", "off"),
        default="auto",
        help="compile the steps; auto where it pays",
    )
    reader.add_argument("--batch-size", type=int, default=64, help="images at a time (64)")
    reader.add_argument("--truncate", action="store_true", help="cut prompts that are too long")
    options = reader.parse_args(spelled(rest, "-"))
    prompts = list(options.prompts)
    if options.file is not None:
        prompts += options.file.read_text(encoding="utf-8").splitlines()
    if not prompts:
        raise UsageError("no prompt was given; add one in quotes, or --prompts FILE")
    from pipeline.inference.generate import generate

    written = generate(
        options.bundle,
        prompts,
        options.out,
        num=options.num,
        seed=options.seed,
        batch_size=options.batch_size,
        truncate=options.truncate,
        best_of=options.best_of,
        judge=options.judge,
        compile=options.compile,
        **_sampling(options),
    )
    print_rank0(f"wrote {written} images, grid.png and samples.jsonl to {options.out}")
    return 0


def edit_verb(rest: Sequence[str]) -> int:
    reader = argparse.ArgumentParser(
        prog="minidalle edit", description="Draws a part of an image anew.", allow_abbrev=False
    )
    reader.add_argument(
        "--bundle",
        type=Path,
        required=True,
        help="folder of a bundle whose prior was trained with prior.train.code_order=random",
    )
    reader.add_argument(
        "--image",
        type=Path,
        required=True,
        help="image of the size that the prior draws; smaller with --outpaint-at",
    )
    what = reader.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--mask", type=Path, help="black and white image of the same size: white is replaced"
    )
    what.add_argument(
        "--outpaint-at",
        dest="at",
        type=int,
        nargs=2,
        metavar=("X", "Y"),
        help="extend a smaller image; its top left corner comes here",
    )
    what.add_argument(
        "--strength",
        type=float,
        help="vary the image: this share of its codes, scattered, is resampled",
    )
    reader.add_argument("--prompt", default="", help="what the whole image is to show")
    reader.add_argument("--num-images", dest="num", type=int, default=4, help="images (4)")
    reader.add_argument(
        "--out", type=Path, default=Path("pictures"), help="folder for the images (pictures)"
    )
    reader.add_argument(
        "--seed", type=int, default=0, help="the same seed gives the same images (0)"
    )
    reader.add_argument("--truncate", action="store_true", help="cut a prompt that is too long")
    _add_sampling(reader)
    options = reader.parse_args(spelled(rest, "-"))
    require_single_process("edit")
    from pipeline.inference.generate import edit

    written = edit(
        options.bundle,
        options.image,
        options.prompt,
        options.out,
        mask=options.mask,
        at=tuple(options.at) if options.at else None,
        strength=options.strength,
        num=options.num,
        seed=options.seed,
        truncate=options.truncate,
        **_sampling(options),
    )
    print_rank0(f"wrote {written} images, grid.png and samples.jsonl to {options.out}")
    return 0


def reconstruct_verb(rest: Sequence[str]) -> int:
    reader = argparse.ArgumentParser(
        prog="minidalle reconstruct", description="Images through the tokenizer and back."
    )
    reader.add_argument(
        "files",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="images of any size that the code grid divides",
    )
    reader.add_argument(
        "--tokenizer", type=Path, required=True, help="folder of a tokenizer: runs/NAME/tokenizer"
    )
    reader.add_argument(
        "--out", type=Path, default=Path("reconstructions"), help="folder for the images"
    )
    reader.add_argument("--size", help="crop and resize to this: 64, or 512x768 (width x height)")
    reader.add_argument(
        "--tile",
        type=int,
        default=512,
        help="larger images go through in pieces of this many pixels (512)",
    )
    options = reader.parse_args(spelled(rest, "-"))
    require_single_process("reconstruct")
    size = _size(options.size) if options.size else None
    if options.tile < 1:
        raise UsageError(f"--tile is {options.tile}; it must be at least 1")
    from pipeline.inference.generate import reconstruct

    for line in reconstruct(
        options.tokenizer, options.files, options.out, size=size, tile=options.tile
    ):
        print_rank0(line)
    return 0


def _size(text: str) -> tuple[int, int]:
    parts = text.split("x")
    if len(parts) > 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise UsageError(
            f"--size is {text!r}; it must be a number of pixels (64), or width and height (512x768)"
        )
    return int(parts[0]), int(parts[-1])
