"""Lossless compression of an image by both stages: its codes by the prior, then its pixels by the
likelihood. Knows bytes; opens no file and no bundle.

Legend: N codes of an image, n symbols, K choices of each, C channels, H W pixels.

The compressed image is a header, the prompt in UTF-8, the words of a range coder (32 bits each)
and a checksum of all of these. The range coder (Martin 1979) spends -log2 p bits on a symbol of
probability p. It codes, in this order:

    codes             p(code | prompt, earlier codes), in the prior's order
    side information  of the likelihood, if it has any
    values            p(value | codes), 16 rows at a time, channel after channel

A decoder needs the encoder's numbers to the last bit. Both directions are therefore one program
(`_code_image`), with the same shapes, in fp32, on one thread, nothing compiled. Another processor
or another version of torch may round differently. A checksum of the values detects it.
"""

from __future__ import annotations

import hashlib
import logging
import math
import struct
import zlib
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipeline.runtime.threads import FreeThreads
from stage1_tokenizer import TokenizerConfig, TokenizerModule, to_model_range
from stage1_tokenizer.pixels import from_pil, to_pil
from stage2_prior import PriorModule, TextTokenizer
from stage2_prior.order import seeded_orders

_log = logging.getLogger(__name__)
_MAGIC = b"mdci"
_FORMAT = 1
_HEADER = struct.Struct("<4sB8sHHHI")
"""Magic, format, fingerprint, height, width, bytes of the prompt, checksum of the values."""
_CHECKSUM = struct.Struct("<I")
_WORD = np.dtype("<u4")
_LONGEST_PROMPT = 2**16 - 1
_ROWS = 16
"""Rows of pixels whose tables of probabilities are computed at once: 8 MiB at a width of 64."""


@dataclass(frozen=True)
class CompressedImage:
    """An image, its compressed form, and the bits that the model claims for it: -log2 of its
    probability."""

    image: Image.Image
    data: bytes
    prompt: str
    """'' where there is none."""
    rate_bits: float
    """Of the codes."""
    distortion_bits: float
    """Of the values given the codes, with the likelihood's side information."""

    @property
    def claimed_bits(self) -> float:
        return self.rate_bits + self.distortion_bits

    @property
    def coded_bits(self) -> int:
        """Of the range coder's words: the data without header, prompt and checksums."""
        overhead = _HEADER.size + len(self.prompt.encode()) + _CHECKSUM.size
        return 8 * (len(self.data) - overhead)

    @property
    def bits_per_dimension(self) -> float:
        """Of all data, header and prompt included."""
        return (
            8 * len(self.data) / (self.image.width * self.image.height * len(self.image.getbands()))
        )


def compress(
    tokenizer: TokenizerModule,
    prior: PriorModule,
    text: TextTokenizer,
    image: Image.Image,
    prompt: str = "",
    *,
    codes_in_bf16: bool = False,
) -> CompressedImage:
    """Compresses an RGB image of the tokenizer's size, so that `decompress` returns it exactly. The
    models are on the CPU, in evaluation mode.

    A tokenizer of four channels takes RGBA images, too. Their premultiplied values come back
    exactly, and so does how they look. Straight colours that transparency hides come back
    otherwise, which is logged.

    The codes are the posterior's likeliest ones.

    Args:
        prompt: what the image shows, which is stored; '' codes without a prompt.
        codes_in_bf16: encode in bf16, if the prior was trained on such codes
            (`trained_on["codes_in_bf16"]`).

    Raises:
        ValueError: the latents are Gaussian, the image has another mode or size, the likelihood
            gives it no probability, the prompt is too long, there is no prompt and the prior was
            trained without caption dropout, or the package constriction is missing.
    """
    _check_models(tokenizer, prior)
    _check_image(image, tokenizer.own_config)
    prompt = prompt.strip()
    text_ids = _text_ids(prior, text, prompt)
    pixels = from_pil([image], channels=tokenizer.own_config.channels)
    values = pixels.permute(0, 3, 1, 2).long()
    if not tokenizer.likelihood.covers(values):
        raise ValueError(
            f"tokenizer.model.likelihood {tokenizer.own_config.likelihood} gives some values of "
            "this image no probability; train a tokenizer with tokenizer.model.likelihood: "
            "discretized_logistic"
        )
    with torch.autocast("cpu", torch.bfloat16, enabled=codes_in_bf16):
        codes = tokenizer.encode(to_model_range(pixels))
    coder = _Encoder()
    coded = _code_image(coder, tokenizer, prior, text_ids, _Content(codes.flatten(1), values))
    header = _HEADER.pack(
        _MAGIC,
        _FORMAT,
        _fingerprint(tokenizer, prior, text_ids),
        image.height,
        image.width,
        len(prompt.encode()),
        zlib.crc32(pixels.numpy().tobytes()),
    )
    body = header + prompt.encode() + coder.words().astype(_WORD).tobytes()
    data = body + _CHECKSUM.pack(zlib.crc32(body))
    returned = to_pil(pixels)[0]
    if image.mode == "RGBA" and image.tobytes() != returned.tobytes():
        _log.warning(
            "transparency hides a part of this image's colours, and that part is not kept: the "
            "premultiplied values come back without loss, the straight ones rounded"
        )
    return CompressedImage(returned, data, prompt, coded.rate_bits, coded.distortion_bits)


