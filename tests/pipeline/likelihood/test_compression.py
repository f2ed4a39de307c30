"""Lossless compression: what comes back, how many bits it takes, and what is refused."""

from __future__ import annotations

import math
import sys
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.inference.pipeline import TextToImagePipeline
from pipeline.likelihood import compression
from pipeline.likelihood.compression import CompressedImage
from stage1_tokenizer import HierarchicalOptions, ResidualOptions, to_model_range
from stage2_prior import code_log_likelihood
from stage2_prior.order import seeded_orders
from tests.helpers.pipelines import CAPTIONS, tiny_pipeline
from tests.helpers.tokenizers import tiny_tokenizer

LOGISTIC: dict[str, Any] = {"likelihood": "discretized_logistic", "likelihood_mixtures": 2}
MODELS: dict[str, dict[str, Any]] = {
    "vq, logistic": LOGISTIC,
    "residual, calibrated_l2": {
        "quantizer": "residual",
        "residual": ResidualOptions(depth=3),
        "likelihood": "calibrated_l2",
    },
    "hierarchical, logistic": {
        "quantizer": "hierarchical",
        "hierarchical": HierarchicalOptions(width=8),
        **LOGISTIC,
    },
    "gumbel, learned_l2": {"quantizer": "gumbel", "likelihood": "learned_l2"},
    "random order, logistic": {"any_order": True, **LOGISTIC},
}
EVERY_MODEL = pytest.mark.parametrize("kind", MODELS)


def compressing_pipe(**changes: Any) -> TextToImagePipeline:
    pipe = tiny_pipeline(**changes)
    pipe.prior.config.trained_with_caption_dropout = True
    return pipe


@pytest.fixture(scope="module")
def pipe() -> TextToImagePipeline:
    return compressing_pipe(**LOGISTIC)


@pytest.fixture
def image() -> Image.Image:
    """16x16, with the first and the last value, plain areas and noise. Wider than tall parts
    differ, so that rows and columns cannot be exchanged."""
    values = np.random.default_rng(0).normal(128, 40, (16, 16, 3)).clip(0, 255)
    values[:4] = 255
    values[4:6, :9] = 0
    return Image.fromarray(values.astype(np.uint8))


def compress(pipe, image, prompt="") -> CompressedImage:
    return compression.compress(pipe.tokenizer, pipe.prior, pipe.text, image, prompt)


def decompress(pipe, data) -> CompressedImage:
    return compression.decompress(pipe.tokenizer, pipe.prior, pipe.text, data)


def with_checksum(body: bytes) -> bytes:
    return body + zlib.crc32(body).to_bytes(4, "little")


@pytest.mark.parametrize("prompt", ["", "a red star"])
@EVERY_MODEL
def test_an_image_comes_back_bit_for_bit(kind, prompt, image):
    pipe = compressing_pipe(**MODELS[kind])
    sent = compress(pipe, image, prompt)
    received = decompress(pipe, sent.data)
    assert np.array_equal(np.asarray(received.image), np.asarray(image))
    assert received.prompt == prompt
    # The same numbers in both directions, to the last bit.
    assert (received.rate_bits, received.distortion_bits) == (sent.rate_bits, sent.distortion_bits)


@EVERY_MODEL
def test_size_is_within_1_percent_and_64_bits_of_the_claimed_bits(kind, image):
    compressed = compress(compressing_pipe(**MODELS[kind]), image, "a red star")
    assert abs(compressed.coded_bits - compressed.claimed_bits) <= (
        0.01 * compressed.claimed_bits + 64
    )
    # The rest is a header of 23 bytes, the prompt and a checksum.
    assert 8 * len(compressed.data) == compressed.coded_bits + 8 * (23 + len("a red star") + 4)
    assert compressed.bits_per_dimension == 8 * len(compressed.data) / 768


