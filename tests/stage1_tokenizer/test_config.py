"""Sizes that follow from the configuration, and every violated relation named in one error."""

from __future__ import annotations

import dataclasses
import re
import typing
from pathlib import Path

import pytest

import stage1_tokenizer
from stage1_tokenizer import (
    BinaryOptions,
    DiscriminatorOptions,
    FsqOptions,
    GaussianOptions,
    GumbelOptions,
    HierarchicalOptions,
    ObjectiveConfig,
    ResidualOptions,
    ScoreFunctionOptions,
    SignOptions,
    TokenizerConfig,
    VectorOptions,
    VqganOptions,
)
from stage1_tokenizer.config import joint_problems
from stage1_tokenizer.options import OWNERS, QuantizerName

PACKAGE = Path(stage1_tokenizer.__file__).parent


def test_the_defaults_are_valid():
    assert TokenizerConfig().grid == (8, 8)
    ObjectiveConfig()


@pytest.mark.parametrize(
    ("factor", "widths"),
    [
        (1, (128,)),
        (2, (128,)),
        (4, (128,)),
        (8, (64, 128)),
        (16, (32, 64, 128)),
        (32, (32, 32, 64, 128)),
    ],
)
def test_each_halving_beyond_the_patch_has_half_the_width_and_32_at_least(factor, widths):
    assert TokenizerConfig(downsample_factor=factor, width=128).widths == widths


def test_all_problems_are_reported_at_once_by_the_flags_the_user_typed():
    with pytest.raises(ValueError) as error:
        TokenizerConfig(
            image_size=0,
            downsample_factor=6,
            width=20,
            num_codes=1,
            code_dim=0,
            encoder_depth=0,
            likelihood_scale=0.0,
            vq=VectorOptions(decay=1.0),
        )
    for name in (
        "image_size",
        "downsample_factor",
        "width",
        "num_codes",
        "code_dim",
        "encoder_depth",
        "likelihood_scale",
        "vq",
    ):
        assert f"tokenizer.model.{name}" in str(error.value)


@pytest.mark.parametrize(("size", "near"), [(60, 64), (66, 64), (3, 8)])
def test_a_size_that_does_not_fit_names_the_nearest_that_does(size, near):
    with pytest.raises(
        ValueError,
        match=f"image_size {size} is not a multiple.*factor 8.*nearest size that fits is {near}",
    ):
        TokenizerConfig(image_size=size)


@pytest.mark.parametrize("factor", [0, -4, 3, 12])
def test_the_factor_must_be_a_power_of_two(factor):
    with pytest.raises(ValueError, match=f"factor is {factor}; it must be a power of two"):
        TokenizerConfig(downsample_factor=factor)


@pytest.mark.parametrize(
    "wrong",
    [
        {"decay": 0.0},
        {"commitment": -1.0},
        {"dead_code_check_every": 0},
        {"dead_code_threshold": 1.0},
        {"entropy_weight": -1.0},
        {"kmeans_iterations": -1},
    ],
    ids=lambda w: next(iter(w)),
)
def test_vq_options_out_of_range_are_refused(wrong):
    name, value = next(iter(wrong.items()))
    with pytest.raises(
        ValueError, match=rf"^tokenizer\.model\.vq\.{name} is {value}; it must be [^;]*$"
    ):
        TokenizerConfig(vq=VectorOptions(**wrong))


