"""`minidalle COMMAND`: which commands there are, and how each one ends. Imports nothing heavy until
a command runs.

Exit status: 0 done, 1 failed (one line says why), 2 wrong usage, 129 stopped by SIGHUP, 130 stopped
by Ctrl-C, 143 stopped by SIGTERM. A training that is stopped saves a checkpoint first, and the line says which command
resumes from it.
"""

from __future__ import annotations

import atexit
import errno
import gc
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Sequence

from pipeline.cli.commands import (
    codebook_command,
    compare_tokenizers_command,
    encode_command,
    estimate_command,
    evaluate_command,
    push_command,
    run_command,
    train_prior_command,
    train_tokenizer_command,
    zoo_command,
)
from pipeline.cli.compress import compress_command, decompress_command
from pipeline.cli.doctor import doctor_command
from pipeline.cli.finetune import finetune_command
from pipeline.cli.generate import edit_command, generate_command, reconstruct_command
from pipeline.cli.likelihood import likelihood_command
from pipeline.cli.log import logging_to_terminal, print_error
from pipeline.cli.options import UsageError, parse_options
from pipeline.cli.serve import serve_command
from pipeline.cli.streams import lasting_streams
from pipeline.runtime.signals import RecoverableError, TrainingInterrupted, interrupts_raise

HELP = """usage: minidalle COMMAND [options]

Trains an image tokenizer and a prior over caption and codes, and samples images for prompts.

before training:
  doctor            SOURCE                                 what is in it, what would stop a training, which settings suit it
  estimate          --config FILE                          the memory that each training stage takes

training, each with --config FILE [--key.path VALUE ...]; run again, it resumes from what is there:
  run               all of the below, in order, then a grid of images
  train-tokenizer   stage 1: images <-> codes
  encode            the codes of every image, once; FILES... --tokenizer DIR --out DIR: of these
  train-prior       stage 2: caption and codes as one stream, or Gaussian latents
  compare-tokenizers  several tokenizers side by side (configs/bakeoff-*.yaml; --minutes for equal time)
  zoo               several generative models at equal time, by the probability of held-out images (configs/zoo.yaml)

  finetune          --bundle DIR --data FOLDER             a new style from 20 to 50 drawings; other names are drawn in it, too

using what was trained:
  generate          "prompt" ["prompt" ...] [--bundle DIR] images for prompts; without DIR by icons of the package
  edit              --bundle DIR --image FILE --mask FILE --prompt "..."   a part of an image, resampled
  reconstruct       --tokenizer DIR FILES...               images through the tokenizer and back
  likelihood        --bundle DIR FILES... [--prompt TEXT]  how likely images are: nats and bits per dimension, surprise maps
  compress          IMAGE --bundle DIR --out FILE          an image without loss, by the bundle's probabilities
  decompress        FILE --bundle DIR --out IMAGE.png      the same image again
  evaluate          --config FILE [--bundle DIR] [--out FILE]  quality as JSON and a table
  serve             [--bundle DIR] [--port 8000]           a web page and an HTTP API over a bundle
  push              --bundle DIR --to user/name            a bundle to the Hub; every other --bundle takes user/name
  codebook          --tokenizer DIR                        what each code looks like and how often it is used, as a page

`minidalle COMMAND --help` lists a command's options. Every command takes --log-level LEVEL, the least severe messages
to show: debug, info (the default), warning or error; --traceback, which shows where in the code an error arose; and
--offline, which forbids every network call (docs/security.md).
Several processes: `accelerate launch -m pipeline.cli COMMAND ...` on GPUs, and on CPUs
`ACCELERATE_USE_CPU=true torchrun --nproc_per_node N -m -- pipeline.cli COMMAND ...`.
Start with: minidalle run --config configs/shapes.yaml
"""

COMMANDS: dict[str, Callable[..., int | None]] = {
    "run": run_command,
    "train-tokenizer": train_tokenizer_command,
    "encode": encode_command,
    "train-prior": train_prior_command,
    "compare-tokenizers": compare_tokenizers_command,
    "zoo": zoo_command,
    "finetune": finetune_command,
    "generate": generate_command,
    "edit": edit_command,
    "reconstruct": reconstruct_command,
    "likelihood": likelihood_command,
    "compress": compress_command,
    "decompress": decompress_command,
    "evaluate": evaluate_command,
    "serve": serve_command,
    "push": push_command,
    "codebook": codebook_command,
    "doctor": doctor_command,
    "estimate": estimate_command,
}
"""Functions whose signatures are the options. They return the exit status, or None for 0."""

