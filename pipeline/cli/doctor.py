"""`minidalle doctor`: reads its arguments, writes the page, the numbers and the suggested
configuration. Finds nothing out itself."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.config.data import DataConfig
from pipeline.config.experiment import Experiment
from pipeline.config.load import load_experiment, load_values
from pipeline.config.option_names import spelled
from pipeline.doctor.diagnose import PICTURES, diagnose_parts
from pipeline.doctor.html_report import as_page
from pipeline.doctor.report import Diagnosis
from pipeline.doctor.suggest_config import LARGEST, SIZES, as_yaml, name_of
from pipeline.doctor.text_report import as_table
from pipeline.runtime.atomic_io import atomic_write_dir, check_output_dir

NUMBERS = "doctor.json"
"""The diagnosis, for programs."""
SUGGESTED = "suggested.yaml"


@dataclass
class Asked:
    """What the command line asks for: whose data, how many images of them at most, the largest
    size to suggest, and where to write."""

    experiment: Experiment
    pictures: int
    largest: int
    out: Path


def asked(rest: Sequence[str]) -> Asked:
    """Reads `[SOURCE] [--config FILE] [--max-images N] [--max-image-size S] [--out DIR] [--key.path
    VALUE ...]`.

    Raises:
        ValueError: they are wrong, or no source is among them.
        FileNotFoundError: there is no such configuration file.
    """
    reader = argparse.ArgumentParser(
        prog="minidalle doctor",
        description="What is in a source of images and captions, and whether a training on it "
        "would stop.",
        usage="minidalle doctor SOURCE [options] [--key.path VALUE ...], or minidalle doctor "
        "--config FILE [options]",
        allow_abbrev=False,
    )
    reader.add_argument(
        "--config",
        type=Path,
        help="the experiment that the data are for; without it the default settings",
    )
    reader.add_argument(
        "--max-images",
        dest="pictures",
        type=int,
        default=PICTURES,
        help=f"images to look at of a stream, or of shapes ({PICTURES})",
    )
    reader.add_argument(
        "--max-image-size",
        dest="largest",
        type=int,
        default=LARGEST,
        help=f"largest image size to suggest ({LARGEST})",
    )
    reader.add_argument(
        "--out", type=Path, help="folder for the page, the numbers and the suggestion (RUN/doctor)"
    )
    source = rest[0] if rest and not rest[0].startswith("-") else None
    options, settings = reader.parse_known_args(
        spelled(rest[1:] if source is not None else rest, "-")
    )
    if source is None and options.config is None:
        raise ValueError(
            "no source was given; add a folder, a file, shards or a datasets name, or --config FILE"
        )
    if options.pictures < 1 or options.largest < SIZES[0]:
        raise ValueError(
            f"--max-images is {options.pictures} and must be at least 1; --max-image-size is "
            f"{options.largest}, at least {SIZES[0]}"
        )
    given = settings if source is None else ["--data.source", source, *settings]
    if options.config is not None:
        experiment = load_experiment(["--config", str(options.config), *given])
    else:
        name = name_of(DataConfig(source=source or ""))
        values = {"name": name, "data": {"source": source}} | (
            {"encode": {"max_images": PICTURES}} if source == "shapes" else {}
        )
        experiment = load_values(values, settings)
    return Asked(
        experiment, options.pictures, options.largest, options.out or experiment.folder / "doctor"
    )


def report(asked: Asked) -> tuple[Diagnosis, str]:
    """Diagnoses, writes index.html, doctor.json and suggested.yaml, and returns the diagnosis and
    what to print.

    Raises:
        FileExistsError: there is something else in the folder already.
        ValueError, OSError: nothing of the source can be opened.
    """
    experiment, out = asked.experiment, asked.out
    check_output_dir(out, NUMBERS, "report of the doctor")
    diagnosis, parts = diagnose_parts(
        experiment.data,
        text=experiment.text,
        pictures=asked.pictures,
        largest=asked.largest,
        folder=experiment.folder / "data",
    )
    command = f"minidalle run --config {shlex.quote(str(out / SUGGESTED))}"
    suggested = as_yaml(diagnosis.suggestion, command) if diagnosis.suggestion is not None else None
    page = as_page(diagnosis, parts, suggested)

    def write(beside: Path) -> None:
        (beside / NUMBERS).write_text(
            json.dumps(asdict(diagnosis), ensure_ascii=False, indent=1) + "\n", encoding="utf-8"
        )
        (beside / "index.html").write_text(page, encoding="utf-8")
        if suggested is not None:
            (beside / SUGGESTED).write_text(suggested, encoding="utf-8")

    atomic_write_dir(out, write)
    lines = [as_table(diagnosis), "", f"wrote {out / 'index.html'} and {out / NUMBERS}"]
    if suggested is not None:
        lines = [
            *lines[:-1],
            "suggested",
            suggested,
            f"{lines[-1]}, and the suggestion to {out / SUGGESTED}",
            f"next: {command}",
        ]
    else:
        lines.append("next: repair what fails, then ask again; no configuration makes up for it")
    return diagnosis, "\n".join(lines)
