"""Growth of a training's memory over time, extrapolated to three hours.

    python -m benchmarks.growth [--minutes 20] [--stage tokenizer] [--config configs/emoji.yaml]
        [--name growth]

The stage is trained in a process of its own, with the evaluations and checkpoints of its
configuration. A prior needs the tokenizer and the codes of the run. The process's anonymous memory
is read every two seconds. Growth is the slope of a line through the readings after the first
quarter, in which compilers and caches fill.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time

import numpy as np
import psutil

HOURS = 3


def main() -> None:
    reader = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    reader.add_argument("--minutes", type=float, default=20)
    reader.add_argument("--stage", choices=("tokenizer", "prior"), default="tokenizer")
    reader.add_argument("--config", default="configs/emoji.yaml")
    reader.add_argument("--name", default="growth")
    options, more = reader.parse_known_args()
    steps = f"--{options.stage}.train.steps"
    command = [
        sys.executable,
        "-m",
        "pipeline.cli",
        f"train-{options.stage}",
        "--config",
        options.config,
        "--name",
        options.name,
    ]
    read: list[tuple[float, float]] = []
    with (
        tempfile.TemporaryFile() as said,
        subprocess.Popen([*command, steps, "1000000", *more], stdout=said, stderr=said) as process,
    ):
        watched = psutil.Process(process.pid)
        start = time.monotonic()
        while (
            passed := time.monotonic() - start
        ) < options.minutes * 60 and process.poll() is None:
            memory = watched.memory_info()
            read.append((passed, (memory.rss - memory.shared) / 2**20))
            time.sleep(2)
        if process.poll() is not None:
            said.seek(0)
            raise SystemExit(said.read().decode()[-1000:])
        process.kill()
    seconds, mebibytes = np.array(read).T
    settled = seconds > seconds[-1] / 4
    slope = np.polyfit(seconds[settled], mebibytes[settled], 1)[0]
    after = mebibytes[settled][0]
    last = mebibytes[-1]
    most = mebibytes.max()
    print(
        f"{options.stage}, {options.config}, {seconds[-1] / 60:.0f} minutes: {after:,.0f} MiB "
        f"after the first quarter, {last:,.0f} MiB at"
    )
    print(
        f"the end, at most {most:,.0f} MiB; {slope * 3600 * HOURS:+,.0f} MiB in {HOURS} hours by "
        "the slope"
    )


if __name__ == "__main__":
    main()
