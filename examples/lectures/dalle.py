"""DALL-E's stream of caption and codes: what each token attends to, and where it stands.

    python -m examples.lectures.dalle --out dalle.png

The stream is that of `stage2_prior/sequence.py`, with a caption of three words and 3x3 codes. The
mask is `attention_mask` of `stage2_prior/transformer.py`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from examples.lectures.plots import canvas, out_option
from stage2_prior.config import Level, StreamConfig
from stage2_prior.sequence import Stream
from stage2_prior.transformer import attention_mask

SIDE = 3
TEXT = ("<start>", "a", "red", "heart", "<end>", "<pad>")
STREAM = Stream(
    StreamConfig(
        text_vocab_size=16, text_length=len(TEXT), levels=(Level(grid=(SIDE, SIDE), num_codes=32),)
    )
)


def tokens() -> list[str]:
    """What stands at each position of the stream."""
    return [*TEXT, *(f"z{i // SIDE}{i % SIDE}" for i in range(STREAM.image_length))]


def causal_mask() -> Tensor:
    """(S,S): which positions the token of each row attends to, for all inputs of the stream."""
    codes = torch.zeros(1, STREAM.image_length, dtype=torch.long)
    sequence = STREAM.text_first(STREAM.null_caption(1), codes)
    positions = sequence.position_ids
    return attention_mask(positions, positions, len(positions))


def main(out: Path) -> None:
    """The mask with the token that each row predicts, and the coordinates of rotary positions."""
    names = tokens()
    mask = causal_mask()
    plot = canvas(11, 5)
    attention, places = plot.subplots(1, 2)
    attention.imshow(mask.numpy(), cmap="Blues", vmin=0, vmax=1.6)
    inputs = range(len(mask))
    attention.set_xticks(inputs, names[:-1], rotation=90)
    attention.set_yticks(
        inputs, [f"{name} -> {names[i + 1]}" for i, name in enumerate(names[:-1])], fontsize=8
    )
    attention.axhline(len(TEXT) - 1.5, color="C3", linewidth=1)
    attention.set(title="what each token sees (token -> its target)")
    coordinates = STREAM.coordinates()
    is_code = STREAM.level_index() > 0
    for kind, label in ((~is_code, "text"), (is_code, "codes")):
        rows, columns = coordinates[kind].T
        places.scatter(columns, rows, s=500, marker="s", alpha=0.4, label=label)
    for name, (row, column) in zip(names, coordinates.tolist(), strict=True):
        places.annotate(name, (column, row), ha="center", va="center", fontsize=8)
    places.invert_yaxis()
    places.set(title="rows and columns of rotary positions", xlabel="column", ylabel="row")
    places.set(aspect="equal")
    places.margins(0.12)
    places.legend(fontsize=8, markerscale=0.4)
    plot.savefig(out)


if __name__ == "__main__":
    main(out_option(__doc__ or ""))
