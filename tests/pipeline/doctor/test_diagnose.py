"""`minidalle doctor`: each finding, in a folder that has it; its errors are those of training."""

from __future__ import annotations

import json
import shutil
import tarfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from pipeline import diagnose, load_experiment
from pipeline.cli import doctor
from pipeline.cli.main import main
from pipeline.config.data import DataConfig, MixPart
from pipeline.data.load import load_sources
from pipeline.doctor.report import Diagnosis
from pipeline.stages.run import run
from pipeline.stages.sources import sources_of
from stage2_prior import TextConfig
from tests.helpers.cli import fails
from tests.helpers.data import config as small

WORDS = ("red", "green", "blue", "small", "large", "cat", "dog", "tree")


def image(seed: int, size: tuple[int, int] = (64, 64)) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def caption(seed: int) -> str:
    return f"{WORDS[seed % 8]} {WORDS[seed // 8 % 8]} {seed}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Forty good images of 64x64."""
    made = tmp_path / "images"
    made.mkdir()
    for seed in range(40):
        add(made, f"{seed:02}.png", image(seed), caption(seed))
    return made


def add(folder: Path, name: str, image: Image.Image, text: str) -> None:
    image.save(folder / name)
    (folder / name).with_suffix(".txt").write_text(text)


def said(diagnosis: Diagnosis, level: str) -> str:
    return "\n".join(finding.text for finding in diagnosis.findings if finding.level == level)


def training_says(config: DataConfig) -> str:
    with pytest.raises((ValueError, OSError)) as raised:
        load_sources(config)
    return str(raised.value)


def config(source: Path, **options) -> DataConfig:
    return small(source, **{"image_size": 32, "val_fraction": 0.2, **options})


def test_good_images_pass(folder, tmp_path, capsys):
    out = tmp_path / "report"
    status = main(
        ["doctor", str(folder), "--out", str(out), "--output_dir", str(tmp_path / "runs")]
    )
    printed = capsys.readouterr().out
    assert status == 0, printed
    assert (
        "40, 40 readable, 40 usable" in printed
        and f"next: minidalle run --config {out / 'suggested.yaml'}" in printed
    )
    assert f"wrote {out / 'index.html'} and {out / 'doctor.json'}" in printed
    assert (out / "suggested.yaml").read_text() in printed
    told = json.loads((out / "doctor.json").read_text())
    assert told["sources"][0]["shorter_side"] == {
        "smallest": 64,
        "median": 64,
        "most": 64,
        "largest": 64,
    }
    assert not [f for f in told["findings"] if f["level"] == "fails"]
    train, held_out = load_sources(DataConfig(source=str(folder)))
    assert (told["sources"][0]["train"], told["sources"][0]["held_out"]) == (
        len(train),
        len(held_out),
    )


def test_images_are_counted_by_size_mode_and_format(folder):
    image(50, (30, 90)).convert("L").save(folder / "50.jpg")
    (folder / "50.txt").write_text("tall")
    clear = image(51, (200, 100))
    clear.putalpha(128)
    clear.save(folder / "51.webp")
    (folder / "51.txt").write_text("wide")
    frames = [image(seed) for seed in (52, 53)]
    frames[0].save(folder / "52.gif", save_all=True, append_images=frames[1:])
    (folder / "52.txt").write_text("moving")
    found = diagnose(config(folder))
    (source,) = found.sources
    assert (source.rows, source.usable) == (43, 42)
    assert {one.label: one.count for one in source.sides} == {
        "24 to 31": 1,
        "64 to 95": 41,
        "96 to 127": 1,
    }
    assert {one.label: one.count for one in source.aspects} == {
        "square": 41,
        "up to 2:1": 1,
        "up to 3:1": 1,
    }
    assert {one.label: one.count for one in source.modes} == {
        "RGB": 40,
        "L": 1,
        "RGBA": 1,
        "P, animated": 1,
    }
    assert {one.label: one.count for one in source.formats} == {
        ".png": 40,
        ".jpg": 1,
        ".webp": 1,
        ".gif": 1,
    }
    assert (source.longer_side.largest, source.shorter_side.smallest) == (200, 30)
    assert "of 1 images with several frames the first is used" in said(found, "notes")
    assert (
        "1 images smaller than 32 pixels left out (data.upscale=true keeps them): 50.jpg"
        in said(found, "notes")
    )


