"""Estimated seconds of the stages after the tokenizer."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest

from pipeline.config.load import load_experiment
from pipeline.stages import run, time_estimate
from pipeline.stages.time_estimate import StageSeconds, estimate_seconds


@pytest.fixture
def two_seconds_per_look(monkeypatch):
    clock = itertools.count(0.0, 2.0)
    monkeypatch.setattr(time_estimate, "time", SimpleNamespace(perf_counter=lambda: next(clock)))


def estimated(tiny_yaml, *arguments):
    return estimate_seconds(load_experiment(["--config", str(tiny_yaml), *arguments]))


def test_stages_take_their_steps_and_images_at_the_pace_of_the_trial(
    tiny_yaml, two_seconds_per_look
):
    """Two seconds per step, and per batch of images."""
    seconds = estimated(
        tiny_yaml,
        *("--prior.train.steps", "50", "--prior.train.compile", "off"),
        *("--encode.max_images", "96", "--encode.batch_size", "32"),
    )
    assert seconds == StageSeconds(encode=6.0, prior=100.0)
    shifted = ("--encode.augmentations_per_image", "2", "--encode.shift", "1")
    once, twice = (estimated(tiny_yaml, *more).encode for more in ((), shifted))
    assert twice == pytest.approx(2 * once)


def test_compiled_prior_is_estimated_from_plain_steps(tiny_yaml, two_seconds_per_look):
    arguments = ("--prior.train.steps", "50", "--prior.train.compile")
    plain, compiled = (estimated(tiny_yaml, *arguments, how).prior for how in ("off", "on"))
    assert compiled == pytest.approx(0.6 * plain + 20.0)


def test_nothing_is_tried_where_no_bar_shows_it(tiny_yaml, monkeypatch):
    monkeypatch.setattr(time_estimate, "shows_progress", lambda: False)
    monkeypatch.setattr(time_estimate, "sources_of", None)
    assert estimated(tiny_yaml) == StageSeconds()


def test_batch_that_does_not_split_is_left_to_the_training_to_refuse(tiny_yaml, monkeypatch):
    three = SimpleNamespace(num_processes=3)
    monkeypatch.setattr(time_estimate, "make_accelerator", lambda *options: three)
    assert estimated(tiny_yaml, "--prior.train.batch_size", "4") == StageSeconds()


def test_automatic_batch_size_has_no_estimate(tiny_yaml):
    assert estimated(tiny_yaml, "--prior.train.batch_size", "auto") == StageSeconds()


def test_run_gives_each_stage_the_time_of_those_after_it(tiny_yaml, monkeypatch):
    given = {}
    monkeypatch.setattr(run, "estimate_seconds", lambda experiment: StageSeconds(30.0, 400.0))
    monkeypatch.setattr(
        run,
        "train_tokenizer",
        lambda experiment, seconds_after: given.update(tokenizer=seconds_after),
    )
    monkeypatch.setattr(
        run, "encode_dataset", lambda experiment, seconds_after: given.update(encode=seconds_after)
    )

    def train_prior(experiment):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "train_prior", train_prior)
    with pytest.raises(KeyboardInterrupt):
        run.run(load_experiment(["--config", str(tiny_yaml)]))
    assert given == {"tokenizer": 430.0, "encode": 400.0}
