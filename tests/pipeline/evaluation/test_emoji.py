"""Nearest-image metrics of a pipeline whose images are given, and which split they may be of."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from pipeline.config.builtin import EmojiOptions
from pipeline.config.data import DataConfig
from pipeline.config.load import load_values
from pipeline.data.builtin.emoji import ANNOTATIONS, FONT, EmojiSource
from pipeline.evaluation import emoji
from pipeline.evaluation.accuracy import Accuracy
from pipeline.evaluation.emoji import captions_found, check_split, emoji_metrics, squared_errors
from pipeline.evaluation.evaluate import evaluate
from tests.helpers.pipelines import tiny_pipeline


def test_squared_errors_match_hand_computation():
    a, b = (
        np.zeros((1, 2, 2, 3), dtype=np.uint8),
        np.stack([np.full((2, 2, 3), v, dtype=np.uint8) for v in (0, 10, 255)]),
    )
    assert squared_errors(a, b).tolist() == [[0, 100, 255**2]]


class Tones:
    """Ten one-coloured images in two families of five tones. The families are siblings."""

    shades = np.arange(10) * 25

    def __len__(self) -> int:
        return 10

    def images(self, rows):
        return np.stack([np.full((4, 4, 3), self.shades[r], dtype=np.uint8) for r in rows])

    def captions(self, rows):
        return [str(r) for r in rows]

    def siblings(self, row):
        return self.images(range(10)), row

    def tone_siblings(self, row):
        first = row // 5 * 5
        return self.images(range(first, first + 5)), row - first


def shading_pipe(shade):
    """Draws a prompt's number `p` as an image of brightness `shade(p)`."""

    def pipe(prompts, truncate, num_inference_steps):
        images = [np.clip(shade(int(p)), 0, 255) for p in prompts]
        return SimpleNamespace(images=[Image.new("RGB", (4, 4), (int(v),) * 3) for v in images])

    pipe.prior = SimpleNamespace(config=SimpleNamespace(trained_image_first=False))  # type: ignore[attr-defined]
    return pipe


@pytest.mark.parametrize(("off", "expected"), [(0, 1.0), (5, 1.0), (25, 0.0)])
def test_retrieval_counts_images_nearest_to_their_own(monkeypatch, off, expected):
    monkeypatch.setattr(emoji, "EmojiSource", lambda config, split: Tones())
    pipe = shading_pipe(lambda number: number * 25 + off)
    metrics = emoji_metrics(pipe, SimpleNamespace(data=None), 500)  # type: ignore[arg-type]
    assert list(metrics) == [
        "retrieval_among_siblings_held_out",
        "retrieval_among_siblings_chance",
        "siblings_per_name",
        "retrieval_at_1_of_100_held_out",
        "retrieval_at_1_of_100_seen",
        "skin_tone_accuracy_val",
    ]
    assert metrics["retrieval_among_siblings_chance"] == pytest.approx(0.1)
    assert metrics["siblings_per_name"] == 10
    # The lightest image of all, or of its family, has no lighter one to be mistaken for.
    for name, slack in (
        ("retrieval_among_siblings_held_out", 0.1),
        ("retrieval_at_1_of_100_seen", 0.1),
        ("retrieval_at_1_of_100_held_out", 0.1),
        ("skin_tone_accuracy_val", 0.2),
    ):
        found = metrics[name]
        assert isinstance(found, Accuracy) and found.count == 10
        assert found.value == pytest.approx(expected, abs=slack)


def test_the_wrong_gender_in_the_right_tone_is_no_hit_among_siblings(monkeypatch):
    monkeypatch.setattr(emoji, "EmojiSource", lambda config, split: Tones())
    pipe = shading_pipe(lambda number: (number + 5) % 10 * 25)
    metrics = emoji_metrics(pipe, SimpleNamespace(data=None), 500)  # type: ignore[arg-type]
    assert metrics["retrieval_among_siblings_held_out"] == Accuracy(0, 10)


