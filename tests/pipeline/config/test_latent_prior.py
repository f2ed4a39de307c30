"""Settings of priors of Gaussian latents: what they do not go together with."""

from __future__ import annotations

import copy
import json
import re

import pytest

from pipeline.config.experiment import Experiment
from pipeline.config.inheritance import stage_folder
from pipeline.config.load import from_dict
from tests.helpers.experiments import TINY


def experiment(**changes: object) -> Experiment:
    """The tiny experiment with Gaussian latents and other changes, by dotted name with __."""
    values = copy.deepcopy(TINY)
    changes = {"tokenizer__model__quantizer": "gaussian", **changes}
    for name, value in {"tokenizer__model__image_size": 32, **changes}.items():
        *path, last = name.split("__")
        section = values
        for key in path:
            section = section.setdefault(key, {})  # type: ignore[assignment]
        section[last] = value
    return from_dict(Experiment, values)


def test_a_joint_flow_is_taken():
    assert experiment(prior__joint=True, prior__latent={"kind": "maf"}).prior.latent.kind == "maf"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"tokenizer__model__quantizer": "vq"},
            "prior.joint is on and tokenizer.model.quantizer is vq; only a prior of Gaussian "
            "latents is trained together with the tokenizer, set prior.joint=false",
        ),
        (
            {"prior__init_from": "runs/a"},
            "prior.init_from is runs/a and tokenizer.model.quantizer is gaussian; a prior of "
            "Gaussian latents starts from random weights, leave it out",
        ),
        (
            {"tokenizer__frozen": True, "tokenizer__init_from": "runs/a"},
            "prior.joint and tokenizer.frozen are both on; a frozen tokenizer is not trained",
        ),
        (
            {"prior__latent": {"kind": "vamp"}},
            "prior.joint is on and prior.latent.kind is vamp, which is not trained together with "
            "the tokenizer; choose one of mixture, realnvp, maf, or set prior.joint=false",
        ),
        (
            {"prior__latent": {"kind": "standard"}},
            "prior.joint is on and prior.latent.kind is standard",
        ),
        (
            {"prior__latent": {"context_features": 8}},
            "prior.joint is on and prior.latent.context_features is 8; a prior that is trained "
            "together with the tokenizer is unconditional, set context_features to 0 or",
        ),
        (
            {"tokenizer__model__gaussian": {"free_bits": 0.1}},
            "prior.joint is on and tokenizer.model.gaussian.free_bits is 0.1; free bits need",
        ),
        (
            {"prior__latent": {"kind": "flow"}},
            "prior.latent.kind is 'flow'; it must be one of standard, mixture",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        experiment(prior__joint=True, **changes)
    assert "tokenizer.frozen is off" not in str(error.value)  # advice for priors over codes


def test_a_prior_of_latents_is_no_prior_to_start_from(tmp_path):
    folder = tmp_path / "prior"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "mini_dalle_latent_prior"}))
    with pytest.raises(
        ValueError,
        match=rf"^prior\.init_from is {re.escape(str(tmp_path))}, whose prior is one of Gaussian "
        "latents; such a prior starts from random weights, leave it out$",
    ):
        stage_folder(tmp_path, "prior")


def test_commands_that_need_codes_name_the_one_that_does_not():
    with pytest.raises(
        ValueError,
        match=r"^tokenizer\.model\.quantizer is gaussian, which has Gaussian latents, and "
        r"`minidalle encode` needs codes; choose another quantizer \(vq\), or use `minidalle run`, "
        r"which trains a prior of the latents$",
    ):
        experiment().require_codes("encode")
