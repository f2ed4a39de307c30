"""`minidalle VERB`: each verb a few lines over a function that Python users can call too. Imports
nothing heavy until a verb runs.

Exit status: 0 done, 1 failed (one line says why), 2 wrong usage, 130 stopped by Ctrl-C, 143 stopped
by SIGTERM. A training that is stopped saves a checkpoint first, and the line says which command
resumes from it.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from pipeline.cli.common import UsageError, parse_experiment, print_rank0, require_single_process
from pipeline.cli.generate import edit_verb, generate_verb, reconstruct_verb
from pipeline.cli.log import log_level, logging_to_terminal
from pipeline.config.option_names import spelled
from pipeline.runtime.signals import RecoverableError, TrainingInterrupted, sigterm_raises

HELP = """usage: minidalle VERB [options]

Trains an image tokenizer and a prior over caption and codes, and draws images from prompts.

before training:
  doctor            SOURCE                                 what is in it, what would stop a training, which settings suit it
  estimate          --config FILE                          the memory that each training stage takes

training, each with --config FILE [--key.path VALUE ...]; run again, it resumes from what is there:
  run               all of the below, in order, then a grid of images
  train-tokenizer   stage 1: images <-> codes
  encode            the codes of every image, once
  train-prior       stage 2: caption and codes as one stream
  compare-tokenizers  several tokenizers side by side (configs/bakeoff-*.yaml; --minutes for equal time)

using what was trained:
  generate          --bundle DIR "prompt" ["prompt" ...]   images from prompts
  edit              --bundle DIR --image FILE --mask FILE --prompt "..."   a part of an image, resampled
  reconstruct       --tokenizer DIR FILES...               images through the tokenizer and back
  evaluate          --bundle DIR --config FILE --out FILE  quality as JSON and a table
  codebook          --tokenizer DIR                        what each code draws and how often, as a page

