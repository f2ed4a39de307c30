"""The commands that train, encode, evaluate and compare: each a few lines over a function that
Python users can call too. Imports nothing heavy until a command runs."""

from __future__ import annotations

import os
import shlex
import time
from contextlib import nullcontext
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pipeline
from pipeline.cli.log import print_rank0
from pipeline.cli.options import UsageError, as_usage, check_at_least, parse_experiment
from pipeline.config.option_names import has_config

if TYPE_CHECKING:
    from pipeline.config.experiment import Experiment


def run_command(*, settings: list[str]) -> None:
    """Trains a tokenizer, encodes every image, trains a prior and samples a grid of images; run
    again, it resumes."""
    experiment = parse_experiment(settings)
    start = time.perf_counter()
    bundle = pipeline.run(experiment)
    print_rank0(
        f"\ndone in {(time.perf_counter() - start) / 60:.1f} minutes\n"
        f"  bundle    {bundle}\n"
        f"  samples   {experiment.folder / 'samples'}\n"
        f"  logs      {experiment.folder / 'logs'}\n"
        f"{_next_generate(experiment, bundle)}"
    )


def train_tokenizer_command(*, settings: list[str]) -> None:
    """Stage 1: trains a tokenizer, images <-> codes or Gaussian latents; run again, it resumes."""
    experiment = parse_experiment(settings)
    folder = pipeline.train_tokenizer(experiment)
    following = "encode" if experiment.tokenizer.model.has_codes else "train-prior"
    print_rank0(f"wrote {folder}\nnext: minidalle {following} {shlex.join(settings)}")


def encode_command(
    *,
    settings: list[str],
    tokenizer: Path | None = None,
    out: Path | None = None,
    format: Literal["arrow", "parquet", "webdataset"] = "arrow",
) -> None:
    """Encodes every image once; run again, it resumes. `minidalle encode FILES... --tokenizer DIR
    --out DIR` encodes these images.

    Args:
        tokenizer: another tokenizer than the run's; without --config, the settings of its own run
            hold
        out: folder for the codes, for other programs (RUN/codes, for train-prior)
        format: form of the codes in --out
    """
    if out is None and (tokenizer is not None or format != "arrow"):
        raise UsageError("--tokenizer and --format are for codes outside a run; add --out DIR")
    images = [Path(one) for one in takewhile(lambda one: not one.startswith("-"), settings)]
    settings = settings[len(images) :]
    if images:
        if tokenizer is None or out is None or has_config(settings):
            raise UsageError(
                "images as arguments take --tokenizer DIR and --out DIR; leave --config out"
            )
        experiment = _experiment_of_files(images[0], tokenizer, out, settings)
    elif tokenizer is None or has_config(settings):
        experiment = parse_experiment(settings)
    else:
        experiment = _experiment_of(tokenizer, settings)
    if out is None:
        folder = pipeline.encode_dataset(experiment)
        if os.environ.get("RANK", "0") == "0":
            print_rank0(f"wrote {folder}\n{_next_prior(folder, settings)}")
        return
    rows, files = pipeline.encode_for_export(
        experiment, out, format, tokenizer_folder=tokenizer, images=images
    )
    counts = ", ".join(f"{count:,} {split}" for split, count in rows.items())
    print_rank0(
        f"wrote {out}: {counts} images in {', '.join(files[:3])}"
        f"{' ...' if len(files) > 3 else ''}, and codes.json"
    )


def _experiment_of_files(
    first: Path, tokenizer: Path, out: Path, settings: list[str]
) -> Experiment:
    """An experiment that encodes all images given as arguments, of which the first is known, at the
    tokenizer's size. The tokenizer's run and its data are not needed."""
    from pipeline.config.experiment import to_dict
    from pipeline.config.load import load_values
    from pipeline.runtime.run_paths import existing_tokenizer
    from pipeline.stages.encode import without_augmentation
    from stage1_tokenizer import TokenizerModule

    model = TokenizerModule.from_pretrained(existing_tokenizer(tokenizer))
    model.require_codes("`minidalle encode`")
    config = to_dict(model.own_config)
    data = {
        "source": str(first),
        "image_size": config.pop("image_size"),
        "val_fraction": 0,  # all in one table
        "alpha": "keep" if model.own_config.channels == 4 else "white",
    }
    # What is found out about the images lies where the codes are made, and goes with it.
    run = {"name": f".{out.name}.arrow", "output_dir": str(out.parent)}
    values = {**run, "data": data, "tokenizer": {"model": config}}
    return without_augmentation(as_usage(load_values, values, settings))


