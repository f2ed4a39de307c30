"""The time that a training will take is said before it begins, by steps that leave no trace."""

from __future__ import annotations

import math
import re
import signal
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from pipeline.cli.main import main
from pipeline.config.train import TrainConfig
from pipeline.runtime.signals import Stopped
from pipeline.training import rehearsal
from pipeline.training import trainer as training
from pipeline.training.monitoring import Pace
from pipeline.training.prefetch import Ahead
from pipeline.training.rehearsal import Rehearsed, duration, rehearse
from pipeline.training.snapshot import as_they_were
from pipeline.training.task import Task
from pipeline.training.trainer import fit
from stage1_tokenizer import ImageTokenizer, ObjectiveConfig, TokenizerConfig, TokenizerObjective, VectorOptions
from stage1_tokenizer.options import AdversaryOptions
from stage2_prior import PriorObjective
from tests.helpers.signals import send
from tests.pipeline.training.test_memory_estimate import prior


def judged(**codes: object) -> TokenizerObjective:
    """Everything that moves in a step: codes that k-means begins and that restart, and from step 12 on an adversary."""
    torch.manual_seed(0)
    sizes = {"image_size": 32, "factor": 8, "width": 32, "encoder_depth": 1, "decoder_depth": 1, "code_dim": 4, "num_codes": 32}
    vq = VectorOptions(kmeans_iterations=2, restart_below=0.9, restart_every=1, **codes)
    adversary = AdversaryOptions(weight=0.1, start=12, width=16, layers=1, lecam=0.01)
    return TokenizerObjective(ImageTokenizer(TokenizerConfig(vq=vq, **sizes)).train(), ObjectiveConfig(adversary=adversary))


def half_captions() -> PriorObjective:
    """Every other batch has its codes first."""
    plain = prior(caption_dropout=0.3)
    return PriorObjective(plain.prior, plain.config, image_first=0.5)


def sampled_pictures(step: int) -> torch.Tensor:
    return torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(step))


def sampled_pairs(step: int) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(step)  # batches are made in a thread: torch's own random state is the training's
    return {"text_ids": torch.randint(3, 300, (4, 12), generator=random), "codes": torch.randint(0, 64, (4, 64), generator=random)}


STAGES = {
    "tokenizer": (judged, sampled_pictures, "nll", [12]),
    "learned codes": (lambda: judged(codebook="gradient"), sampled_pictures, "nll", [12]),
    "prior": (half_captions, sampled_pairs, "nats_per_code", []),
}


def train(stage: str, folder: Path, *, progress: bool, **options: object) -> None:
    make, batch, best, begins = STAGES[stage]
    objective = make()
    task = Task(objective, batch, lambda: [batch(10**6)], best, dict, begins=begins)
    config = TrainConfig(**{"steps": 44, "batch_size": 4, "evaluate_every": 100, "checkpoint_every": 8} | options)
    fit(task, config, Accelerator(), folder, seed=1, compile_networks=False, bf16=False, label=stage, progress=progress)


def kept(folder: Path) -> dict[str, bytes]:
    last = max((folder / "checkpoints").iterdir(), key=lambda path: int(path.name.removeprefix("step-")))
    return {path.name: path.read_bytes() for path in last.iterdir()}


@pytest.mark.parametrize("stage", STAGES)
def test_a_rehearsal_leaves_no_trace(tmp_path, monkeypatch, capsys, stage):
    """Neither before a training nor before the rest of one, in weights, statistics of codes, moments (of both kinds) or averages; nor where
    steps may be skipped."""
    train(stage, tmp_path / "silent", progress=False, optimizer="muon", skip_nonfinite=1)
    assert "about" not in capsys.readouterr().out
    take = training._Training.take

    def stops(self, seed, step, batch, finite):
        scalars = take(self, seed, step, batch, finite)
        if step == 9 and finite.__class__.__name__ == "partial":
            send(signal.SIGTERM)
        return scalars

    monkeypatch.setattr(training._Training, "take", stops)
    monkeypatch.setattr(rehearsal, "_STEPS_A_TIMED_ONE", 5)  # the rest of it is rehearsed too
    with pytest.raises(Stopped):
        train(stage, tmp_path / "said", progress=True, optimizer="muon", skip_nonfinite=1)
    monkeypatch.setattr(training._Training, "take", take)
    train(stage, tmp_path / "said", progress=True, optimizer="muon", skip_nonfinite=1)
    out = capsys.readouterr().out
    later = "" if stage == "prior" else " s from step 12 on"
    assert re.search(rf"{stage}: about \d+ seconds for 44 steps \(\S+ s each(, \S+)?{later}, beside evaluating\)", out), out
    assert re.search(rf"going on from .*step-11 (.*\n)+{stage}: about .* for 33 steps", out), out
    assert kept(tmp_path / "said") == kept(tmp_path / "silent")


