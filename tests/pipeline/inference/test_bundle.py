"""A bundle as files: what is read is what was written, and what is refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from pipeline.inference.bundle import Bundle, read_bundle, write_bundle
from pipeline.inference.pipeline import SamplingOptions, TextToImagePipeline
from tests.helpers.pipelines import CAPTIONS, tiny_pipeline


@pytest.fixture
def folder(tmp_path):
    pipe = tiny_pipeline()
    options = SamplingOptions(top_p=0.9, guidance_interval=(0.1, 0.8))
    write_bundle(
        tmp_path / "bundle",
        Bundle(pipe.tokenizer, pipe.prior, pipe.text, options, {"experiment": "tiny"}),
    )
    return tmp_path / "bundle"


def test_a_bundle_is_read_as_it_was_written(folder):
    pipe = tiny_pipeline()
    read = read_bundle(folder)
    assert read.tokenizer.fingerprint == pipe.tokenizer.fingerprint
    assert read.prior.fingerprint == pipe.prior.fingerprint
    assert torch.equal(read.text.encode(CAPTIONS), pipe.text.encode(CAPTIONS))
    assert read.defaults == SamplingOptions(top_p=0.9, guidance_interval=(0.1, 0.8))
    assert read.trained_on == {"experiment": "tiny"} and not read.tokenizer.training


def test_a_prior_that_was_rounded_for_sampling_is_not_saved(tmp_path, monkeypatch):
    """Its codebook and rotations were rounded too, and its weights in fp32 are gone."""
    pipe = tiny_pipeline()
    monkeypatch.setattr("pipeline.runtime.devices.uses_bf16", lambda *_: True)
    pipe.compile()
    for dtype in ("fp32", "bf16"):
        with pytest.raises(ValueError, match="load the bundle again to save it"):
            pipe.save_pretrained(tmp_path / "bundle", dtype=dtype)
    assert not (tmp_path / "bundle").exists()


def test_bf16_halves_a_bundle_that_is_loaded_in_fp32(tmp_path):
    """Its parameters are rounded, its buffers (codebook, rotations) are not; the pipeline that is
    saved stays as it is."""
    pipe = tiny_pipeline()
    before = {name: value.clone() for name, value in pipe.prior.state_dict().items()}
    for dtype in ("fp32", "bf16"):
        pipe.save_pretrained(tmp_path / dtype, dtype=dtype)
    half = read_bundle(tmp_path / "bf16")
    parameters = dict(half.prior.named_parameters())
    for name, value in half.prior.state_dict().items():
        if name in parameters:
            assert value.dtype == torch.float32
            assert torch.equal(value, before[name].to(torch.bfloat16).float()), name
        else:
            assert torch.equal(value, before[name]), name
    assert all(value.equal(before[name]) for name, value in pipe.prior.state_dict().items())
    sizes = [(tmp_path / d / "prior/model.safetensors").stat().st_size for d in ("fp32", "bf16")]
    saved = sum(2 * one.numel() for one in parameters.values())
    assert abs(sizes[0] - sizes[1] - saved) < 2_000  # of the header
    again = TextToImagePipeline(half.tokenizer, half.prior, half.text)
    again.save_pretrained(tmp_path / "again", dtype="bf16")
    assert read_bundle(tmp_path / "again").prior.fingerprint == half.prior.fingerprint
    assert again(["a red square"]).images[0].size == (half.tokenizer.size[::-1])


@pytest.mark.parametrize("part", ["tokenizer", "prior", "text_tokenizer"])
def test_each_part_of_another_bundle_is_refused(folder, tmp_path, part):
    tiny_pipeline(captions=["yellow moons"], num_codes=16).save_pretrained(tmp_path / "other")
    shutil.rmtree(folder / part)
    with pytest.raises(ValueError, match=f"has no {part}/"):
        read_bundle(folder)
    shutil.copytree(tmp_path / "other" / part, folder / part)
    with pytest.raises(ValueError, match=rf"bundle/{part} has fingerprint .* another bundle"):
        read_bundle(folder)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"format": 2}, "has bundle format 2, and this version reads 1"),
        ({"trained_on": None}, "does not describe a bundle"),
        ({"sampling": {"top_P": 1}}, r"unknown sampling options \['top_P'\]"),
    ],
)
def test_a_description_that_does_not_fit_is_refused(folder, changed, message):
    path = folder / "pipeline.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    with pytest.raises(ValueError, match=message):
        read_bundle(folder)
