"""Control characters of names, captions and prompts do not reach the terminal."""

from __future__ import annotations

import re

import numpy as np
import pytest
import yaml
from PIL import Image

from pipeline.cli.main import main
from tests.helpers.experiments import TINY
from tests.helpers.pipelines import tiny_pipeline

RAW = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2028\u2029\u2066-\u2069]"
)
"""All but newlines, tabs and the returns of progress bars."""
NASTY = "\x1b[31m\x1b]0;owned\x07\x9b2J\u202egnp.\u2028\x7f\x08"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images with control characters in their names and captions; two are no images, and one is
    a copy of another."""
    made = tmp_path_factory.mktemp("data") / f"images{NASTY}"
    made.mkdir()
    random = np.random.default_rng(0)
    for i in range(12):
        pixels = random.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        image = Image.fromarray(pixels).resize((32, 32))
        for copy in range(2 if i == 0 else 1):
            image.save(made / f"{i:02}{copy}{NASTY}.png")
            (made / f"{i:02}{copy}{NASTY}.txt").write_text(f"shade {i} {NASTY}")
    for i in range(2):
        (made / f"broken{i}{NASTY}.png").write_bytes(b"broken")
        (made / f"broken{i}{NASTY}.txt").write_text("nothing")
        (made / f"uncaptioned{i}{NASTY}.png").write_bytes(b"")
    return made


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    made = tmp_path_factory.mktemp("bundle") / f"bundle{NASTY}"
    tiny_pipeline().save_pretrained(made)
    return made


@pytest.fixture
def config(tmp_path, folder):
    values = TINY | {
        "output_dir": str(tmp_path / f"runs{NASTY}"),
        "data": {"source": str(folder), "image_size": 32, "val_fraction": 0.3},
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "c.yaml"


def shown(capfd, *arguments: object) -> str:
    """What a command prints, which holds names and no control character."""
    capfd.readouterr()
    main([str(one) for one in arguments])
    out, err = capfd.readouterr()
    assert not RAW.search(out + err), ascii(RAW.findall(out + err))
    return out + err


def test_doctor_escapes_names_and_captions(capfd, config, tmp_path):
    text = shown(capfd, "doctor", "--config", config, "--out", tmp_path / f"doctor{NASTY}")
    assert "broken0\\u001b[31m" in text and "wrote" in text


@pytest.mark.parametrize("command", ["train-tokenizer", "encode", "train-prior", "run"])
def test_errors_of_stages_escape_names(capfd, config, command):
    assert "\\u001b[31m" in shown(capfd, command, "--config", config)


def test_prompts_and_folders_are_escaped(capfd, bundle, tmp_path):
    out = tmp_path / f"out{NASTY}"
    options = ("generate", "--bundle", bundle, "--num-images", 1, "--out", out)
    assert "wrote 1 images" in shown(capfd, *options, f"a {NASTY}", "--truncate")
    assert "text slots" in shown(capfd, *options, f"a {NASTY}" * 50)
    prompts = tmp_path / f"p{NASTY}.txt"
    prompts.write_text(f"\n{NASTY}\0\n")
    assert "NUL" in shown(capfd, *options, "--prompts", prompts)


@pytest.mark.parametrize(
    "arguments",
    [
        ("evaluate", "--config", "CONFIG", "--bundle", f"none{NASTY}"),
        ("reconstruct", f"none{NASTY}.png", "--tokenizer", f"none{NASTY}"),
        ("likelihood", f"none{NASTY}.png", "--bundle", "BUNDLE"),
        ("codebook", "--tokenizer", f"none{NASTY}"),
        ("run", "--config", f"none{NASTY}.yaml"),
        ("run", "--config", "CONFIG", f"--name={NASTY}"),
        ("run", "--config", "CONFIG", f"--{NASTY}", "1"),
        ("generate", "--bundle", "BUNDLE", "x", f"--{NASTY}"),
        ("generate", "--bundle", "BUNDLE", "x", "--compile", NASTY),
        (f"{NASTY}",),
    ],
)
def test_errors_escape_what_was_given(capfd, config, bundle, arguments):
    given = {"CONFIG": config, "BUNDLE": bundle}
    assert "minidalle" in shown(capfd, *(given.get(one, one) for one in arguments))


def test_tracebacks_are_escaped(capfd, tmp_path):
    missing = tmp_path / f"none{NASTY}"
    text = shown(capfd, "generate", "x", "--bundle", missing, "--traceback")
    assert "Traceback" in text and "\\u001b[31m" in text
