"""Runs that start from a bundle: what they inherit, what they refuse, adapters, new words,
forgetting."""

from __future__ import annotations

import json
import re
import shutil
import sys
import warnings
from dataclasses import replace
from functools import reduce
from operator import getitem
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from benchmarks.attack_bundles import edit, sign_text
from pipeline import TextToImagePipeline, forgetting
from pipeline.cli.main import main
from pipeline.config.experiment import PriorSection, TokenizerSection
from pipeline.config.load import load_experiment, load_values
from pipeline.config.train import PriorTrainConfig
from pipeline.data.codes.dataset import CodesDataset
from pipeline.data.load import load_source
from pipeline.evaluation.forgetting import NEW, OLD
from pipeline.stages.finetune import LoRAAdapter, check_init_from, new_tokenizer
from pipeline.stages.manifest import read_settings
from pipeline.training import trainer
from stage1_tokenizer import TokenizerModule, VectorOptions, to_model_range
from stage2_prior import PriorModule, PriorObjective, PriorObjectiveConfig, TextTokenizer
from tests.helpers.cli import fails
from tests.helpers.experiments import TINY
from tests.helpers.launch import CHECK, launch
from tests.helpers.pipelines import tiny_pipeline
from tests.helpers.priors import tiny_prior
from tests.helpers.tokenizers import tiny_tokenizer

pytestmark = pytest.mark.slow

STILL = ["--prior.train.learning_rate", "1e-12", "--prior.objective.caption_dropout", "0"]
"""Steps that move nothing."""
LORA = ["--prior.lora_rank", "2", "--prior.train.learning_rate", "1e-2"]


def settings(tmp_path: Path, bundle: Path, **data: object) -> list[str]:
    """Arguments of a run `tuned` that says nothing of the models and starts from a bundle with a
    frozen tokenizer."""
    values = {key: value for key, value in TINY.items() if key not in ("text", "name")}
    values |= {
        "name": "tuned",
        "output_dir": str(tmp_path / "runs"),
        "data": {"source": "shapes", **data},
        "tokenizer": {
            "train": TINY["tokenizer"]["train"],
            "init_from": str(bundle),
            "frozen": True,
        },
        "prior": {"train": TINY["prior"]["train"], "init_from": str(bundle)},
    }
    (tmp_path / "tuned.yaml").write_text(yaml.safe_dump(values))
    return ["--config", str(tmp_path / "tuned.yaml")]


@pytest.fixture
def bundle(finished_run) -> Path:
    return finished_run[1] / "bundle"


@pytest.fixture
def same(tmp_path, bundle) -> list[str]:
    """Starting from the finished run on its own data."""
    return settings(tmp_path, bundle, shapes={"max_objects": 1})


@pytest.fixture
def encoded(same, tmp_path) -> tuple[list[str], Path]:
    """The same, with a tokenizer taken over and codes."""
    for stage in ("train-tokenizer", "encode"):
        assert main([stage, *same]) == 0
    return same, tmp_path / "runs" / "tuned"


def test_model_and_text_settings_are_inherited(same, bundle):
    experiment = load_experiment(same)
    tokenizer, prior = (
        TokenizerModule.from_pretrained(bundle / "tokenizer"),
        PriorModule.from_pretrained(bundle / "prior"),
    )
    assert experiment.tokenizer.model == tokenizer.own_config and experiment.data.image_size == 32
    assert (
        experiment.prior.model == prior.model_config
        and experiment.text.max_length == prior.stream.text_length == 48
    )


def test_weights_from_before_a_setting_existed_can_be_started_from(tmp_path):
    """A tokenizer whose config.json has no section of a quantizer that is newer."""
    tokenizer = tiny_tokenizer(quantizer="fsq", num_codes=1024)
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    del values["model"]["gaussian"]
    path.write_text(json.dumps(values))
    section = TokenizerSection(model=tokenizer.own_config, init_from=str(tmp_path))
    check_init_from(section, PriorSection(), 48)
    del values["model"]["fsq"]  # which is of this quantizer, and at its default
    path.write_text(json.dumps(values))
    check_init_from(section, PriorSection(), 48)
    section.model.code_dim += 1
    with pytest.raises(
        ValueError, match=r"of another architecture: tokenizer\.model\.code_dim is 5"
    ):
        check_init_from(section, PriorSection(), 48)


