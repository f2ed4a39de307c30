"""What `minidalle generate`, `edit` and `reconstruct` do: images to files. Knows folders; models
come from the stages. Parameters are the options of the command line, hence their number."""

from __future__ import annotations

import json
import logging
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import gather_object
from PIL import Image

from pipeline.inference.pipeline import TextToImagePipeline
from pipeline.runtime.atomic_io import (
    atomic_write_png,
    atomic_write_text,
    check_folder,
    short_stem,
    write_errors,
    writing_images,
)
from pipeline.runtime.contact_sheet import contact_sheets, sheet_names
from pipeline.runtime.distributed import distributed_state
from pipeline.runtime.image_grid import grid_image, make_grid
from pipeline.runtime.log import on_main_process
from pipeline.runtime.run_paths import existing_tokenizer
from stage1_tokenizer.metrics import psnr
from stage1_tokenizer.pixels import image_array, pil_image

_log = logging.getLogger(__name__)
_log.addFilter(on_main_process)


def generate(
    bundle: str | Path,
    prompts: Sequence[str],
    out: Path,
    *,
    num_images: int,
    seed: int = 0,
    batch_size: int = 64,
    clip_scorer: str | None = None,
    given_in: Sequence[str] = (),
    **options: Any,
) -> int:
    """Writes numbered PNGs, sheets of them (`sheet_names`) and `samples.jsonl`; the prompts are
    split over the processes. Returns the number of images.

    The images do not depend on how many processes there are.

    Args:
        num_images: images per prompt.
        given_in: where each prompt stands, for messages ("prompts.txt line 3").
        clip_scorer: name or folder of a CLIP model that `best_of` chooses by.
        options: those of `TextToImagePipeline.__call__`.

    Raises:
        ValueError, FileNotFoundError: what `TextToImagePipeline` raises; nothing is written then.
    """
    state = distributed_state()
    check_folder(out, "images")
    pipe = TextToImagePipeline.from_pretrained(bundle).to(state.device)
    if not options.get("truncate") and pipe.reads_prompts:
        _check_lengths(pipe, prompts, given_in or [""] * len(prompts))
    if clip_scorer is not None:
        if options.get("judge", "likelihood") != "likelihood":
            raise ValueError(
                f"best_of is to choose by {options['judge']} and by a CLIP model; give one of "
                "judge and clip_scorer"
            )
        from pipeline.inference.reranking import CLIPScorer

        options["judge"] = CLIPScorer(clip_scorer, state.device)
    mine = np.array_split(np.arange(len(prompts)), state.num_processes)[
        state.process_index
    ].tolist()
    drawn: list[_Drawn] = []
    if mine:
        with _notes():
            output = pipe(
                [prompts[i] for i in mine],
                num_images_per_prompt=num_images,
                seed=seed,
                batch_size=batch_size,
                **options,
            )
        for place, (image, likelihood) in enumerate(
            zip(output.images, output.log_likelihood.tolist(), strict=True)
        ):
            drawn.append(_Drawn(mine[place // num_images], place % num_images, image, likelihood))
    gathered = sorted(gather_object(drawn), key=lambda row: row[:2])
    if state.is_main_process:
        _write(out, gathered, prompts, seed)
    state.wait_for_everyone()
    return len(gathered)


def edit(
    bundle: str | Path,
    image: Path,
    prompt: str,
    out: Path,
    *,
    mask: Path | None = None,
    outpaint_at: tuple[int, int] | None = None,
    strength: float | None = None,
    num_images: int = 4,
    seed: int = 0,
    **options: Any,
) -> int:
    """Writes edited images as `generate` does; returns their number. One of `mask`,
    `outpaint_at` and `strength` says what is resampled.

    Args:
        mask: image whose white is replaced (`TextToImagePipeline.edit`).
        outpaint_at: where on the canvas the image's top left corner comes to (`outpaint`).
        strength: fraction of the codes (`vary`).

    Raises:
        ValueError, FileNotFoundError: what is given does not fit or is not there; nothing is
            written then.
    """
    from pipeline.data.readers.images import open_image

    check_folder(out, "images")
    files = [_file_name(number, prompt) for number in range(num_images)]
    inputs = [image] if mask is None else [image, mask]
    _refuse_overwriting(out, [*files, *sheet_names(num_images)], inputs)
    pipe = TextToImagePipeline.from_pretrained(bundle).to(distributed_state().device)
    original = open_image(image)
    with _notes():
        if mask is not None:
            output = pipe.edit(
                original, open_image(mask), prompt, num_images=num_images, seed=seed, **options
            )
        elif outpaint_at is not None:
            output = pipe.outpaint(
                original, prompt, at=outpaint_at, num_images=num_images, seed=seed, **options
            )
        elif strength is not None:
            output = pipe.vary(
                original, strength, prompt, num_images=num_images, seed=seed, **options
            )
        else:
            raise ValueError("nothing says what to resample; give mask, outpaint_at or strength")
    rows = [
        _Drawn(0, i, *pair)
        for i, pair in enumerate(zip(output.images, output.log_likelihood.tolist(), strict=True))
    ]
    _write(out, rows, [prompt], seed)
    return len(rows)


class _Drawn(NamedTuple):
    """One image on its way to a file."""

    prompt: int
    number: int
    image: Image.Image
    log_likelihood: float


@contextmanager
def _notes() -> Iterator[None]:
    """Warnings as notes for the user, each once."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for message in sorted({str(w.message) for w in caught if issubclass(w.category, UserWarning)}):
        _log.info(f"note: {message}")


def _check_lengths(
    pipe: TextToImagePipeline, prompts: Sequence[str], given_in: Sequence[str]
) -> None:
    """Raises ValueError where a prompt does not fit the text slots; names where it stands."""
    for prompt, length, where in zip(prompts, pipe.text.lengths(prompts), given_in, strict=True):
        if length > pipe.text.length:
            raise ValueError(
                f"{where or 'a prompt'} needs {length} tokens, and this bundle has "
                f"{pipe.text.length} text slots ({prompt[:80]!r}); shorten it, or set truncate"
            )


def _write(out: Path, rows: Sequence[_Drawn], prompts: Sequence[str], seed: int) -> None:
    samples = out / "samples.jsonl"
    lines = []
    with writing_images(out, len(rows)) as written:
        with write_errors(samples):  # of an earlier command: it would describe other images
            samples.unlink(missing_ok=True)
        for number, row in enumerate(rows):
            prompt = prompts[row.prompt]
            file = _file_name(number, prompt)
            written.save(file, row.image)
            line = {
                "prompt": prompt,
                "file": file,
                "seed": seed,
                "log_likelihood": round(row.log_likelihood, 4),
            }
            lines.append(json.dumps(line, ensure_ascii=False))
        images = [image_array(row.image) for row in rows]
        captions = [prompts[row.prompt] for row in rows]
        sheets = contact_sheets(images, captions, together=len(rows) // len(prompts))
        for name, sheet in zip(sheet_names(len(rows)), sheets, strict=True):
            atomic_write_png(out / name, sheet)
        atomic_write_text(samples, "\n".join(lines) + "\n")


def _file_name(number: int, prompt: str) -> str:
    """A number, which keeps names apart, and a few plain words of the prompt."""
    words = re.findall(r"[a-z0-9]+", prompt.lower())[:6]
    slug = "".join(f"-{word}" for word in words)[:60]
    return f"{number:05d}{slug}.png"


def _refuse_overwriting(out: Path, names: Iterable[str], inputs: Iterable[Path]) -> None:
    """Raises ValueError where a file in `out` would take the place of one that is read."""
    written = {(out / name).resolve() for name in names}
    for file in inputs:
        if file.resolve() in written:
            raise ValueError(
                f"{file} is read, and would be overwritten; choose another folder by the option out"
            )


def reconstruct(
    tokenizer: Path,
    files: Sequence[Path],
    out: Path,
    *,
    size: tuple[int, int] | None = None,
    tile: int = 512,
) -> list[str]:
    """Writes each image's reconstruction, and a grid of pairs where all have one size. Returns a
    line per image with its PSNR.

    Args:
        size: width and height to crop and resize to; without it images stay as they are.
        tile: images with a longer side go through in pieces of this many pixels.

    Raises:
        ValueError: a file cannot be read as an image, or has a size that the tokenizer's grid does
            not divide.
        FileNotFoundError: a file or the tokenizer is not there.
    """
    from pipeline.data.readers.images import open_image
    from stage1_tokenizer import (
        TokenizerModule,
        resize_and_crop,
        to_channels,
        to_model_range,
        to_uint8,
    )

    check_folder(out, "images")
    names = [f"{number:05d}-{short_stem(file)}.png" for number, file in enumerate(files)]
    _refuse_overwriting(out, [*names, "grid.png"], files)
    model = TokenizerModule.from_pretrained(existing_tokenizer(tokenizer)).eval()
    channels = model.own_config.channels
    true = []
    for file in files:
        image = to_channels(open_image(file), channels)
        image = image if size is None else resize_and_crop(image, size, channels)
        true.append(image_array(image).copy())
        try:
            model.check_size((1, channels, image.height, image.width))
        except ValueError as error:
            raise ValueError(f"{file}: {error} (the option size does)") from error
    drawn = [
        to_uint8(model.reconstruct(to_model_range(torch.from_numpy(one)[None]), tile=tile))[
            0
        ].numpy()
        for one in true
    ]
    lines = []
    with writing_images(out, len(files)) as written:
        for name, file, before, after in zip(names, files, true, drawn, strict=True):
            written.save(name, pil_image(after))
            lines.append(f"{file}: {psnr(before, after):.2f} dB -> {out / name}")
        if len({one.shape for one in true}) == 1:
            pairs = [one for pair in zip(true, drawn, strict=True) for one in pair]
            grid = make_grid(pairs, columns=2 * min(4, len(files)))
            atomic_write_png(out / "grid.png", grid_image(grid))
    count = "1 reconstruction" if len(files) == 1 else f"{len(files)} reconstructions"
    return [
        *lines,
        f"wrote {count} to {out}, and grid.png (original, reconstruction, ...) if they have one "
        "size",
    ]
