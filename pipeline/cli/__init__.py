"""The command line `minidalle`."""

from pipeline.cli.main import main

__all__ = ["main"]
