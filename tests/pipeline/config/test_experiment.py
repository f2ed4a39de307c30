"""Configurations: every shipped YAML loads, every mistake is named, every field is documented and
read."""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from pipeline.cli.main import main
from pipeline.config.checks import out_of_range
from pipeline.config.data import DataConfig
from pipeline.config.experiment import (
    Experiment,
    flat,
    to_dict,
    with_defaults,
    with_section_defaults,
)
from pipeline.config.inheritance import stage_folder
from pipeline.config.load import from_dict, load_experiment
from pipeline.config.option_names import spelled
from pipeline.stages.finetune import parent_bundle
from tests.helpers.pipelines import tiny_pipeline

ROOT = Path(__file__).parents[3]
SHIPPED = sorted(
    path
    for path in (ROOT / "configs").glob("*.yaml")
    if not path.name.startswith(("bakeoff-", "zoo"))
)
BAKEOFFS = sorted((ROOT / "configs").glob("bakeoff-*.yaml"))
ZOO = ROOT / "configs" / "zoo.yaml"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.name)
def test_shipped_configurations_load_and_say_what_to_expect(path):
    experiment = load_experiment(["--config", str(path)])
    assert experiment.name == path.stem
    header = path.read_text().split("\nname:")[0]
    for word in (f"minidalle run --config configs/{path.name}", "minutes", "Expect"):
        assert word in header


@pytest.mark.parametrize("path", BAKEOFFS, ids=lambda p: p.name)
def test_shipped_comparisons_load_and_say_what_to_expect(path):
    from pipeline.stages.compare_tokenizers import load_comparison

    comparison = load_comparison(["--config", str(path)])
    assert comparison.folder.name == path.stem and len(comparison.variants) > 1
    header = path.read_text().split("\nname:")[0]
    for word in (f"minidalle compare-tokenizers --config configs/{path.name}", "minutes", "Expect"):
        assert word in header


def test_shipped_zoo_loads_and_says_what_to_expect():
    from pipeline.evaluation.zoo import load_zoo

    zoo = load_zoo(["--config", str(ZOO)])
    assert zoo.folder.name == ZOO.stem and len(zoo.models) == 8
    header = ZOO.read_text().split("\nname:")[0]
    for word in ("minidalle zoo --config configs/zoo.yaml", "minutes", "Expect"):
        assert word in header


def test_shipped_configurations_exist():
    assert {"shapes.yaml", "shapes-long.yaml", "emoji.yaml"} <= {
        p.name for p in SHIPPED
    } and BAKEOFFS


def test_overrides_and_exponents_are_read(tiny_yaml):
    experiment = load_experiment(
        [
            "--config",
            str(tiny_yaml),
            "--prior.train.steps",
            "500",
            "--prior.train.learning_rate=1e-4",
        ]
    )
    assert experiment.prior.train.steps == 500 and experiment.prior.train.learning_rate == 1e-4
    assert experiment.tokenizer.train.steps == 6 and experiment.tokenizer.model.image_size == 32
    tiny_yaml.write_text(tiny_yaml.read_text() + "sampling: {temperature: 5e-1}\n")
    assert load_experiment(["--config", str(tiny_yaml)]).sampling.temperature == 0.5


def test_invalid_option_is_reported_once_without_relations(tiny_yaml):
    arguments = [
        "--tokenizer.objective.discriminator.weight",
        "1",
        "--tokenizer.objective.discriminator.layers",
        "-1",
        "--prior.train.steps",
        "0",
    ]
    with pytest.raises(
        ValueError, match=r"(?s)layers is -1; it must be at least 1.*train.steps is 0"
    ):
        load_experiment(["--config", str(tiny_yaml), *arguments])


def test_from_dict_refuses_unknown_keys():
    with pytest.raises(ValueError, match="nonsense is not a setting"):
        from_dict(DataConfig, {"source": "shapes", "nonsense": 1})


def test_resolved_configuration_loads_again(tiny_yaml, tmp_path):
    experiment = load_experiment(["--config", str(tiny_yaml)])
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(to_dict(experiment)))
    assert load_experiment(["--config", str(again)]) == experiment


def test_every_unknown_key_and_wrong_type_is_named(tiny_yaml):
    text = (
        tiny_yaml.read_text()
        .replace("depth: 1", "dept: 1")
        .replace("num_codes: 16", "num_codes: many")
    )
    tiny_yaml.write_text(text + "colour: red\n")
    with pytest.raises(ValueError) as caught:
        load_experiment(["--config", str(tiny_yaml)])
    for key in ("prior.model.dept", "tokenizer.model.num_codes", "colour"):
        assert key in str(caught.value)