def _experiment_of(tokenizer: Path, settings: list[str]) -> Experiment:
    """The experiment of the run that a tokenizer lies in, with all of its data encoded once."""
    from pipeline.config.load import load_values
    from pipeline.config.yaml_file import read_yaml
    from pipeline.runtime.run_paths import settings_of_run
    from pipeline.stages.encode import without_augmentation

    written = settings_of_run(tokenizer)
    try:
        values: Any = read_yaml(written)
        values["tokenizer"]["model"].pop("image_size", None)  # it follows that of other data
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{written} is truncated or corrupted; add --config FILE, which takes its place"
        ) from error
    given = [
        setting.removeprefix("--encode.").partition("=")[0].replace("-", "_")
        for setting in settings
        if setting.startswith("--encode.")
    ]
    return without_augmentation(as_usage(load_values, values, settings), but=given)


def train_prior_command(*, settings: list[str]) -> None:
    """Stage 2: trains a prior over caption and codes as one stream, or over Gaussian latents; run
    again, it resumes."""
    experiment = parse_experiment(settings)
    folder = pipeline.train_prior(experiment)
    if os.environ.get("RANK", "0") == "0":
        bundle = pipeline.assemble_bundle(experiment)
        print_rank0(f"wrote {folder} and {bundle}\n{_next_generate(experiment, bundle)}")


def compare_tokenizers_command(*, settings: list[str], minutes: float | None = None) -> None:
    """Trains several tokenizers and a prior for each, and compares them; run again, it resumes.

    Args:
        minutes: training time of each tokenizer, in place of its steps
    """
    limit = [] if minutes is None else ["--minutes", str(minutes)]
    folder = pipeline.compare_tokenizers(as_usage(pipeline.load_comparison, [*settings, *limit]))
    print_rank0(
        f"\n{(folder / 'comparison.md').read_text()}\n{(folder / 'times.md').read_text()}\n"
        f"wrote comparison.md, times.md and the images to {folder}"
    )


def zoo_command(
    *, settings: list[str], minutes: float | None = None, tokenizer_fraction: float | None = None
) -> None:
    """Trains several generative models on one data set at equal wall time, and compares them by the
    probability of held-out images; run again, it resumes.

    Args:
        minutes: training time of both stages of each model, in place of the file's
        tokenizer_fraction: part of it that the tokenizer has, in place of the file's
    """
    given = {"minutes": minutes, "tokenizer_fraction": tokenizer_fraction}
    own = [f"--{name}={value}" for name, value in given.items() if value is not None]
    folder = pipeline.train_zoo(as_usage(pipeline.load_zoo, [*settings, *own]))
    print_rank0(
        f"\n{(folder / 'table.md').read_text()}\n{(folder / 'times.md').read_text()}\n"
        f"wrote table.md, results.json, times.md and samples.png to {folder}"
    )


def evaluate_command(
    *,
    settings: list[str],
    bundle: str | None = None,
    out: Path | None = None,
    max_images: int = 500,
    baseline_bundle: str | None = None,
) -> None:
    """Measures the quality of both stages and of the whole.

    Args:
        bundle: bundle to evaluate, a folder or user/name of the Hub (that of the configuration's
            run)
        out: JSON file for the metrics (evaluation.json in the run folder)
        max_images: validation images and prompts to evaluate on
        baseline_bundle: bundle to compare with on the old data and the new (that of init_from)
    """
    from pipeline.evaluation.evaluate import is_own

    check_at_least("--max-images", max_images, 1)
    experiment = parse_experiment(settings)
    if os.environ.get("RANK", "0") != "0":  # one process evaluates: the images are few
        return
    if out is None:
        out = experiment.folder / "evaluation.json"
        if bundle is not None and out.exists() and not is_own(experiment, bundle):
            raise UsageError(
                f"{out} has the metrics of the run's own bundle; add --out FILE for those of "
                f"{bundle}"
            )
    report = pipeline.evaluate(
        bundle or experiment.folder / "bundle",
        experiment,
        out,
        images=max_images,
        before=baseline_bundle,
    )
    print_rank0(f"{report.table()}\nwrote {out}")


