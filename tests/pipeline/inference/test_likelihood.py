"""`pipe.likelihood`, `pipe.surprise` and `minidalle likelihood`."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.cli.main import main
from pipeline.inference.pipeline import TextToImagePipeline
from pipeline.likelihood.estimate import image_likelihood
from pipeline.likelihood.model import CodeModel
from tests.helpers.cli import fails
from tests.helpers.image_files import png_of_16_bits
from tests.helpers.pipelines import CAPTIONS, tiny_pipeline

RANDOM = np.random.default_rng(0).integers(0, 255, (3, 16, 16, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def pipe() -> TextToImagePipeline:
    return tiny_pipeline(likelihood="discretized_logistic", quantizer="gumbel")


@pytest.fixture(scope="module")
def folder(pipe, tmp_path_factory):
    """A bundle, and images 0.png, 1.png and 2.png next to it."""
    folder = tmp_path_factory.mktemp("likelihood")
    pipe.save_pretrained(folder / "bundle")
    for number, pixels in enumerate(RANDOM):
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def pil(count: int = 3) -> list[Image.Image]:
    return [Image.fromarray(pixels) for pixels in RANDOM[:count]]


def test_images_and_prompts_have_the_likelihood_of_their_pixels_and_ids(pipe):
    found = pipe.likelihood(pil(), CAPTIONS[:3], num_samples=3, seed=5)
    model = CodeModel(pipe.tokenizer, pipe.prior)
    ids = pipe.text.encode(CAPTIONS[:3])
    expected = image_likelihood(model, ids, torch.from_numpy(RANDOM), num_samples=3, seed=5)
    torch.testing.assert_close(found.nats, expected.nats)
    assert found.bound == "importance_weighted"
    one = pipe.likelihood(pil(1)[0], CAPTIONS[0], num_samples=3, seed=5)
    torch.testing.assert_close(one.nats, found.nats[:1], rtol=1e-5, atol=0)
    naive = pipe.likelihood(pil(), CAPTIONS[:3], method="naive")
    expected = image_likelihood(model, ids, torch.from_numpy(RANDOM), method="naive")
    torch.testing.assert_close(naive.nats, expected.nats)
    assert naive.bound == "naive"
    assert len(pipe.surprise(pil(), CAPTIONS[:3])) == 3


def test_a_grey_image_has_the_likelihood_of_its_rgb_pixels(pipe):
    grey = pil(1)[0].convert("L")
    found = pipe.likelihood([grey, grey.convert("RGB")], [CAPTIONS[0]] * 2)
    assert found.nats[0] == found.nats[1]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "I;16", "CMYK", "F"])
def test_an_image_without_8_bit_rgb_pixels_is_refused(pipe, mode):
    image = Image.new(mode, (16, 16))
    with pytest.raises(ValueError, match=f"^image 1 has mode {mode}.*of 8-bit RGB pixels; convert"):
        pipe.likelihood([pil(1)[0], image], CAPTIONS[:2])


def test_a_palette_with_transparency_is_refused(pipe):
    image = Image.new("P", (16, 16))
    image.info["transparency"] = 0
    with pytest.raises(ValueError, match=r"^the image has transparency"):
        pipe.likelihood(image, CAPTIONS[0])


def test_an_empty_prompt_needs_caption_dropout(pipe):
    with pytest.raises(ValueError, match="an empty prompt needs a prior trained with caption drop"):
        pipe.likelihood(pil(1), [""])


def test_the_command_shows_a_line_per_image_and_the_mean(folder, capsys):
    files = [str(folder / f"{number}.png") for number in range(3)]
    command = ["likelihood", "--bundle", str(folder / "bundle"), *files, "--prompt", CAPTIONS[0]]
    assert main(command) == 0
    heads, *rows, mean, meaning = capsys.readouterr().out.splitlines()
    assert heads.split() == ["nats", "bits/dim", "distortion", "rate"]
    assert [row.split()[0] for row in rows] == files and mean.split()[0] == "mean"
    assert meaning.startswith("nats per image: negative ELBO by one sample")
    pipe = TextToImagePipeline.from_pretrained(folder / "bundle")
    found = pipe.likelihood(pil(), [CAPTIONS[0]] * 3)
    shown = [[float(cell.replace(",", "")) for cell in row.split()[1:]] for row in rows]
    np.testing.assert_allclose([row[0] for row in shown], found.nats, atol=0.06)
    np.testing.assert_allclose([row[1] for row in shown], found.bits_per_dimension, atol=6e-4)
    sums = [row[2] + row[3] for row in shown]
    np.testing.assert_allclose(sums, found.nats, atol=0.11)


def test_the_command_writes_json_and_a_surprise_map_per_image(folder, tmp_path, capsys):
    files = [str(folder / f"{number}.png") for number in range(2)]
    prompts = ["--prompt", *CAPTIONS[:2]]
    given = ["--samples", "2", "--out", str(tmp_path / "out")]
    assert main(["likelihood", "--bundle", str(folder / "bundle"), *files, *prompts, *given]) == 0
    assert "importance-weighted bound of 2 samples" in capsys.readouterr().out
    written = json.loads((tmp_path / "out" / "likelihood.json").read_text())
    assert written["bound"] == "importance_weighted" and written["num_samples"] == 2
    assert [row["prompt"] for row in written["images"]] == CAPTIONS[:2]
    for row in written["images"]:
        assert row["distortion"] + row["rate"] > row["nats"]
        with Image.open(tmp_path / "out" / row["surprise_map"]) as drawn:
            assert drawn.width > 3 * 256


def test_naive_monte_carlo_has_no_rate(folder, capsys):
    command = ["likelihood", "--bundle", folder / "bundle", folder / "0.png", "--naive"]
    assert main([str(part) for part in [*command, "--samples", 4, "--prompt", CAPTIONS[0]]]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0].split() == ["nats", "bits/dim"]
    assert "Monte Carlo by 4 samples of the prior" in out


def test_wrong_input_is_one_line_and_writes_nothing(folder, tmp_path, capsys):
    image = folder / "0.png"
    Image.new("RGB", (16, 15)).save(tmp_path / "small.png")
    Image.new("RGBA", (16, 16)).save(tmp_path / "clear.png")
    (tmp_path / "no.png").write_text("no image")
    png_of_16_bits(tmp_path / "deep.png")
    bernoulli = tiny_pipeline(likelihood="bernoulli")
    bernoulli.save_pretrained(tmp_path / "bernoulli")
    prompt = ["--prompt", CAPTIONS[0]]
    for given, message, status in [
        ([tmp_path / "small.png", *prompt], "small.png is 16x15 and this prior draws 16x16", 1),
        ([tmp_path / "clear.png", *prompt], "clear.png has mode RGBA", 1),
        ([tmp_path / "deep.png", *prompt], "deep.png has 16 bits per value", 1),
        ([tmp_path / "no.png", *prompt], "no.png", 1),
        ([tmp_path / "missing.png", *prompt], "missing.png", 1),
        ([image, *prompt, "--samples", 0], "--samples is 0; it must be at least 1", 2),
        ([image, "--prompt", "a", "b"], "there are 1 images and 2 prompts", 2),
        ([], "the following arguments are required: files", 2),
        ([image], "an empty prompt needs a prior trained with caption dropout", 1),
        (
            [image, *prompt, "--bundle", tmp_path / "bernoulli"],
            "train a tokenizer with tokenizer.model.likelihood: discretized_logistic",
            1,
        ),
    ]:
        out = ["--out", tmp_path / "out"]
        fails(
            capsys,
            ["likelihood", "--bundle", folder / "bundle", *given, *out],
            message,
            status=status,
        )
        assert not (tmp_path / "out").exists()
    file = ["likelihood", "--bundle", folder / "bundle", image, *prompt, "--out", image]
    fails(capsys, file, "0.png is a file; name a folder for the surprise maps")