def test_what_is_wrong_with_each_setting_is_plain(tiny_yaml):
    arguments = [
        "--prior.model.dept=3",
        "--tokenizer.model.num-codes=many",
        "--data.crop=left",
        "--tokenizer.train.batch_size=some",
        "--prior.train.betas=[0.1]",
        "--encode=5",
    ]
    with pytest.raises(ValueError) as caught:
        load_experiment(["--config", str(tiny_yaml), *arguments])
    assert sorted(str(caught.value).splitlines()) == [
        "data.crop is left; it must be 'centre' | 'random'",
        "encode is 5; it must be a section of settings",
        "prior.model.dept is not a setting; did you mean prior.model.depth?",
        "prior.train.betas is [0.1]; it must be tuple[float, float]",
        "tokenizer.model.num_codes is many; it must be int",
        "tokenizer.train.batch_size is some; it must be int | 'auto'",
    ]


def test_every_violated_relation_is_named(tiny_yaml):
    arguments = [
        "--tokenizer.model.downsample_factor",
        "6",
        "--prior.model.heads",
        "5",
        "--tokenizer.train.steps",
        "0",
        "--text.max_length",
        "1",
        "--encode.augmentations_per_image",
        "2",
        "--prior.train.ema_decay",
        "2",
        "--sampling.guidance_scale",
        "2",
        "--prior.objective.caption_dropout",
        "0",
    ]
    with pytest.raises(ValueError) as caught:
        load_experiment(["--config", str(tiny_yaml), *arguments])
    for part in (
        "factor is 6",
        "prior.model.heads 5",
        "train.steps is 0",
        "text.max_length is 1",
        "encode.augmentations_per_image is 2",
        "ema_decay is 2",
        "guidance needs caption dropout",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--sampling.guidance_scale", "2", "--prior.objective.caption_dropout", "0"],
            "guidance needs caption dropout",
        ),
        (
            ["--tokenizer.model.image_size", "48"],
            "data.image_size is 32 and tokenizer.model.image_size is 48",
        ),
        (
            ["--data.image_size", "128", "--tokenizer.model", '{"image_size": 64}'],
            "data.image_size is 128 and tokenizer.model.image_size is 64",
        ),
        (
            ["--tokenizer.model.image_size", "64"],
            "data.image_size is 32 and tokenizer.model.image_size is 64",
        ),  # its default
        (["--encode.max_images", "null"], "the shapes are unlimited"),
        (["--tokenizer.model.channels", "1"], "data.alpha is white, which gives images of 3"),
        (["--tokenizer.model.channels", "4"], "data.alpha is white, which gives images of 3"),
        (
            ["--data.alpha", "keep"],
            r"data\.alpha is keep.* 4 channels, and tokenizer\.model\.channels is 3; .*channels=4",
        ),
        (["--seed", "-1"], "seed is -1"),
        (["--process_timeout", "0"], "process_timeout is 0; it must be at least 1 minute"),
        (
            ["--prior.train.max_nonfinite_steps", "-1"],
            "train.max_nonfinite_steps is -1; it must be 0 or more",
        ),
        (
            ["--sampling.num_inference_steps", "4"],
            "several codes per step need prior.train.code_order=random",
        ),
        (
            ["--encode.augmentations_per_image", "2", "--encode.flip", "true"],
            "captions of the shapes say what is left and right",
        ),
        (
            ["--prior.train.anneal_fraction", "[0.7, 0.5]"],
            r"train\.anneal_fraction is 0\.7, 0\.5; it must be two fractions",
        ),
        (["--sequence.captioning_fraction", "1"], r"sequence\.captioning_fraction is 1"),
        (["--prior.model.text_depth", "-1"], r"text_depth is -1; it must be 0 or more"),
        (
            ["--prior.model.text_depth", "2", "--sequence.captioning_fraction", "0.2"],
            r"(?s)text_depth is 2 and prior\.objective\.text_weight is 0\.1; .*set "
            r"prior\.objective\.text_weight=0.*text_depth is 2 and "
            r"sequence\.captioning_fraction is 0\.2; .*set sequence\.captioning_fraction=0",
        ),
        (
            ["--sampling.guidance_interval", "[0.7, 0.5]", "--sampling.guidance_power", "0"],
            r"(?s)guidance_interval is \(0\.7, 0\.5\).*guidance_power is 0",
        ),
        (
            ["--tokenizer.model.quantizer", "binary"],
            "temperature_start is 1.0, at which .* power_pair carries nothing of a bit",
        ),
        (["--seed", "10000000000"], "seed is 10000000000"),
        (["--name", "a/b"], "must be a plain folder name"),
        (
            ["--encode.max_images", "0", "--encode.max_val_images", "0"],
            r"(?s)encode.max_val_images is 0.*encode.max_images is 0",
        ),
        (
            [
                *("--data.shapes.num_scenes", "0", "--data.filter.max_aspect", "0.5"),
                *("--data.stream.shuffle_buffer", "0", "--encode.batch_size", "0"),
            ],
            r"(?s)data\.filter\.max_aspect is 0\.5.*data\.stream\.shuffle_buffer is 0.*"
            r"data\.shapes\.num_scenes is 0.*encode\.batch_size is 0",
        ),
        (["--data.max_objects", "2"], r"data\.max_objects is not a setting"),
        (
            [
                "--prior.train.learning_rate",
                "0",
                "--prior.train.min_lr_ratio",
                "2",
                "--prior.train.warmup_steps",
                "-1",
            ],
            r"(?s)learning_rate is 0.*warmup_steps is -1.*min_lr_ratio is 2",
        ),
        (
            ["--tokenizer.train.betas", "[2, 3]"],
            r"^tokenizer\.train\.betas is \[2\.0, 3\.0\]; both must be in \[0, 1\)$",
        ),
        (["--prior.train.betas", "[0.9, 1]"], r"prior\.train\.betas is \[0\.9, 1\.0\]"),
        (["--prior.train.betas", "[-0.1, 0.9]"], r"prior\.train\.betas is \[-0\.1, 0\.9\]"),
    ],
)
def test_relations_between_sections_are_checked(tiny_yaml, arguments, message):
    with pytest.raises(ValueError, match=message):
        load_experiment(["--config", str(tiny_yaml), *arguments])