def decompress(
    tokenizer: TokenizerModule, prior: PriorModule, text: TextTokenizer, data: bytes
) -> CompressedImage:
    """The image that `compress` made `data` of, by the same models.

    Raises:
        ValueError: the data are no compressed image, truncated, damaged or of another format, were
            made by other models, or on a machine whose numbers differ; or the package constriction
            is missing.
    """
    _check_models(tokenizer, prior)
    stored = _read(data)
    height, width = tokenizer.size
    if (stored.height, stored.width) != (height, width):
        raise ValueError(
            f"it is an image of {stored.width}x{stored.height}, and this bundle has images of "
            f"{width}x{height}; decompress it with the bundle that compressed it"
        )
    # Another bundle may not know such prompts. Its fingerprint says so.
    text_ids = text.encode([stored.prompt], truncate=True)
    fingerprint = _fingerprint(tokenizer, prior, text_ids)
    if stored.fingerprint != fingerprint:
        raise ValueError(
            f"it was compressed with another bundle (fingerprint {stored.fingerprint.hex()}, and "
            f"this bundle has {fingerprint.hex()}); decompress it with that one"
        )
    coder = _Decoder(stored.words)
    try:
        coded = _code_image(coder, tokenizer, prior, text_ids, None)
    except _InvalidWords:
        raise ValueError(_OTHER_NUMBERS) from None
    pixels = coded.content.values.to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    if zlib.crc32(pixels.numpy().tobytes()) != stored.values_checksum:
        raise ValueError(_OTHER_NUMBERS)
    return CompressedImage(
        to_pil(pixels)[0], data, stored.prompt, coded.rate_bits, coded.distortion_bits
    )


_OTHER_NUMBERS = (
    "this machine computes other probabilities than the one that compressed it; decompress it with "
    "that machine's processor and version of torch"
)


@dataclass(frozen=True)
class _Content:
    """What is coded: all that a decoder must find."""

    codes: Tensor
    """(1,N) each counted within its level."""
    values: Tensor
    """(1,C,H,W) int64 in 0..255."""


@dataclass(frozen=True)
class _Coded:
    """What was coded, and its -log2 p."""

    content: _Content
    rate_bits: float
    distortion_bits: float


class _Coder:
    """Codes symbols in turn, in one of the two directions, and sums up their -log2 p."""

    def __init__(self) -> None:
        self._constriction = _import_constriction()
        # Of 2^24 units each symbol gets at least one, so that all can be coded. In exchange, K
        # symbols take K / 2^24 of the probability of the others.
        self._family = self._constriction.stream.model.Categorical(perfect=False)
        self.bits = 0.0

    def code(self, log_p: Tensor, symbols: Tensor | None) -> Tensor:
        """Codes symbols (n,) of log probabilities (n,K) in nats; returns them. A decoder finds
        them, and is given None."""
        symbols = self._code(log_p.exp().float().numpy(), symbols)
        self.bits -= float(log_p.gather(1, symbols[:, None]).sum()) / math.log(2)
        return symbols

    def _code(self, table: np.ndarray, symbols: Tensor | None) -> Tensor:
        raise NotImplementedError


