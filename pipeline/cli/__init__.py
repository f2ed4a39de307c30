"""The command line `minidalle`."""

from pipeline.runtime.signals import exits_on_ctrl_c

with exits_on_ctrl_c("minidalle"):
    from pipeline.cli.main import main

__all__ = ["main"]
