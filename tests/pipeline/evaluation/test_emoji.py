"""Nearest-image metrics of a pipeline whose images are given."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from pipeline.evaluation import emoji
from pipeline.evaluation.emoji import captions_found, emoji_metrics, squared_errors


def test_squared_errors_match_hand_computation():
    a, b = (
        np.zeros((1, 2, 2, 3), dtype=np.uint8),
        np.stack([np.full((2, 2, 3), v, dtype=np.uint8) for v in (0, 10, 255)]),
    )
    assert squared_errors(a, b).tolist() == [[0, 100, 255**2]]


class Tones:
    """Ten one-coloured images in two families of five tones."""

    shades = np.arange(10) * 25

    def __len__(self) -> int:
        return 10

    def images(self, rows):
        return np.stack([np.full((4, 4, 3), self.shades[r], dtype=np.uint8) for r in rows])

    def captions(self, rows):
        return [str(r) for r in rows]

    def tone_siblings(self, row):
        first = row // 5 * 5
        return self.images(range(first, first + 5)), row - first


@pytest.mark.parametrize(("off", "expected"), [(0, 1.0), (5, 1.0), (25, 0.0)])
def test_retrieval_counts_images_nearest_to_their_own(monkeypatch, off, expected):
    monkeypatch.setattr(emoji, "EmojiSource", lambda config, split: Tones())

    def pipe(prompts, truncate, num_inference_steps):
        images = [np.clip(int(p) * 25 + off, 0, 255) for p in prompts]
        return SimpleNamespace(images=[Image.new("RGB", (4, 4), (int(v),) * 3) for v in images])

    pipe.prior = SimpleNamespace(config=SimpleNamespace(trained_image_first=False))  # type: ignore[attr-defined]
    metrics = emoji_metrics(pipe, SimpleNamespace(data=None))  # type: ignore[arg-type]
    assert set(metrics) == {
        "retrieval_at_1_of_100_seen",
        "retrieval_at_1_of_100_held_out",
        "skin_tone_accuracy_val",
    }
    # The lightest image of all, or of its family, has no lighter one to be mistaken for.
    assert metrics["retrieval_at_1_of_100_seen"] == pytest.approx(expected, abs=0.1)
    assert metrics["skin_tone_accuracy_val"] == pytest.approx(expected, abs=0.2)


def test_caption_retrieval_counts_images_whose_caption_is_likeliest():
    """A captioner that is right about the five darkest images alone."""

    def caption(image, candidates, truncate):
        own = np.asarray(image)[0, 0, 0] // 25
        best = candidates[own] if own < 5 else candidates[0]
        return [(best, -1.0), *((c, -2.0) for c in candidates if c != best)]

    images = Tones().images(range(10))
    assert (
        captions_found(SimpleNamespace(caption=caption), images, [str(i) for i in range(10)]) == 0.5
    )  # type: ignore[arg-type]


def test_captioning_has_metrics_of_its_own(monkeypatch):
    """Every image is right, and the captioner finds half of the captions."""
    monkeypatch.setattr(emoji, "EmojiSource", lambda config, split: Tones())

    class Pipe:
        prior = SimpleNamespace(config=SimpleNamespace(trained_image_first=True))

        def __call__(self, prompts, truncate, num_inference_steps):
            shades = [int(p) * 25 for p in prompts]
            return SimpleNamespace(images=[Image.new("RGB", (4, 4), (v,) * 3) for v in shades])

        def caption(self, image, candidates, truncate):
            own = str(np.asarray(image)[0, 0, 0] // 25)
            return [(own if int(own) < 5 else "0", -1.0)]

    found = emoji_metrics(Pipe(), SimpleNamespace(data=None))  # type: ignore[arg-type]
    for split in ("seen", "held_out"):
        assert found[f"retrieval_at_1_of_100_{split}"] == 1.0
        assert found[f"caption_of_100_{split}"] == 0.5
