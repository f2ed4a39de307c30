"""Where things lie in a run folder. Knows paths alone."""

from __future__ import annotations

from pathlib import Path


def existing_tokenizer(folder: Path) -> Path:
    """The folder, or FileNotFoundError where there is none."""
    if not folder.is_dir():
        raise FileNotFoundError(
            f"there is no tokenizer in {folder}; `minidalle train-tokenizer` makes one in "
            "runs/NAME/tokenizer"
        )
    return folder


def settings_of_run(tokenizer: Path) -> Path:
    """The settings of the run that a tokenizer lies in.

    Raises:
        FileNotFoundError: there is no tokenizer, or no run around it.
    """
    written = existing_tokenizer(tokenizer).resolve().parent / "experiment.yaml"
    if not written.is_file():
        raise FileNotFoundError(
            f"there is no {written}, so it is not known which images to encode; add --config FILE"
        )
    return written