def estimate_command(*, settings: list[str], processes: int = 1) -> None:
    """Estimates the memory per process that each training stage takes.

    Args:
        processes: number of processes that share each batch
    """
    from pipeline.stages.estimate import estimate

    estimates = estimate(parse_experiment(settings), processes=processes)
    for stage, memory in estimates.items():
        print_rank0(f"{stage}: {memory.line(processes)}")
    if "prior" not in estimates:
        print_rank0("prior: of Gaussian latents, not estimated on its own")
    print_rank0(f"next: minidalle run {shlex.join(settings)}")


def push_command(*, bundle: str, to: str, private: bool = False) -> None:
    """Uploads a bundle to the Hub: safetensors, JSON, Markdown and PNG files.

    Args:
        bundle: folder of a bundle (runs/NAME/bundle), or icons, which comes with the package
        to: repository user/name; made where there is none
        private: make it a private one
    """
    from pipeline.config.shipped_bundles import bundle_folder
    from pipeline.inference.hub import push_bundle

    address = push_bundle(bundle_folder(bundle), to, private=private or None)
    print_rank0(f"pushed to {address}\nnext: minidalle generate --bundle {to} 'your prompt'")


def codebook_command(
    *,
    tokenizer: Path,
    config: Path | None = None,
    max_images: int = 500,
    mode: Literal["naive", "gumbel", "both"] = "naive",
    out: Path | None = None,
) -> None:
    """Shows what each code looks like and how often it is used.

    Args:
        tokenizer: folder of a tokenizer: runs/NAME/tokenizer
        config: YAML whose validation images to encode (that of the tokenizer's run)
        max_images: validation images to encode
        mode: whole images of the most used codes: a grid filled with the code, a grid optimized so
            that its image is encoded as the code, or both side by side
        out: folder for the page (RUN/codebook)
    """
    from pipeline.data.source import more_held_out
    from pipeline.evaluation.codebook_report import NUMBERS
    from pipeline.runtime.atomic_io import check_output_dir
    from pipeline.runtime.network import network_forbidden
    from pipeline.runtime.run_paths import existing_tokenizer, settings_of_run

    check_at_least("--max-images", max_images, 1)
    settings = config or settings_of_run(tokenizer)
    experiment = parse_experiment(["--config", str(settings)])
    run = existing_tokenizer(tokenizer).resolve().parent
    out = out or run / "codebook"
    with network_forbidden(str(settings)) if config is None else nullcontext():
        source = pipeline.load_source(experiment.data, "held_out", require_captions=False)
    check_output_dir(out, NUMBERS, "codebook page")
    if not len(source):
        raise ValueError(
            "no image is held out, so there is nothing to encode; "
            + more_held_out(experiment.data.source, experiment.data.val_fraction)
        )
    images = source.images(range(min(max_images, len(source))))
    for view in pipeline.codebook_page(tokenizer, images, out, mode=mode):
        s = view.statistics
        print_rank0(
            f"{view.name or 'codebook'}: {s.usage:.1%} of the codes used, perplexity "
            f"{s.perplexity:,.1f}, {s.dead} never used, "
            f"{view.metrics['distinct_codes']:,.0f} draw differently, "
            f"{view.metrics['reencode_agreement']:.1%} unchanged by encoding the decoded image"
        )
        for name, fraction in view.mean_code_fractions.items():
            print_rank0(f"  {name} images: {fraction:.1%} of their codes are the code shown")
    print_rank0(f"wrote {out / 'index.html'} and its images")


def _next_prior(folder: Path, settings: list[str]) -> str:
    from pipeline.data.codes.dataset import are_captioned, read_manifest

    if not are_captioned(read_manifest(folder)):
        return "the images have no captions, which a prior needs; to train one, see docs/data.md"
    return f"next: minidalle train-prior {shlex.join(settings)}"


def _next_generate(experiment: Experiment, bundle: Path) -> str:
    prompt = "your prompt" if experiment.sees_captions else ""
    command = ["generate", "--bundle", str(bundle), prompt, "--num-images", "4", "--out", "images"]
    return f"next: minidalle {shlex.join(command)}"
