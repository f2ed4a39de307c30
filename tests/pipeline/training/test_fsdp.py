"""FSDP on CPUs: a prior that is sharded over 2 processes, then unsharded on 1, then sharded over 4
ends as on one process."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file

from pipeline.cli.main import main
from stage2_prior import PriorModule
from tests.helpers.launch import CHECK, launch, settings

pytestmark = pytest.mark.distributed

CUT = """
import torch
from torch.distributed.tensor import DTensor
from pipeline.training import fsdp
init = fsdp.FSDPModelState.__init__
def counted(self, *given):
    init(self, *given)
    cut = [p for p in self.networks["prior"].parameters() if isinstance(p, DTensor)]
    here = sum(p.to_local().numel() for p in cut)
    assert len(cut) == len(list(self.networks["prior"].parameters()))
    assert here < 0.6 * sum(p.numel() for p in cut)
    print("[cut]")
fsdp.FSDPModelState.__init__ = counted
"""
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


OPTIONS = [
    "--prior.objective.caption_dropout",
    "0",
    "--prior.train.schedule",
    "wsd",
    "--prior.train.min_lr_ratio",
    "1",
    "--prior.train.save_total_limit",
    "9",
    "--prior.train.save_best",
    "true",
    "--prior.train.activation_checkpointing",
    "true",
]


@pytest.fixture
def command(by_processes, tmp_path) -> list[str]:
    for name in ("alone", "cut"):
        for part in ("tokenizer", "codes"):
            shutil.copytree(by_processes / "runs" / "by1" / part, tmp_path / "runs" / name / part)
    return ["train-prior", *settings(tmp_path), *OPTIONS]


def same(folder, file: str, atol: float) -> None:
    alone, cut = (
        load_file(folder / "runs" / name / "prior" / f"{file}.safetensors")
        for name in ("alone", "cut")
    )
    assert alone.keys() == cut.keys()
    for key, value in alone.items():
        torch.testing.assert_close(
            cut[key], value, atol=atol, rtol=1e-4, msg=lambda m, k=f"{file} {key}": f"{k}: {m}"
        )


def test_checkpoints_load_on_another_number_of_processes(command, tmp_path):
    assert main([*command, "--name", "alone", "--prior.train.steps", "8"]) == 0
    for processes, steps in ((2, "4"), (1, "6"), (4, "8")):
        given = [*command, "--name", "cut", "--prior.train.steps", steps]
        if processes == 1:
            assert main(given) == 0
        else:
            said = launch(tmp_path, processes, *given, script=CUT + CHECK, **FSDP)
            assert said.count("[cut]") == processes
    for file in ("step-4/weights", "step-4/ema", "step-8/weights", "step-8/optimizer"):
        same(tmp_path, f"checkpoints/{file}", 1e-5)
    same(tmp_path, "model", 1e-5)
    PriorModule.from_pretrained(tmp_path / "runs" / "cut" / "prior")


def test_muon_gathers_sharded_matrices(command, tmp_path):
    command += ["--prior.train.optimizer", "muon", "--prior.train.steps", "4"]
    assert main([*command, "--name", "alone"]) == 0
    launch(tmp_path, 2, *command, "--name", "cut", script=CUT + CHECK, **FSDP)
    for file in ("weights", "optimizer"):
        same(tmp_path, f"checkpoints/step-4/{file}", 2e-3)  # its own arithmetic is in bf16


def test_tokenizer_is_not_sharded(by_processes, tmp_path):
    """Under FSDP, which is for priors, as without it."""
    options = [
        "--tokenizer.model.num_codes",
        "64",
        "--tokenizer.model.vq.dead_code_threshold",
        "0.9",
        "--tokenizer.model.vq.dead_code_check_every",
        "2",
        "--tokenizer.train.log_every",
        "1",
    ]
    launch(tmp_path, 2, "train-tokenizer", *settings(tmp_path), *options, script=CHECK, **FSDP)
    cut, given = (
        load_file(f / "tokenizer" / "model.safetensors")
        for f in (tmp_path / "runs" / "tiny", by_processes / "runs" / "by2")
    )
    assert all(torch.equal(value, given[key]) for key, value in cut.items())
