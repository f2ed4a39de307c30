"""`LatentPriorModel`: saving and loading, and what training asks of it."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from stage2_prior import ImagePrior, LatentPriorConfig, LatentPriorModel
from tests.helpers.latent_priors import KINDS
from tests.helpers.priors import tiny_prior


def tiny_model(kind: str, context_features: int = 0) -> LatentPriorModel:
    config = LatentPriorConfig(
        kind=kind,  # type: ignore[arg-type]
        components=4,
        transforms=2,
        width=8,
        context_features=context_features,
    )
    model = LatentPriorModel(config, 3, (6,) if kind == "vamp" else None)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.normal_(std=0.3)
    return attached(model)


def attached(model: LatentPriorModel) -> LatentPriorModel:
    """With an encoder, where its prior needs one."""
    if model.prior_config.kind == "vamp":
        model.prior.attach(lambda inputs: inputs.chunk(2, dim=1))  # type: ignore[operator]
    return model


@pytest.mark.parametrize(("kind", "context_features"), KINDS)
def test_saving_and_loading_keeps_density_samples_and_fingerprint(kind, context_features, tmp_path):
    model = tiny_model(kind, context_features)
    model.save_pretrained(tmp_path)
    latents = torch.randn(5, 3)
    context = torch.randn(5, context_features) if context_features else None
    by_us = LatentPriorModel.from_pretrained(tmp_path)
    by_transformers = LatentPriorModel.from_pretrained(str(tmp_path), device_map=None)
    for again in (by_us, by_transformers):
        attached(again)
        assert again.fingerprint == model.fingerprint
        assert again.log_prob(latents, context).equal(model.log_prob(latents, context))
        generators = [torch.Generator().manual_seed(1) for _ in range(2)]
        ours = model.sample(5, generators[0], context)
        assert again.sample(5, generators[1], context).equal(ours) and ours.shape == (5, 3)
        assert again.prior_config == model.prior_config and not again.training
        assert (again.latent_features, again.context_features) == (3, context_features)


def test_fingerprint_changes_with_weights_and_settings():
    model = tiny_model("maf")
    before = model.fingerprint
    with torch.no_grad():
        next(model.parameters()).add_(1)
    assert model.fingerprint != before
    models = [
        LatentPriorModel(LatentPriorConfig(kind="standard", width=width), 3) for width in (8, 9)
    ]
    assert models[0].fingerprint != models[1].fingerprint


def test_loading_names_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        LatentPriorModel.from_pretrained(tmp_path)
    tiny_model("realnvp").save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    config = tmp_path / "config.json"
    complete = weights.read_bytes()
    weights.write_bytes(complete[:-100])
    with pytest.raises(ValueError, match="cannot be read"):
        LatentPriorModel.from_pretrained(tmp_path)
    weights.write_bytes(complete)
    values = json.loads(config.read_text())
    config.write_text(json.dumps(values | {"model": values["model"] | {"transforms": 3}}))
    with pytest.raises(ValueError, match=r"do not fit its config\.json .*transforms\.2"):
        LatentPriorModel.from_pretrained(tmp_path)
    config.write_text(json.dumps(values | {"model": values["model"] | {"widht": 3}}))
    with pytest.raises(ValueError, match=r"unknown keys \['widht'\]"):
        LatentPriorModel.from_pretrained(tmp_path)
    config.write_text(json.dumps(values | {"latent_features": 4}))
    with pytest.raises(ValueError, match=r"do not fit its config\.json"):
        LatentPriorModel.from_pretrained(tmp_path)
    section = "no 'model' section"
    damage = {"{}": section, "[]": "it holds no JSON object", '{"model": 3}': section}
    for damaged, message in damage.items():
        config.write_text(damaged)
        with pytest.raises(ValueError, match=message):
            LatentPriorModel.from_pretrained(tmp_path)


BOTH_LOADERS = pytest.mark.parametrize("options", [{}, {"device_map": None}], ids=["ours", "hub"])
"""Further options are passed on to transformers."""


@BOTH_LOADERS
@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda w: w.pop("prior.means"), "prior.means"),
        (lambda w: w.update(stranger=torch.ones(1)), "stranger"),
        (lambda w: w.update({"prior.means": torch.ones(5)}), "prior.means"),
    ],
    ids=["missing", "unexpected", "shape"],
)
def test_weights_that_do_not_fit_are_refused_by_both_loaders(tmp_path, options, change, named):
    tiny_model("mixture").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    change(weights)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"first keys that differ: \['{named}'\]"):
        LatentPriorModel.from_pretrained(tmp_path, **options)


@BOTH_LOADERS
def test_truncated_weights_are_refused_by_both_loaders(tmp_path, options):
    tiny_model("maf").save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"cannot be read.*copy it again"):
        LatentPriorModel.from_pretrained(tmp_path, **options)


def test_transformers_loading_report_is_kept(tmp_path):
    tiny_model("maf").save_pretrained(tmp_path)
    model, info = LatentPriorModel.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(model, LatentPriorModel) and not info["missing_keys"]


def test_the_two_kinds_of_prior_refuse_each_others_folders(tmp_path):
    tiny_model("maf").save_pretrained(tmp_path / "latent")
    tiny_prior().save_pretrained(tmp_path / "image")
    with pytest.raises(ValueError, match=r"'mini_dalle_latent_prior'; ImagePrior reads"):
        ImagePrior.from_pretrained(tmp_path / "latent")
    with pytest.raises(ValueError, match=r"'mini_dalle_prior'; LatentPriorModel reads"):
        LatentPriorModel.from_pretrained(tmp_path / "image")


@pytest.mark.parametrize(("kind", "count"), [("realnvp", 2), ("maf", 2), ("mixture", 0)])
def test_optimizers_for_matrices_get_those_between_hidden_layers(kind, count):
    matrices = tiny_model(kind).hidden_matrices()
    assert [tuple(p.shape) for p in matrices] == [(8, 8)] * count


@pytest.mark.parametrize("kind", ["standard", "aggregated", "maf"])
def test_device_and_dtype_are_those_of_parameters_or_buffers(kind):
    model = tiny_model(kind).double()
    assert model.dtype == torch.float64 and model.device == torch.device("cpu")
