"""`TextToImagePipeline` on a GPU: sampling, editing, `best_of`, scores, bundles that change
device."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline import TextToImagePipeline
from stage1_tokenizer import TokenizerConfig, TokenizerModule
from stage2_prior import (
    Level,
    PriorConfig,
    PriorModule,
    SamplingOptions,
    StreamConfig,
    TextTokenizer,
)

pytestmark = pytest.mark.gpu


def random_pipe(device: torch.device) -> TextToImagePipeline:
    """A tokenizer and a prior for any order with random weights, the same each time: 32x32 images
    of 4x4 codes."""
    torch.manual_seed(0)
    sizes = {
        "image_size": 32,
        "downsample_factor": 8,
        "num_codes": 16,
        "width": 32,
        "encoder_depth": 1,
        "decoder_depth": 1,
        "code_dim": 4,
    }
    tokenizer = TokenizerModule(TokenizerConfig(**sizes)).eval()  # type: ignore[arg-type]
    text = TextTokenizer.train(["a red circle", "a blue square"], vocab_size=300, length=16)
    stream = StreamConfig(
        text_vocab_size=text.vocab_size,
        text_length=16,
        levels=(Level(grid=(4, 4), num_codes=16),),
        code_dim=4,
        any_order=True,
        pad_id=text.pad_id,
        start_id=text.start_id,
        end_id=text.end_id,
    )
    prior = PriorModule(PriorConfig(width=32, depth=2, heads=2), stream)
    prior.set_codebook(tokenizer.code_vectors)
    with torch.no_grad():
        for parameter in prior.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
    prior.config.trained_order, prior.config.trained_with_caption_dropout = "random", True
    pipe = TextToImagePipeline(tokenizer, prior.eval(), text, SamplingOptions())
    return pipe.to(device)


@pytest.fixture
def original() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8))


def same_images(found: list[Image.Image], expected: list[Image.Image]) -> None:
    """Up to a pixel value of 1, by which rounding differs."""
    for a, b in zip(found, expected, strict=True):
        assert np.abs(np.asarray(a, int) - np.asarray(b, int)).max() <= 1


def test_images_equal_those_of_the_cpu(device):
    prompts = ["a red circle", "a blue square"]
    expected, found = (
        random_pipe(where)(prompts, num_images_per_prompt=3, seed=2, guidance_scale=2)
        for where in (torch.device("cpu"), device)
    )
    assert torch.equal(found.codes, expected.codes) and found.codes.device.type == "cpu"
    same_images(found.images, expected.images)


def test_an_edit_keeps_what_is_outside_the_mask(device, original):
    mask = Image.new("L", (32, 32), 0)
    mask.paste(255, (9, 0, 20, 12))  # cells 1 and 2 of rows 0 and 1
    pipe = random_pipe(device)
    out = pipe.edit(original, mask, "a red circle", num_images=3, seed=1)
    kept = torch.ones(4, 4, dtype=torch.bool)
    kept[:2, 1:3] = False
    before = pipe.tokenizer.to_codes([original])[0].cpu()
    assert all(torch.equal(codes[kept], before[kept]) for codes in out.codes)
    outside = np.asarray(mask) == 0
    assert all(
        np.array_equal(np.asarray(image)[outside], np.asarray(original)[outside])
        for image in out.images
    )


def test_best_of_chooses_the_same_image_as_on_the_cpu(device):
    expected, found = (
        random_pipe(where)(["a red circle"] * 2, best_of=4, seed=1, guidance_scale=2)
        for where in (torch.device("cpu"), device)
    )
    assert found.seeds == expected.seeds and torch.equal(found.codes, expected.codes)


def test_scores_equal_those_of_the_cpu(device, original):
    expected, found = (
        random_pipe(where).score([original], ["a red circle"])
        for where in (torch.device("cpu"), device)
    )
    torch.testing.assert_close(
        found.log_likelihood.cpu(), expected.log_likelihood, rtol=1e-3, atol=1e-3
    )


def test_compiled_pipeline_samples_in_bf16(device):
    pipe = random_pipe(device).compile()
    out = pipe(["a red circle"], num_images_per_prompt=4, seed=0, guidance_scale=2)
    assert len(out.images) == 4 and out.log_likelihood.isfinite().all()


def test_a_bundle_saved_on_the_device_loads_on_the_cpu(device, tmp_path):
    pipe = random_pipe(device)
    pipe.save_pretrained(tmp_path / "bundle")
    loaded = TextToImagePipeline.from_pretrained(tmp_path / "bundle")
    options = {"num_images_per_prompt": 2, "seed": 3}
    assert torch.equal(
        loaded(["a red circle"], **options).codes, pipe(["a red circle"], **options).codes
    )