def test_null_encodes_all_images(tiny_yaml):
    limits = ["--encode.max_images", "null", "--encode.max_val_images", "null"]
    experiment = load_experiment(["--config", str(tiny_yaml), "--data.source", "images", *limits])
    assert experiment.encode.max_images is None
    assert experiment.encode.max_val_images is None


def test_settings_of_a_training_are_named_in_full(tiny_yaml):
    arguments = ["--prior.train.steps", "0", "--tokenizer.train.ema_decay", "2"]
    with pytest.raises(ValueError) as caught:
        load_experiment(["--config", str(tiny_yaml), *arguments])
    assert str(caught.value).splitlines() == [
        "tokenizer.train.ema_decay is 2.0; it must be in [0, 1)",
        "prior.train.steps is 0; it must be at least 1",
    ]


@pytest.mark.parametrize(
    ("interval", "inside", "outside", "needed"),
    [
        ("[0, 1)", [0, 0.999], [-0.1, 1], "in [0, 1)"),
        ("(0, 1]", [1e-9, 1], [0, 1.1], "in (0, 1]"),
        ("[1, inf]", [1, float("inf"), "auto", None], [0, float("nan")], "at least 1"),
        ("[0, inf]", [0], [-1], "0 or more"),
        ("(0, inf)", [1], [0, float("inf")], "above 0"),
    ],
)
def test_values_outside_of_an_interval_are_named(interval, inside, outside, needed):
    check = lambda value: out_of_range(SimpleNamespace(x=value), "a", interval, "x")  # noqa: E731
    assert not any(check(value) for value in inside)
    for value in outside:
        assert check(value) == [f"a.x is {value}; it must be {needed}"]


def test_nested_settings_are_named_with_dots_and_empty_sections_stay():
    assert flat({"a": {"b": {"c": 1}, "d": {}}, "e": None}) == {"a.b.c": 1, "a.d": {}, "e": None}


def test_a_missing_or_unreadable_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no configuration file"):
        load_experiment(["--config", str(tmp_path / "none.yaml")])
    with pytest.raises(ValueError, match=r"add --config configs/shapes\.yaml"):
        load_experiment([])
    (tmp_path / "broken.yaml").write_text("name: [unclosed\n")
    with pytest.raises(ValueError, match="not readable YAML"):
        load_experiment(["--config", str(tmp_path / "broken.yaml")])
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ValueError, match="holds no settings"):
        load_experiment(["--config", str(tmp_path / "list.yaml")])


