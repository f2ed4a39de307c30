"""An experiment small enough for every test to run, and the names of settings."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

TINY = {
    "name": "tiny",
    "trackers": [],
    "data": {"source": "shapes", "image_size": 32, "shapes": {"max_objects": 1}},
    "tokenizer": {
        "model": {
            "num_codes": 16,
            "downsample_factor": 8,
            "width": 32,
            "encoder_depth": 1,
            "decoder_depth": 1,
            "code_dim": 4,
        },
        "train": {
            "steps": 6,
            "batch_size": 8,
            "log_every": 2,
            "eval_every": 3,
            "save_every": 2,
            "warmup_steps": 2,
        },
    },
    "encode": {"max_images": 40, "max_val_images": 10, "batch_size": 16},
    "text": {"vocab_size": 320, "max_length": 48},
    "prior": {
        "model": {"width": 32, "depth": 1, "heads": 2},
        "train": {
            "steps": 6,
            "batch_size": 8,
            "log_every": 2,
            "eval_every": 3,
            "save_every": 2,
            "warmup_steps": 2,
        },
    },
}


def settings(kind: Any, path: str = "") -> set[str]:
    """Dotted names of every setting, sections included."""
    found: set[str] = set()
    hints = get_type_hints(kind)
    for field in fields(kind):
        found.add(f"{path}{field.name}")
        if is_dataclass(hints[field.name]):
            found |= settings(hints[field.name], f"{path}{field.name}.")
    return found
