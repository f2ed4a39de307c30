"""Tokenizers of several levels, and with other codes than vq, through both stages."""

from __future__ import annotations

import pytest
import torch

from pipeline import TextToImagePipeline
from pipeline.cli.main import main
from pipeline.data.codes.dataset import CodesDataset, read_manifest

pytestmark = pytest.mark.slow

CHANGES = {
    "hierarchical": [
        "--tokenizer.model.quantizer",
        "hierarchical",
        "--tokenizer.model.hierarchical.width",
        "16",
    ],
    "uneven": [
        "--tokenizer.model.quantizer",
        "hierarchical",
        "--tokenizer.model.hierarchical.width",
        "16",
        "--tokenizer.model.hierarchical.coarse_codes",
        "[6]",
    ],
    "residual": [
        "--tokenizer.model.quantizer",
        "residual",
        "--tokenizer.model.residual.depth",
        "3",
    ],
    "binary": [
        "--tokenizer.model.quantizer",
        "binary",
        "--tokenizer.objective.temperature_start",
        "0.5",
    ],
    "fsq": ["--tokenizer.model.quantizer", "fsq", "--tokenizer.model.fsq.levels", "[4, 4]"],
}
CODES = {
    "hierarchical": [4, 16],
    "uneven": [4, 16],
    "residual": [16, 16, 16],
    "binary": [16],
    "fsq": [16],
}


@pytest.mark.parametrize("quantizer", CHANGES)
def test_every_quantizer_runs_all_stages(quantizer, tiny_yaml, tmp_path, capsys):
    arguments = ["--config", str(tiny_yaml), "--precision", "fp32", *CHANGES[quantizer]]
    assert main(["run", *arguments]) == 0, capsys.readouterr().err
    folder = tmp_path / "runs" / "tiny"
    levels = read_manifest(folder / "codes")["levels"]
    assert [level["grid"][0] * level["grid"][1] for level in levels] == CODES[quantizer]
    assert CodesDataset(folder / "codes", "train").codes([0, 1]).shape == (2, sum(CODES[quantizer]))
    pipe = TextToImagePipeline.from_pretrained(folder / "bundle")
    out = pipe(["a red circle"], num_images_per_prompt=3)
    assert [image.size for image in out.images] == [(32, 32)] * 3
    drawn = out.codes.flatten(1)
    assert drawn.shape == (3, sum(CODES[quantizer])) and 0 <= drawn.min() <= drawn.max() < 16
    assert torch.equal(pipe("a red circle", num_images_per_prompt=3, batch_size=2).codes, out.codes)
    assert main(["evaluate", *arguments, "--max-images", "10"]) == 0
    metrics = capsys.readouterr().out
    assert ("codebook_usage_level_2" in metrics) == (len(CODES[quantizer]) > 1)
    parts = ("elbo_reconstruction", "mutual_information", "marginal_kl_fixed_prior")
    assert all((part in metrics) == (quantizer == "binary") for part in parts)
