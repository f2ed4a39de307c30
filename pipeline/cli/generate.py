"""The commands that write images: generate, edit, reconstruct. Samples nothing itself. A command
has as many parameters as options."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, TypedDict, Unpack

import pipeline
from pipeline.cli.log import print_rank0
from pipeline.cli.options import UsageError


class Sampling(TypedDict, total=False):
    """The fields of `SamplingOptions`; one that is left out is as in the bundle.

    Args:
        guidance_scale: how strongly the prompt steers; 1 is off
        guidance_interval: fractions of the codes between which it steers
        guidance_power: let guidance rise by this power of a cosine
        temperature: 0 takes the most likely codes
        top_k: keep the k most likely codes
        top_p: keep the codes that reach this probability
        min_p: drop codes that the caption makes less likely than this fraction of the likeliest
        num_inference_steps: sample all codes in this many steps (priors trained on random orders)
    """

    guidance_scale: float | None
    guidance_interval: tuple[float, float] | None
    guidance_power: float | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    num_inference_steps: int | None


def generate_command(
    prompt: tuple[str, ...] = (),
    *,
    bundle: str | None = None,
    prompts: Path | None = None,
    num_images: int = 4,
    out: Path = Path("images"),
    seed: int = 0,
    best_of: int = 1,
    judge: Literal["likelihood", "consensus"] = "likelihood",
    clip_scorer: str | None = None,
    compile: Literal["auto", "on", "off"] = "auto",
    batch_size: int = 64,
    truncate: bool = False,
    **sampling: Unpack[Sampling],
) -> None:
    """Samples images for prompts.

    Args:
        prompt: what the images show; '' samples without a caption
        bundle: folder that `minidalle run` made (runs/NAME/bundle), or user/name of the Hub (icons,
            which comes with the package)
        prompts: text file with one prompt per line; empty lines are skipped
        num_images: images per prompt
        out: folder for the images
        seed: the same seed gives the same images
        best_of: sample this many per image and keep the one that shows the prompt best
        judge: what --best-of chooses by: the prior's likelihoods, or the image nearest to the mean
            of all
        clip_scorer: name or folder of a CLIP model that --best-of chooses by instead
        compile: compile the steps; auto where it pays
        batch_size: images at a time
        truncate: truncate prompts that are too long
    """
    from pipeline.config.shipped_bundles import shipped_bundle
    from pipeline.inference.prompt_file import Prompt, read_prompts

    if not prompt and prompts is None:
        raise UsageError("no prompt was given; add one in quotes, or --prompts FILE")
    every = [Prompt(text, f"prompt {number}") for number, text in enumerate(prompt, start=1)]
    if prompts is not None:
        every += read_prompts(prompts)
    written = pipeline.generate(
        bundle or shipped_bundle(),
        [one.text for one in every],
        out,
        given_in=[one.given_in for one in every],
        num_images=num_images,
        seed=seed,
        best_of=best_of,
        judge=judge,
        clip_scorer=clip_scorer,
        compile=compile,
        batch_size=batch_size,
        truncate=truncate,
        **sampling,
    )
    print_rank0(_wrote(written, out))


def edit_command(
    *,
    bundle: str,
    image: Path,
    mask: Path | None = None,
    outpaint_at: tuple[int, int] | None = None,
    strength: float | None = None,
    prompt: str = "",
    num_images: int = 4,
    out: Path = Path("edited"),
    seed: int = 0,
    truncate: bool = False,
    **sampling: Unpack[Sampling],
) -> None:
    """Resamples a part of an image: one of --mask, --outpaint-at and --strength says which.

    Args:
        bundle: folder of a bundle, or user/name of the Hub, whose prior was trained with
            prior.train.code_order=random
        image: image of the size that the prior samples; smaller with --outpaint-at
        mask: black and white image of the same size: white is replaced
        outpaint_at: extend a smaller image; its top left corner comes to this x and y
        strength: vary the image: this fraction of its codes, scattered, is resampled
        prompt: what the whole image is to show
        num_images: number of images
        out: folder for the images
        seed: the same seed gives the same images
        truncate: truncate a prompt that is too long
    """
    if [mask, outpaint_at, strength].count(None) != 2:
        raise UsageError("give one of --mask, --outpaint-at and --strength")
    written = pipeline.edit(
        bundle,
        image,
        prompt,
        out,
        mask=mask,
        outpaint_at=outpaint_at,
        strength=strength,
        num_images=num_images,
        seed=seed,
        truncate=truncate,
        **sampling,
    )
    print_rank0(_wrote(written, out))


def reconstruct_command(
    files: tuple[Path, ...],
    *,
    tokenizer: Path,
    out: Path = Path("reconstructions"),
    size: str | None = None,
    tile: int = 512,
) -> None:
    """Sends images through the tokenizer and back.

    Args:
        files: images of any size that the code grid divides
        tokenizer: folder of a tokenizer: runs/NAME/tokenizer
        out: folder for the images
        size: crop and resize to this: 64, or 512x768 (width x height)
        tile: larger images go through in pieces of this many pixels
    """
    pixels = _size(size) if size else None
    if tile < 1:
        raise UsageError(f"--tile is {tile}; it must be at least 1")
    for line in pipeline.reconstruct(tokenizer, files, out, size=pixels, tile=tile):
        print_rank0(line)


def _wrote(count: int, out: Path) -> str:
    from pipeline.runtime.contact_sheet import sheet_names

    names = sheet_names(count)
    grid = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
    return f"wrote {count} images, {grid} and samples.jsonl to {out}"


def _size(text: str) -> tuple[int, int]:
    parts = text.split("x")
    if len(parts) > 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise UsageError(
            f"--size is {text!r}; it must be a number of pixels (64), or width and height (512x768)"
        )
    return int(parts[0]), int(parts[-1])