def test_unreadable_images_are_named_and_too_many_fail(folder):
    for name in ("aa", "bb", "cc"):
        (folder / f"{name}.png").write_bytes(b"no image")
        (folder / f"{name}.txt").write_text("broken")
    found = diagnose(config(folder, filter={"max_corrupt_fraction": 0.1}))
    assert [
        (one.name, "of no known format" in one.problem) for one in found.sources[0].unreadable
    ] == [("aa.png", True), ("bb.png", True), ("cc.png", True)]
    assert not found.fails and "3 unreadable images left out: aa.png, bb.png, cc.png" in said(
        found, "notes"
    )
    found = diagnose(config(folder))
    assert found.fails and training_says(config(folder)) in said(found, "fails").splitlines()
    # And it went on
    assert (
        found.sources[0].usable == 40
        and found.captions is not None
        and found.suggestion is not None
    )


def test_missing_column_fails_and_images_are_still_inspected(folder):
    for text in folder.glob("*.txt"):
        text.unlink()
    (folder / "metadata.csv").write_text(
        "file_name,title\n" + "".join(f"{n:02}.png,{caption(n)}\n" for n in range(40))
    )
    found = diagnose(config(folder))
    assert said(found, "fails") == training_says(config(folder)) and "did you mean 'title'" in said(
        found, "fails"
    )
    assert found.sources[0].readable == 40 and found.sources[0].shorter_side.median == 64
    assert found.captions is None and found.suggestion is None
    assert not diagnose(config(folder, text_column="title")).fails


def test_no_captions_is_a_failure(folder):
    for text in folder.glob("*.txt"):
        text.unlink()
    found = diagnose(config(folder))
    assert said(found, "fails") == training_says(
        config(folder)
    ) and "40 images and no captions" in said(found, "fails")
    assert found.sources[0].rows == 40 and found.suggestion is None
    assert "can be used by `minidalle train-tokenizer`, `encode`" in said(found, "notes")


def test_images_that_are_all_too_small_fail_and_a_size_is_suggested(folder):
    found = diagnose(config(folder, image_size=128))
    assert said(found, "fails") == training_says(config(folder, image_size=128))
    assert "no usable image with a caption" in said(found, "fails")
    assert found.suggestion.values["data"]["image_size"] == 64


def test_empty_validation_split_fails(tmp_path):
    folder = tmp_path / "one"
    folder.mkdir()
    add(folder, "0.png", image(0), caption(0))
    path = tmp_path / "one.yaml"
    data = {"source": str(folder), "image_size": 32}
    path.write_text(yaml.safe_dump({"name": "one", "data": data}))
    experiment = load_experiment(["--config", str(path)])
    with pytest.raises(ValueError, match="1 images to train on and 0 held out") as raised:
        sources_of(experiment.data, experiment.folder, experiment.process_timeout)
    assert said(diagnose(experiment.data), "fails") == str(raised.value)


def test_of_few_images_one_is_held_out(tmp_path):
    """At 0.001, the hash of no name is low enough."""
    folder = tmp_path / "few"
    folder.mkdir()
    for seed in range(5):
        add(folder, f"{seed}.png", image(seed), caption(seed))
    experiment = load_experiment(_few(tmp_path, folder))
    train, held_out = sources_of(experiment.data, experiment.folder, experiment.process_timeout)
    assert (len(train), len(held_out)) == (4, 1)
    found = diagnose(experiment.data)
    assert not said(found, "fails")
    assert (found.sources[0].train, found.sources[0].held_out) == (4, 1)
    # A wider split holds the same image out.
    wider = load_experiment([*_few(tmp_path, folder), "--data.val_fraction", "0.5"])
    _, more = sources_of(wider.data, wider.folder, wider.process_timeout)
    assert set(held_out.names([0])) <= set(more.names(range(len(more))))


def _few(tmp_path, folder) -> list[str]:
    path = tmp_path / "few.yaml"
    data = {"source": str(folder), "image_size": 32, "val_fraction": 0.001}
    path.write_text(yaml.safe_dump({"name": "few", "data": data}))
    return ["--config", str(path)]


def test_captions_that_are_too_long_fail_unless_truncated(folder):
    (folder / "03.txt").write_text("many words " * 30)
    found = diagnose(config(folder), text=TextConfig(max_length=16, vocab_size=320))
    assert "1 of 40 captions need more than text.max_length=16 slots (the longest " in said(
        found, "fails"
    )
    assert (
        f"set text.max_length={found.captions.tokens.largest:.0f}" in said(found, "fails")
        and found.captions.too_long == 1
    )
    assert found.captions.longest.startswith("many words")
    cut = diagnose(config(folder), text=TextConfig(max_length=16, vocab_size=320, truncate=True))
    assert not cut.fails and "1 of 40 captions are truncated to text.max_length=16 slots" in said(
        cut, "warns"
    )
    long = diagnose(config(folder), text=TextConfig(max_length=500))
    assert "of text.max_length=500 slots; a lower text.max_length trains" in said(long, "notes")