def test_every_wrong_option_of_a_section_is_named_and_no_right_one():
    wrong = {
        "vq": VectorOptions(decay=2.0, dead_code_check_every=0),
        "sign": SignOptions(diversity=-1.0, inverse_temperature=0.0),
        "hierarchical": HierarchicalOptions(levels=1, width=0),
        "vqgan": VqganOptions(channels=48, multipliers=(1, 0), blocks=0),
    }
    assert [message for options in wrong.values() for message in options.problems()] == [
        "tokenizer.model.vq.decay is 2.0; it must be in (0, 1)",
        "tokenizer.model.vq.dead_code_check_every is 0; it must be at least 1",
        "tokenizer.model.sign.diversity is -1.0; it must be 0 or more",
        "tokenizer.model.sign.inverse_temperature is 0.0; it must be above 0",
        "tokenizer.model.hierarchical.levels is 1; it must be at least 2",
        "tokenizer.model.hierarchical.width is 0; it must be at least 1",
        "tokenizer.model.vqgan.blocks is 0; it must be at least 1",
        "tokenizer.model.vqgan.channels is 48; it must be a multiple of 32, at least 32",
        "tokenizer.model.vqgan.multipliers is [1, 0]; it must be a list of numbers of at least 1, "
        "one for each resolution",
    ]
    with pytest.raises(ValueError, match=r"vqgan\.blocks is 0; .*vq\.decay is 2\.0; ") as error:
        TokenizerConfig(vq=wrong["vq"], vqgan=wrong["vqgan"])
    assert "Options(" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"quantizer": "gumbel", "gumbel": GumbelOptions(diversity=-1.0)},
            r"gumbel\.diversity is -1\.0; it must be 0 or more",
        ),
        (
            {
                "quantizer": "score_function",
                "score_function": ScoreFunctionOptions(baseline_decay=1.0, diversity=-1.0),
            },
            r"score_function\.baseline_decay is 1\.0; it must be in \[0, 1\); .*"
            r"score_function\.diversity is -1\.0; it must be 0 or more",
        ),
        (
            {
                "quantizer": "score_function",
                "score_function": ScoreFunctionOptions(inverse_temperature=0.0),
            },
            r"score_function\.inverse_temperature is 0\.0; it must be above 0$",
        ),
        (
            {"quantizer": "score_function", "score_function": ScoreFunctionOptions(diversity=-1.0)},
            r"score_function\.diversity is -1\.0",
        ),
        (
            {"quantizer": "fsq", "fsq": FsqOptions(levels=(4, 2))},
            r"fsq\.levels is \[4, 2\]; each must be at least 3 .* at most 1000",
        ),
        ({"quantizer": "fsq", "fsq": FsqOptions(levels=())}, r"fsq\.levels is \[\]"),
        (
            {"quantizer": "fsq", "num_codes": 1000},
            r"fsq\.levels \[4, 4, 4, 4, 4\] make 1024 codes and .*num_codes is 1000; make them",
        ),
        (
            {"quantizer": "lfq", "sign": SignOptions(inverse_temperature=0.0)},
            r"sign\.inverse_temperature is 0\.0; it must be above 0$",
        ),
        (
            {"quantizer": "residual", "residual": ResidualOptions(depth=0)},
            r"residual\.depth is 0; it must be at least 1",
        ),
        (
            {"quantizer": "hierarchical", "hierarchical": HierarchicalOptions(levels=1)},
            r"hierarchical\.levels is 1; it must be at least 2$",
        ),
        (
            {"quantizer": "hierarchical", "hierarchical": HierarchicalOptions(coarse_codes=(8, 8))},
            r"coarse_codes is \[8, 8\]; with 2 levels it needs 1 numbers from 2 to 2147483647",
        ),
        (
            {"quantizer": "hierarchical", "hierarchical": HierarchicalOptions(coarse_codes=(1,))},
            r"coarse_codes is \[1\]",
        ),
        (
            {
                "quantizer": "hierarchical",
                "hierarchical": HierarchicalOptions(coarse_codes=(2**31,)),
            },
            r"coarse_codes is \[2147483648\]",
        ),
        (
            {
                "quantizer": "hierarchical",
                "hierarchical": HierarchicalOptions(levels=4),
                "image_size": 96,
            },
            r"image_size 96 is not a multiple of 64, .*factor 8 needs with "
            r"tokenizer\.model\.hierarchical\.levels 4; the nearest size that fits is 128",
        ),
        (
            {"quantizer": "gaussian", "gaussian": GaussianOptions(free_bits=-0.1)},
            r"gaussian\.free_bits is -0\.1; it must be 0 or more$",
        ),
        (
            {
                "quantizer": "gaussian",
                "gaussian": GaussianOptions(latents="vector", vector_features=0),
            },
            r"gaussian\.vector_features is 0; it must be at least 1$",
        ),
        (
            {"quantizer": "gaussian", "gaussian": GaussianOptions(vector_features=8)},
            r"gaussian\.vector_features is 8 and .*latents is grid; set latents to vector, or "
            r"leave vector_features out \(a grid has tokenizer\.model\.code_dim features per "
            r"position\)$",
        ),
        ({"num_codes": 1}, "num_codes is 1; it must be at least 2"),
        (
            {"likelihood_scale": 0.005},
            r"likelihood_scale is 0\.005; it must be above 0\.0078, the step of 8-bit images",
        ),
        (
            {"likelihood": "l1", "likelihood_scale": 0.005},
            r"likelihood_scale is 0\.005; it must be above 0\.0078",
        ),
        (
            {"likelihood": "logit_laplace", "likelihood_scale": 0.0},
            r"likelihood_scale is 0\.0; it must be above 0$",
        ),
        (
            {"likelihood_mixtures": 5},
            r"likelihood_mixtures is 5, which belongs to likelihood discretized_logistic, and "
            r"tokenizer\.model\.likelihood is l2; leave it out or choose that likelihood",
        ),
        (
            {"likelihood": "discretized_logistic", "likelihood_mixtures": 0},
            r"likelihood_mixtures is 0; it must be at least 1",
        ),
        (
            {"num_codes": 2**31},
            r"num_codes is 2147483648; it must be at least 2, and at most 2147483647 \(32 bits\)",
        ),
    ],
)
def test_options_and_code_counts_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        TokenizerConfig(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architecture": "dalle", "attention": True},
            "attention and encoder_kernel belong to architecture patch, and .* is dalle",
        ),
        (
            {"architecture": "transformer", "encoder_kernel": 3},
            "encoder_kernel belong to architecture patch, and .* is transformer",
        ),
        (
            {"vqgan": VqganOptions(blocks=3)},
            "vqgan belongs to architecture vqgan, and .* is patch; remove the section",
        ),
        (
            {"architecture": "vqgan", "downsample_factor": 16},
            "multipliers are 4, which makes a factor of 8, and .*factor is 16; make them agree",
        ),
        (
            {"architecture": "vqgan", "vqgan": VqganOptions(channels=48)},
            r"vqgan\.channels is 48; it must be a multiple of 32",
        ),
        (
            {"architecture": "vqgan", "vqgan": VqganOptions(multipliers=())},
            r"vqgan\.multipliers is \[\]; it must be a list of numbers of at least 1",
        ),
        (
            {"architecture": "transformer", "width": 48},
            "width is 48; architecture transformer needs a multiple of 32",
        ),
        (
            {"architecture": "dalle", "width": 48},
            "width is 48; architecture dalle needs 4 times factor 8 or a multiple of that",
        ),
    ],
)
def test_networks_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        TokenizerConfig(**changes)


