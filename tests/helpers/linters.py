"""Linters as programs of this environment. They ask no network."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def lint(program: str, *arguments: str | Path) -> tuple[int, str]:
    """Exit status, and all that a linter printed."""
    command = [Path(sys.executable).parent / program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr
