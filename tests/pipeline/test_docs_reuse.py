"""The worked examples of docs/reuse.md run as they stand there, on the tiny run's tokenizer and
fewer images."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch

from stage1_tokenizer import ImageTokenizer

pytestmark = pytest.mark.slow

DOCUMENT = Path(__file__).parents[2] / "docs" / "reuse.md"
SMALLER = {"COUNT = 5000": "COUNT = 100", "STEPS = 600": "STEPS = 3", "range(10)": "range(150)"}


@pytest.fixture(scope="module")
def examples(finished_run, tmp_path_factory) -> dict:
    """What the document's lines leave behind, run in order in a folder with a run of shapes."""
    import os

    folder = tmp_path_factory.mktemp("reuse")
    shutil.copytree(finished_run[1] / "tokenizer", folder / "runs" / "shapes" / "tokenizer")
    code = "\n".join(re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL))
    for given, smaller in SMALLER.items():
        assert given in code
        code = code.replace(given, smaller)
    before, space = Path.cwd(), {}
    os.chdir(folder)
    try:
        torch.manual_seed(0)
        exec(compile(code, str(DOCUMENT), "exec"), space)
    finally:
        os.chdir(before)
    return space


def test_auto_model_loads_the_tokenizer(finished_run):
    from transformers import AutoModel

    assert isinstance(AutoModel.from_pretrained(finished_run[1] / "tokenizer"), ImageTokenizer)


def test_the_classifier_learns_from_codes(examples):
    assert examples["codes"].shape == (100, 16) and 0.0 <= examples["accuracy"] <= 1.0
    fitted = examples["classifier"](examples["places"][:80]).argmax(1)
    truth = examples["two_objects"][:80].float()
    most = max(float(truth.mean()), 1 - float(truth.mean()))
    assert (fitted == truth).float().mean() > most + 0.15  # than the commoner answer always


def test_language_model_samples_codes(examples):
    out, prompt = examples["out"], examples["prompt"]
    drawn = out[:, prompt.shape[1] :]
    first = examples["first_code"]
    assert drawn.shape == (1, 16) and first <= int(drawn.min()) <= int(drawn.max()) < first + 16
    assert [image.size for image in examples["drawn"]] == [(32, 32)]
    assert examples["language_model"].get_input_embeddings().num_embeddings == first + 16