def test_a_residual_tokenizer_can_start_from_one_with_a_single_codebook(tmp_path):
    """Its first codes are those of that one; what they leave over is quantized by new codebooks."""
    origin = tiny_tokenizer(quantizer="vq", num_codes=16).eval()
    origin.save_pretrained(tmp_path)
    model = replace(origin.own_config, quantizer="residual")
    section = TokenizerSection(model=model, init_from=str(tmp_path))
    check_init_from(section, PriorSection(), 48)
    started = new_tokenizer(section).eval()
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    first = started.encode(pixels)[:, : origin.layout[0].length]
    assert torch.equal(first, origin.encode(pixels).flatten(1))
    assert started.layout == origin.layout * 2
    kept = {n: w for n, w in origin.state_dict().items() if not n.startswith("quantizer.")}
    assert all(torch.equal(started.state_dict()[name], weight) for name, weight in kept.items())
    section.frozen = True  # a copy has the codes of what it is copied from
    with pytest.raises(ValueError, match="quantizer is residual and vq there"):
        check_init_from(section, PriorSection(), 48)


@pytest.mark.parametrize("codebook", ["ema", "gradient", "linear"])
def test_the_first_of_residual_codebooks_has_the_vectors_of_the_single_one(tmp_path, codebook):
    """They lie on the sphere, which a residual codebook does not see to itself."""
    options = VectorOptions(codebook=codebook, normalize=True)
    origin = tiny_tokenizer(quantizer="vq", num_codes=16, vq=options).eval()
    with torch.no_grad():
        origin.quantizer.codebook.mul_(1.3)
        if origin.quantizer.map is not None:
            origin.quantizer.map.add_(0.1 * torch.randn(origin.quantizer.map.shape))
    origin.save_pretrained(tmp_path)
    model = replace(origin.own_config, quantizer="residual")
    started = new_tokenizer(TokenizerSection(model=model, init_from=str(tmp_path)))
    torch.testing.assert_close(started.quantizer.books[0].vectors(), origin.quantizer.vectors())


def test_new_tokens_with_lora_are_refused_under_fsdp(monkeypatch):
    prior = tiny_prior()
    section = PriorSection(
        init_from="bundle", lora_rank=2, train=PriorTrainConfig(optimizer="adamw")
    )
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="cannot be sharded: FSDP would train"):
        LoRAAdapter(prior, section, {"prior": "0"}, len(prior.text_embedding.weight) - 1)


def test_weights_can_be_started_from_with_another_dropout(bundle, tmp_path):
    arguments = [*settings(tmp_path, bundle), "--prior.model.dropout", "0.25"]
    experiment = load_experiment(arguments)
    check_init_from(experiment.tokenizer, experiment.prior, experiment.text.max_length)
    assert experiment.prior.model.dropout == 0.25


def test_of_a_prior_with_a_text_encoder_no_text_is_modelled_either(bundle, tmp_path):
    origin = PriorModule.from_pretrained(bundle / "prior")
    shutil.copytree(bundle, tmp_path / "other")
    model = replace(origin.model_config, text_depth=1)
    PriorModule(model, origin.stream.config).save_pretrained(tmp_path / "other/prior")
    experiment = load_experiment(settings(tmp_path, tmp_path / "other"))
    assert experiment.prior.model.text_depth == 1
    assert experiment.prior.objective.text_weight == 0
    check_init_from(experiment.tokenizer, experiment.prior, experiment.text.max_length)


def test_a_text_encoder_can_be_added_to_weights_without_one(bundle, tmp_path):
    encoder = ["--prior.model.text_depth", "1", "--prior.objective.text_weight", "0"]
    experiment = load_experiment([*settings(tmp_path, bundle), *encoder])
    check_init_from(experiment.tokenizer, experiment.prior, experiment.text.max_length)
    experiment.prior.lora_rank = 4
    with pytest.raises(ValueError, match=r"would not be trained, set prior\.lora_rank=0"):
        check_init_from(experiment.tokenizer, experiment.prior, experiment.text.max_length)
    experiment.prior.lora_rank = 0
    experiment.prior.model.depth += 1
    with pytest.raises(ValueError, match=r"another architecture: prior\.model\.depth"):
        check_init_from(experiment.tokenizer, experiment.prior, experiment.text.max_length)