@pytest.mark.parametrize("quantizer", ["binary", "lfq", "bsq"])
def test_codes_that_are_bits_need_a_power_of_two(quantizer):
    TokenizerConfig(quantizer=quantizer, num_codes=512)
    with pytest.raises(
        ValueError,
        match=rf"num_codes is 600 and the codes of {quantizer} are bits.*power of two; the nearest "
        r"is 512",
    ):
        TokenizerConfig(quantizer=quantizer, num_codes=600)


@pytest.mark.parametrize("section", OWNERS)
def test_an_option_of_another_quantizer_is_refused_by_name(section):
    """The first field of the section, changed; its owners take it, every other quantizer names it
    and them."""
    other = {
        "vq": VectorOptions(codebook="gradient"),
        "gumbel": GumbelOptions(gradient="reinmax"),
        "fsq": FsqOptions(levels=(32, 32)),
        "binary": BinaryOptions(smoothing="exponential_pair"),
        "score_function": ScoreFunctionOptions(credit_assignment="image"),
        "sign": SignOptions(commitment=0.5),
        "residual": ResidualOptions(depth=3),
        "hierarchical": HierarchicalOptions(levels=3),
        "gaussian": GaussianOptions(latents="vector"),
    }[section]
    first = dataclasses.fields(other)[0].name
    for quantizer in typing.get_args(QuantizerName):
        if quantizer in OWNERS[section]:
            TokenizerConfig(quantizer=quantizer, **{section: other})
        else:
            with pytest.raises(
                ValueError,
                match=rf"model\.{section} is .*'{first}'.* belongs to quantizer "
                rf"{OWNERS[section][0]}.*{quantizer}",
            ):
                TokenizerConfig(quantizer=quantizer, **{section: other})


