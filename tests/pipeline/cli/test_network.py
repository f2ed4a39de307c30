"""No command asks the network for anything but what its user names, and nothing with --offline."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from pipeline.cli.main import COMMANDS
from tests.helpers.connections import run_counted
from tests.helpers.data import encoded, write_shards
from tests.helpers.experiments import TINY
from tests.helpers.pipelines import tiny_pipeline


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle, images of several layouts, and experiments."""
    folder = tmp_path_factory.mktemp("place")
    pipe = tiny_pipeline(
        any_order=True, trained_on={"source": "shapes"}, likelihood="discretized_logistic"
    )
    pipe.save_pretrained(folder / "bundle")
    images = [encoded((20 * i, 0, 0), (40, 40)) for i in range(12)]
    (folder / "images").mkdir()
    for i, image in enumerate(images):
        (folder / "images" / f"{i}.png").write_bytes(image)
        (folder / "images" / f"{i}.txt").write_text(f"shade {i}")
    (folder / "own.png").write_bytes(encoded((60, 0, 0), (16, 16)))
    rows = {"image": images, "text": [f"shade {i}" for i in range(12)]}
    pq.write_table(pa.table(rows), folder / "rows.parquet")
    write_shards(folder / "shards", [6, 6])
    tiny = {**TINY, "output_dir": str(folder / "runs"), "trackers": ["tensorboard"]}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tiny))
    return folder


def names_of_the_hub(place: Path) -> dict[str, list[str]]:
    """Commands that ask for what is not on this disk."""
    config = ["--config", str(place / "tiny.yaml"), "--name", "hub"]
    bundle = ["--bundle", str(place / "bundle")]
    source = "--data.source"
    stream = ["--data.streaming", "true"]
    return {
        "a data set": ["doctor", "user/set"],
        "a streamed data set": ["train-tokenizer", *config, source, "user/set", *stream],
        "shards": ["train-tokenizer", *config, source, "https://host.test/{0..3}.tar", *stream],
        "Parquet": ["train-tokenizer", *config, source, "hf://datasets/a/b.parquet", *stream],
        "a scorer": ["generate", *bundle, "red", "--best-of", "2", "--clip-scorer", "user/clip"],
        "a text tokenizer": ["run", *config, "--text.pretrained", "user/tokenizer"],
        "a backbone": [
            *("train-tokenizer", *config, "--tokenizer.objective.perceptual.weight", "1"),
            *("--tokenizer.objective.perceptual.distance", "user/backbone"),
        ],
        "a tracker": ["train-tokenizer", *config, "--trackers", "[wandb]"],
        "a bundle": ["generate", "--bundle", "user/bundle", "red"],
        "a repository to push to": ["push", *bundle, "--to", "user/bundle"],
        "a tokenizer": ["codebook", "--tokenizer", "user/tokenizer"],
    }


@pytest.mark.parametrize("by", ["--offline", "HF_HUB_OFFLINE"])
def test_offline_refuses_what_needs_the_network_in_one_line_and_asks_for_nothing(place, by):
    given = names_of_the_hub(place)
    by_option = by == "--offline"
    commands = [[*command, *([by] if by_option else [])] for command in given.values()]
    results = run_counted(commands, place / "home", **({} if by_option else {by: "1"}))
    for name, result in zip(given, results, strict=True):
        assert result["status"] == 1 and result["asked"] == [], (name, result)
        last = result["error"].strip().splitlines()[-1]
        assert last.startswith("minidalle ") and "Traceback" not in result["error"], (name, result)
        if name != "a tokenizer":  # which is a folder alone
            assert "--offline or HF_HUB_OFFLINE forbids" in last, (name, last)


def test_names_that_need_the_network_ask_for_them_without_offline(place):
    """What is counted is counted."""
    given = names_of_the_hub(place)
    asking = ("a data set", "a scorer", "a text tokenizer", "a backbone", "a bundle")
    results = run_counted([given[name] for name in asking], place / "home")
    for name, result in zip(asking, results, strict=True):
        assert result["status"] == 1 and result["asked"], (name, result)
        assert all("huggingface.co" in address for address in result["asked"]), (name, result)
        assert len(result["asked"]) < 12, (name, result)
        assert "the Hub does not answer" in result["error"], (name, result)


@pytest.mark.slow
@pytest.mark.parametrize("option", [[], ["--offline"]], ids=["online", "offline"])
def test_no_command_asks_the_network_for_anything_on_data_that_lie_here(place, option, tmp_path):
    config = ["--config", str(place / "tiny.yaml"), "--output-dir", str(tmp_path / "runs")]
    bundle = ["--bundle", str(place / "bundle")]
    tokenizer = ["--tokenizer", str(place / "bundle" / "tokenizer")]
    image = str(place / "own.png")
    held_out = ["--data.val-fraction", "0.4", "--data.upscale", "true"]
    rows = ["--data.source", str(place / "rows.parquet"), *held_out]
    stream = ["--data.source", str(place / "shards"), "--data.streaming", "true", *held_out]
    variants = {name: {"prior": {"train": {"steps": 2}}} for name in ("one", "two")}
    several = tmp_path / "several.yaml"
    several.write_text(
        yaml.safe_dump(
            {**TINY, "name": "several", "output_dir": str(tmp_path), "variants": variants}
        )
    )
    made = ["--bundle", str(tmp_path / "runs" / "tiny" / "bundle")]
    quick = ["--output-dir", str(tmp_path), "--prior.train.steps", "2", "--trackers", "[]"]
    commands = [
        ["doctor", str(place / "images")],
        ["doctor", str(place / "rows.parquet")],
        ["doctor", str(place / "shards")],
        ["estimate", *config],
        ["run", *config],
        ["train-tokenizer", *config, "--name", "rows", *rows],
        ["train-tokenizer", *config, "--name", "stream", *stream],
        ["encode", *config, "--name", "tiny"],
        ["train-prior", *config, "--name", "tiny"],
        ["compare-tokenizers", "--config", str(several)],
        ["generate", *bundle, "a red star", "--out", str(tmp_path / "images")],
        [
            *("edit", *bundle, "--image", image, "--prompt", "a red star", "--strength", "0.5"),
            *("--out", str(tmp_path / "edited")),
        ],
        ["reconstruct", *tokenizer, image, "--out", str(tmp_path / "again")],
        ["likelihood", image, *bundle, "--prompt", "a red star"],
        [
            *("compress", image, *bundle, "--prompt", "a red star"),
            "--out",
            str(tmp_path / "packed"),
        ],
        ["decompress", str(tmp_path / "packed"), *bundle, "--out", str(tmp_path / "back.png")],
        ["evaluate", *config, "--name", "tiny", "--max-images", "4"],
        ["codebook", "--tokenizer", str(tmp_path / "runs" / "tiny" / "tokenizer")],
        ["finetune", *made, "--data", str(place / "images"), "--style", "new", *quick],
    ]
    assert {command[0] for command in commands} == set(COMMANDS) - {
        "zoo",
        "push",
        "serve",
    }  # a run of each variant; asks; ends by a signal
    results = run_counted([[*command, *option] for command in commands], place / "home")
    for command, result in zip(commands, results, strict=True):
        assert result["asked"] == [], (command, result)
        assert result["status"] == 0 or command[0] == "doctor", (command, result)
