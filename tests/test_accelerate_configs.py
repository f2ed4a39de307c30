"""The shipped configurations of `accelerate launch`, by accelerate's own reader."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

FOLDER = Path(__file__).parents[1] / "configs" / "accelerate"
FILES = sorted(FOLDER.glob("*.yaml"))


def launched(file: Path):
    """What `accelerate launch` makes of a file, without starting anything."""
    arguments = ["--config_file", str(file), "--main_process_ip", "127.0.0.1", "-m", "pipeline.cli"]
    return launch_command_parser().parse_args(arguments)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_key_is_known_to_accelerate(file):
    config = load_config_from_file(str(file))  # raises for a key that it does not know
    known = vars(launched(file))
    assert all(key in known for key in config.fsdp_config or {}), (
        "a key of fsdp_config that `accelerate launch` has no option for"
    )
    kind = {"gpu-1": "NO", "ddp-8": "MULTI_GPU", "fsdp-8": "FSDP", "fsdp-4x8": "FSDP"}[file.stem]
    assert config.distributed_type == kind and not config.use_cpu and config.mixed_precision == "no"
    *machines, cards = (int(number) for number in file.stem.partition("-")[2].split("x"))
    assert (config.num_machines, config.num_processes) == (
        math.prod(machines),
        math.prod(machines) * cards,
    )
    # Its header has the command
    assert file.name in file.read_text().split("compute_environment")[0]


def test_removed_key_is_refused(tmp_path):
    path = tmp_path / "old.yaml"
    path.write_text((FOLDER / "ddp-8.yaml").read_text() + "no_such_key: 1\n")
    with pytest.raises(ValueError, match="no_such_key"):
        load_config_from_file(str(path))


def test_no_configuration_is_for_several_cpu_processes():
    """Accelerate would start a single one, without a word; torchrun starts them."""
    assert not any(
        yaml.safe_load(file.read_text())["distributed_type"] == "MULTI_CPU" for file in FILES
    )


@pytest.mark.parametrize("name", ["fsdp-8", "fsdp-4x8"])
def test_fsdp_configurations_are_recognised_by_training(name, monkeypatch):
    from pipeline.training import fsdp

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    arguments, _, _ = _validate_launch_command(launched(FOLDER / f"{name}.yaml"))
    for key, value in prepare_multi_gpu_env(arguments).items():
        monkeypatch.setenv(key, value)
    assert fsdp.fsdp_requested()