def test_names_without_siblings_do_not_count(monkeypatch):
    monkeypatch.setattr(emoji, "EmojiSource", lambda config, split: Tones())
    monkeypatch.setattr(
        Tones, "siblings", lambda self, row: (self.images([row, 0] if row in (3, 4) else [row]), 0)
    )
    pipe = shading_pipe(lambda number: 0 if number == 3 else number * 25)
    metrics = emoji_metrics(pipe, SimpleNamespace(data=None), 500)  # type: ignore[arg-type]
    assert metrics["retrieval_among_siblings_held_out"] == Accuracy(1, 2)
    assert metrics["siblings_per_name"] == 2


@pytest.mark.skipif(
    not Path(FONT).is_file() or not Path(ANNOTATIONS).is_dir(),
    reason="the emoji font or names are not installed",
)
@pytest.mark.slow
def test_another_tone_is_right_among_100_and_never_among_siblings():
    """A pipeline that draws the next tone of every held-out name."""
    experiment = SimpleNamespace(data=DataConfig(source="emoji"))
    source = EmojiSource(experiment.data, "held_out")
    others = {}
    for row, name in enumerate(source.captions(range(len(source)))):
        tones, own = source.tone_siblings(row)
        others[name] = Image.fromarray(tones[(own + 1) % len(tones)])
    white = Image.new("RGB", (64, 64), "white")

    def pipe(prompts, truncate, num_inference_steps):
        return SimpleNamespace(images=[others.get(prompt, white) for prompt in prompts])

    pipe.prior = SimpleNamespace(config=SimpleNamespace(trained_image_first=False))  # type: ignore[attr-defined]
    metrics = emoji_metrics(pipe, experiment, 500)  # type: ignore[arg-type]
    assert metrics["retrieval_among_siblings_held_out"] == Accuracy(0, len(source))
    assert metrics["skin_tone_accuracy_val"] == Accuracy(0, len(source))
    assert metrics["retrieval_at_1_of_100_held_out"].value > 0.6  # type: ignore[union-attr]
    assert metrics["retrieval_among_siblings_chance"] < 0.1  # type: ignore[operator]


def test_names_that_the_bundle_has_seen_are_refused(tmp_path):
    """Another seed holds out names that were trained on."""
    trained_on = {"data": {"source": "emoji", "emoji": {"split_seed": 1}}}
    tiny_pipeline(trained_on=trained_on).save_pretrained(tmp_path / "bundle")
    values = {"name": "x", "data": {"source": "emoji", "image_size": 16}}
    experiment = load_values(values, ["--tokenizer.model.downsample_factor=4"])
    with pytest.raises(ValueError, match=r"was trained with data\.emoji\.split_seed 1, and the"):
        evaluate(tmp_path / "bundle", experiment)
    for seed, known in ((1, trained_on), (0, {}), (0, {"data": {"source": "emoji", "emoji": {}}})):
        data = DataConfig(source="emoji", emoji=EmojiOptions(split_seed=seed))
        check_split(SimpleNamespace(trained_on=known), data)  # type: ignore[arg-type]


def test_caption_retrieval_counts_images_whose_caption_is_likeliest():
    """A captioner that is right about the five darkest images alone."""

    def caption(image, candidates, truncate):
        own = np.asarray(image)[0, 0, 0] // 25
        best = candidates[own] if own < 5 else candidates[0]
        return [(best, -1.0), *((c, -2.0) for c in candidates if c != best)]

    images = Tones().images(range(10))
    assert (
        captions_found(SimpleNamespace(caption=caption), images, [str(i) for i in range(10)])  # type: ignore[arg-type]
        == Accuracy(5, 10)
    )


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

    found = emoji_metrics(Pipe(), SimpleNamespace(data=None), 500)  # type: ignore[arg-type]
    for split in ("seen", "held_out"):
        assert found[f"retrieval_at_1_of_100_{split}"] == Accuracy(10, 10)
        assert found[f"caption_of_100_{split}"] == Accuracy(5, 10)
