"""`minidalle VERB`: each verb a few lines over a function that Python users can call too. Imports nothing heavy until a verb runs.

Exit status: 0 done, 1 failed (one line says why), 2 wrong usage, 130 stopped by Ctrl-C, 143 stopped by SIGTERM. A training that is
stopped saves a checkpoint first, and the line says which command goes on from it.
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
from typing import Any

from pipeline.interrupt import Resumable, Stopped, sigterm_raises

HELP = """usage: minidalle VERB [options]

Trains an image tokenizer and a prior over caption and codes, and draws pictures from prompts.

training, each with --config FILE [--key.path VALUE ...]; run again, it goes on from what is there:
  run               all of the below, in order, then a grid of pictures
  train-tokenizer   stage 1: pictures <-> codes
  encode            the codes of every picture, once
  train-prior       stage 2: caption and codes as one stream
  compare-tokenizers  several tokenizers side by side (configs/bakeoff-*.yaml; --minutes for equal time)

using what was trained:
  generate          --bundle DIR "prompt" ["prompt" ...]   pictures from prompts
  edit              --bundle DIR --image FILE --mask FILE --prompt "..."   a part of a picture, drawn anew
  reconstruct       --tokenizer DIR FILES...               pictures through the tokenizer and back
  evaluate          --bundle DIR --config FILE --out FILE  quality as JSON and a table
  codebook          --tokenizer DIR                        what each code draws and how often, as a page

