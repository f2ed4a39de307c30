"""Hostile prompts, files of prompts, sampling options and compressed images."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from random import Random

from benchmarks.attack.parts import (
    NUMBERS,
    damaged,
    encoded_text,
    misplace,
    nested,
    plain_image,
    text,
)
from benchmarks.attack.trial import Input
from pipeline.inference.pipeline import TextToImagePipeline

_WHOLE = (0, -1, 1, 3, 2**31, 2**62, 2**64, 10**400)
_OPTIONS: dict[str, tuple[object, ...]] = {
    "guidance_scale": NUMBERS,
    "guidance_interval": ((0.0, 1.0), (1.0, 0.0), (float("nan"), 2.0), (-1.0, 1e308)),
    "guidance_power": NUMBERS,
    "temperature": NUMBERS,
    "top_k": _WHOLE,
    "top_p": NUMBERS,
    "min_p": NUMBERS,
    "num_inference_steps": _WHOLE,
    "seed": (0, -1, 2**63, 2**64, 10**30),
    "best_of": (1, 2, 0, -1),
    "batch_size": (1, 0, -1, 2**62),
    "truncate": (True, False),
}


@cache
def _pipe(bundle: Path) -> TextToImagePipeline:
    return TextToImagePipeline.from_pretrained(bundle)


def make(bundle: Path, chance: Random, folder: Path) -> Input:
    """Prompts with sampling options, or a file of prompts, as `generate` takes them."""
    options = {
        name: chance.choice(choices)
        for name, choices in _OPTIONS.items()
        if chance.random() < (0.1 if name != "truncate" else 0.8)
    }
    if chance.random() < 0.5:
        words = [text(chance) for _ in range(chance.choice((1, 1, 2)))]
        if chance.random() < 0.03:
            words = chance.choice(([], [""], [" "], ["a" * 10**6], [nested(chance)]))
        return Input(f"{words!r:.80} {options}", partial(_drawn, bundle, words, options))
    path = folder / "prompts.txt"
    ends = chance.choice(("\n", "\r\n", "\r", "\u2028", "\n\n"))
    path.write_bytes(encoded_text(chance, ends.join(text(chance) for _ in range(3))))
    what = misplace(chance, path, named=True) if chance.random() < 0.1 else "file"
    out = folder.parent / "out"
    return Input(f"{what} {options}", partial(_drawn_from_file, bundle, path, out, options))


def _drawn(bundle: Path, words: Sequence[str], options: dict[str, object]) -> Sequence[str]:
    _pipe(bundle)(words, **options)  # type: ignore[arg-type]
    return []


def _drawn_from_file(
    bundle: Path, path: Path, out: Path, options: dict[str, object]
) -> Sequence[str]:
    from pipeline.inference.generate import generate
    from pipeline.inference.prompt_file import read_prompts

    prompts = read_prompts(path)[:2]
    words = [prompt.text for prompt in prompts]
    places = [prompt.given_in for prompt in prompts]
    generate(bundle, words, out, num_images=1, given_in=places, **options)  # type: ignore[arg-type]
    return words


@cache
def _compressed(bundle: Path) -> bytes:
    import io

    from PIL import Image

    from pipeline.likelihood.compression import compress

    pipe = _pipe(bundle)
    image = Image.open(io.BytesIO(plain_image(size=(16, 16))))
    return compress(pipe.tokenizer, pipe.prior, pipe.text, image, "a red heart").data


def make_compressed(bundle: Path, chance: Random, folder: Path) -> Input:
    """A compressed image that is damaged. Its checksum fits, or else nothing else would be read."""
    from pipeline.likelihood.compression import decompress

    content = _compressed(bundle)
    body = damaged(chance, content[:-4], changes=2)
    if chance.random() < 0.5:
        # In the header, whose fields are short.
        at = chance.randrange(27)
        changed = bytearray(content[:-4])
        changed[at] = chance.choice((0, 1, 127, 255))
        body = bytes(changed)
    if chance.random() < 0.9:
        body += zlib.crc32(body).to_bytes(4, "little")

    def use() -> Sequence[str]:
        pipe = _pipe(bundle)
        decompress(pipe.tokenizer, pipe.prior, pipe.text, body)
        return []

    return Input(f"{len(body)} bytes", use)
