"""Published weights fit our modules, without a missing or unexpected key, and compute the same.

The state dicts are written down here from the published architectures: full size without memory,
or small with numbers. The arithmetic is a plain forward pass that shares nothing with the networks
of the package."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from stage1_tokenizer import TokenizerModule
from stage1_tokenizer.convert_checkpoints import (
    align_state_dict,
    convert,
    load_external,
    read_weights,
)
from tests.helpers.published_weights import Weights, dvae, vqgan


def full_size(
    multipliers: tuple[int, ...], codes: int, *, latent: int = 256, dim: int = 256, **options
) -> Weights:
    return vqgan(
        channels=128,
        multipliers=multipliers,
        blocks=2,
        latent=latent,
        dim=dim,
        codes=codes,
        meta=True,
        **options,
    )


F16 = (1, 1, 2, 2, 4)
PUBLISHED = {
    "OpenAI dVAE": (
        "openai-dvae",
        lambda: dvae(base=256, codes=8192, first=128, meta=True),
        97.6,
        (8, 8192),
    ),
    "VQGAN f16 1024": ("taming-vqgan", lambda: full_size(F16, 1024), None, (16, 1024)),
    "VQGAN f16 16384": ("taming-vqgan", lambda: full_size(F16, 16384), None, (16, 16384)),
    "Gumbel VQGAN f8": (
        "taming-gumbel",
        lambda: full_size((1, 1, 2, 4), 8192, gumbel=True),
        None,
        (8, 8192),
    ),
    "VQGAN f8": (
        "taming-vqgan",
        lambda: full_size((1, 2, 2, 4), 16384, latent=4, dim=4, attention=False),
        None,
        (8, 16384),
    ),
    "LlamaGen VQ-8": (
        "llamagen",
        lambda: full_size((1, 2, 2, 4), 16384, dim=8, style="llamagen"),
        70,
        (8, 16384),
    ),
    "LlamaGen VQ-16": (
        "llamagen",
        lambda: full_size(F16, 16384, dim=8, style="llamagen"),
        72,
        (16, 16384),
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_architectures_fit_without_a_missing_or_unexpected_key(name):
    """At full size; millions of parameters as the papers give them (the dVAE's files hold 53.8 and
    43.8)."""
    kind, build, millions, (factor, codes) = PUBLISHED[name]
    config, weights = convert(build(), kind, name)
    with torch.device("meta"):
        tokenizer = TokenizerModule(config)
    own = tokenizer.state_dict()
    whole = align_state_dict(config, weights, own, name)
    assert set(whole) == set(own) and all(whole[key].shape == own[key].shape for key in own)
    assert (config.downsample_factor, config.num_codes, config.image_size) == (factor, codes, 256)
    assert tokenizer.grid == (256 // factor, 256 // factor)
    if millions is not None:
        count = sum(p.numel() for n, p in weights.items() if not n.endswith("codebook_used")) / 1e6
        assert count == pytest.approx(millions, abs=1.0)


def conv(
    weights: Weights, name: str, x: Tensor, names: tuple[str, str] = ("weight", "bias"), **options
) -> Tensor:
    weight, bias = (weights[f"{name}.{part}"] for part in names)
    return F.conv2d(x, weight, bias, **({"padding": weight.shape[-1] // 2} | options))


def dvae_walk(weights: Weights, part: str, x: Tensor, blocks: int, kernel_gain: float) -> Tensor:
    """All groups of one side of the dVAE."""
    wb = ("w", "b")
    for group in (1, 2, 3, 4):
        for i in range(blocks):
            stem = f"{part}.blocks.group_{group}.block_{i + 1}"
            inner = x
            for layer in (1, 2, 3, 4):
                inner = conv(weights, f"{stem}.res_path.conv_{layer}", inner.relu(), wb)
            carried = (
                conv(weights, f"{stem}.id_path", x, wb) if f"{stem}.id_path.w" in weights else x
            )
            x = carried + kernel_gain * inner
        if group < 4:
            x = (
                F.max_pool2d(x, 2)
                if part == "encoder"
                else F.interpolate(x, scale_factor=2, mode="nearest")
            )
    return conv(weights, f"{part}.blocks.output.conv", x.relu(), wb)


@pytest.fixture
def pixels() -> Tensor:
    return torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(5)) * 2 - 1


@pytest.mark.parametrize("blocks", [1, 2])
def test_dvae_equals_a_plain_forward_pass_of_its_weights(tmp_path, pixels, blocks):
    weights = dvae(base=16, codes=40, first=12, blocks=blocks)
    for part in ("encoder", "decoder"):
        own = {k.removeprefix(f"{part}."): v for k, v in weights.items() if k.startswith(part)}
        save_file(own, tmp_path / f"{part}.safetensors")
    tokenizer = TokenizerModule.from_external(tmp_path, kind="openai-dvae")
    gain = 1 / (4 * blocks) ** 2
    unit = (pixels + 1) / 2
    logits = dvae_walk(
        weights,
        "encoder",
        conv(weights, "encoder.blocks.input", 0.8 * unit + 0.1, ("w", "b")),
        blocks,
        gain,
    )
    torch.testing.assert_close(tokenizer.encoder(pixels), logits)
    assert torch.equal(tokenizer.encode(pixels), logits.argmax(1))
    codes = torch.randint(0, 40, (2, 4, 6), generator=torch.Generator().manual_seed(1))
    one_hot = F.one_hot(codes, 40).permute(0, 3, 1, 2).float()
    drawn = dvae_walk(
        weights, "decoder", conv(weights, "decoder.blocks.input", one_hot, ("w", "b")), blocks, gain
    )
    expected = ((drawn[:, :3].sigmoid() - 0.1) / 0.8).clamp(0, 1) * 2 - 1
    torch.testing.assert_close(tokenizer.decode(codes), expected, atol=1e-5, rtol=0)


def norm_silu(weights: Weights, name: str, x: Tensor, *, silu: bool = True) -> Tensor:
    groups = x.reshape(len(x), 32, -1)
    normed = (groups - groups.mean(2, keepdim=True)) / (
        groups.var(2, keepdim=True, correction=0) + 1e-6
    ).sqrt()
    out = (
        normed.reshape(x.shape) * weights[f"{name}.weight"][:, None, None]
        + weights[f"{name}.bias"][:, None, None]
    )
    return out * out.sigmoid() if silu else out


def residual_walk(weights: Weights, stem: str, x: Tensor) -> Tensor:
    inner = conv(weights, f"{stem}.conv1", norm_silu(weights, f"{stem}.norm1", x))
    inner = conv(weights, f"{stem}.conv2", norm_silu(weights, f"{stem}.norm2", inner))
    return inner + (
        conv(weights, f"{stem}.nin_shortcut", x) if f"{stem}.nin_shortcut.weight" in weights else x
    )


def attention_walk(weights: Weights, stem: str, x: Tensor) -> Tensor:
    normed = norm_silu(weights, f"{stem}.norm", x, silu=False)
    q, k, v = (conv(weights, f"{stem}.{part}", normed).flatten(2) for part in ("q", "k", "v"))
    mixed = torch.einsum(
        "bqk,bck->bcq", (torch.einsum("bcq,bck->bqk", q, k) * x.shape[1] ** -0.5).softmax(2), v
    )
    return x + conv(weights, f"{stem}.proj_out", mixed.reshape(x.shape))


def vqgan_walk(
    weights: Weights, part: str, x: Tensor, stages: list[str], middle: list[str], block: str
) -> Tensor:
    """One side of VQ-GAN: `stages` in the order in which they are passed."""
    x = conv(weights, f"{part}.conv_in", x)

    def pass_middle(x: Tensor) -> Tensor:
        x = residual_walk(weights, f"{part}.mid.{middle[0]}", x)
        x = attention_walk(weights, f"{part}.mid.{middle[1]}", x)
        return residual_walk(weights, f"{part}.mid.{middle[2]}", x)

    if part == "decoder":
        x = pass_middle(x)
    for stage in stages:
        j = 0
        while f"{part}.{stage}.{block}.{j}.conv1.weight" in weights:
            x = residual_walk(weights, f"{part}.{stage}.{block}.{j}", x)
            if f"{part}.{stage}.attn.{j}.q.weight" in weights:
                x = attention_walk(weights, f"{part}.{stage}.attn.{j}", x)
            j += 1
        if f"{part}.{stage}.downsample.conv.weight" in weights:
            x = conv(
                weights,
                f"{part}.{stage}.downsample.conv",
                F.pad(x, (0, 1, 0, 1)),
                stride=2,
                padding=0,
            )
        if f"{part}.{stage}.upsample.conv.weight" in weights:
            x = conv(
                weights,
                f"{part}.{stage}.upsample.conv",
                x.repeat_interleave(2, 2).repeat_interleave(2, 3),
            )
    if part == "encoder":
        x = pass_middle(x)
    return conv(weights, f"{part}.conv_out", norm_silu(weights, f"{part}.norm_out", x))


@pytest.mark.parametrize("kind", ["taming-vqgan", "taming-gumbel", "llamagen"])
@pytest.mark.parametrize("attention", [True, False])
def test_vqgans_equal_a_plain_forward_pass_of_their_weights(tmp_path, pixels, kind, attention):
    llama, gumbel = kind == "llamagen", kind == "taming-gumbel"
    weights = vqgan(
        channels=32,
        multipliers=(1, 2, 2),
        blocks=2,
        latent=12,
        dim=12 if gumbel else 6,
        codes=40,
        attention=attention,
        style="llamagen" if llama else "taming",
        gumbel=gumbel,
    )
    published = dict(weights)
    if not llama:
        published |= {
            "loss.discriminator.main.0.weight": torch.ones(2),
            "loss.perceptual_loss.lin0.model.1.weight": torch.ones(2),
        }
    torch.save({"model" if llama else "state_dict": published}, tmp_path / "weights.ckpt")
    tokenizer = TokenizerModule.from_external(tmp_path / "weights.ckpt", kind=kind)
    middle = ["0", "1", "2"] if llama else ["block_1", "attn_1", "block_2"]
    down = [f"conv_blocks.{i}" if llama else f"down.{i}" for i in range(3)]
    up = [f"conv_blocks.{i}" if llama else f"up.{2 - i}" for i in range(3)]
    block = "res" if llama else "block"
    features = conv(
        weights, "quant_conv", vqgan_walk(weights, "encoder", pixels, down, middle, block)
    )
    table = weights["quantize.embed.weight" if gumbel else "quantize.embedding.weight"]
    if gumbel:
        expected = conv(weights, "quantize.proj", features).argmax(1)
    else:
        if llama:
            features, table = F.normalize(features, dim=1), F.normalize(table, dim=1)
        expected = (
            torch.cdist(features.permute(0, 2, 3, 1).flatten(0, 2), table)
            .argmin(1)
            .reshape(2, 8, 12)
        )
    codes = tokenizer.encode(pixels)
    assert torch.equal(codes, expected) and codes.unique().numel() > 5
    latents = conv(weights, "post_quant_conv", table[codes].permute(0, 3, 1, 2))
    drawn = vqgan_walk(weights, "decoder", latents, up, middle, block).clamp(-1, 1)
    torch.testing.assert_close(tokenizer.decode(codes), drawn, atol=2e-4, rtol=0)


def test_loaded_tokenizer_can_be_saved_and_trained(tmp_path, pixels):
    weights = vqgan(channels=32, multipliers=(1, 2), blocks=1, latent=8, dim=4, codes=16)
    save_file(weights, tmp_path / "weights.safetensors")
    tokenizer = TokenizerModule.from_external(tmp_path / "weights.safetensors", kind="taming-vqgan")
    tokenizer.save_pretrained(tmp_path / "saved")
    assert TokenizerModule.from_pretrained(tmp_path / "saved").fingerprint == tokenizer.fingerprint
    before = tokenizer.quantizer.codebook.clone()
    tokenizer.train()
    # Neither is its codebook initialised again, nor do codes restart that these images lack.
    for _ in range(25):
        tokenizer(pixels[:1, :, :8, :8])
    assert torch.equal(tokenizer.quantizer.codebook, before)


def small() -> Weights:
    return vqgan(channels=32, multipliers=(1, 2), blocks=1, latent=8, dim=4, codes=16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w: w.pop("decoder.mid.attn_1.q.weight"),
            r"missing \['decoder\.mid\.attn_1\.q\.weight'\]",
        ),
        (
            lambda w: w.update({"encoder.stranger.weight": torch.ones(1)}),
            r"unexpected \['encoder\.stranger\.weight'\]",
        ),
        (
            lambda w: w.update({"decoder.conv_out.bias": torch.ones(7)}),
            r"of another shape \['decoder\.conv_out\.bias'\]",
        ),
        (
            lambda w: w.pop("quant_conv.weight"),
            "holds no taming-vqgan weights: it has no 'quant_conv.weight', and its first keys are",
        ),
    ],
    ids=["missing", "unexpected", "shape", "foreign"],
)
def test_weights_of_another_architecture_are_refused_naming_keys(tmp_path, change, message):
    weights = small()
    change(weights)
    save_file(weights, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=message):
        TokenizerModule.from_external(tmp_path / "weights.safetensors", kind="taming-vqgan")


@pytest.mark.parametrize("kind", ["openai-dvae", "taming-gumbel", "llamagen"])
def test_wrong_kind_is_refused_and_kinds_are_listed(tmp_path, kind):
    save_file(small(), tmp_path / "weights.safetensors")
    with pytest.raises(
        ValueError,
        match=f"holds no {kind} weights: it has no .*; choose one of the kinds openai-dvae, taming",
    ):
        TokenizerModule.from_external(tmp_path / "weights.safetensors", kind=kind)


class Program:
    """What a file that runs a program when it is unpickled looks like."""

    def __reduce__(self):
        return (Path.touch, (Path("touched-by-unpickling"),))


def test_pickled_objects_are_refused_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": small(), "callbacks": Program()}, tmp_path / "last.ckpt")
    with pytest.raises(
        ValueError,
        match=r"holds more than tensors .* can run any program in it, so it is "
        r"refused\..*save_file",
    ):
        read_weights(tmp_path / "last.ckpt")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "encoder.pkl")
    with pytest.raises(ValueError, match="so it is refused"):
        read_weights(tmp_path / "encoder.pkl")
    assert not Path("touched-by-unpickling").exists()


def test_truncated_missing_and_empty_files_are_refused(tmp_path):
    save_file(small(), tmp_path / "weights.safetensors")
    data = (tmp_path / "weights.safetensors").read_bytes()
    (tmp_path / "weights.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="truncated or corrupted, copy it again"):
        read_weights(tmp_path / "weights.safetensors")
    torch.save(small(), tmp_path / "weights.pt")
    (tmp_path / "weights.pt").write_bytes((tmp_path / "weights.pt").read_bytes()[:1000])
    with pytest.raises(ValueError, match="is corrupted, or holds more"):
        read_weights(tmp_path / "weights.pt")
    torch.save({"epoch": 3}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="holds no named tensors"):
        read_weights(tmp_path / "other.pt")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_weights(tmp_path / "none.pt")
    with pytest.raises(FileNotFoundError, match=r"holds no encoder\.safetensors"):
        load_external(tmp_path, "openai-dvae")
    with pytest.raises(ValueError, match="kind is 'vqvae'; it must be one of openai-dvae"):
        load_external(tmp_path / "weights.pt", "vqvae")  # type: ignore[arg-type]