`minidalle VERB --help` lists a verb's options. Every verb takes --log-level LEVEL, the least that is said: debug, info
(as it is without), warning or error. Several processes: accelerate launch (GPUs) or torchrun (CPU) before
`-m pipeline.cli VERB ...`. Start with: minidalle run --config configs/shapes.yaml
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP)
        return 0 if arguments else 2
    verb, *rest = arguments
    if verb not in VERBS:
        print(
            f"minidalle: {verb!r} is not a verb; choose one of: {', '.join(VERBS)}", file=sys.stderr
        )
        return 2
    # The Hub is asked for nothing unless a name is given; without this, libraries warn about tokens
    # and parallelism.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        level, rest = log_level(rest)
        with logging_to_terminal(level), sigterm_raises():
            if verb in RESUMABLE:
                _keep_freed_memory()
            status = VERBS[verb](rest)
        if "RANK" in os.environ:  # one of several processes
            from pipeline.runtime.distributed import destroy_process_group

            destroy_process_group()
        return status
    except SystemExit as stop:  # argparse: 0 after --help, 2 for wrong usage
        return int(stop.code or 0)
    except UsageError as error:
        print(f"minidalle {verb}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        stopped = (
            error if isinstance(error, TrainingInterrupted) else TrainingInterrupted(signal.SIGINT)
        )
        if os.environ.get("RANK", "0") == "0":  # all stop together
            print(f"minidalle {verb}: {stopped}{_resume(arguments)}", file=sys.stderr)
        return stopped.status
    except RecoverableError as error:
        # Where the process that drew the bar is gone, the bar's line was never ended.
        before = "" if os.environ.get("RANK", "0") == "0" else "\n"
        print(f"{before}minidalle {verb}: {error}{_resume(arguments)}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        if "RANK" not in os.environ or os.environ.get("MINIDALLE_TRACEBACK"):
            raise
        from pipeline.runtime.distributed import is_peer_failure

        if not is_peer_failure(error):
            raise
        print(
            f"minidalle {verb}: another process of this job is gone or no longer "
            f"answers{_resume(arguments)}",
            file=sys.stderr,
        )
        return 1
    except (ValueError, OSError, FloatingPointError, MemoryError) as error:
        if os.environ.get("MINIDALLE_TRACEBACK"):
            raise
        print(f"minidalle {verb}: {error}", file=sys.stderr)
        return 1


def _keep_freed_memory() -> None:
    """Tunes the allocator of this process where the CPU trains."""
    import torch
    from accelerate.utils import parse_flag_from_env

    from pipeline.runtime.devices import tune_malloc

    if parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.cuda.is_available():
        tune_malloc()


def _resume(arguments: Sequence[str]) -> str:
    """What to type to go on, as a clause; nothing for verbs that keep nothing of their work."""
    if arguments[0] not in RESUMABLE:
        return ""
    launcher = ", under the same launcher" if "RANK" in os.environ else ""
    return f"; to go on: {shlex.join(['minidalle', *arguments])}{launcher}"


def _run(rest: Sequence[str]) -> int:
    from pipeline.stages.run import run

    experiment, start = parse_experiment(rest), time.perf_counter()
    bundle = run(experiment)
    print_rank0(
        f"\ndone in {(time.perf_counter() - start) / 60:.1f} minutes\n"
        f"  bundle    {bundle}\n  samples   {experiment.folder / 'samples'}\n  logs      "
        f"{experiment.folder / 'logs'}\n"
        f'next: minidalle generate --bundle {bundle} "your prompt" --num-images 4 --out pictures'
    )
    return 0


def _train_tokenizer(rest: Sequence[str]) -> int:
    from pipeline.stages.tokenizer import train_tokenizer

    folder = train_tokenizer(parse_experiment(rest))
    print_rank0(f"wrote {folder}\nnext: minidalle encode {shlex.join(rest)}")
    return 0


def _encode(rest: Sequence[str]) -> int:
    reader = argparse.ArgumentParser(prog="minidalle encode", add_help=False, allow_abbrev=False)
    reader.add_argument(
        "--tokenizer",
        type=Path,
        help="another tokenizer than the run's; its own run's settings hold where none are given",
    )
    reader.add_argument(
        "--out",
        type=Path,
        help="folder for the codes, for other programs (RUN/codes, for train-prior)",
    )
    reader.add_argument(
        "--format",
        choices=("arrow", "parquet", "webdataset"),
        default="arrow",
        help="form of the codes in --out (arrow)",
    )
    options, settings = reader.parse_known_args(spelled(rest, "-"))
    if "--help" in rest or "-h" in rest:
        print(reader.format_help())
    if options.out is None and (options.tokenizer is not None or options.format != "arrow"):
        raise UsageError("--tokenizer and --format are for codes outside a run; add --out DIR")
    given = any(a == "--config" or a.startswith("--config=") for a in settings)
    from pipeline.stages.encode import encode_dataset, encode_for_export, without_augmentation

    if options.tokenizer is None or given:
        experiment = parse_experiment(settings)
    else:
        import yaml

        from pipeline.config.load import load_values
        from pipeline.runtime.run_paths import settings_of_run

        written = settings_of_run(options.tokenizer)
        try:
            values = yaml.safe_load(written.read_text())
            values["tokenizer"]["model"].pop("image_size", None)  # it follows that of other data
        except (yaml.YAMLError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{written} is truncated or corrupted; add --config FILE, which takes its place"
            ) from error
        try:
            experiment = load_values(values, settings)
        except ValueError as error:
            raise UsageError(str(error)) from error
        said = [
            setting.removeprefix("--encode.").partition("=")[0].replace("-", "_")
            for setting in settings
            if setting.startswith("--encode.")
        ]
        experiment = without_augmentation(experiment, but=said)
    if options.out is None:
        folder = encode_dataset(experiment)
        print_rank0(f"wrote {folder}\nnext: minidalle train-prior {shlex.join(rest)}")
        return 0
    rows, files = encode_for_export(
        experiment, options.out, options.format, tokenizer_folder=options.tokenizer
    )
    counts = ", ".join(f"{count:,} {split}" for split, count in rows.items())
    print_rank0(
        f"wrote {options.out}: {counts} images in "
        f"{', '.join(files[:3])}{' ...' if len(files) > 3 else ''}, and codes.json"
    )
    return 0


def _train_prior(rest: Sequence[str]) -> int:
    from pipeline.stages.prior import train_prior
    from pipeline.stages.run import assemble_bundle

    experiment = parse_experiment(rest)
    folder = train_prior(experiment)
    if os.environ.get("RANK", "0") == "0":
        bundle = assemble_bundle(experiment)
        print(
            f'wrote {folder} and {bundle}\nnext: minidalle generate --bundle {bundle} "your '
            'prompt" --num-images 4 --out pictures'
        )
    return 0


def _compare_tokenizers(rest: Sequence[str]) -> int:
    from pipeline.config.load import parser
    from pipeline.stages.compare_tokenizers import compare_tokenizers, load_comparison

    if "--help" in rest or "-h" in rest:
        print(
            "minidalle compare-tokenizers --config configs/bakeoff-emoji.yaml [--minutes M] "
            "[--key.path VALUE ...]\n"
        )
        parser().print_help()
        return 0
    require_single_process("compare-tokenizers")
    try:
        comparison = load_comparison(rest)
    except ValueError as error:
        raise UsageError(str(error)) from error
    folder = compare_tokenizers(comparison)
    print_rank0(
        f"\n{(folder / 'comparison.md').read_text()}\nwrote comparison.md and its images to "
        f"{folder}"
    )
    return 0


def _evaluate(rest: Sequence[str]) -> int:
    reader = argparse.ArgumentParser(
        prog="minidalle evaluate", description="Quality of both stages and of the whole."
    )
    reader.add_argument(
        "--bundle", type=Path, help="bundle to judge (that of the configuration's run)"
    )
    reader.add_argument(
        "--out", type=Path, help="JSON file for the figures (evaluation.json in the run folder)"
    )
    reader.add_argument(
        "--max-images",
        dest="pictures",
        type=int,
        default=500,
        help="held-out images and prompts to judge on (500)",
    )
    reader.add_argument(
        "--baseline-bundle",
        dest="before",
        type=Path,
        help="bundle to compare with on the old data and the new (that of init_from)",
    )
    options, settings = reader.parse_known_args(spelled(rest, "-"))
    from pipeline.evaluation.evaluate import evaluate

    experiment = parse_experiment(settings)
    if os.environ.get("RANK", "0") != "0":  # judged by one process: the images are few
        return 0
    bundle = options.bundle or experiment.folder / "bundle"
    out = options.out or experiment.folder / "evaluation.json"
    print_rank0(
        evaluate(bundle, experiment, out, pictures=options.pictures, before=options.before).table()
    )
    print_rank0(f"wrote {out}")
    return 0


def _estimate(rest: Sequence[str]) -> int:
    experiment = parse_experiment(rest)
    require_single_process("estimate")
    from pipeline.stages.estimate import estimate

    for stage, memory in estimate(experiment).items():
        print_rank0(f"{stage}: {memory.line(1)}")
    print_rank0(f"next: minidalle run {' '.join(rest)}")
    return 0


def _codebook(rest: Sequence[str]) -> int:
    reader = argparse.ArgumentParser(
        prog="minidalle codebook", description="What each code draws and how often it is used."
    )
    reader.add_argument(
        "--tokenizer", type=Path, required=True, help="folder of a tokenizer: runs/NAME/tokenizer"
    )
    reader.add_argument(
        "--config", type=Path, help="whose held-out images to encode (that of the tokenizer's run)"
    )
    reader.add_argument(
        "--max-images",
        dest="pictures",
        type=int,
        default=500,
        help="held-out images to encode (500)",
    )
    reader.add_argument("--out", type=Path, help="folder for the page (RUN/codebook)")
    options = reader.parse_args(spelled(rest, "-"))
    require_single_process("codebook")
    from pipeline.data.load import load_source
    from pipeline.evaluation.codebook_report import NUMBERS, codebook_page
    from pipeline.runtime.atomic_io import check_output_dir
    from pipeline.runtime.run_paths import existing_tokenizer, settings_of_run

    config = options.config or settings_of_run(options.tokenizer)
    run = existing_tokenizer(options.tokenizer).parent
    source = load_source(parse_experiment(["--config", str(config)]).data, "held_out")
    out = options.out or run / "codebook"
    check_output_dir(out, NUMBERS, "codebook page")
    if options.pictures < 1 or not len(source):
        raise ValueError(
            f"--max-images is {options.pictures} and {len(source)} are held out; at least one is "
            "needed of both"
        )
    views = codebook_page(
        options.tokenizer, source.images(range(min(options.pictures, len(source)))), out
    )
    for view in views:
        s = view.statistics
        print_rank0(
            f"{view.name or 'codebook'}: {s.usage:.1%} of the codes used, perplexity "
            f"{s.perplexity:,.1f}, {s.dead} never used"
        )
    print_rank0(f"wrote {out / 'index.html'} and its images")
    return 0


def _doctor(rest: Sequence[str]) -> int:
    from pipeline.cli.doctor import asked, report

    require_single_process("doctor")
    try:
        what = asked(rest)
    except ValueError as error:
        raise UsageError(str(error)) from error
    diagnosis, lines = report(what)
    print(lines)
    return int(diagnosis.fails)


VERBS: dict[str, Callable[[Sequence[str]], int]] = {
    "run": _run,
    "train-tokenizer": _train_tokenizer,
    "encode": _encode,
    "train-prior": _train_prior,
    "compare-tokenizers": _compare_tokenizers,
    "generate": generate_verb,
    "edit": edit_verb,
    "reconstruct": reconstruct_verb,
    "evaluate": _evaluate,
    "codebook": _codebook,
    "doctor": _doctor,
    "estimate": _estimate,
}

RESUMABLE = ("run", "train-tokenizer", "encode", "train-prior", "compare-tokenizers")
"""Verbs that resume from what is there."""
