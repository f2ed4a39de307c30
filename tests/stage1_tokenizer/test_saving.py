"""Saving and loading: complete, strict, safetensors only."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, PreTrainedModel

import stage1_tokenizer
from stage1_tokenizer import ImageTokenizer, TokenizerModule, to_model_range
from tests.helpers.tokenizers import (
    EVERY_KIND,
    EVERY_LATENT_KIND,
    KINDS,
    LATENT_KINDS,
    tiny_tokenizer,
)

EVERY_LOADER = pytest.mark.parametrize(
    "loader",
    [TokenizerModule.from_pretrained, ImageTokenizer.from_pretrained, AutoModel.from_pretrained],
)


def trained(**changes) -> TokenizerModule:
    """With buffers that are not at their start."""
    tokenizer = tiny_tokenizer(**changes).train()
    for seed in range(3):
        tokenizer(torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(seed)), 1.0)
    return tokenizer.eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    trained().save_pretrained(tmp_path)
    return tmp_path


def rewrite_weights(folder: Path, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def rewrite_config(folder: Path, change) -> None:
    values = json.loads((folder / "config.json").read_text())
    change(values)
    (folder / "config.json").write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("loader", "kind_of_model"),
    [
        (TokenizerModule.from_pretrained, TokenizerModule),
        (ImageTokenizer.from_pretrained, ImageTokenizer),
        (AutoModel.from_pretrained, ImageTokenizer),
    ],
)
@EVERY_KIND
def test_every_tensor_survives_and_so_does_the_fingerprint(
    tmp_path, images, loader, kind_of_model, kind
):
    tokenizer = trained(**KINDS[kind], likelihood="logit_laplace")
    tokenizer.save_pretrained(tmp_path)
    again = loader(tmp_path)
    assert type(again) is kind_of_model and not again.training
    state = again.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in tokenizer.state_dict().items())
    assert again.fingerprint == tokenizer.fingerprint and again.own_config == tokenizer.own_config
    pixels = to_model_range(images)
    codes = tokenizer.encode(pixels)
    assert torch.equal(again.encode(pixels), codes)
    torch.testing.assert_close(again.decode(codes), tokenizer.decode(codes))
    assert any(bool(tensor.any()) for name, tensor in state.items() if name.endswith("counts"))


@EVERY_LATENT_KIND
def test_gaussian_latents_survive_saving(tmp_path, images, kind):
    tokenizer = tiny_tokenizer(**LATENT_KINDS[kind])
    tokenizer.save_pretrained(tmp_path)
    again = ImageTokenizer.from_pretrained(tmp_path)
    assert again.fingerprint == tokenizer.fingerprint and again.own_config == tokenizer.own_config
    pixels = to_model_range(images)
    before, after = tokenizer.posterior(pixels), again.posterior(pixels)
    assert torch.equal(after.mean, before.mean) and torch.equal(after.log_std, before.log_std)
    torch.testing.assert_close(again.reconstruct(pixels), tokenizer.reconstruct(pixels))


def test_the_folder_holds_a_readable_configuration_and_no_pickle(folder):
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    values = json.loads((folder / "config.json").read_text())
    assert values["model_type"] == "mini_dalle_tokenizer" and values["model"]["vq"]["decay"] == 0.99
    assert type(AutoConfig.from_pretrained(folder)).__name__ == "ImageTokenizerConfig"


def test_a_tokenizer_and_its_model_of_transformers_write_the_same(tmp_path):
    module = trained()
    model = ImageTokenizer(module.own_config).eval()
    model.load_state_dict(module.state_dict())
    assert isinstance(model, PreTrainedModel) and not isinstance(module, PreTrainedModel)
    module.save_pretrained(tmp_path / "module")
    model.save_pretrained(tmp_path / "model")
    ours, theirs = (
        json.loads((tmp_path / kind / "config.json").read_text()) for kind in ("module", "model")
    )
    assert theirs.pop("transformers_version") and ours == theirs
    ours, theirs = (
        load_file(tmp_path / kind / "model.safetensors") for kind in ("module", "model")
    )
    assert ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)


def test_options_of_transformers_are_not_ignored_without_it(folder):
    with pytest.raises(TypeError, match=r"no options \['device_map'\].*use ImageTokenizer"):
        TokenizerModule.from_pretrained(folder, device_map=None)


def test_other_weights_than_its_own_are_saved_without_its_fingerprint(tmp_path, capsys):
    model = ImageTokenizer(trained().config)
    other = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    other["quantizer.codebook"] += 1
    model.save_pretrained(tmp_path, state_dict=dict(other))  # it empties it
    again = ImageTokenizer.from_pretrained(tmp_path)
    assert again.quantizer.codebook.equal(other["quantizer.codebook"])
    assert again.config.saved_fingerprint is None and capsys.readouterr().err == ""
    assert {"ImageTokenizer", "TokenizerModule"} <= set(dir(stage1_tokenizer))


def test_another_size_keeps_the_other_fields_of_an_older_configuration(tmp_path):
    """The fingerprint covers them."""
    trained().save_pretrained(tmp_path)
    rewrite_config(tmp_path, lambda c: (c.pop("saved_fingerprint"), c["model"].pop("gaussian")))
    older = TokenizerModule.from_pretrained(tmp_path)
    other = older.at_size(32)
    assert other.size == (32, 32) and "gaussian" not in other.config.model


@pytest.mark.parametrize("model", [TokenizerModule, ImageTokenizer])
def test_a_subfolder_can_be_named(tmp_path, model):
    tokenizer = trained()
    tokenizer.save_pretrained(tmp_path / "inside")
    again = model.from_pretrained(str(tmp_path), subfolder="inside")
    assert again.fingerprint == tokenizer.fingerprint


def test_a_compiled_tokenizer_is_saved_without_prefixes(tmp_path, tokenizer):
    tokenizer.compile_networks()
    tokenizer.save_pretrained(tmp_path)
    assert ImageTokenizer.from_pretrained(tmp_path).fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"holds no {name}"):
        ImageTokenizer.from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda w: w.pop("quantizer.codebook"), "quantizer.codebook"),
        (lambda w: w.pop("quantizer.steps"), "quantizer.steps"),
        (lambda w: w.update(stranger=torch.ones(1)), "stranger"),
        (lambda w: w.update({"quantizer.counts": torch.ones(5)}), "quantizer.counts"),
        (lambda w: w.update({f"_orig_mod.{k}": w.pop(k) for k in list(w)}), "_orig_mod.decoder"),
    ],
    ids=["missing", "missing counter", "unexpected", "shape", "compile prefix"],
)
def test_weights_that_do_not_fit_are_refused_by_name(folder, change, named):
    rewrite_weights(folder, change)
    with pytest.raises(ValueError, match=rf"do not fit its config\.json.*{named}"):
        ImageTokenizer.from_pretrained(folder)


@EVERY_LOADER
@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda w: w.pop("quantizer.codebook"), "quantizer.codebook"),
        (lambda w: w.pop("decoder.layers.0.weight"), "decoder.layers.0.weight"),
        (lambda w: w.update(stranger=torch.ones(1)), "stranger"),
        (lambda w: w.update({"quantizer.counts": torch.ones(5)}), "quantizer.counts"),
    ],
    ids=["missing buffer", "missing", "unexpected", "shape"],
)
def test_from_pretrained_initialises_no_weight_randomly(folder, loader, change, named):
    rewrite_weights(folder, change)
    with pytest.raises(ValueError, match=rf"do not fit its config\.json.*{named}"):
        loader(folder)


def test_transformers_loading_report_is_kept(folder):
    model, info = ImageTokenizer.from_pretrained(folder, output_loading_info=True)
    assert isinstance(model, ImageTokenizer) and not info["missing_keys"]


@pytest.mark.parametrize("keep", [0, 7, 500, -1])
def test_from_pretrained_refuses_a_truncated_file(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"cannot be read.*copy it again"):
        ImageTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("keep", [0, 7, 500, -1])
def test_a_truncated_file_is_refused_by_transformers_loader_too(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"cannot be read.*copy it again"):
        ImageTokenizer.from_pretrained(folder, device_map=None)


def test_truncated_configuration_is_refused(folder):
    path = folder / "config.json"
    path.write_text(path.read_text()[:40])
    with pytest.raises(ValueError, match="cannot be read"):
        ImageTokenizer.from_pretrained(folder)


@EVERY_LOADER
def test_unknown_keys_are_refused_also_in_nested_options(folder, loader):
    rewrite_config(folder, lambda c: c["model"].update(wdith=3))
    with pytest.raises(ValueError, match=r"unknown keys \['wdith'\] for TokenizerConfig"):
        loader(folder)
    rewrite_config(folder, lambda c: (c["model"].pop("wdith"), c["model"]["vq"].update(dcay=1)))
    with pytest.raises(ValueError, match=r"unknown keys \['dcay'\] for VectorOptions"):
        loader(folder)


def test_a_configuration_of_another_model_is_refused(folder):
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 8}))
    with pytest.raises(ValueError, match="is not a tokenizer's: it has no 'model' section"):
        ImageTokenizer.from_pretrained(folder)


def test_violated_relation_in_a_configuration_is_refused(folder):
    rewrite_config(folder, lambda c: c["model"].update(downsample_factor=3))
    with pytest.raises(ValueError, match="factor is 3; it must be a power of two"):
        ImageTokenizer.from_pretrained(folder)