def test_caption_lengths_and_vocabulary_are_reported(folder):
    (folder / "03.txt").write_text("")
    (folder / "04.txt").write_text("twice")
    (folder / "05.txt").write_text("twice")
    (folder / "06.txt").write_bytes(b"caf\xe9")
    found = diagnose(config(folder))
    assert "1 images without a caption left out: 03.png" in said(found, "notes")
    assert "1 captions that are not UTF-8 left out (save them as UTF-8): 06.txt" in said(
        found, "notes"
    )
    captions = found.captions
    assert (captions.captions, captions.distinct, captions.shared) == (38, 37, 2)
    assert [asdict(one) for one in captions.repeated] == [{"label": "twice", "count": 2}]
    numbers = {str(n) for n in range(40)} - {"3", "4", "5", "6"}
    assert captions.words == len(set(WORDS) | {"twice"} | numbers) and captions.words_once == len(
        numbers
    )
    assert 0 < captions.vocabulary_used < captions.vocabulary <= 1024
    assert (
        sum(one.count for one in captions.token_bins) == 38
        and captions.characters.largest == len("green green 9") + 1
    )
    assert "entries of text.vocab_size=1024; no more occur twice" in said(found, "notes")


def test_many_images_with_one_caption_are_warned_of(folder):
    for number in range(30):
        (folder / f"{number:02}.txt").write_text("an image")
    found = diagnose(config(folder))
    assert (
        "30 of 40 images share their caption with another one (11 are distinct)"
        in said(found, "warns")
        and not found.fails
    )


def test_captions_that_lost_characters_are_warned_of(tmp_path, folder):
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        (folder / "06.txt").write_bytes(b"caf\xe9")
        (folder / "07.txt").write_text("caf\ufffd")  # as programs write that replaced it
        for path in sorted(folder.iterdir()):
            tar.add(path, path.name)
    found = diagnose(config(tmp_path / "shard.tar"))
    assert (
        "1 captions hold characters that are not UTF-8" in said(found, "warns")
        and found.captions.damaged == 1
    )
    assert "1 captions that are not UTF-8 left out (save them as UTF-8): 06" in said(found, "notes")


def split(folder: Path) -> tuple[list[str], list[str]]:
    train, held_out = load_sources(config(folder))
    return train.names(range(len(train))), held_out.names(range(len(held_out)))


def test_copies_are_found_within_and_across_the_splits(folder):
    seen, kept = split(folder)
    shutil.copy(folder / seen[0], folder / "copy.png")
    (folder / "copy.txt").write_text("copied")
    before = diagnose(config(folder)).sources[0].duplicates
    assert (
        before.copies == 1
        and before.alike == 0
        and before.held_out_copies == int("copy.png" in split(folder)[1])
    )
    assert [set(group.names) for group in before.groups] == [{"copy.png", seen[0]}]
    # A training image is now one that is held out
    shutil.copy(folder / kept[0], folder / seen[1])
    image(3, (64, 64)).resize((128, 128), Image.Resampling.BICUBIC).save(folder / "03.png")
    Image.open(folder / kept[1]).resize((48, 48)).save(folder / seen[2])
    found = diagnose(config(folder))
    after = found.sources[0].duplicates
    assert (after.copies, after.held_out_copies) == (2, before.held_out_copies + 1)
    assert (after.alike, after.held_out_alike) == (1, 1) and set(after.alike_groups[0].names) == {
        kept[1],
        seen[2],
    }
    assert dict(zip(after.alike_groups[0].names, after.alike_groups[0].held_out, strict=True)) == {
        kept[1]: True,
        seen[2]: False,
    }
    assert "look like one (at most 4 of 64 bits apart)" in said(found, "warns")


def test_many_copies_warn_and_plain_images_are_no_copies(folder):
    for number in range(5):
        shutil.copy(folder / "00.png", folder / f"c{number}.png")
        (folder / f"c{number}.txt").write_text("copied")
        add(folder, f"p{number}.png", Image.new("RGB", (64, 64), (40 * number, 90, 200)), "plain")
    found = diagnose(config(folder))
    assert "5 images are copies of others; keep one of each" in said(found, "warns")
    assert found.sources[0].duplicates.plain == 5 and found.sources[0].duplicates.alike == 0
    assert "5 images are one plain surface" in said(found, "notes")