RESUMABLE = (
    "run",
    "train-tokenizer",
    "encode",
    "train-prior",
    "compare-tokenizers",
    "zoo",
    "finetune",
)
"""Commands that resume from what is there."""

SINGLE_PROCESS = (
    "compare-tokenizers",
    "zoo",
    "finetune",
    "edit",
    "reconstruct",
    "likelihood",
    "compress",
    "decompress",
    "serve",
    "push",
    "codebook",
    "doctor",
    "estimate",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    if arguments is None:  # this is the program, and no call from another one
        arguments = sys.argv[1:]
        # Imports make a hundred thousand objects that stay. Searching them for garbage, on the way
        # and again at the end, takes a fifth of the time to a first image.
        gc.set_threshold(50_000)
        atexit.register(gc.freeze)
    arguments = list(arguments)
    with lasting_streams():
        try:
            with interrupts_raise(lambda error: _explain(error, arguments)[1]):
                status = _run(arguments)
                sys.stdout.flush()
            return status
        except SystemExit as stop:  # after --help
            return int(stop.code or 0)
        except (UsageError, KeyboardInterrupt, RuntimeError, *_EXPECTED) as error:
            status, line = _explain(error, arguments)
            if "--traceback" in arguments:
                print_error(traceback.format_exc())
            if line:
                print_error(line)
            return status


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP)
        return 0 if arguments else 2
    command, *rest = arguments
    if command not in COMMANDS:
        raise UsageError(f"{command!r} is not a command; choose one of: {', '.join(COMMANDS)}")
    options = parse_options(command, COMMANDS[command], rest)
    _set_environment(options.pop("offline"))
    del options["traceback"]  # `main` looks for it: it holds for errors of the options, too
    with logging_to_terminal(options.pop("log_level")):
        if command in SINGLE_PROCESS and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError(
                f"{command} is the work of one process; start it without torchrun or "
                "accelerate launch"
            )
        if command in RESUMABLE:
            _keep_freed_memory()
        status = COMMANDS[command](**options) or 0
    if "RANK" in os.environ:  # one of several processes
        from pipeline.runtime.distributed import destroy_process_group

        destroy_process_group()
    return status


def _set_environment(offline: bool) -> None:
    """Sets what libraries read when they are imported: no telemetry, no warnings of parallelism,
    and no network where none is allowed."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ |= {"HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1"}
    os.environ["HF_UPDATE_DOWNLOAD_COUNTS"] = "0"
    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"


def _keep_freed_memory() -> None:
    """Tunes the allocator of this process where the CPU trains."""
    import torch
    from accelerate.utils import parse_flag_from_env

    from pipeline.runtime.devices import tune_malloc

    if parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.cuda.is_available():
        tune_malloc()


_EXPECTED = (ValueError, OSError, FloatingPointError, MemoryError)
"""Errors whose message is for the user; all others are bugs, and show a traceback."""


def _explain(error: BaseException, arguments: Sequence[str]) -> tuple[int, str]:
    """Exit status and line of an error; raises it again where it is a bug."""
    known = [command for command in arguments[:1] if command in COMMANDS]
    name = " ".join(["minidalle", *known])
    first_process = os.environ.get("RANK", "0") == "0"
    launcher = ", under the same launcher" if "RANK" in os.environ else ""
    resume = f"; to resume: {shlex.join(['minidalle', *arguments])}{launcher}"
    if not set(known) & set(RESUMABLE):
        resume = ""
    if isinstance(error, UsageError):
        return 2, f"{name}: {error}"
    if isinstance(error, KeyboardInterrupt):
        if not isinstance(error, TrainingInterrupted):
            error = TrainingInterrupted(signal.SIGINT)
        # All processes stop together; the first one says so.
        return error.status, f"{name}: {error}{resume}" if first_process else ""
    if isinstance(error, RecoverableError):
        # Where the process that drew the bar is gone, the bar's line was never ended.
        return 1, f"{'' if first_process else chr(10)}{name}: {error}{resume}"
    if isinstance(error, RuntimeError):
        if not launcher:
            raise error
        from pipeline.runtime.distributed import is_peer_failure

        if not is_peer_failure(error):
            raise error
        return 1, f"{name}: another process of this job is gone or no longer answers{resume}"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC and not error.filename:
        return 1, f"{name}: a file cannot be written ({error.strerror}); free some space"
    return 1, f"{name}: {error}"