@pytest.mark.parametrize(
    ("part", "place", "value", "message"),
    [
        ("tokenizer", "model.score_function", 3, "ScoreFunctionOptions is 3"),
        ("tokenizer", "model.class_path", "this", r"unknown keys \['class_path'\]"),
        ("tokenizer", "model.image_size", [], "it must be a list: 2 values"),
        ("prior", "model", 3, "PriorConfig is 3; it must be a JSON object"),
        ("prior", "stream.levels", [{"grid": 0, "num_codes": 16}], "it must be a list: 2 values"),
        ("prior", "stream.text_length", "x", "StreamConfig.text_length is 'x'"),
        ("prior", "stream", None, "StreamConfig is None; it must be a JSON object"),
    ],
)
def test_a_changed_config_cannot_be_started_from(tmp_path, part, place, value, message):
    bundle = tmp_path / "bundle"
    tiny_pipeline().save_pretrained(bundle)
    path = bundle / part / "config.json"
    content = json.loads(path.read_text())
    *outer, last = place.split(".")
    reduce(getitem, outer, content)[last] = value
    path.write_text(json.dumps(content))
    section = {"init_from": str(bundle)}
    values = {"name": "tuned", "data": {"source": "images"}}
    values |= {"tokenizer": section | {"frozen": True}, "prior": section}
    with pytest.raises(ValueError, match=message) as raised:
        load_values(values, [])
    assert str(path) in str(raised.value)