def test_each_source_of_a_mixture_is_inspected(folder, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for seed in range(20):
        add(other, f"{seed}.png", image(100 + seed), caption(seed))
    mixed = DataConfig(
        mix=[MixPart(source=str(folder)), MixPart(source=str(other))],
        image_size=32,
        val_fraction=0.2,
    )
    found = diagnose(mixed)
    assert (
        [source.rows for source in found.sources] == [40, 20]
        and found.captions.captions == 60
        and not found.fails
    )
    assert [part["source"] for part in found.suggestion.values["data"]["mix"]] == [
        str(folder),
        str(other),
    ]
    mixed.mix[1].source = str(tmp_path / "nowhere")
    found = diagnose(mixed)
    assert (
        found.fails
        and "there is no " in said(found, "fails")
        and "/nowhere; " in said(found, "fails")
        and found.sources[0].rows == 40
    )
    assert found.suggestion is None


def test_stream_is_inspected_from_its_start(folder, tmp_path):
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        for path in sorted(folder.iterdir()):
            tar.add(path, path.name.replace(".txt", ".caption"))
    streamed = config(tmp_path / "all.tar", streaming=True, text_column="caption")
    whole = diagnose(streamed)
    assert whole.sources[0].rows == 40 and not whole.sources[0].first_only and not whole.fails
    first = diagnose(streamed, images=25)
    assert (first.sources[0].rows, first.sources[0].first_only) == (25, True)
    assert "the first 25 images were looked at, of a source that goes on (max_images)" in said(
        first, "notes"
    )
    assert whole.suggestion.values["data"]["streaming"] is True
    train, held_out = load_sources(streamed)
    assert train.name == held_out.name and len(held_out) == whole.sources[0].held_out
    mapped = diagnose(config(tmp_path / "all.tar", text_column="caption"))
    assert (
        mapped.sources[0].train == whole.sources[0].train
        and mapped.captions.tokens == whole.captions.tokens
    )


def test_synthetic_sources_are_inspected(tmp_path):
    found = diagnose(DataConfig(source="shapes", image_size=32), images=60)
    assert (found.sources[0].rows, found.sources[0].first_only, found.sources[0].held_out) == (
        63,
        True,
        3,
    )
    assert (
        found.suggestion.values["encode"]["max_images"] > 0
        and found.suggestion.values["data"]["image_size"] == 32
    )


def test_a_tokenizer_that_cannot_be_loaded_fails(folder, tmp_path):
    found = diagnose(config(folder), text=TextConfig(pretrained=str(tmp_path / "none")))
    assert (
        "cannot be loaded as a transformers tokenizer" in said(found, "fails")
        and found.captions.tokens is None
    )
    assert found.captions.captions == 40 and found.suggestion is None


def test_html_report_is_self_contained_and_escapes_input(folder, tmp_path):
    nasty = "<script>alert('caption')</script>"
    for name in ("10", "11"):
        (folder / f"{name}.txt").write_text(nasty)
    shutil.copy(folder / "00.png", folder / "<b>copy.png")
    (folder / "<b>copy.txt").write_text("copied")
    (folder / "<i>broken.png").write_bytes(b"no")
    (folder / "<i>broken.txt").write_text("x")
    out = tmp_path / "page"
    assert (
        main(
            [
                "doctor",
                str(folder),
                "--out",
                str(out),
                "--output_dir",
                str(tmp_path / "runs"),
                "--data.filter.max_corrupt_fraction",
                "0.5",
            ]
        )
        == 0
    )
    page = (out / "index.html").read_text()
    assert "<script" not in page and "<b>" not in page and "<i>" not in page
    assert (
        "&lt;script&gt;" in page and "&lt;b&gt;copy.png" in page and "&lt;i&gt;broken.png" in page
    )
    assert page.count("data:image/jpeg;base64,") >= 24 and 'src="http' not in page
    assert sorted(path.name for path in out.iterdir()) == [
        "doctor.json",
        "index.html",
        "suggested.yaml",
    ]


def test_title_headings_and_suggestion_of_the_page_are_escaped(folder, tmp_path):
    named = folder.rename(tmp_path / "a & <script>b")
    (named / "10.txt").write_text("salt & pepper")
    (named / "11.txt").write_text("salt & pepper")
    out = tmp_path / "page"
    assert main(["doctor", str(named), "--out", str(out), "--output_dir", str(tmp_path)]) == 0
    page = (out / "index.html").read_text()
    assert "<script" not in page and "& " not in page.replace("&amp; ", "")
    escaped = "a &amp; &lt;script&gt;b"
    assert f"{escaped}</title>" in page and f"{escaped}</h1>" in page
    assert escaped in page[page.index("<pre>") : page.index("</pre>")]
    assert "<td>salt &amp; pepper</td>" in page


def test_exit_statuses_of_doctor(folder, tmp_path, capsys):
    runs = ["--output_dir", tmp_path / "runs"]
    assert main([str(a) for a in ("doctor", folder, "--data.image_size", "128", *runs)]) == 1
    printed = capsys.readouterr().out
    assert "fails" in printed and "no usable image with a caption" in printed
    assert (tmp_path / "runs" / "images" / "doctor" / "index.html").is_file()
    # Its own report is replaced
    assert main([str(a) for a in ("doctor", folder, "--data.image_size", "64", *runs)]) == 0
    fails(capsys, ["doctor"], "no source was given", status=2)
    fails(capsys, ["doctor", folder, "--data.image_sise", "32"], "image_sise", status=2)
    fails(capsys, ["doctor", folder, "--data.image_size", "3"], "data.image_size is 3", status=2)
    fails(
        capsys,
        ["doctor", folder, "--max-images", "0"],
        "--max-images is 0; it must be at least 1\n",
        status=2,
    )
    fails(
        capsys,
        ["doctor", folder, "--max-image-size", "8"],
        "doctor: --max-image-size is 8; it must be at least 16\n",
        status=2,
    )
    fails(
        capsys,
        ["doctor", folder, "--config", tmp_path / "none.yaml"],
        "there is no configuration file",
    )
    fails(capsys, ["doctor", tmp_path / "nowhere", *runs], "/nowhere; ", " holds ")
    assert not (tmp_path / "runs" / "nowhere").exists()
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine.txt").write_text("mine")
    fails(capsys, ["doctor", folder, "--out", taken, *runs], "holds no report of the doctor")


def test_doctor_reads_the_source_of_a_configuration(folder, tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "name": "mine",
                "output_dir": str(tmp_path / "runs"),
                "data": {"source": str(folder)},
                "text": {"max_length": 5},
            }
        )
    )
    assert main(["doctor", "--config", str(path)]) == 1
    assert (
        "text.max_length=5" in capsys.readouterr().out
        and (tmp_path / "runs" / "mine" / "doctor" / "doctor.json").is_file()
    )
    assert main(["doctor", "--config", str(path), "--text.max_length", "40"]) == 0
    fails(capsys, ["doctor", tmp_path / "elsewhere", "--config", path], "/elsewhere; ")


