"""Fetches sets of icons by npm into the folder that `data.icons.folder` names by default.

    python -m pipeline.data.builtin.fetch_icons [--folder DIR] [SET ...]

Each set is one tarball of 1 to 3 MB, whose hash is checked. Without npm, the same files can be put
there by hand. See docs/data.md for the licences.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from pipeline.config.builtin import IconOptions
from pipeline.data.builtin.icon_sets import MAX_SET_BYTES
from pipeline.data.readers.files import parse_json, read_file
from pipeline.runtime.atomic_io import atomic_write_dir

_log = logging.getLogger(__name__)
PACKAGES = {
    "noto": ("1.2.9", "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad"),
    "twemoji": ("1.2.5", "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7"),
    "fluent-emoji-flat": (
        "1.2.6",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
    ),
    "openmoji": ("1.2.29", "03181e2c156cab35cf4a62f1f7886bd971d59212e75ac3f189d5a4cae3930fc5"),
    "emojione": ("1.2.3", "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e"),
    "noto-v1": ("1.2.5", "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37"),
    "fxemoji": ("1.2.2", "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef"),
}
"""Version and SHA-256 of the npm package @iconify-json/NAME by name."""
FILES = ("icons.json", "chars.json", "info.json")
_FETCHED = "fetched.json"
"""Beside them: the SHA-256 of the tarball that they come from."""


def fetch(name: str, folder: Path) -> None:
    """Downloads one set and unpacks its three JSON files into `folder/name`.

    Raises:
        ValueError: the set is unknown, or the tarball has another hash.
        FileNotFoundError: npm is not installed; says what to put where.
        OSError: npm could not download it.
    """
    if name not in PACKAGES:
        raise ValueError(f"{name!r} is no known set; give some of {', '.join(PACKAGES)}")
    version, expected = PACKAGES[name]
    package = f"@iconify-json/{name}@{version}"
    npm = shutil.which("npm")
    by_hand = f"unpack {', '.join(FILES)} of the npm package {package} into {folder / name}"
    if npm is None:
        raise FileNotFoundError(f"npm is not installed; install it, or {by_hand}")
    with tempfile.TemporaryDirectory() as scratch:
        done = subprocess.run(
            [npm, "pack", "--loglevel", "error", package],
            cwd=scratch,
            capture_output=True,
            text=True,
        )
        tarballs = list(Path(scratch).glob("*.tgz"))
        if done.returncode or len(tarballs) != 1:
            said = " ".join(done.stderr.split())[:300] or "npm says no more"
            raise OSError(
                f"npm could not download {package} ({said}); see to the network and run this "
                f"again, or {by_hand}"
            )
        found = hashlib.sha256(tarballs[0].read_bytes()).hexdigest()
        if found != expected:
            raise ValueError(
                f"{package} has SHA-256 {found} and must have {expected}; it is damaged, or not "
                f"what this version was tested with; run this again, or {by_hand}"
            )
        with tarfile.open(tarballs[0]) as archive:
            contents = {file: archive.extractfile(f"package/{file}") for file in FILES}
            texts = {file: member.read() for file, member in contents.items() if member}

    def write(beside: Path) -> None:
        for file, text in texts.items():
            (beside / file).write_bytes(text)
        (beside / _FETCHED).write_text(json.dumps({"sha256": found}))

    atomic_write_dir(folder / name, write)


def is_there(name: str, folder: Path) -> bool:
    """Whether a set is there, can be read, and comes from the tarball of this version. Of one that
    was put there by hand, that is not known."""
    try:
        for file in FILES:
            if not isinstance(parse_json(read_file(folder / name / file, MAX_SET_BYTES)), dict):
                return False
        if not (folder / name / _FETCHED).exists():
            return True
        fetched = parse_json(read_file(folder / name / _FETCHED, MAX_SET_BYTES))
    except (OSError, ValueError):
        return False
    return name not in PACKAGES or fetched == {"sha256": PACKAGES[name][1]}


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    reader = argparse.ArgumentParser(
        prog="python -m pipeline.data.builtin.fetch_icons",
        description="Fetches sets of icons by npm.",
    )
    reader.add_argument("sets", nargs="*", default=list(PACKAGES), help="names of sets (all)")
    reader.add_argument("--folder", type=Path, default=Path(IconOptions().folder))
    options = reader.parse_args()
    folder = options.folder.expanduser()
    for name in options.sets:
        if is_there(name, folder):
            _log.info("%s is there", folder / name)
            continue
        try:
            fetch(name, folder)
        except (OSError, ValueError) as error:
            _log.error("%s", error)
            return 1
        _log.info("wrote %s", folder / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