`minidalle VERB --help` lists a verb's options. Several processes: accelerate launch (GPUs) or torchrun (CPU) before
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
        print(f"minidalle: {verb!r} is not a verb; choose one of: {', '.join(VERBS)}", file=sys.stderr)
        return 2
    # The Hub is asked for nothing unless a name is given; without this, libraries warn about tokens and parallelism.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        with sigterm_raises():
            status = VERBS[verb](rest)
        if "RANK" in os.environ:  # one of several processes
            from pipeline.runtime import end_processes

            end_processes()
        return status
    except SystemExit as stop:  # argparse: 0 after --help, 2 for wrong usage
        return int(stop.code or 0)
    except _WrongUsage as error:
        print(f"minidalle {verb}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        stopped = error if isinstance(error, Stopped) else Stopped(signal.SIGINT)
        if os.environ.get("RANK", "0") == "0":  # all stop together
            print(f"minidalle {verb}: {stopped}{_resume(arguments)}", file=sys.stderr)
        return stopped.status
    except Resumable as error:
        # Where the process that drew the bar is gone, the bar's line was never ended.
        before = "" if os.environ.get("RANK", "0") == "0" else "\n"
        print(f"{before}minidalle {verb}: {error}{_resume(arguments)}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        if "RANK" not in os.environ or os.environ.get("MINIDALLE_TRACEBACK"):
            raise
        from pipeline.runtime import lost_process

        if not lost_process(error):
            raise
        print(f"minidalle {verb}: another process of this job is gone or no longer answers{_resume(arguments)}", file=sys.stderr)
        return 1
    except (ValueError, OSError, FloatingPointError, MemoryError) as error:
        if os.environ.get("MINIDALLE_TRACEBACK"):
            raise
        print(f"minidalle {verb}: {error}", file=sys.stderr)
        return 1


def _resume(arguments: Sequence[str]) -> str:
    """What to type to go on, as a clause; nothing for verbs that keep nothing of their work."""
    if arguments[0] not in _GOES_ON:
        return ""
    launcher = ", under the same launcher" if "RANK" in os.environ else ""
    return f"; to go on: {shlex.join(['minidalle', *arguments])}{launcher}"


class _WrongUsage(Exception):
    """The command line itself is wrong."""


def _experiment(rest: Sequence[str]):
    from pipeline.config import load_experiment, parser

    if "--help" in rest or "-h" in rest:
        parser().print_help()
        raise SystemExit(0)
    try:
        return load_experiment(rest)
    except FileNotFoundError:
        raise
    except ValueError as error:
        raise _WrongUsage(str(error)) from error


def _alone(verb: str) -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(f"{verb} is the work of one process; start it without torchrun or accelerate launch")


def _say(text: str) -> None:
    """Prints on the first process alone."""
    if os.environ.get("RANK", "0") == "0":
        print(text)


def _run(rest: Sequence[str]) -> int:
    from pipeline.stages import run

    experiment, start = _experiment(rest), time.perf_counter()
    bundle = run(experiment)
    _say(
        f"\ndone in {(time.perf_counter() - start) / 60:.1f} minutes\n"
        f"  bundle    {bundle}\n  samples   {experiment.folder / 'samples'}\n  logs      {experiment.folder / 'logs'}\n"
        f'next: minidalle generate --bundle {bundle} "your prompt" --num 4 --out pictures'
    )
    return 0


def _train_tokenizer(rest: Sequence[str]) -> int:
    from pipeline.stages import train_tokenizer

    folder = train_tokenizer(_experiment(rest))
    _say(f"wrote {folder}\nnext: minidalle encode {' '.join(rest)}")
    return 0


def _encode(rest: Sequence[str]) -> int:
    reader = argparse.ArgumentParser(prog="minidalle encode", add_help=False, allow_abbrev=False)
    reader.add_argument("--tokenizer", type=Path, help="another tokenizer than the run's; its own run's settings hold where none are given")
    reader.add_argument("--out", type=Path, help="folder for the codes, for other programs (RUN/codes, for train-prior)")
    reader.add_argument("--format", choices=("arrow", "parquet", "webdataset"), default="arrow", help="form of the codes in --out (arrow)")
    options, settings = reader.parse_known_args(rest)
    if "--help" in rest or "-h" in rest:
        print(reader.format_help())
    if options.out is None and (options.tokenizer is not None or options.format != "arrow"):
        raise _WrongUsage("--tokenizer and --format are for codes outside a run; add --out DIR")
    given = any(a == "--config" or a.startswith("--config=") for a in settings)
    from pipeline.encoding import encode_dataset, encode_elsewhere, every_picture_once

    if options.tokenizer is None or given:
        experiment = _experiment(settings)
    else:
        import yaml

        from pipeline.config import load_values
        from pipeline.settings import settings_of_run

        written = settings_of_run(options.tokenizer)
        try:
            values = yaml.safe_load(written.read_text())
            values["tokenizer"]["model"].pop("image_size", None)  # it follows that of other data
        except (yaml.YAMLError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{written} is cut or damaged; add --config FILE, which takes its place") from error
        try:
            experiment = load_values(values, settings)
        except ValueError as error:
            raise _WrongUsage(str(error)) from error
        said = [setting.removeprefix("--encode.").partition("=")[0] for setting in settings if setting.startswith("--encode.")]
        experiment = every_picture_once(experiment, but=said)
    if options.out is None:
        folder = encode_dataset(experiment)
        _say(f"wrote {folder}\nnext: minidalle train-prior {' '.join(rest)}")
        return 0
    rows, files = encode_elsewhere(experiment, options.out, options.format, tokenizer_folder=options.tokenizer)
    counts = ", ".join(f"{count:,} {split}" for split, count in rows.items())
    _say(f"wrote {options.out}: {counts} pictures in {', '.join(files[:3])}{' ...' if len(files) > 3 else ''}, and codes.json")
    return 0


def _train_prior(rest: Sequence[str]) -> int:
    from pipeline.stages import assemble_bundle, train_prior

    experiment = _experiment(rest)
    folder = train_prior(experiment)
    if os.environ.get("RANK", "0") == "0":
        bundle = assemble_bundle(experiment)
        print(f'wrote {folder} and {bundle}\nnext: minidalle generate --bundle {bundle} "your prompt" --num 4 --out pictures')
    return 0


def _compare_tokenizers(rest: Sequence[str]) -> int:
    from pipeline.comparison import compare_tokenizers, load_comparison
    from pipeline.config import parser

    if "--help" in rest or "-h" in rest:
        print("minidalle compare-tokenizers --config configs/bakeoff-emoji.yaml [--minutes M] [--key.path VALUE ...]\n")
        parser().print_help()
        return 0
    _alone("compare-tokenizers")
    try:
        comparison = load_comparison(rest)
    except ValueError as error:
        raise _WrongUsage(str(error)) from error
    folder = compare_tokenizers(comparison)
    _say(f"\n{(folder / 'comparison.md').read_text()}\nwrote comparison.md and its pictures to {folder}")
    return 0


_SAMPLING: dict[str, dict[str, Any]] = {
    "guidance_scale": {"type": float, "help": "how strongly the prompt steers; 1 is off"},
    "guidance_interval": {"type": float, "nargs": 2, "metavar": ("FROM", "TO"), "help": "shares of the codes between which it steers"},
    "guidance_power": {"type": float, "help": "let guidance rise by this power of a cosine"},
    "temperature": {"type": float, "help": "0 takes the most likely codes"},
    "top_k": {"type": int, "help": "keep the k most likely codes"},
    "top_p": {"type": float, "help": "keep the codes that reach this probability"},
    "min_p": {"type": float, "help": "drop codes that the caption makes less likely than this share of the likeliest"},
    "steps": {"type": int, "help": "decide all codes in so many steps (priors trained on random orders)"},
}
"""The fields of `SamplingOptions`; one left out takes the bundle's default."""


def _add_sampling(reader: argparse.ArgumentParser) -> None:
    for name, how in _SAMPLING.items():
        reader.add_argument(f"--{name}", **how)


def _sampling(options: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(options, name) for name in _SAMPLING}


def _generate(rest: Sequence[str]) -> int:
    reader = argparse.ArgumentParser(prog="minidalle generate", description="Draws pictures for prompts.")
    reader.add_argument("prompts", nargs="*", metavar="prompt", help="'' samples without a caption")
    reader.add_argument("--bundle", type=Path, required=True, help="folder that `minidalle run` made: runs/NAME/bundle")
    reader.add_argument("--prompts", dest="file", type=Path, help="text file with a prompt a line")
    reader.add_argument("--num", type=int, default=4, help="pictures a prompt (4)")
    reader.add_argument("--out", type=Path, default=Path("pictures"), help="folder for the pictures (pictures)")
    reader.add_argument("--seed", type=int, default=0, help="the same seed gives the same pictures (0)")
    _add_sampling(reader)
    reader.add_argument(
        "--best_of", type=int, default=1, help="draw so many for each picture and keep the one that shows the prompt best (1)"
    )
    reader.add_argument("--judge", help="name or folder of a CLIP model that --best_of chooses by; without it the prior itself does")
    reader.add_argument("--compile", choices=("auto", "on", "off"), default="auto", help="compile the steps; auto where it pays")
    reader.add_argument("--int8", action="store_true", help="keep the prior's matrices as 8-bit integers")
    reader.add_argument("--batch_size", type=int, default=64, help="pictures at a time (64)")
    reader.add_argument("--truncate", action="store_true", help="cut prompts that are too long")
    options = reader.parse_args(rest)
    prompts = list(options.prompts)
    if options.file is not None:
        prompts += options.file.read_text(encoding="utf-8").splitlines()
    if not prompts:
        raise _WrongUsage("no prompt was given; add one in quotes, or --prompts FILE")
    from pipeline.generation import generate

    written = generate(
        options.bundle, prompts, options.out, num=options.num, seed=options.seed, batch_size=options.batch_size,
        truncate=options.truncate, best_of=options.best_of, judge=options.judge, compile=options.compile, int8=options.int8,
        **_sampling(options),
    )  # fmt: skip
    _say(f"wrote {written} pictures, grid.png and samples.jsonl to {options.out}")
    return 0


def _edit(rest: Sequence[str]) -> int:
    reader = argparse.ArgumentParser(prog="minidalle edit", description="Draws a part of a picture anew.", allow_abbrev=False)
    reader.add_argument(
        "--bundle", type=Path, required=True, help="folder of a bundle whose prior was trained with prior.train.order=random"
    )
    reader.add_argument("--image", type=Path, required=True, help="picture of the size that the prior draws; smaller with --at")
    what = reader.add_mutually_exclusive_group(required=True)
    what.add_argument("--mask", type=Path, help="black and white picture of the same size: white is replaced")
    what.add_argument("--at", type=int, nargs=2, metavar=("X", "Y"), help="extend a smaller picture; its top left corner comes here")
    what.add_argument("--strength", type=float, help="vary the picture: this share of its codes, scattered, is drawn anew")
    reader.add_argument("--prompt", default="", help="what the whole picture is to show")
    reader.add_argument("--num", type=int, default=4, help="pictures (4)")
    reader.add_argument("--out", type=Path, default=Path("pictures"), help="folder for the pictures (pictures)")
    reader.add_argument("--seed", type=int, default=0, help="the same seed gives the same pictures (0)")
    reader.add_argument("--truncate", action="store_true", help="cut a prompt that is too long")
    _add_sampling(reader)
    options = reader.parse_args(rest)
    _alone("edit")
    from pipeline.generation import edit

    written = edit(
        options.bundle, options.image, options.prompt, options.out, mask=options.mask, at=tuple(options.at) if options.at else None,
        strength=options.strength, num=options.num, seed=options.seed, truncate=options.truncate, **_sampling(options),
    )  # fmt: skip
    _say(f"wrote {written} pictures, grid.png and samples.jsonl to {options.out}")
    return 0


def _reconstruct(rest: Sequence[str]) -> int:
    reader = argparse.ArgumentParser(prog="minidalle reconstruct", description="Pictures through the tokenizer and back.")
    reader.add_argument("files", nargs="+", type=Path, metavar="FILE", help="pictures of any size that the code grid divides")
    reader.add_argument("--tokenizer", type=Path, required=True, help="folder of a tokenizer: runs/NAME/tokenizer")
    reader.add_argument("--out", type=Path, default=Path("reconstructions"), help="folder for the pictures")
    reader.add_argument("--size", help="crop and resize to this: 64, or 512x768 (width x height)")
    reader.add_argument("--tile", type=int, default=512, help="larger pictures go through in pieces of this many pixels (512)")
    options = reader.parse_args(rest)
    _alone("reconstruct")
    size = _size(options.size) if options.size else None
    if options.tile < 1:
        raise _WrongUsage(f"--tile is {options.tile}; it must be at least 1")
    from pipeline.generation import reconstruct

    for line in reconstruct(options.tokenizer, options.files, options.out, size=size, tile=options.tile):
        _say(line)
    return 0


def _size(text: str) -> tuple[int, int]:
    parts = text.split("x")
    if len(parts) > 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise _WrongUsage(f"--size is {text!r}; it must be a number of pixels (64), or width and height (512x768)")
    return int(parts[0]), int(parts[-1])


def _evaluate(rest: Sequence[str]) -> int:
    reader = argparse.ArgumentParser(prog="minidalle evaluate", description="Quality of both stages and of the whole.")
    reader.add_argument("--bundle", type=Path, help="bundle to judge (that of the configuration's run)")
    reader.add_argument("--out", type=Path, help="JSON file for the figures (evaluation.json in the run folder)")
    reader.add_argument("--pictures", type=int, default=500, help="held-out pictures and prompts to judge on (500)")
    reader.add_argument("--before", type=Path, help="bundle to compare with on the old data and the new (that of init_from)")
    options, settings = reader.parse_known_args(rest)
    from pipeline.evaluation.report import evaluate

    experiment = _experiment(settings)
    if os.environ.get("RANK", "0") != "0":  # judged by one process: the pictures are few
        return 0
    bundle = options.bundle or experiment.folder / "bundle"
    out = options.out or experiment.folder / "evaluation.json"
    _say(evaluate(bundle, experiment, out, pictures=options.pictures, before=options.before).table())
    _say(f"wrote {out}")
    return 0


def _codebook(rest: Sequence[str]) -> int:
    reader = argparse.ArgumentParser(prog="minidalle codebook", description="What each code draws and how often it is used.")
    reader.add_argument("--tokenizer", type=Path, required=True, help="folder of a tokenizer: runs/NAME/tokenizer")
    reader.add_argument("--config", type=Path, help="whose held-out pictures to encode (that of the tokenizer's run)")
    reader.add_argument("--pictures", type=int, default=500, help="held-out pictures to encode (500)")
    reader.add_argument("--out", type=Path, help="folder for the page (RUN/codebook)")
    options = reader.parse_args(rest)
    _alone("codebook")
    from pipeline.checkpoints import refuse_taken
    from pipeline.codebook import NUMBERS, codebook_page
    from pipeline.data.sources import load_source
    from pipeline.settings import existing_tokenizer, settings_of_run

    config = options.config or settings_of_run(options.tokenizer)
    run = existing_tokenizer(options.tokenizer).parent
    source = load_source(_experiment(["--config", str(config)]).data, "held_out")
    out = options.out or run / "codebook"
    refuse_taken(out, NUMBERS, "codebook page")
    if options.pictures < 1 or not len(source):
        raise ValueError(f"--pictures is {options.pictures} and {len(source)} are held out; at least one is needed of both")
    views = codebook_page(options.tokenizer, source.images(range(min(options.pictures, len(source)))), out)
    for view in views:
        s = view.statistics
        _say(f"{view.name or 'codebook'}: {s.usage:.1%} of the codes used, perplexity {s.perplexity:,.1f}, {s.dead} never used")
    _say(f"wrote {out / 'index.html'} and its pictures")
    return 0


VERBS: dict[str, Callable[[Sequence[str]], int]] = {
    "run": _run,
    "train-tokenizer": _train_tokenizer,
    "encode": _encode,
    "train-prior": _train_prior,
    "compare-tokenizers": _compare_tokenizers,
    "generate": _generate,
    "edit": _edit,
    "reconstruct": _reconstruct,
    "evaluate": _evaluate,
    "codebook": _codebook,
}

_GOES_ON = ("run", "train-tokenizer", "encode", "train-prior", "compare-tokenizers")
"""Verbs that go on from what is there."""

if __name__ == "__main__":
    sys.exit(main())
