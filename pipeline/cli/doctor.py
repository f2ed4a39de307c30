"""`minidalle doctor`: writes the page, the numbers and the suggested configuration. Finds nothing
out itself."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.cli.log import print_rank0
from pipeline.cli.options import UsageError, as_usage, check_at_least, parse_experiment
from pipeline.config.option_names import has_config

if TYPE_CHECKING:
    from pipeline.config.experiment import Experiment
    from pipeline.doctor.report import Diagnosis

NUMBERS = "doctor.json"
"""The diagnosis, for programs."""
SUGGESTED = "suggested.yaml"


def doctor_command(
    *,
    settings: list[str],
    max_images: int = 10_000,
    max_image_size: int = 256,
    out: Path | None = None,
) -> int:
    """Says what is in a source of images and captions, and whether a training on it would stop.
    `minidalle doctor SOURCE` takes a folder, a file, shards or a datasets name in place of the
    configuration's source. Without --config the default settings hold.

    Args:
        max_images: images to look at of a stream, or of shapes
        max_image_size: largest image size to suggest
        out: folder for the page, the numbers and the suggestion (RUN/doctor)
    """
    from pipeline.doctor.suggest_config import SIZES

    check_at_least("--max-images", max_images, 1)
    check_at_least("--max-image-size", max_image_size, SIZES[0])
    experiment = _experiment(settings)
    diagnosis, lines = report(
        experiment,
        out or experiment.folder / "doctor",
        max_images=max_images,
        largest=max_image_size,
    )
    print_rank0(lines)
    return int(diagnosis.fails)


def _experiment(settings: list[str]) -> Experiment:
    """The experiment whose data are looked at; the source may come first."""
    from pipeline.config.data import DataConfig
    from pipeline.config.load import load_values
    from pipeline.doctor.diagnose import IMAGES
    from pipeline.doctor.suggest_config import name_of

    if not settings or settings[0].startswith("-"):
        if has_config(settings):
            return parse_experiment(settings)
        raise UsageError(
            "no source was given; add a folder, a file, shards or a datasets name, or --config FILE"
        )
    source, *others = settings
    if has_config(others):
        return parse_experiment([*others, "--data.source", source])
    name = name_of(DataConfig(source=source))
    encode = {"encode": {"max_images": IMAGES}} if source == "shapes" else {}
    return as_usage(load_values, {"name": name, "data": {"source": source}} | encode, others)


def report(
    experiment: Experiment, out: Path, *, max_images: int, largest: int
) -> tuple[Diagnosis, str]:
    """Diagnoses, writes index.html, doctor.json and suggested.yaml, and returns the diagnosis and
    what to print.

    Raises:
        FileExistsError: there is something else in the folder already.
        ValueError, OSError: nothing of the source can be opened.
    """
    from pipeline.doctor.diagnose import diagnose_parts
    from pipeline.doctor.html_report import as_page
    from pipeline.doctor.suggest_config import as_yaml
    from pipeline.doctor.text_report import as_table
    from pipeline.runtime.atomic_io import atomic_write_dir, check_output_dir

    check_output_dir(out, NUMBERS, "report of the doctor")
    diagnosis, parts = diagnose_parts(
        experiment.data,
        text=experiment.text,
        images=max_images,
        largest=largest,
        folder=experiment.folder / "data",
    )
    command = f"minidalle run --config {shlex.quote(str(out / SUGGESTED))}"
    suggested = as_yaml(diagnosis.suggestion, command) if diagnosis.suggestion is not None else None
    page = as_page(diagnosis, parts, suggested)

    def write(beside: Path) -> None:
        numbers = json.dumps(asdict(diagnosis), ensure_ascii=False, indent=1)
        (beside / NUMBERS).write_text(numbers + "\n", encoding="utf-8")
        (beside / "index.html").write_text(page, encoding="utf-8")
        if suggested is not None:
            (beside / SUGGESTED).write_text(suggested, encoding="utf-8")

    atomic_write_dir(out, write)
    table = as_table(diagnosis)
    wrote = f"wrote {out / 'index.html'} and {out / NUMBERS}"
    if suggested is None:
        next_step = "next: repair what fails, then run this again; no configuration makes up for it"
        return diagnosis, f"{table}\n\n{wrote}\n{next_step}"
    return diagnosis, (
        f"{table}\n\nsuggested\n{suggested}\n{wrote}, and the suggestion to {out / SUGGESTED}\n"
        f"next: {command}"
    )
