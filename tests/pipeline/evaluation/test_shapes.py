"""The oracle's metrics on pipelines that draw what the test wants."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from pipeline.config.builtin import ShapesOptions
from pipeline.config.data import DataConfig
from pipeline.data.builtin.shapes import NEW_PAIRS
from pipeline.data.builtin.shapes_captions import ShapesSource
from pipeline.evaluation.accuracy import Accuracy
from pipeline.evaluation.metrics import Reconstructions
from pipeline.evaluation.shapes import _edit, edit_accuracy, shapes_metrics

SIZE = 64
COUNT = 12
EXPERIMENT = SimpleNamespace(
    data=DataConfig(source="shapes", image_size=SIZE, shapes=ShapesOptions(max_objects=2))
)


class Painter:
    """Draws each prompt of the world right, or an empty image where `right` is off."""

    def __init__(self, right: bool, order: str = "raster") -> None:
        self.right = right
        self.steps: list[int | None] = []
        self.edits: list[str] = []
        self.prior = SimpleNamespace(
            config=SimpleNamespace(trained_order=order), stream=SimpleNamespace(image_length=64)
        )
        self.tokenizer = SimpleNamespace(own_config=SimpleNamespace(downsample_factor=8))
        self.known = {}
        for split in ("held_out", "new_pairs"):
            source = ShapesSource(EXPERIMENT.data, split)
            for prompt, image in zip(
                source.prompts(range(COUNT)), source.images(range(COUNT)), strict=True
            ):
                self.known[prompt.text] = Image.fromarray(image)

    def __call__(self, prompts, truncate, num_inference_steps):
        self.steps.append(num_inference_steps)
        empty = Image.new("RGB", (SIZE, SIZE), "white")
        return SimpleNamespace(images=[self.known[p] if self.right else empty for p in prompts])

    def edit(self, image, mask, prompt, truncate):
        self.edits.append(prompt)
        return SimpleNamespace(images=[image])


def reconstructions() -> Reconstructions:
    real = ShapesSource(EXPERIMENT.data, "held_out").images(range(COUNT))
    return Reconstructions(real, np.full_like(real, 255), {})


@pytest.mark.parametrize("right", [True, False])
def test_accuracies_are_fractions_of_right_images(right):
    metrics = shapes_metrics(Painter(right), EXPERIMENT, reconstructions())  # type: ignore[arg-type]
    assert metrics["oracle_accuracy_real"] == Accuracy(COUNT, COUNT)
    assert metrics["oracle_accuracy_reconstructed"] == Accuracy(0, COUNT)
    for name in ("prompt_accuracy", "prompt_accuracy_new_pairs", "prompt_accuracy_of_count"):
        assert metrics[name] == Accuracy(COUNT * right, COUNT), name
    by_objects = [metrics[f"prompt_accuracy_{n}_objects"] for n in (1, 2)]
    assert sum(own.count for own in by_objects) == COUNT
    assert all(own.value == right for own in by_objects)
    # Not every caption says how objects relate.
    assert metrics["prompt_accuracy_of_relations"].count < COUNT
    assert not {"prompt_accuracy_3_objects", "prompt_accuracy_16_steps", "edit_accuracy"} & {
        *metrics
    }


def test_a_prior_of_random_orders_is_judged_in_few_steps_and_by_edits():
    pipe = Painter(True, order="random")
    metrics = shapes_metrics(pipe, EXPERIMENT, reconstructions())  # type: ignore[arg-type]
    assert metrics["prompt_accuracy_16_steps"].value == 1 and pipe.steps == [None, None, 16]
    # An image that is left as it was does not show what the edit asked for.
    assert metrics["edit_accuracy"] == Accuracy(0, COUNT)


def test_no_more_edits_are_made_than_are_asked_for():
    pipe = Painter(True)
    edit_accuracy(pipe, EXPERIMENT, 3)  # type: ignore[arg-type]
    assert len(pipe.edits) == 3 and len(set(pipe.edits)) == 3


def test_an_edit_masks_one_object_by_whole_cells_and_keeps_the_other():
    source = ShapesSource(EXPERIMENT.data, "held_out")
    scenes = {i: source.world.scene(i) for i in range(60)}
    index, scene = next((i, one) for i, one in scenes.items() if len(one.items) == 2)
    prompt, mask = _edit(scene, index, SIZE, cell=8)
    cells = mask.reshape(8, 8, 8, 8).transpose(0, 2, 1, 3).reshape(64, 64)
    assert set(np.unique(mask)) == {0, 255} and (cells == cells[:, :1]).all()
    claimed = {(claim.shape, claim.colour) for claim in prompt.claims.objects}
    (old,) = [item for item in scene.items if mask[item.y, item.x]]
    (kept,) = [item for item in scene.items if not mask[item.y, item.x]]
    assert (kept.shape, kept.colour) in claimed and len(claimed) == 2
    ((shape, colour),) = claimed - {(kept.shape, kept.colour)}
    assert shape != old.shape and colour != old.colour and (shape, colour) not in NEW_PAIRS