def configurations(kind: type) -> list[type]:
    import typing

    found = [kind]
    for hint in typing.get_type_hints(kind).values():
        if dataclasses.is_dataclass(hint):
            found += configurations(hint)  # type: ignore[arg-type]
    return found


class WithoutChecks(ast.NodeTransformer):
    """Takes away what only checks a configuration, which is no use of it."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        checks = node.name == "__post_init__" or node.name.endswith("problems")
        return ast.Pass() if checks else node


def test_every_field_is_documented_and_read_somewhere():
    sources = {
        p: p.read_text()
        for d in ("stage1_tokenizer", "stage2_prior", "pipeline")
        for p in (ROOT / d).rglob("*.py")
    }
    code = "\n".join(
        ast.unparse(WithoutChecks().visit(ast.parse(text))) for text in sources.values()
    )
    for kind in {c.__name__: c for c in configurations(Experiment)}.values():
        text = next(s for s in sources.values() if f"class {kind.__name__}" in s)
        body = next(
            n
            for n in ast.walk(ast.parse(text))
            if isinstance(n, ast.ClassDef) and n.name == kind.__name__
        ).body
        for statement, following in zip(body, [*body[1:], None], strict=True):
            if isinstance(statement, ast.AnnAssign):
                name = statement.target.id  # type: ignore[union-attr]
                documented = isinstance(following, ast.Expr) and isinstance(
                    following.value, ast.Constant
                )
                assert documented, f"{kind.__name__}.{name} has no docstring"
                assert re.search(rf"\.{name}\b", code), f"{kind.__name__}.{name} is read nowhere"


def test_options_are_spelled_with_hyphens_or_underscores(tiny_yaml):
    given = [
        "--config",
        str(tiny_yaml),
        "--prior.train.batch-size",
        "16",
        "--tokenizer.train.log-every=3",
        "--name",
        "two-words",
    ]
    experiment = load_experiment(given)
    assert (
        experiment.prior.train.batch_size,
        experiment.tokenizer.train.log_every,
        experiment.name,
    ) == (16, 3, "two-words")
    assert spelled(["--best_of", "a_b", "--top_k=1_0", "-x_y", "--guidance-scale"], "-") == [
        "--best-of",
        "a_b",
        "--top-k=1_0",
        "-x_y",
        "--guidance-scale",
    ]


def test_help_shows_hyphens(capsys):
    for command in ("run", "generate"):
        assert main([command, "--help"]) == 0
        assert re.findall(r"--[a-z.]*_[a-z_.]*", capsys.readouterr().out) == []


def test_saved_settings_get_the_defaults_of_newer_ones_alone():
    written = {"a": 1, "section": {"b": 2}, "removed": 3}
    defaults = {"a": 0, "section": {"b": 0, "c": 4}, "new": {"d": 5}}
    filled = {"a": 1, "section": {"b": 2, "c": 4}, "removed": 3, "new": {"d": 5}}
    assert with_defaults(written, defaults) == filled
    assert written == {"a": 1, "section": {"b": 2}, "removed": 3}


def test_a_saved_section_that_is_not_there_stays_away():
    assert with_section_defaults({}) == {}
    filled = with_section_defaults({"tokenizer": {"model": {"width": 48}}})
    assert list(filled) == ["tokenizer"] and filled["tokenizer"]["model"]["width"] == 48
    assert filled["tokenizer"]["model"]["num_codes"] == 1024


def test_a_home_folder_is_found_in_paths_of_a_configuration(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert (
        Experiment(output_dir="~/runs", name="a", data=DataConfig(source="folder")).folder
        == tmp_path / "runs" / "a"
    )
    tiny_pipeline(channels=4).save_pretrained(tmp_path / "bundle")
    assert stage_folder("~/bundle", "tokenizer") == tmp_path / "bundle" / "tokenizer"
    text = "name: a\ndata: {source: folder}\ntokenizer: {init_from: ~/bundle}\n"
    (tmp_path / "own.yaml").write_text(text)
    experiment = load_experiment(["--config", str(tmp_path / "own.yaml")])
    assert experiment.tokenizer.model.channels == 4
    assert parent_bundle(experiment) == tmp_path / "bundle"


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../a"])
def test_a_name_that_is_no_folder_of_its_own_is_refused(name):
    with pytest.raises(ValueError, match="it must be a plain folder name"):
        Experiment(name=name, data=DataConfig(source="folder"))
