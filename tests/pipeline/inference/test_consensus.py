"""`judge="consensus"`: which of several images it keeps, and how often that one is right."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.inference.reranking import consensus_scores, highest
from tests.helpers.cli import fails
from tests.helpers.pipelines import tiny_pipeline


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline(any_order=True)


def grey(*values: int) -> list[Image.Image]:
    return [Image.new("RGB", (4, 4), (value,) * 3) for value in values]


def test_a_score_is_minus_the_squared_distance_to_the_mean():
    scores = consensus_scores(grey(10, 20, 60, 0, 0, 3), 3)
    assert scores.shape == (2, 3)
    torch.testing.assert_close(scores[0], -torch.tensor([400.0, 100.0, 900.0]))
    assert highest(scores).tolist()[0] == 1


def test_transparent_pixels_count_as_white_whatever_colour_they_hide():
    clear = [Image.new("RGBA", (4, 4), (value, value, value, 0)) for value in (0, 90, 255)]
    assert (consensus_scores(clear, 3) == 0).all()


def test_the_image_that_samples_agree_on_is_right_more_often_than_one_of_them():
    """Ten shapes; of the samples of a prompt 55% show its own shape, the others any one, each with
    noise."""
    rng = np.random.default_rng(0)
    shapes = rng.integers(0, 256, (10, 8, 8, 3))
    asked = rng.integers(0, 10, 200)
    shown = np.where(rng.random((200, 8)) < 0.55, asked[:, None], rng.integers(0, 10, (200, 8)))
    drawn = (shapes[shown] + rng.normal(0, 20, (200, 8, 8, 8, 3))).clip(0, 255).astype(np.uint8)
    images = [Image.fromarray(one) for one in drawn.reshape(-1, 8, 8, 3)]
    kept = highest(consensus_scores(images, 8)).numpy()
    right = float((shown.reshape(-1)[kept] == asked).mean())
    single = float((shown == asked[:, None]).mean())
    assert single < 0.65 and right > 0.9


def test_the_kept_image_depends_on_its_own_group_alone(pipe):
    every = pipe("a red circle", num_images_per_prompt=6)
    expected = highest(consensus_scores(every.images, 3)).tolist()
    both = pipe("a red circle", num_images_per_prompt=2, best_of=3, judge="consensus")
    assert torch.equal(both.codes, every.codes[expected])
    assert both.seeds == [every.seeds[i] for i in expected]
    first = pipe("a red circle", best_of=3, judge="consensus")
    assert torch.equal(first.codes, both.codes[:1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"judge": "mean", "best_of": 2}, "judge is 'mean'; give 'likelihood', 'consensus'"),
        ({"judge": "consensus"}, "best_of is 1; ask for more"),
    ],
)
def test_a_judge_that_cannot_choose_is_refused(pipe, options, message):
    with pytest.raises(ValueError, match=message):
        pipe("a red circle", **options)


def test_command_takes_one_judge(pipe, tmp_path, capsys):
    pipe.save_pretrained(tmp_path / "bundle")
    command = ["generate", "--bundle", tmp_path / "bundle", "x", "--best-of", 2]
    both = ["--judge", "consensus", "--clip-scorer", "nothing", "--out", tmp_path / "out"]
    fails(capsys, [*command, *both], "give one of judge and clip_scorer")
    assert not (tmp_path / "out").exists()
