"""A prior's batches with lists of tags: pure functions of the step, for any number of processes."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import pipeline
from pipeline.config.data import TagOptions
from pipeline.config.experiment import Experiment
from pipeline.config.load import from_dict
from pipeline.data.sampler import BatchSampler
from pipeline.stages.latent_prior import LatentPriorTraining
from pipeline.stages.prior import PriorTraining
from pipeline.training.trainer import Trainer
from stage2_prior import TextConfig, TextTokenizer
from tests.helpers.data import encoded
from tests.helpers.experiments import TINY
from tests.helpers.tokenizers import tiny_tokenizer

CAPTIONS = [f"image {row}, red, round, small, plain, bright" for row in range(6)]


class Images:
    """Codes, or images, of six rows with a caption each."""

    views = 1

    def captions(self, rows: list[int], draws: object = None) -> list[str]:
        return [CAPTIONS[row] for row in rows]

    def all_captions(self, rows: list[int]) -> list[list[str]]:
        return [[CAPTIONS[row]] for row in rows]

    def codes(self, rows: list[int], views: object = None) -> np.ndarray:
        return np.array(rows)[:, None]

    images = codes


@pytest.fixture(scope="module")
def text() -> TextTokenizer:
    return TextTokenizer.train(CAPTIONS, vocab_size=300, length=64)


def batch(
    kind: type, text: TextTokenizer, step: int, process: int = 0, processes: int = 1, **tags: object
) -> list[str]:
    """The captions of a new training's batch of six."""
    training = object.__new__(kind)
    training.experiment = SimpleNamespace(
        seed=3, data=SimpleNamespace(tags=TagOptions(**tags)), text=TextConfig(max_length=64)
    )
    training.accelerator = SimpleNamespace(process_index=process, num_processes=processes)
    training.train = training.source = Images()
    training.text = text
    training.prior = SimpleNamespace(context_features=1)
    training.several_captions = False
    ids = training._batch(BatchSampler(6, 6, seed=3), step)["text_ids"]
    assert isinstance(ids, torch.Tensor)
    return text.decode(ids)


@pytest.mark.parametrize("kind", [PriorTraining, LatentPriorTraining])
def test_tags_are_reshuffled_each_step_and_alike_after_a_restart(kind, text):
    plain = batch(kind, text, 1)
    first = batch(kind, text, 1, shuffle=True, keep_first=1)
    assert first == batch(kind, text, 1, shuffle=True, keep_first=1) != plain
    by_image = {caption.split(",")[0]: caption for caption in first}
    later = {c.split(",")[0]: c for c in batch(kind, text, 2, shuffle=True, keep_first=1)}
    assert by_image.keys() == later.keys() and by_image != later
    for caption in plain:
        assert sorted(by_image[caption.split(",")[0]].split(", ")) == sorted(caption.split(", "))


@pytest.mark.parametrize("kind", [PriorTraining, LatentPriorTraining])
def test_tags_are_the_same_for_any_number_of_processes(kind, text):
    parts = [batch(kind, text, 4, process, 3, dropout=0.5) for process in range(3)]
    assert [caption for part in parts for caption in part] == batch(kind, text, 4, dropout=0.5)


@pytest.mark.slow
def test_a_stopped_training_on_shuffled_tags_ends_with_the_same_weights(tmp_path, monkeypatch):
    (tmp_path / "images").mkdir()
    for i in range(40):
        (tmp_path / "images" / f"{i:02}.png").write_bytes(encoded((6 * i, 0, 0), (32, 32)))
        (tmp_path / "images" / f"{i:02}.txt").write_text(f"shade {i}, red, plain, square, dark")

    def experiment(name: str, **tags: object) -> Experiment:
        """Its tokenizer is not trained, and its images are encoded."""
        values = copy.deepcopy(TINY) | {"name": name, "output_dir": str(tmp_path / "runs")}
        values["data"] = {
            "source": str(tmp_path / "images"),
            "image_size": 32,
            "val_fraction": 0.3,
            "tags": tags,
        }
        options = values["tokenizer"]["model"]
        options["image_size"] = 32
        made = from_dict(Experiment, values)
        tiny_tokenizer(**options).save_pretrained(made.folder / "tokenizer")
        pipeline.encode_dataset(made)
        return made

    def weights(one: Experiment) -> dict[str, torch.Tensor]:
        return load_file(pipeline.train_prior(one) / "model.safetensors")

    whole = weights(experiment("whole", shuffle=True, dropout=0.3))
    parts = experiment("parts", shuffle=True, dropout=0.3)
    step = Trainer.train_step

    def killed(self: Trainer, number: int, batch: object):
        if number == 5:
            raise KeyboardInterrupt
        return step(self, number, batch)  # type: ignore[arg-type]

    monkeypatch.setattr(Trainer, "train_step", killed)
    with pytest.raises(KeyboardInterrupt):
        pipeline.train_prior(parts)
    monkeypatch.setattr(Trainer, "train_step", step)
    resumed = weights(parts)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    plain = weights(experiment("plain"))
    assert any(not torch.equal(plain[name], whole[name]) for name in whole)