def test_a_bundle_with_a_text_tokenizer_that_is_no_longer_accepted_names_what_cures(
    tmp_path, bundle, capsys
):
    """As earlier versions wrote it: without a hash in text.json."""
    old = tmp_path / "old"
    shutil.copytree(bundle, old)
    sign = {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAAAAAA"}}
    edit(old / "text_tokenizer" / "tokenizer.json", lambda content: content.update(sign))
    sign_text(old)
    generate = ["generate", "--bundle", str(old), "a red heart", "--out", str(tmp_path / "out")]
    message = (
        "its normalizer is 'Precompiled'",
        f"train a new prior with tokenizer.init_from={old} and tokenizer.frozen=true",
    )
    fails(capsys, generate, *message)
    values = {key: value for key, value in TINY.items() if key != "name"}
    train = {"train": TINY["tokenizer"]["train"], "init_from": str(old), "frozen": True}
    values |= {"name": "cured", "output_dir": str(tmp_path / "runs"), "tokenizer": train}
    (tmp_path / "cured.yaml").write_text(yaml.safe_dump(values))
    assert main(["run", "--config", str(tmp_path / "cured.yaml")]) == 0
    generate[2] = str(tmp_path / "runs" / "cured" / "bundle")
    assert main(generate) == 0


def test_finetuning_starts_where_the_bundle_ended(encoded, bundle, finished_run):
    """The tokenizer is the same to the bit, and so are the prior's metrics on codes before
    anything is learned."""
    arguments, folder = encoded
    assert (
        TokenizerModule.from_pretrained(folder / "tokenizer").fingerprint
        == TokenizerModule.from_pretrained(bundle / "tokenizer").fingerprint
    )
    assert main(["train-prior", *arguments, *STILL]) == 0
    old, new = (read_settings(run / "prior")["held_out"] for run in (finished_run[1], folder))
    for name, value in old.items():
        assert new[name] == pytest.approx(value, abs=1e-5)
    before, after = (
        PriorModule.from_pretrained(bundle / "prior"),
        PriorModule.from_pretrained(folder / "prior"),
    )
    for (name, a), b in zip(before.state_dict().items(), after.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")
    assert (
        TextTokenizer.load(folder / "text_tokenizer").fast.get_vocab()
        == TextTokenizer.load(bundle / "text_tokenizer").fast.get_vocab()
    )
    said = json.loads((folder / "bundle" / "pipeline.json").read_text())["trained_on"][
        "started_from"
    ]
    assert said["prior"]["prior"] == before.fingerprint and said["tokenizer"] == tokenizer_of(
        bundle
    )
    shutil.rmtree(folder / "prior" / "checkpoints")
    moved = shutil.copytree(bundle, folder.parent / "moved")
    again = [
        *arguments,
        *STILL,
        "--prior.init_from",
        str(moved),
        "--tokenizer.init_from",
        str(moved / "tokenizer"),
    ]
    for stage in ("train-tokenizer", "train-prior"):
        assert main([stage, *again]) == 0  # the same weights lie elsewhere
    assert not (folder / "prior" / "checkpoints").exists()


def tokenizer_of(bundle: Path) -> str:
    return json.loads((bundle / "pipeline.json").read_text())["tokenizer_fingerprint"]


def test_a_tokenizer_that_is_trained_further_starts_from_the_weights(same, tmp_path, bundle):
    free = ["--prior.init_from", "null", "--tokenizer.frozen", "false"]
    still = [
        "--tokenizer.train.learning_rate",
        "1e-12",
        "--tokenizer.train.steps",
        "1",
        "--tokenizer.train.warmup_steps",
        "0",
    ]
    assert main(["train-tokenizer", *same, *free, *still]) == 0
    old, new = (
        TokenizerModule.from_pretrained(bundle / "tokenizer"),
        TokenizerModule.from_pretrained(tmp_path / "runs" / "tuned" / "tokenizer"),
    )
    for name, parameter in old.named_parameters():
        torch.testing.assert_close(new.get_parameter(name), parameter)
    assert main(["train-tokenizer", *same, *free, "--name", "further"]) == 0
    assert (
        TokenizerModule.from_pretrained(tmp_path / "runs" / "further" / "tokenizer").fingerprint
        != old.fingerprint
    )


def test_mismatched_parents_are_refused_with_the_difference(
    encoded, tmp_path, bundle, finished_run, capsys
):
    arguments, _ = encoded
    fails(
        capsys,
        ["train-tokenizer", *arguments, "--tokenizer.model.width", "48"],
        "tokenizer.model.width is 48 and 32 there",
    )
    fails(
        capsys,
        ["train-tokenizer", *arguments, "--prior.init_from", str(tmp_path)],
        "no finished prior is there; give a bundle",
    )
    other_stage = ["--prior.init_from", str(bundle / "tokenizer")]
    fails(
        capsys,
        ["train-tokenizer", *arguments, *other_stage],
        "is a mini_dalle_tokenizer and no prior",
        status=2,
    )
    wrong = ["train-prior", *arguments]
    fails(
        capsys,
        [*wrong, "--prior.model.depth", "2", "--prior.model.width", "64"],
        "prior.model.depth is 2 and 1 there, prior.model.width is 64",
    )
    fails(
        capsys,
        [*wrong, "--text.max_length", "40"],
        "text.max_length is 40, and the prior in",
        "has 48 text slots",
    )
    fails(
        capsys,
        [*wrong, "--prior.train.code_order", "random"],
        "prior.train.code_order is random, and the prior in",
        "knows raster order alone",
    )
    own, other = tokenizer_of(bundle), "0123456789abcdef"
    copy = shutil.copytree(bundle, tmp_path / "copy")
    described = json.loads((copy / "pipeline.json").read_text()) | {"tokenizer_fingerprint": other}
    (copy / "pipeline.json").write_text(json.dumps(described))
    said = (
        f"knows the codes of tokenizer {other}",
        f"this run's tokenizer is {own}",
        f"set tokenizer.init_from={copy} and tokenizer.froz",
    )
    for stage in ("train-tokenizer", "train-prior"):
        fails(capsys, [stage, *arguments, "--prior.init_from", str(copy)], *said)
    (copy / "pipeline.json").unlink()
    fails(
        capsys,
        [*wrong, "--prior.init_from", str(copy / "prior")],
        "does not say which tokenizer's codes it knows",
    )
    # A run's folder will do
    assert main([*wrong, *STILL, "--prior.init_from", str(finished_run[1])]) == 0
    fails(
        capsys,
        [*wrong, *STILL, "--prior.init_from", "null"],
        "made with other settings",
        "init_from",
    )


def test_contradictory_finetuning_settings_are_named(same, capsys):
    loose = [
        "--prior.lora_rank",
        "4",
        "--prior.init_from",
        "null",
        "--tokenizer.init_from",
        "null",
        "--text.num_new_tokens",
        "3",
    ]
    fails(
        capsys,
        ["run", *same, *loose],
        "LoRA adapts a prior that is there",
        "tokenizer.frozen is on and tokenizer.init_from is absent",
        "text.num_new_tokens is 3, which needs prior.init_from",
        status=2,
    )
    fails(
        capsys,
        ["run", *same, "--tokenizer.frozen", "false"],
        "a prior knows the codes of one tokenizer",
        status=2,
    )
    fails(
        capsys,
        ["run", *same, *LORA, "--prior.train.optimizer", "muon"],
        "Muon is for whole matrices",
        status=2,
    )
    fails(capsys, ["run", *same, "--text.pretrained", "gpt2"], "keeps its own vocabulary", status=2)


def test_lora_trains_only_the_adapter_and_merges_exactly(bundle, tmp_path):
    from accelerate import Accelerator

    prior, plain = (
        PriorModule.from_pretrained(bundle / "prior"),
        PriorModule.from_pretrained(bundle / "prior"),
    )
    adapter = LoRAAdapter(
        prior, PriorSection(init_from="x", lora_rank=2), {"prior": prior.fingerprint}
    )
    trained = {name for name, p in prior.named_parameters() if p.requires_grad}
    assert len(trained) == 8 and all(
        ".lora_" in name and name.startswith("blocks.") for name in trained
    )
    with torch.no_grad():
        for name in trained:
            prior.get_parameter(name).normal_()
    fed = prior.stream.text_first(torch.randint(0, 300, (2, 48)), torch.randint(0, 16, (2, 16)))
    beside = prior(fed.ids, fed.position_ids, targets=fed.targets).image
    adapter.merge_and_save(tmp_path, Accelerator(cpu=True))
    torch.testing.assert_close(prior(fed.ids, fed.position_ids, targets=fed.targets).image, beside)
    assert not torch.allclose(plain(fed.ids, fed.position_ids, targets=fed.targets).image, beside)
    assert prior.state_dict().keys() == plain.state_dict().keys() and all(
        p.requires_grad for p in prior.parameters()
    )
    from peft import PeftModel  # what anybody has

    torch.testing.assert_close(adapted(PeftModel, plain, tmp_path / "adapter", fed), beside)


def test_missing_peft_is_reported(bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(
        ValueError, match=r"prior\.lora_rank is 2, which needs peft; pip install peft"
    ):
        LoRAAdapter(
            PriorModule.from_pretrained(bundle / "prior"),
            PriorSection(init_from="x", lora_rank=2),
            {"prior": "x"},
        )


def adapted(peft_model, prior: PriorModule, folder: Path, fed) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft_model.from_pretrained(prior, folder)
    return model(fed.ids, fed.position_ids, targets=fed.targets).image


def test_killed_lora_run_ends_as_an_uninterrupted_one(encoded, bundle, monkeypatch):
    """And what was not to be trained is what it was; checkpoints hold averages and moments of
    adapters alone."""
    arguments, folder = encoded
    other = Path(shutil.copytree(folder, folder.parent.parent / "other" / "tuned"))
    assert main(["train-prior", *arguments, *LORA]) == 0
    step = trainer.Trainer.train_step

    def killed(self: trainer.Trainer, number: int, batch: object):
        if number == 5:
            raise KeyboardInterrupt
        return step(self, number, batch)

    again = ["train-prior", *arguments, "--output_dir", str(other.parent), *LORA]
    monkeypatch.setattr("pipeline.training.trainer.Trainer.train_step", killed)
    assert main(again) == 130
    assert (other / "prior" / "checkpoints" / "step-4").is_dir() and not (
        other / "prior" / "model.safetensors"
    ).exists()
    monkeypatch.setattr("pipeline.training.trainer.Trainer.train_step", step)
    assert main(again) == 0
    before, whole, cut = (
        PriorModule.from_pretrained(f)
        for f in (bundle / "prior", folder / "prior", other / "prior")
    )
    assert whole.fingerprint == cut.fingerprint
    changed = {
        name
        for name, value in whole.state_dict().items()
        if not torch.equal(value, before.state_dict()[name])
    }
    assert changed == {
        f"blocks.0.{part}.weight"
        for part in (
            "attention.query_key_value",
            "attention.output",
            "feed_forward.gate_up",
            "feed_forward.down",
        )
    }
    adapter = load_file(folder / "prior" / "adapter" / "adapter_model.safetensors")
    assert sorted(p.name for p in (folder / "prior" / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert (
        len(adapter) == 8
        and json.loads((folder / "prior" / "adapter" / "adapter_config.json").read_text())["r"] == 2
    )
    held = load_file(folder / "prior" / "checkpoints" / "step-6" / "ema.safetensors")
    moments = load_file(folder / "prior" / "checkpoints" / "step-6" / "optimizer.safetensors")
    assert len(held) == 8 and len({name.rsplit(".", 1)[0] for name in moments}) == 8
    assert (
        TextToImagePipeline.from_pretrained(folder / "bundle").prior.fingerprint
        == whole.fingerprint
    )


def test_auto_batch_size_works_with_lora(encoded, capsys):
    """Only what is trained has moments and gradients to count."""
    arguments, folder = encoded
    assert main(["train-prior", *arguments, *LORA, "--prior.train.batch_size", "auto"]) == 0
    out = capsys.readouterr().out
    assert "prior: batch_size 32, gradient_accumulation_steps 1" in out  # of 40 images
    assert read_settings(folder / "prior")["settings"]["train"]["batch_size"] == 32
    assert main(["estimate", *arguments, *LORA]) == 0
    optimizer = re.search(r"prior: .*optimizer ([\d.]+) KiB", capsys.readouterr().out)
    assert optimizer and float(optimizer[1]) < 20  # and 280 of the whole prior


CUT_ADAPTER = """
from pipeline.training import fsdp
end = fsdp.FSDPModelState.load_ema
def told(self):
    end(self)
    assert len(self.ema.shadow) == 8 < len(list(self.networks["prior"].parameters()))
    print("[cut]")
fsdp.FSDPModelState.load_ema = told
"""


def test_lora_on_two_processes_equals_one(same, tmp_path):
    """Sharded (FSDP): only the EMA of adapters is gathered."""
    given = [*same, *LORA, "--prior.objective.caption_dropout", "0", "--precision", "fp32"]
    for name in ("alone", "cut"):
        for stage in ("train-tokenizer", "encode"):
            assert main([stage, *given, "--name", name]) == 0
    assert main(["train-prior", *given, "--name", "alone"]) == 0
    environment = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    assert (
        launch(
            tmp_path,
            2,
            "train-prior",
            *given,
            "--name",
            "cut",
            script=CUT_ADAPTER + CHECK,
            **environment,
        ).count("[cut]")
        == 2
    )
    for file in ("model", "adapter/adapter_model"):
        one, two = (
            load_file(tmp_path / "runs" / name / "prior" / f"{file}.safetensors")
            for name in ("alone", "cut")
        )
        assert one.keys() == two.keys()
        for name, value in one.items():
            torch.testing.assert_close(two[name], value, atol=1e-4, rtol=1e-3)


def test_new_tokens_start_as_the_mean_of_their_pieces(encoded, bundle, capsys):
    """Old ids stay, and old captions are cut as they were; longer captions have slots."""
    arguments, folder = encoded
    text = TextTokenizer.load(bundle / "text_tokenizer")
    old = ["a red circle", "a big blue star on white"]
    grown, spelled = text.extend_vocab(["a xylophone", "two xylophones"] * 2, 20)
    assert (
        torch.equal(grown.encode(old), text.encode(old))
        and len(spelled) == grown.vocab_size - text.vocab_size > 0
    )
    assert grown.lengths(["a xylophone"])[0] < text.lengths(["a xylophone"])[0]
    assert grown.decode(grown.encode(["a xylophone on white"])) == ["a xylophone on white"]
    for ids, number in zip(spelled, range(text.vocab_size, grown.vocab_size), strict=True):
        assert text.fast.decode(ids) == grown.fast.decode([number])
    capsys.readouterr()
    assert (
        main(
            [
                "train-prior",
                *arguments,
                *STILL,
                "--text.num_new_tokens",
                "5",
                "--text.max_length",
                "50",
            ]
        )
        == 0
    )
    assert "5 entries more, into" in capsys.readouterr().out
    before, after = (
        PriorModule.from_pretrained(bundle / "prior"),
        PriorModule.from_pretrained(folder / "prior"),
    )
    assert (
        after.stream.text_vocab_size == before.stream.text_vocab_size + 5
        and after.stream.text_length == 50
    )
    _, spelled = text.extend_vocab(
        CodesDataset(folder / "codes", "train").captions(list(range(40))), 5
    )
    for own, theirs in (
        (after.text_embedding, before.text_embedding),
        (after.text_head, before.text_head),
    ):
        torch.testing.assert_close(own.weight[:-5], theirs.weight)
        for row, ids in zip(own.weight[-5:], spelled, strict=True):
            torch.testing.assert_close(row, theirs.weight[ids].mean(0))


def test_forgetting_evaluates_both_bundles_on_both_data(tmp_path, bundle, finished_run, capsys):
    arguments = settings(tmp_path, bundle, shapes={"min_objects": 2, "max_objects": 2})
    arguments += ["--text.truncate", "true"]
    assert main(["run", *arguments, *LORA]) == 0
    folder = tmp_path / "runs" / "tuned"
    experiment = load_experiment(arguments)
    found = forgetting(bundle, folder / "bundle", experiment, images=70)
    assert not found.notes and set(found.metrics) == {OLD, NEW}
    data = {OLD: load_experiment(["--config", str(finished_run[0])]).data, NEW: experiment.data}
    for name, config in data.items():
        source = load_source(config, "held_out")
        for when, place in (("before", bundle), ("after", folder / "bundle")):
            pipe = TextToImagePipeline.from_pretrained(place)
            bf16 = torch.autocast("cpu", torch.bfloat16, enabled=pipe.trained_on["codes_in_bf16"])
            batches = []
            with torch.no_grad(), bf16:
                for rows in (range(64), range(64, 70)):
                    codes = pipe.tokenizer.encode(
                        to_model_range(torch.from_numpy(source.images(rows)))
                    ).flatten(1)
                    batches.append(
                        {
                            "text_ids": pipe.text.encode(source.captions(rows), truncate=True),
                            "codes": codes,
                        }
                    )
                expected = PriorObjective(pipe.prior, PriorObjectiveConfig()).evaluate(batches)
            for metric, values in found.metrics[name].items():
                assert values[when] == pytest.approx(expected[metric], abs=1e-6)
    assert (
        found.metrics[OLD]["nats_per_code"]["before"]
        != found.metrics[NEW]["nats_per_code"]["before"]
    )
    capsys.readouterr()
    assert main(["evaluate", *arguments, *LORA, "--max-images", "70"]) == 0
    out, written = capsys.readouterr().out, json.loads((folder / "evaluation.json").read_text())
    assert "what fine-tuning changed" in out and "new data  nats_per_code" in out
    assert written["forgetting"]["metrics"] == found.metrics


def test_forgetting_compares_bundles_with_other_tokenizers(tmp_path, bundle, finished_run, capsys):
    """A run that was not started from it: `evaluate --baseline-bundle`."""
    path, folder = finished_run
    other = Path(shutil.copytree(folder, tmp_path / "runs" / "tiny"))
    tokenizer = TokenizerModule.from_pretrained(bundle / "tokenizer")
    with torch.no_grad():
        next(tokenizer.decoder.parameters()).mul_(0.5)
    shutil.rmtree(other / "bundle" / "tokenizer")
    tokenizer.save_pretrained(other / "bundle" / "tokenizer")
    described = json.loads((other / "bundle" / "pipeline.json").read_text()) | {
        "tokenizer_fingerprint": tokenizer.fingerprint
    }
    (other / "bundle" / "pipeline.json").write_text(json.dumps(described))
    arguments = [
        "evaluate",
        "--config",
        str(path),
        "--output_dir",
        str(tmp_path / "runs"),
        "--max-images",
        "20",
    ]
    assert main([*arguments, "--baseline-bundle", str(bundle)]) == 0
    out, written = capsys.readouterr().out, json.loads((other / "evaluation.json").read_text())
    found = written["forgetting"]["metrics"]
    assert "the tokenizers differ" in out and set(found) == {OLD, NEW}
    for metrics in found.values():
        assert metrics["psnr"]["before"] != metrics["psnr"]["after"]
    assert found[NEW]["psnr"]["after"] == pytest.approx(written["psnr"], abs=1e-6)


def test_missing_old_data_is_reported_and_new_data_evaluated(tmp_path, bundle, finished_run):
    copy = shutil.copytree(bundle, tmp_path / "copy")
    described = json.loads((copy / "pipeline.json").read_text())
    described["trained_on"]["data"]["source"] = str(tmp_path / "gone")
    (copy / "pipeline.json").write_text(json.dumps(described))
    found = forgetting(copy, bundle, load_experiment(["--config", str(finished_run[0])]), images=10)
    assert (
        set(found.metrics) == {NEW}
        and len(found.notes) == 1
        and "the old data cannot be read" in found.notes[0]
    )
    assert str(tmp_path / "gone") in found.notes[0] and found.notes[0] in found.table()
