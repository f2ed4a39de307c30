"""What `minidalle generate` and `minidalle reconstruct` do: pictures to files. Knows folders; models come from the stages."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from PIL import Image

from pipeline.evaluation.pictures import psnr
from pipeline.grids import grid_image, picture_grid
from pipeline.runtime import processes
from pipeline.settings import existing_tokenizer
from pipeline.text_to_image import TextToImagePipeline


def generate(bundle: Path, prompts: Sequence[str], out: Path, *, num: int, seed: int = 0, batch_size: int = 64, **options: Any) -> int:
    """Writes numbered PNGs, `grid.png` and `samples.jsonl`; the prompts are split over the processes. Returns the count.

    The pictures do not depend on how many processes there are.

    Raises:
        ValueError, FileNotFoundError: what `TextToImagePipeline` raises; nothing is written then.
    """
    state = processes()
    pipe = TextToImagePipeline.from_pretrained(bundle).to(state.device)
    mine = np.array_split(np.arange(len(prompts)), state.num_processes)[state.process_index].tolist()
    drawn: list[tuple[int, int, Any, float]] = []
    if mine:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            output = pipe([prompts[i] for i in mine], num_images_per_prompt=num, seed=seed, batch_size=batch_size, **options)
        for message in sorted({str(w.message) for w in caught if issubclass(w.category, UserWarning)}):
            print(f"note: {message}")
        for place, (image, likelihood) in enumerate(zip(output.images, output.log_likelihood.tolist(), strict=True)):
            drawn.append((mine[place // num], place % num, image, likelihood))
    gathered = sorted(gather_object(drawn), key=lambda row: row[:2])
    if state.is_main_process:
        out.mkdir(parents=True, exist_ok=True)
        lines = []
        for number, (prompt, _, image, likelihood) in enumerate(gathered):
            file = f"{number:05d}{_slug(prompts[prompt])}.png"
            image.save(out / file)
            row = {"prompt": prompts[prompt], "file": file, "seed": seed, "log_likelihood": round(likelihood, 4)}
            lines.append(json.dumps(row, ensure_ascii=False))
        grid = picture_grid([np.asarray(row[2]) for row in gathered], columns=num)
        grid_image(grid).save(out / "grid.png")
        (out / "samples.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    state.wait_for_everyone()
    return len(gathered)


def _slug(prompt: str) -> str:
    """A few plain words of the prompt for the file's name; the number before it keeps names apart."""
    words = re.findall(r"[a-z0-9]+", prompt.lower())[:6]
    return "".join(f"-{word}" for word in words)[:60]


def reconstruct(tokenizer: Path, files: Sequence[Path], out: Path, *, size: tuple[int, int] | None = None, tile: int = 512) -> list[str]:
    """Writes each picture's reconstruction, and a grid of pairs where all have one size; returns a line a picture with its PSNR.

    Args:
        size: width and height to crop and resize to; without it pictures stay as they are.
        tile: pictures with a longer side go through in pieces of this many pixels.

    Raises:
        ValueError: a file cannot be read as a picture, or has a size that the tokenizer's grid does not divide.
        FileNotFoundError: a file or the tokenizer is not there.
    """
    from pipeline.data.pictures import open_picture
    from stage1_tokenizer import ImageTokenizer, resize_and_crop, to_model_range, to_pictures, to_rgb

    model = ImageTokenizer.load(existing_tokenizer(tokenizer)).eval()
    true = []
    for file in files:
        image = to_rgb(open_picture(file))
        image = image if size is None else resize_and_crop(image, size)
        true.append(np.array(image))
        try:
            model.check_size((1, 3, image.height, image.width))
        except ValueError as error:
            raise ValueError(f"{file}: {error} (--size WIDTHxHEIGHT does)") from error
    drawn = [to_pictures(model.reconstruct(to_model_range(torch.from_numpy(one)[None]), tile=tile))[0].numpy() for one in true]
    out.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, (file, before, after) in enumerate(zip(files, true, drawn, strict=True)):
        name = f"{number:05d}-{file.stem}.png"
        Image.fromarray(after).save(out / name)
        lines.append(f"{file}: {psnr(before, after):.2f} dB -> {out / name}")
    if len({one.shape for one in true}) == 1:
        pairs = [picture for pair in zip(true, drawn, strict=True) for picture in pair]
        grid_image(picture_grid(pairs, columns=2 * min(4, len(files)))).save(out / "grid.png")
    count = "1 reconstruction" if len(files) == 1 else f"{len(files)} reconstructions"
    return [*lines, f"wrote {count} to {out}, and grid.png (original, reconstruction, ...) if they have one size"]
