"""Names of files as tables write them -> files: one rule for every reader. Opens nothing.

A name is taken as it is written where that file exists. Otherwise backslashes separate folders, and
letter case and Unicode form (composed or decomposed) are ignored where one file alone matches.
"""

from __future__ import annotations

import os
import re
from collections.abc import Container, Sequence
from itertools import islice
from pathlib import Path, PurePosixPath
from unicodedata import normalize

from pipeline.data.readers.base import SkipCounter, is_text, printable

NO_IMAGE = "captions of images that are not there left out"
FOLDED = "names found in another letter case or Unicode form"
_ELSEWHERE = (
    (
        re.compile(r"[A-Za-z]:[\\/]|\\\\"),
        "rows that name a file of a Windows drive left out (write paths relative to the table)",
    ),
    (
        re.compile(r"file:", re.IGNORECASE),
        "rows that name a file by a file:// address left out (write its path alone)",
    ),
    (
        re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://"),
        "rows that name an address and no file left out (download the images first)",
    ),
)
_ANNOTATIONS = ("annotations", "captions", "labels", "metadata")
"""Names of folders whose images lie in folders next to them."""
_SUBFOLDERS = 200
"""Folders next to a table that are looked in."""
_MATCHES = 8
"""Files that a message about an ambiguous name lists."""


def folded(name: str) -> str:
    """A name without letter case and Unicode form (canonical caseless matching, The Unicode
    Standard 3.13, D145)."""
    return normalize("NFD", normalize("NFD", name).casefold())


def normalized(name: str) -> str:
    """A path with slashes, without `./`, `..` inside, and spaces around."""
    return os.path.normpath(name.strip().replace("\\", "/"))


def is_file(path: Path) -> bool:
    """Whether a file is there; names that no file can have are none."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # the name is too long, or has a null character
        return False


class FileFinder:
    """Finds files by names relative to a folder, or absolute. Lists folders only for names that are
    not there as they are written, each folder once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._listings: dict[Path, dict[str, list[str]]] = {}

    def find(self, name: str) -> str | None:
        """The path of a file as it is on the disk, relative to `root` where the name is; None where
        there is none.

        Raises:
            ValueError: several files match, and none exactly; names them.
        """
        for path in (name, normalized(name)):
            if is_file(self.root / path):
                return path
        return self._matching(normalized(name))

    def _matching(self, path: str) -> str | None:
        found = [""]
        for part in PurePosixPath(path).parts:
            found = [
                os.path.join(folder, entry)
                for folder in found
                for entry in ([part] if part in ("/", "..") else self._entries(folder, part))
            ]
        found = [file for file in found if is_file(self.root / file)]
        # Other forms of the same characters are nearer than other characters.
        found = [
            file for file in found if normalize("NFC", file) == normalize("NFC", path)
        ] or found
        if len(found) > 1:
            raise ValueError(
                f"{path!r} may mean {printable(' or '.join(sorted(found)[:_MATCHES]))} in "
                f"{self.root}; write the name as it is on the disk, or rename the others"
            )
        return found[0] if found else None

    def _entries(self, folder: str, name: str) -> list[str]:
        """The names in a folder that differ from a name by case and form at most."""
        where = self.root / folder
        if where not in self._listings:
            listing: dict[str, list[str]] = {}
            try:
                entries = os.listdir(where)
            except (OSError, ValueError):
                entries = []
            for entry in entries:
                listing.setdefault(folded(entry), []).append(entry)
            self._listings[where] = listing
        return self._listings[where].get(folded(name), [])


class NamedFiles:
    """The files that names in other files mean: absolute names, and those relative to a folder in
    which one of these other files lies.

    Args:
        beside: the other files.
    """

    def __init__(self, beside: Sequence[Path]) -> None:
        folders = dict.fromkeys(file.parent for file in beside)
        self._finders = [FileFinder(folder) for folder in folders]

    def path(self, name: str) -> Path:
        """The path of a file; the name in the first folder where there is none.

        Raises:
            ValueError: several files match; names them.
        """
        found = {
            finder.root / own for finder in self._finders if (own := finder.find(name)) is not None
        }
        if len(found) > 1:
            raise ValueError(
                f"{name!r} may mean {printable(' or '.join(sorted(map(str, found))[:_MATCHES]))}; "
                "write absolute paths, or read the files of one folder alone"
            )
        return found.pop() if found else self._finders[0].root / name


