"""Commands that fail, and their messages."""

from __future__ import annotations

from pipeline.cli.main import main


def fails(capsys, arguments, *messages: str, status: int = 1) -> None:
    """The command fails with one line that says all of `messages`."""
    capsys.readouterr()  # earlier output is no part of it
    assert main([str(a) for a in arguments]) == status
    error = capsys.readouterr().err
    assert error.startswith("minidalle") and "Traceback" not in error
    for message in messages:
        assert message in error, error