class _Encoder(_Coder):
    def __init__(self) -> None:
        super().__init__()
        self._encoder = self._constriction.stream.queue.RangeEncoder()

    def _code(self, table: np.ndarray, symbols: Tensor | None) -> Tensor:
        assert symbols is not None
        self._encoder.encode(symbols.numpy().astype(np.int32), self._family, table)
        return symbols

    def words(self) -> np.ndarray:
        """What was coded so far, uint32."""
        return np.asarray(self._encoder.get_compressed())


class _Decoder(_Coder):
    def __init__(self, words: np.ndarray) -> None:
        super().__init__()
        self._decoder = self._constriction.stream.queue.RangeDecoder(words)

    def _code(self, table: np.ndarray, symbols: Tensor | None) -> Tensor:
        try:
            found = self._decoder.decode(self._family, table)
        except AssertionError as error:
            raise _InvalidWords from error
        return torch.from_numpy(found).long()


class _InvalidWords(Exception):
    """No symbol has these words under these probabilities."""


def _import_constriction() -> ModuleType:
    try:
        import constriction
    except ImportError:
        raise ValueError(
            "compression needs the package constriction; pip install 'mini-dalle[compress]'"
        ) from None
    return constriction


@torch.inference_mode()
def _code_image(
    coder: _Coder,
    tokenizer: TokenizerModule,
    prior: PriorModule,
    text_ids: Tensor,
    content: _Content | None,
) -> _Coded:
    """Codes one image: encodes its `content`, or decodes where that is None. Captions (1,T)."""
    given_codes = content.codes if content is not None else None
    given_values = content.values if content is not None else None
    with FreeThreads(1), torch.autocast("cpu", enabled=False):
        codes = _code_codes(coder, prior, text_ids, given_codes)
        rate_bits = coder.bits
        values = _code_values(coder, tokenizer, codes, given_values)
    return _Coded(_Content(codes, values), rate_bits, coder.bits - rate_bits)


def _code_codes(
    coder: _Coder, prior: PriorModule, text_ids: Tensor, given: Tensor | None
) -> Tensor:
    """Codes (1,N) one after another, by a cache. A prior trained on random orders has one of
    them, the same for every image."""
    stream = prior.stream
    order = torch.arange(stream.image_length)[None]
    if prior.config.trained_order == "random":
        order = seeded_orders([0], stream.image_length)
    codes = torch.zeros_like(order)
    fed = stream.text_first(text_ids, codes, order)
    cache = prior.new_cache(1)
    first = 0
    for step, position in enumerate(order[0].tolist()):
        # The text, then one code per step.
        new = slice(first, stream.text_length + step)
        logits = prior(
            fed.ids[:, new], fed.position_ids[:, new], cache, targets=fed.targets[:, new]
        ).image[:, -1]
        low, high = stream.level_edges[:, position].tolist()
        log_p = logits[:, low:high].double().log_softmax(1)
        here = torch.tensor([position])
        codes[0, here] = coder.code(log_p, None if given is None else given[0, here])
        first = new.stop
        if first < fed.ids.shape[1]:
            fed.ids[:, first] = stream.code_ids(codes[:, here], here)[:, 0]
    return codes