class ImageNames:
    """The images that the rows of one table name; what cannot be found is counted.

    Args:
        table: for messages.
        root: the folder that names are relative to.
        images: the only files that may be named, as paths relative to `root`; None allows any.
        missing: the reason to count what is not there by.
    """

    def __init__(
        self,
        table: Path,
        root: Path,
        tally: SkipCounter,
        images: Container[str] | None = None,
        missing: str = NO_IMAGE,
    ) -> None:
        self._table = table
        self._root = root
        self._tally = tally
        self._images = images
        self._missing = missing
        self._finder = FileFinder(root)

    def find(self, name: str, row: int) -> str | None:
        """The path of an image, relative to the root or absolute; None where there is none.

        Raises:
            ValueError: several files match; or only `images` are allowed, and the name lies
                outside the folder.
        """
        for pattern, reason in _ELSEWHERE:
            if pattern.match(name) and not is_file(self._root / name):
                self._tally.add(reason, name)
                return None
        if self._images is not None:
            name = self._inside(name, row)
            if name in self._images:
                return name
        try:
            found = self._finder.find(name) if is_text(name) else None
        except ValueError as error:
            raise ValueError(f"{self._table} row {row}: {error}") from error
        if found is None or (self._images is not None and found not in self._images):
            self._tally.add(self._missing, name)
            return None
        if found not in (name, normalized(name)):
            self._tally.add(FOLDED, f"{found} for {name}")
        return found

    def _inside(self, name: str, row: int) -> str:
        """A name relative to the folder."""
        path = normalized(name)
        folder = f"{self._root.absolute()}/"
        if path.startswith(folder):
            return path.removeprefix(folder)
        if path.startswith(("/", "../")) or path == "..":
            raise ValueError(
                f"{self._table} row {row} names {name!r}, which lies outside the folder; copy the "
                "image into the folder, and name it there"
            )
        return path


def image_folder(table: Path, names: Sequence[str]) -> tuple[Path | None, list[Path]]:
    """The folder that the names of a table are relative to, and the folders that were looked in.

    It is the table's own folder, or a folder in it: `val2017` for `captions_val2017.json`,
    `images`, or the only other one that has these images. Next to a folder `annotations`, the same.

    Args:
        names: some of the images.

    Raises:
        ValueError: several other folders have images of these names.
    """
    tried = _usual_folders(table)
    for folder in tried:
        if _has_any(folder, names):
            return folder, tried
    others = [folder for folder in _subfolders(table.parent).values() if folder not in tried]
    found = [folder for folder in others if _has_any(folder, names)]
    if len(found) > 1:
        raise ValueError(
            f"{table} names {names[0]!r}, and the folders "
            f"{printable(', '.join(folder.name for folder in found))} have images of such names; "
            "write the folder in front of each name"
        )
    return (found[0] if found else None), tried + others


def _usual_folders(table: Path) -> list[Path]:
    here = table.parent
    bases = [here, here.parent] if folded(here.name) in _ANNOTATIONS else [here]
    own_names = [folded(table.stem), folded(table.stem.rpartition("_")[2])]
    found = []
    for base in bases:
        inside = _subfolders(base)
        in_images = _subfolders(inside["images"]) if "images" in inside else {}
        found += [base]
        found += [inside[name] for name in own_names if name in inside]
        found += [in_images[name] for name in own_names if name in in_images]
        found += [inside[name] for name in ("images",) if name in inside]
    return list(dict.fromkeys(found))


def _subfolders(folder: Path) -> dict[str, Path]:
    """Folded name -> folder, the first ones in order of their names."""
    try:
        entries = sorted(os.listdir(folder))
    except OSError:
        return {}
    shown = (name for name in entries if not name.startswith("."))
    inside = (name for name in shown if os.path.isdir(folder / name))
    return {folded(name): folder / name for name in islice(inside, _SUBFOLDERS)}


def _has_any(folder: Path, names: Sequence[str]) -> bool:
    finder = FileFinder(folder)
    for name in names:
        try:
            if finder.find(name) is not None:
                return True
        except ValueError:  # several match
            return True
    return False