def test_a_signal_before_the_first_step_ends_it(tmp_path, monkeypatch):
    batches = iter(range(100))
    monkeypatch.setitem(STAGES, "prior", (prior, lambda step: (next(batches) == 2 and send(signal.SIGINT), sampled_pairs(step))[1], "", []))
    with pytest.raises(Stopped, match=r"stopped by Ctrl-C before step 0 of 44 \(prior\), which loses nothing"):
        train("prior", tmp_path, progress=True)
    assert not (tmp_path / "checkpoints").exists()


def test_what_is_not_finite_is_the_trainings_to_say(tmp_path, monkeypatch, capsys):
    def broken():
        objective = prior()
        with torch.no_grad():
            next(objective.prior.parameters()).fill_(math.nan)
        return objective

    monkeypatch.setitem(STAGES, "prior", (broken, *STAGES["prior"][1:]))
    with pytest.raises(FloatingPointError, match="not finite at step 0"):
        train("prior", tmp_path, progress=True)
    assert "for 44 steps" in capsys.readouterr().out


def test_batches_that_were_there_are_not_counted_as_waited_for(tmp_path, monkeypatch):
    """Three, two and two steps were rehearsed, and one batch more was under way."""
    restarted = []

    class Seen(Pace):
        def restart(self) -> None:
            restarted.append(getattr(self, "steps", None))
            super().restart()

    monkeypatch.setattr(training, "Pace", Seen)
    train("prior", tmp_path, progress=True, log_every=100, checkpoint_every=100)
    assert restarted.count(8) == 2  # of the whole training and of what is logged next


def test_what_is_taken_back_leaves_no_gradients_and_no_moments():
    layer, frozen = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2).requires_grad_(False)
    optimizer, other = torch.optim.AdamW(layer.parameters()), torch.ones(3)
    before = [p.clone() for p in layer.parameters()]
    with as_they_were([layer, frozen], [optimizer], [other]):
        layer(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        other += 1
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, layer.parameters(), strict=True))
    assert not optimizer.state and other.tolist() == [1, 1, 1]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_time_is_foretold_by_the_steps_that_do_not_compile(monkeypatch):
    """40 s to compile, 2 s a step, and 5 s from step 300 on; another program takes 30 s once."""
    clock, taken, told = Clock(), [], []
    monkeypatch.setattr("pipeline.training.rehearsal.time.perf_counter", clock)

    def step(number: int, batch: int) -> None:
        taken.append((number, batch))
        clock.now += 40 if number in (100, 300) else 30 if len(taken) == 6 else 3.25 if number >= 300 else 2

    with Ahead(lambda step: step, 400) as ahead:
        foretold = rehearse(step, ahead, 100, 400, [50, 300, 400], nullcontext, lambda own: told.append(own) or own)
    assert foretold == Rehearsed(((100, 2.0), (300, 3.25)), 400) and foretold.seconds == 200 * 2 + 100 * 3.25
    assert foretold.line() == "about 12 minutes for 300 steps (2 s each, 3.25 s from step 300 on, beside evaluating)"
    # The same batches where more takes part, and no more steps than half a minute has: one that settles, then 10 and 9.
    assert taken == [(100 + i, 100 + i) for i in range(14)] + [(300 + i, 100 + i) for i in range(12)]
    assert told == [2.0, 3.25]


def test_the_slowest_process_decides_how_many_steps_are_timed():
    taken = []
    with Ahead(lambda step: step, 400) as ahead:
        assert rehearse(lambda number, batch: taken.append(number), ahead, 0, 400, [], nullcontext, lambda own: 100.0)
    assert taken == [0, 1, 2, 3]


def test_few_steps_are_not_rehearsed():
    with Ahead(lambda step: step, 39) as ahead:
        assert rehearse(lambda number, batch: pytest.fail("taken"), ahead, 0, 39, [], nullcontext, max) is None
    taken = []
    with Ahead(lambda step: step, 40) as ahead:
        assert rehearse(lambda number, batch: taken.append((number, batch)), ahead, 0, 40, [38], nullcontext, lambda own: 0.1)
    assert taken == [(i, i) for i in range(7)] + [(min(38 + i, 39), i) for i in range(7)]


def test_batches_are_made_once_and_in_order_and_one_ahead():
    made = []
    with Ahead(lambda step: made.append(step) or -step, 5) as ahead:
        assert [ahead.take(step, keep=True) for step in (0, 1, 2)] == [0, -1, -2]
        assert [ahead.take(step) for step in range(4)] == [0, -1, -2, -3]
        assert ahead.made == 1
        assert ahead.take(4) == -4
    assert made == list(range(5))


def test_times_in_words():
    assert [duration(s) for s in (12, 100, 700, 10000)] == ["12 seconds", "1.7 minutes", "12 minutes", "2.8 hours"]


def test_an_adversary_of_a_run_is_foretold(tiny_yaml, capsys):
    adversary = "--tokenizer.objective.adversary"
    options = [f"{adversary}.weight", "0.1", f"{adversary}.start", "10", f"{adversary}.width", "16", "--tokenizer.train.steps", "40"]
    assert main(["train-tokenizer", "--config", str(tiny_yaml), *options]) == 0
    assert re.search(r"tokenizer: about \d+ seconds for 40 steps \(\S+ s each, \S+ s from step 10 on, beside", capsys.readouterr().out)