def _code_values(
    coder: _Coder, tokenizer: TokenizerModule, codes: Tensor, given: Tensor | None
) -> Tensor:
    """Values (1,C,H,W) given the codes (1,N)."""
    levels = tokenizer.layout
    grid = codes.unflatten(1, levels[0].grid) if len(levels) == 1 else codes
    parameters = tokenizer.code_parameters(grid)
    likelihood = tokenizer.likelihood
    if likelihood.side_choices > 1:
        side = None if given is None else likelihood.side_information(given, parameters)
        equal = torch.full((1, likelihood.side_choices), -likelihood.side_nats)
        likelihood = likelihood.given(coder.code(equal.double(), side))
    height, width = tokenizer.size
    values = torch.zeros(1, tokenizer.own_config.channels, height, width, dtype=torch.long)
    for top in range(0, height, _ROWS):
        rows = slice(top, top + _ROWS)
        for channel in range(values.shape[1]):
            # Not `given`, of which a decoder knows no later channels.
            log_p = likelihood.log_probabilities(
                parameters[:, :, rows], values[:, :, rows], channel
            )
            symbols = None if given is None else given[:, channel, rows].flatten()
            found = coder.code(log_p.flatten(0, -2), symbols)
            values[:, channel, rows] = found.view(1, -1, width)
    return values


def _check_models(tokenizer: TokenizerModule, prior: PriorModule) -> None:
    tokenizer.require_codes("compression")
    devices = {tokenizer.device.type, prior.device.type}
    if devices != {"cpu"}:
        raise ValueError(
            f"the models are on {' and '.join(sorted(devices))}, and compression computes on the "
            "CPU, where equal programs give equal numbers; move both there, by pipe.to('cpu')"
        )


def _check_image(image: Image.Image, config: TokenizerConfig) -> None:
    modes = ["RGB", "RGBA"] if config.channels == 4 else ["RGB"]
    if image.mode not in modes or "transparency" in image.info:
        mode = image.mode if image.mode not in modes else "RGB with a transparent colour"
        raise ValueError(
            f"the image has mode {mode} and would not come back as it is; only "
            f"{' and '.join(modes)} of 8 bits can be compressed, convert it first"
        )
    height, width = config.size
    if image.size != (width, height):
        raise ValueError(
            f"the image is {image.width}x{image.height} and this bundle compresses images of "
            f"{width}x{height}; crop or resize it first"
        )


def _text_ids(prior: PriorModule, text: TextTokenizer, prompt: str) -> Tensor:
    """(1,T)"""
    if not prompt and not prior.config.trained_with_caption_dropout:
        raise ValueError(
            "compressing without a prompt needs a prior trained with caption dropout, and this "
            "one was not; give a prompt"
        )
    if len(prompt.encode()) > _LONGEST_PROMPT:
        raise ValueError(
            f"the prompt has {len(prompt.encode())} bytes; it must have at most {_LONGEST_PROMPT}"
        )
    (needed,) = text.lengths([prompt])
    if needed > text.length:
        raise ValueError(
            f"the prompt needs {needed} tokens and there are {text.length} text slots; shorten it"
        )
    return text.encode([prompt])


def _fingerprint(tokenizer: TokenizerModule, prior: PriorModule, text_ids: Tensor) -> bytes:
    """8 bytes that change with each model and with the ids (1,T) of the prompt, on which the
    probabilities depend."""
    models = f"{tokenizer.fingerprint}/{prior.fingerprint}/{text_ids.tolist()}"
    return hashlib.sha256(models.encode()).digest()[:8]


@dataclass(frozen=True)
class _Stored:
    """The parts of a compressed image."""

    fingerprint: bytes
    height: int
    width: int
    prompt: str
    values_checksum: int
    words: np.ndarray


def _read(data: bytes) -> _Stored:
    if not data.startswith(_MAGIC):
        raise ValueError("it is no compressed image; `minidalle compress` makes one")
    body, checksum = data[: -_CHECKSUM.size], data[-_CHECKSUM.size :]
    if len(body) < _HEADER.size or checksum != _CHECKSUM.pack(zlib.crc32(body)):
        raise ValueError("it is truncated or damaged; copy it again, or compress the image again")
    _, form, fingerprint, height, width, prompt_size, values_checksum = _HEADER.unpack_from(body)
    if form != _FORMAT:
        raise ValueError(
            f"it has format {form}, and this version reads {_FORMAT}; use the one that wrote it"
        )
    rest = body[_HEADER.size :]
    words = np.frombuffer(rest[prompt_size:], _WORD).astype(np.uint32)
    prompt = rest[:prompt_size].decode()
    return _Stored(fingerprint, height, width, prompt, values_checksum, words)
