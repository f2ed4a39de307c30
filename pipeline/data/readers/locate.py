"""What a source's name leads to: files on this disk, or a name on the Hub. Knows names and sizes;
reads no image."""

from __future__ import annotations

import difflib
import glob
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from pipeline.data.readers.base import printable
from pipeline.data.readers.files import check_link
from pipeline.data.readers.images import EXTENSIONS

PARQUET = (".parquet", ".arrow")
ACCEPTED = (
    "give shapes, emoji, a folder of images, a .csv or .jsonl file, Parquet, .tar shards, or a "
    "datasets name (docs/data.md)"
)
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
_MOST_IN_BRACES = 1_000_000
_HUB = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?")
_FILE = re.compile(
    r"\.(csv|tsv|jsonl?|parquet|arrow|feather|tar|tgz|gz|zst|bz2|xz|zip|7z|rar|txt|ya?ml|xml|"
    r"png|jpe?g|webp|avif|gif|bmp|tiff?|npy|npz|h5|hdf5|mdb|lmdb|db|sqlite|pkl|xlsx?|tfrecords?)",
    re.IGNORECASE,
)
_POINTER = b"version https://git-lfs"
_NAMED = 3
_LISTED = 100_000
"""Files after which a folder's listing stops."""


def is_remote(source: str) -> bool:
    return "://" in source


def is_hub_name(source: str) -> bool:
    """Whether a source that is not on this disk may be a data set of the Hub: `name` or
    `user/name`. Whatever is plainly a path is not, so that its name is sent nowhere."""
    if not _HUB.fullmatch(source) or _FILE.fullmatch(Path(source).suffix):
        return False
    return "/" not in source or not Path(source).parent.is_dir()


def matching(source: str) -> list[Path]:
    """The files that a path, a glob (`**` reads all depths) or a range {000..123} names, in
    order. Of a range, those that exist.

    Raises:
        ValueError: a range is too long.
    """
    found: dict[Path, None] = {}
    for name in in_braces(source):
        path = Path(name).expanduser()
        if path.is_file():
            found[path] = None
        elif glob.has_magic(name):
            names = sorted(glob.glob(str(path), recursive=True))
            found |= dict.fromkeys(Path(one) for one in names if os.path.isfile(one))
    return list(found)


def files_of_rows(source: str) -> list[Path]:
    """The files of many rows each that a source names: shards, or Parquet or Arrow files. A folder
    names its shards, and where it has no image at any depth, whatever of them lies below. None of
    a folder of images and of other files.
    """
    path = Path(source).expanduser()
    if not path.is_dir():
        files = matching(source)
        kinds = {file.suffix.lower() for file in files}
        return files if len(kinds) == 1 and kinds <= {*PARQUET, ".tar"} else []
    if shards := sorted(path.glob("*.tar")):
        return shards
    below: dict[str, list[Path]] = {}
    for file in files_below(path):
        ending = file.suffix.lower()
        if ending in EXTENSIONS:
            return []
        below.setdefault(ending, []).append(file)
    return next((below[ending] for ending in (*PARQUET, ".tar") if ending in below), [])


def in_braces(source: str) -> Iterator[str]:
    """The names that ranges in braces stand for."""
    match = _BRACES.search(source)
    if match is None:
        yield source
        return
    first, last = match.groups()
    if int(last) - int(first) > _MOST_IN_BRACES:
        raise ValueError(
            f"data.source {printable(source)} names more than {_MOST_IN_BRACES:,} files; give a "
            "shorter range"
        )
    for number in range(int(first), int(last) + 1):
        name = source[: match.start()] + str(number).zfill(len(first)) + source[match.end() :]
        yield from in_braces(name)


def files_below(folder: Path) -> Iterator[Path]:
    """The files of a folder at any depth, without hidden ones. Links to folders are not followed:
    they may lead back here."""
    for where, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith("."):
                yield Path(where) / name


def linked_folders(folder: Path) -> Iterator[Path]:
    """The links to folders in a folder, at any depth; they are not followed."""
    for where, folders, _ in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in folders:
            if os.path.islink(os.path.join(where, name)):
                yield Path(where) / name


def described(files: Sequence[Path], root: Path) -> str:
    """How many files of each ending there are, and the first names."""
    if not files:
        return "no file"
    endings = Counter(file.suffix.lower() or "without an ending" for file in files)
    counts = ", ".join(f"{count:,} {ending}" for ending, count in endings.most_common(6))
    more = ", ..." if len(files) > _NAMED else ""
    names = ", ".join(printable(os.path.relpath(file, root)) for file in files[:_NAMED])
    return f"{counts} ({names}{more})"


def contents(folder: Path) -> str:
    """What lies in a folder, at any depth, in words."""
    files = list(islice(files_below(folder), _LISTED))
    links = list(islice(linked_folders(folder), _NAMED))
    names = ", ".join(printable(os.path.relpath(link, folder)) for link in links)
    said = f", and links to folders, which are not followed ({names})" if links else ""
    return described(files, folder) + said


def not_found(source: str) -> FileNotFoundError:
    """The error for a path that leads to nothing: what lies next to it, and the nearest name."""
    # The deepest part of it that is there.
    path = Path(source.replace("\\", "/") if not os.path.exists(source) else source).expanduser()
    missing = path
    while not missing.parent.is_dir() and missing.parent != missing:
        missing = missing.parent
    folder = missing.parent
    names = _names_in(folder)
    near = nearest(missing.name, names)
    hint = f"; did you mean {printable(str(folder / near))}? Or" if near else ";"
    some = printable(", ".join(names[:10])) + (", ..." if len(names) > 10 else "")
    what = "no files match" if glob.has_magic(source) or _BRACES.search(source) else "there is no"
    return FileNotFoundError(
        f"data.source: {what} {printable(source)}; {printable(str(folder))} holds "
        f"{some or 'nothing'}{hint} {ACCEPTED}"
    )


def nearest(name: str, names: Sequence[str]) -> str | None:
    """The name most like another, whatever their cases."""
    by_lower = {own.lower(): own for own in names}
    near = difflib.get_close_matches(name.lower(), list(by_lower), n=1, cutoff=0.6)
    return by_lower[near[0]] if near else None


def nearest_here(source: str) -> str | None:
    """The file or folder of this folder whose name is most like a source's."""
    return nearest(source, _names_in(Path()))


def refuse_pointers(files: Sequence[Path]) -> None:
    """Raises ValueError where a file is what Git LFS leaves of one that it has not fetched."""
    for file in filter(Path.is_file, files):
        with open(file, "rb") as opened:
            if opened.read(len(_POINTER)) == _POINTER:
                raise ValueError(
                    f"{printable(str(file))} is a pointer of Git LFS and no data; run `git lfs "
                    "pull` in that clone"
                )


def check_links(source: str, files: Sequence[Path], follow_links: bool) -> None:
    """Raises LeavesFolder where a file of rows in a folder is a link to somewhere outside of it."""
    folder = Path(source).expanduser()
    for file in files if folder.is_dir() else ():
        check_link(file, folder, follow_links)


def _names_in(folder: Path) -> list[str]:
    try:
        return sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError:
        return []