@EVERY_MODEL
def test_claimed_bits_are_those_of_the_stages(kind, image):
    pipe = compressing_pipe(**MODELS[kind])
    compressed = compress(pipe, image, "a red star")
    values = torch.from_numpy(np.array(image))[None]
    with torch.no_grad():
        output = pipe.tokenizer(to_model_range(values))
        nats = pipe.tokenizer.likelihood.exact_nll(values.permute(0, 3, 1, 2), output.parameters)
    assert compressed.distortion_bits == pytest.approx(float(nats) / math.log(2), rel=1e-5)
    codes = pipe.tokenizer.to_codes([image]).flatten(1)
    orders = seeded_orders([0], codes.shape[1]) if "random" in kind else None
    given = code_log_likelihood(pipe.prior, pipe.text.encode(["a red star"]), codes, orders)
    assert compressed.rate_bits == pytest.approx(-float(given.sum()) / math.log(2), rel=1e-5)


def test_values_of_next_to_no_probability_are_coded(image):
    pipe = compressing_pipe(likelihood="l2", likelihood_scale=0.008)
    compressed = compress(pipe, image)
    assert compressed.claimed_bits > 1e5 > compressed.coded_bits
    assert np.array_equal(np.asarray(decompress(pipe, compressed.data).image), np.asarray(image))


def test_a_prompt_is_stored_and_changes_the_bits_of_the_codes_alone(pipe, image):
    without, given = (compress(pipe, image, prompt) for prompt in ("", " a red star "))
    assert given.prompt == "a red star" and b"a red star" in given.data
    assert given.rate_bits != without.rate_bits
    assert given.distortion_bits == pytest.approx(without.distortion_bits)


def test_codes_are_encoded_in_the_precision_of_the_priors_codes(pipe, image, monkeypatch):
    precisions = []

    def encode(pixels):
        precisions.append(torch.is_autocast_enabled("cpu"))
        return torch.zeros(1, 4, 4, dtype=torch.long)

    monkeypatch.setattr(pipe.tokenizer, "encode", encode)
    for in_bf16 in (False, True):
        compression.compress(pipe.tokenizer, pipe.prior, pipe.text, image, codes_in_bf16=in_bf16)
    assert precisions == [False, True]


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "CMYK"])
def test_an_image_of_another_mode_is_refused(pipe, image, mode):
    with pytest.raises(ValueError, match=f"the image has mode {mode} .*; only RGB of 8 bits"):
        compress(pipe, image.convert(mode))


def test_an_rgb_image_with_a_transparent_colour_is_refused(pipe, image):
    image.info["transparency"] = (255, 255, 255)
    with pytest.raises(ValueError, match="has mode RGB with a transparent colour and would not"):
        compress(pipe, image)


def test_what_cannot_be_compressed_is_refused_in_one_line(pipe, image):
    undropped = tiny_pipeline(**LOGISTIC)
    for model, given, prompt, message in (
        (pipe, image.resize((12, 16)), "", "the image is 12x16 and this bundle compresses .*16x16"),
        (undropped, image, " ", "compressing without a prompt needs a prior trained with caption"),
        (pipe, image, "word " * 30, "needs .* tokens and there are .* text slots; shorten it$"),
        (pipe, image, "word " * 14_000, "the prompt has 69999 bytes; it must have at most 65535"),
        (
            compressing_pipe(likelihood="bernoulli"),
            image,
            "",
            "likelihood bernoulli gives some values of this image no probability; train a",
        ),
    ):
        with pytest.raises(ValueError, match=message) as error:
            compress(model, given, prompt)
        assert "\n" not in str(error.value)
    assert compress(undropped, image, "a red star").prompt == "a red star"


def test_gaussian_latents_are_refused(pipe, image):
    gaussian = tiny_tokenizer(quantizer="gaussian", **LOGISTIC)
    for call, given in ((compression.compress, image), (compression.decompress, b"")):
        with pytest.raises(ValueError, match=r"compression needs codes; .*quantizer=vq"):
            call(gaussian, pipe.prior, pipe.text, given)


