"""Codes in the plane leave their corner."""

from __future__ import annotations

from pathlib import Path

import torch

from examples.lectures.vq import CODES, main, train, vectors


def test_codes_spread_over_the_vectors_and_the_error_falls():
    books, errors = train(40)
    assert len(books) == 41 and books[0].shape == (CODES, 2)
    assert errors[-1] < errors[0] / 20
    data = vectors(2000, torch.Generator().manual_seed(1))
    reach = torch.cdist(books[-1], data).min(1).values
    assert (books[0] < 0).all() and float(reach.max()) < 0.3


def test_the_plot_is_written(tmp_path: Path):
    main(tmp_path / "vq.png", steps=1)
    assert (tmp_path / "vq.png").read_bytes().startswith(b"\x89PNG")
