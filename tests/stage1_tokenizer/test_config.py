"""Sizes that follow from the configuration, and every broken relation named in one error."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

import stage1_tokenizer
from stage1_tokenizer import GumbelOptions, ObjectiveConfig, TokenizerConfig, VectorOptions

PACKAGE = Path(stage1_tokenizer.__file__).parent


def test_the_defaults_are_valid():
    assert TokenizerConfig().grid == (8, 8)
    ObjectiveConfig()


@pytest.mark.parametrize(
    ("factor", "widths"),
    [(1, (128,)), (2, (128,)), (4, (128,)), (8, (64, 128)), (16, (32, 64, 128)), (32, (32, 32, 64, 128))],
)
def test_each_halving_beyond_the_patch_has_half_the_width_and_32_at_least(factor, widths):
    assert TokenizerConfig(factor=factor, width=128).widths == widths


def test_all_problems_are_reported_at_once_by_the_flags_the_user_typed():
    with pytest.raises(ValueError) as error:
        TokenizerConfig(
            image_size=0, factor=6, width=20, num_codes=1, code_dim=0, encoder_depth=0, likelihood_scale=0.0,
            vq=VectorOptions(decay=1.0),
        )  # fmt: skip
    for name in ("image_size", "factor", "width", "num_codes", "code_dim", "encoder_depth", "likelihood_scale", "vq"):
        assert f"tokenizer.model.{name}" in str(error.value)


@pytest.mark.parametrize(("size", "near"), [(60, 64), (66, 64), (3, 8)])
def test_a_size_that_does_not_fit_names_the_nearest_that_does(size, near):
    with pytest.raises(ValueError, match=f"image_size {size} is not a multiple.*factor 8.*nearest size that fits is {near}"):
        TokenizerConfig(image_size=size)


@pytest.mark.parametrize("factor", [0, -4, 3, 12])
def test_the_factor_must_be_a_power_of_two(factor):
    with pytest.raises(ValueError, match=f"factor is {factor}; it must be a power of two"):
        TokenizerConfig(factor=factor)


@pytest.mark.parametrize(
    "wrong", [{"decay": 0.0}, {"commitment": -1.0}, {"restart_every": 0}, {"restart_below": 1.0}], ids=lambda w: next(iter(w))
)
def test_vq_options_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=rf"tokenizer\.model\.vq.*{next(iter(wrong))}"):
        TokenizerConfig(vq=VectorOptions(**wrong))


def test_objective_reports_all_problems_at_once():
    with pytest.raises(ValueError) as error:
        ObjectiveConfig(kl_weight=-1, kl_ramp_steps=-1, temperature_start=0, temperature_end=0, temperature_steps=-1)
    for name in ("kl_weight", "kl_ramp_steps", "temperature_start", "temperature_end", "temperature_steps"):
        assert f"tokenizer.objective.{name}" in str(error.value)


@pytest.mark.parametrize("kind", [TokenizerConfig, VectorOptions, GumbelOptions, ObjectiveConfig])
def test_every_field_is_read_somewhere_outside_the_configuration(kind):
    derived = {"factor", "width", "channels"}  # read by properties of the configuration that others read
    code = "\n".join(p.read_text() for p in PACKAGE.rglob("*.py") if p.name != "config.py")
    for field in dataclasses.fields(kind):
        assert field.name in derived or re.search(rf"\.{field.name}\b", code), f"{kind.__name__}.{field.name} is never read"


def test_the_public_list_is_what_the_package_has():
    assert sorted(stage1_tokenizer.__all__) == stage1_tokenizer.__all__
    assert all(hasattr(stage1_tokenizer, name) for name in stage1_tokenizer.__all__)