def test_models_on_another_device_are_refused(image):
    pipe = compressing_pipe(**LOGISTIC)
    pipe.prior.to("meta")
    with pytest.raises(ValueError, match=r"on cpu and meta, .* by pipe\.to\('cpu'\)"):
        compress(pipe, image)


def test_a_missing_coder_is_named_with_the_command_that_installs_it(pipe, image, monkeypatch):
    monkeypatch.setitem(sys.modules, "constriction", None)
    with pytest.raises(ValueError, match=r"constriction; pip install 'mini-dalle\[compress\]'$"):
        compress(pipe, image)


def test_other_data_are_no_compressed_image(pipe):
    for data in (b"", b"mdc", b"\x89PNG\r\n\x1a\n" + bytes(100)):
        with pytest.raises(ValueError, match="it is no compressed image; `minidalle compress`"):
            decompress(pipe, data)


def test_truncated_and_damaged_data_are_refused(pipe, image):
    data = compress(pipe, image, "a red star").data
    damaged = [data[:length] for length in (4, 8, 22, 23, 27, 40, len(data) - 4, len(data) - 1)]
    damaged.append(data + b"\0")
    for position in range(4, len(data), 7):
        damaged.append(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
    for one in damaged:
        with pytest.raises(ValueError, match="it is truncated or damaged; copy it again"):
            decompress(pipe, one)


def test_another_format_and_another_size_are_refused(pipe, image):
    body = compress(pipe, image).data[:-4]
    with pytest.raises(ValueError, match="it has format 2, and this version reads 1"):
        decompress(pipe, with_checksum(body[:4] + b"\x02" + body[5:]))
    with pytest.raises(ValueError, match="an image of 32x16, and this bundle has images of 16x16"):
        decompress(pipe, with_checksum(body[:15] + b"\x20" + body[16:]))


@pytest.mark.parametrize("part", ["tokenizer", "prior", "text"])
def test_another_bundle_is_refused_by_its_fingerprint(image, part):
    pipe = compressing_pipe(**LOGISTIC)
    data = compress(pipe, image, "a red star").data
    with torch.no_grad():
        if part == "tokenizer":
            next(pipe.tokenizer.decoder.parameters()).mul_(1.001)
        elif part == "prior":
            next(pipe.prior.parameters()).mul_(1.001)
        else:
            pipe.text = compressing_pipe(captions=CAPTIONS[1:], **LOGISTIC).text
    with pytest.raises(ValueError, match=r"another bundle \(fingerprint \w{16}, .*with that one$"):
        decompress(pipe, data)


def test_another_bundle_that_takes_no_such_prompt_is_refused_by_its_fingerprint(pipe, image):
    undropped = tiny_pipeline(num_codes=11, **LOGISTIC)
    knows_no_words = compressing_pipe(captions=["zzz"], **LOGISTIC)
    for prompt, other in (("", undropped), (" ".join(CAPTIONS[:3]), knows_no_words)):
        with pytest.raises(ValueError, match="it was compressed with another bundle"):
            decompress(other, compress(pipe, image, prompt).data)


def test_a_machine_whose_numbers_differ_is_found_out(pipe, image, monkeypatch):
    data = compress(pipe, image).data
    tables = compression._Decoder.code
    monkeypatch.setattr(
        compression._Decoder,
        "code",
        lambda coder, log_p, symbols: tables(coder, 0.99 * log_p, symbols),
    )
    with pytest.raises(ValueError, match="this machine computes other probabilities"):
        decompress(pipe, data)


def test_words_that_no_image_has_are_refused(pipe, image):
    """For some of them the range coder finds no symbol, others decode to another image."""
    body = compress(pipe, image).data[:-4]
    for seed in range(20):
        words = np.random.default_rng(seed).bytes(400)
        with pytest.raises(ValueError, match="this machine computes other probabilities"):
            decompress(pipe, with_checksum(body[:23] + words))