def test_several_processes_are_refused(folder, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    fails(capsys, ["doctor", folder], "doctor is the work of one process")


def test_a_report_that_cannot_be_written_leaves_the_one_before(
    folder, tmp_path, monkeypatch, capsys
):
    arguments = [
        "doctor",
        str(folder),
        "--out",
        str(tmp_path / "report"),
        "--output_dir",
        str(tmp_path / "runs"),
    ]
    assert main(arguments) == 0
    before = (tmp_path / "report" / "doctor.json").read_bytes()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(doctor.json, "dumps", full)
    fails(capsys, arguments, "No space left on device")
    assert (tmp_path / "report" / "doctor.json").read_bytes() == before


def test_suggested_configuration_trains(folder, tmp_path):
    """As it is, but smaller and for two steps."""
    out = tmp_path / "report"
    assert (
        main(
            [
                "doctor",
                str(folder),
                "--out",
                str(out),
                "--data.image_size",
                "32",
                "--max-image-size",
                "32",
                "--output_dir",
                str(tmp_path),
            ]
        )
        == 0
    )
    small = {
        "tokenizer.model.width": 32,
        "tokenizer.model.num_codes": 16,
        "prior.model.width": 32,
        "prior.model.heads": 2,
        "prior.model.depth": 1,
        "trackers": "[]",
    }
    steps = {
        f"{stage}.train.{name}": 2
        for stage in ("tokenizer", "prior")
        for name in ("steps", "batch_size")
    }
    given = [
        f"--{key}={value}"
        for key, value in (small | steps | {"output_dir": tmp_path / "runs"}).items()
    ]
    bundle = run(load_experiment(["--config", str(out / "suggested.yaml"), *given]))
    assert (bundle / "pipeline.json").is_file()
