"""The mask of the stream of caption and codes."""

from __future__ import annotations

from pathlib import Path

import torch

from examples.lectures.dalle import STREAM, causal_mask, main, tokens


def test_a_token_sees_itself_and_what_came_before():
    mask = causal_mask()
    assert len(mask) == STREAM.length - 1 == len(tokens()) - 1
    assert torch.equal(mask, torch.ones_like(mask).tril())


def test_the_plot_is_written(tmp_path: Path):
    main(tmp_path / "dalle.png")
    assert (tmp_path / "dalle.png").read_bytes().startswith(b"\x89PNG")
