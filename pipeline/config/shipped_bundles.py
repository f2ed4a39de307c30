"""Bundles that come with the package: names -> folders. Knows names and folders; loads nothing."""

from __future__ import annotations

import logging
from pathlib import Path

_log = logging.getLogger(__name__)

FOLDER = Path(__file__).parent.parent / "bundles"
"""Where they lie: package data."""
SHIPPED = ("icons",)
"""Their names. `generate` uses the first where no bundle is given."""


def shipped_bundle(name: str = SHIPPED[0]) -> Path:
    """The folder of a bundle that comes with the package.

    Raises:
        FileNotFoundError: the installation lacks it.
    """
    folder = FOLDER / name
    if not (folder / "pipeline.json").is_file():
        raise FileNotFoundError(
            f"this installation lacks the bundle {name!r}: {folder} holds no pipeline.json; "
            "install mini-dalle again, or give the folder of another bundle"
        )
    return folder


def bundle_folder(name: str | Path) -> Path:
    """The folder of a bundle: a path, or the name of one that comes with the package. A bundle of
    that name in the working directory comes first, and is reported; other folders do not count.

    Raises:
        FileNotFoundError: it is such a name, and the installation lacks that bundle.
    """
    if str(name) not in SHIPPED:
        return Path(name).expanduser()
    if (Path(name) / "pipeline.json").is_file():
        _log.info("using the folder %s, not the bundle of that name in the package", Path(name))
        return Path(name)
    return shipped_bundle(str(name))