@pytest.mark.parametrize(
    ("model", "objective", "message"),
    [
        (
            {"quantizer": "gumbel", "gumbel": GumbelOptions(gradient="reinmax")},
            {},
            r"temperature_end is 0\.0625, and .*reinmax loses its gradient below 1; set "
            r"temperature_start and temperature_end to 1",
        ),
        (
            {"quantizer": "gumbel", "gumbel": GumbelOptions(gradient="reinmax")},
            {"temperature_end": 1.0},
            None,
        ),
        (
            {"quantizer": "binary"},
            {"temperature_start": 0.2, "temperature_end": 1.0},
            r"temperature_end is 1\.0, at which .*power_pair",
        ),
        (
            {"quantizer": "binary"},
            {"temperature_start": 1.0, "temperature_end": 0.1},
            r"temperature_start is 1\.0, at which .*power_pair",
        ),
        ({"quantizer": "binary"}, {"temperature_start": 0.2, "temperature_end": 0.1}, None),
        (
            {"quantizer": "binary", "binary": BinaryOptions(smoothing="two_sided_power")},
            {"temperature_start": 1.0, "temperature_end": 0.1},
            r"temperature_start is 1\.0, at which .*two_sided_power carries nothing",
        ),
        ({"quantizer": "binary", "binary": BinaryOptions(smoothing="spike_root")}, {}, None),
        (
            {},
            {"discriminator": DiscriminatorOptions(weight=1.0, layers=5)},
            r"discriminator\.layers is 5, which leaves no patch",
        ),
        (
            {"quantizer": "gumbel"},
            {"reencoding_weight": 0.5},
            r"reencoding_weight is 0\.5, which needs tokenizer\.model\.quantizer vq; it is gumbel",
        ),
        ({}, {"reencoding_weight": 0.5}, None),
    ],
)
def test_incompatible_options_are_refused(model, objective, message):
    problems = joint_problems(
        dataclasses.asdict(TokenizerConfig(**model)),
        dataclasses.asdict(ObjectiveConfig(**objective)),
    )
    assert (
        not problems if message is None else len(problems) == 1 and re.search(message, problems[0])
    )


def test_objective_reports_all_problems_at_once():
    with pytest.raises(ValueError) as error:
        ObjectiveConfig(
            kl_weight=-1,
            kl_ramp_steps=-1,
            temperature_start=0,
            temperature_end=0,
            temperature_steps=-1,
            reencoding_weight=-1,
        )
    for name in (
        "kl_weight",
        "kl_ramp_steps",
        "reencoding_weight",
        "temperature_start",
        "temperature_end",
        "temperature_steps",
    ):
        assert f"tokenizer.objective.{name}" in str(error.value)


@pytest.mark.parametrize(
    "kind",
    [
        TokenizerConfig,
        ObjectiveConfig,
        VqganOptions,
        *(typing.get_type_hints(TokenizerConfig)[name] for name in OWNERS),
    ],
)
def test_every_field_is_read_somewhere_outside_the_configuration(kind):
    derived = {
        "downsample_factor",
        "width",
        "channels",
        "levels",
    }  # read by properties of the configuration that others read
    code = "\n".join(
        p.read_text() for p in PACKAGE.rglob("*.py") if p.name not in ("config.py", "options.py")
    )
    for field in dataclasses.fields(kind):
        assert field.name in derived or re.search(rf"\.{field.name}\b", code), (
            f"{kind.__name__}.{field.name} is never read"
        )


def test_public_names_exist_in_the_package():
    assert sorted(stage1_tokenizer.__all__) == stage1_tokenizer.__all__
    assert all(hasattr(stage1_tokenizer, name) for name in stage1_tokenizer.__all__)
