"""Saved files, before they are believed: what may be opened, JSON as configurations, tensors by the
header. Knows files and types; knows no model.

The other stage has the same file, word by word: the stages share no package, and a test compares
the two.
"""

from __future__ import annotations

import builtins
import json
import math
import os
import stat
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from safetensors import SafetensorError, safe_open
from torch import Tensor

_Config = TypeVar("_Config")


class UnsafeFile(ValueError):
    """A file that is not read. The message is complete: which file, what is wrong, what to do."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file, by the file's header."""

    dtype: str
    shape: tuple[int, ...]

    def fits(self, tensor: Tensor) -> bool:
        """Whether it can be loaded into a tensor: of the same shape, and real numbers or not as
        that one is."""
        is_real = self.dtype.startswith(("F", "BF"))
        return self.shape == tuple(tensor.shape) and is_real == tensor.is_floating_point()


MAX_JSON_BYTES = 2**23
"""Of a JSON file; a vocabulary of text has a limit of its own."""
_MAX_LIBRARY_BYTES = 2**26
"""Of a text that a library reads, vocabularies with it."""
_MAX_JSON_VALUES = 2_500_000
"""Commas and brackets of a JSON file: each value takes up to 100 bytes of memory."""
_MAX_JSON_DEPTH = 50
_MAX_HEADER_BYTES = 2**19
"""Of a safetensors file: some 5,000 tensors."""
_MIN_SPARSE_BYTES = 2**26
"""Smaller files of weights may be sparse."""
_MAX_ITEMS = 1024
"""Of a list in a configuration."""
_MAX_NUMBER = 2**31 - 1
_MAX_FLOAT = 1e30
_TEXTS = (".json", ".txt", ".jinja", ".model")
"""Endings of files beside the weights that a library reads."""
_CODE = (".py", ".pyc", ".pyd", ".so", ".dll", ".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt")
"""Endings of files that are code, or can run code when they are loaded."""


def check_file(path: Path, most: int | None = None) -> None:
    """Checks that a file can be read without harm, before it is opened.

    Args:
        most: bytes that it may have.

    Raises:
        FileNotFoundError: there is no such file.
        UnsafeFile: it is a pipe, a device or a folder; a link that leaves the folder (the cache of
            the Hub links to its own files, and may); or larger than `most`.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise UnsafeFile(f"{path} is no regular file; put the file itself there")
    if path.is_symlink():
        folder = path.parent.resolve()
        caches = [p.parent / "blobs" for p in (folder, *folder.parents) if p.name == "snapshots"]
        target = path.resolve()
        if not any(target.is_relative_to(allowed) for allowed in (folder, *caches)):
            raise UnsafeFile(
                f"{path} is a link to a file outside of its folder; replace the link by a copy of "
                "the file"
            )
    if most is not None and found.st_size > most:
        raise UnsafeFile(
            f"{path} has {found.st_size:,} bytes, and such a file has at most {most:,}; copy it "
            "again"
        )


def check_part(folder: Path, part: str) -> None:
    """Raises UnsafeFile where a folder in a folder of saved files is a link that leaves it."""
    if not (folder / part).resolve().is_relative_to(folder.resolve()):
        raise UnsafeFile(
            f"{folder / part} is a link to a folder outside of {folder}; replace the link by a "
            "copy of the folder"
        )


def check_weights(path: Path) -> None:
    """Checks the size of a file of weights before it is read.

    Raises:
        FileNotFoundError: there is no such file.
        UnsafeFile: what `check_file` refuses; it has more bytes than this machine has memory, or is
            sparse, and so takes far more memory than it took to send.
    """
    check_file(path)
    found = path.stat()
    if hasattr(os, "sysconf"):  # not on Windows
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        memory = sys.maxsize
    if found.st_size > memory:
        raise UnsafeFile(
            f"{path} has {found.st_size:,} bytes, and this machine has memory for {memory:,}; use "
            "a machine with more memory"
        )
    stored = getattr(found, "st_blocks", found.st_size) * 512  # Windows counts no blocks
    if found.st_size < _MIN_SPARSE_BYTES or stored > found.st_size / 2:
        return
    # Compressed and remote disks count fewer blocks, too, and have no holes.
    with path.open("rb") as file:
        if os.lseek(file.fileno(), 0, os.SEEK_HOLE) < found.st_size:
            raise UnsafeFile(
                f"{path} is a sparse file: {stored:,} of its {found.st_size:,} "
                "bytes are stored; download it again, or make a plain copy of it"
            )


def check_folder(folder: Path) -> None:
    """Raises UnsafeFile where a folder of saved files holds code, or files that can run code when
    they are loaded."""
    for path in folder.iterdir():
        if path.suffix.lower() in _CODE:
            raise UnsafeFile(
                f"{folder} holds {path.name!r}, which may be code; saved models are JSON and "
                "safetensors alone, move that file elsewhere"
            )


def check_library_folder(folder: Path) -> None:
    """Checks the texts that a library may read of a model's folder: regular files alone, sizes, and
    the depth of JSON. Not what they hold, which the library checks.

    Raises:
        OSError: it is no folder, or a file cannot be read.
        UnsafeFile: what `check_file` refuses; JSON is nested too deeply.
    """
    for path in sorted(folder.iterdir()):
        if path.suffix in _TEXTS:
            check_file(path, _MAX_LIBRARY_BYTES)
        if path.suffix == ".json":
            try:
                _read_json(path, _MAX_LIBRARY_BYTES)
            except UnsafeFile:
                raise
            except ValueError:
                continue  # truncated; the library says so where it needs the file


def read_json_object(path: Path, most: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """One JSON object.

    Raises:
        FileNotFoundError: there is no such file.
        UnsafeFile: what `check_file` refuses; it is nested too deeply, or asks for code to be run.
        ValueError: it is truncated, or holds something else.
    """
    content = _read_json(path, most)
    if not isinstance(content, dict):
        raise ValueError("it holds no JSON object")
    if "auto_map" in content:
        raise UnsafeFile(
            f"{path} has the entry 'auto_map', which asks to run code, and no such code is run; "
            "take that entry out of the file"
        )
    return content


def _read_json(path: Path, most: int) -> object:
    check_file(path, most)
    text = path.read_text(encoding="utf-8")
    if sum(map(text.count, ",[{")) > _MAX_JSON_VALUES:
        raise UnsafeFile(f"{path} has more than {_MAX_JSON_VALUES:,} values; copy it again")
    try:
        content: object = json.loads(text)
        too_deep = _depth_exceeds(content, _MAX_JSON_DEPTH)
    except RecursionError:
        too_deep = True
    if too_deep:
        raise UnsafeFile(f"{path} is nested more than {_MAX_JSON_DEPTH} deep; copy it again")
    return content


def _depth_exceeds(content: object, most: int) -> bool:
    level = [content]
    for _ in range(most):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
    return bool(level)


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file by name, from its header alone. The library checks that the
    header fits the file's size.

    Raises:
        FileNotFoundError: there is no such file.
        UnsafeFile: what `check_weights` refuses.
        SafetensorError: the file is truncated, or its header damaged or too large.
    """
    check_weights(path)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if length > _MAX_HEADER_BYTES:
        raise SafetensorError(
            f"its header has {length:,} bytes, and at most {_MAX_HEADER_BYTES:,} are read"
        )
    with safe_open(path, "pt") as file:
        parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {
            name: StoredTensor(part.get_dtype(), tuple(part.get_shape()))
            for name, part in parts.items()
        }


def build_config(kind: type[_Config], values: object, where: str | Path) -> _Config:
    """A configuration from saved values, nested ones too. Unknown keys and values of another type
    are refused; the configuration checks its own ranges.

    Args:
        where: the file that they are from, for messages.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{where}: {kind.__name__} is {_shown(values)}; it must be a JSON object")
    known = {f.name for f in fields(kind)}  # type: ignore[arg-type]
    if unknown := sorted(map(str, set(values) - known)):
        raise ValueError(
            f"{where} has unknown keys {unknown[:5]} for {kind.__name__}; copy it again, or use "
            "the version that wrote it"
        )
    hints = get_type_hints(kind)
    given = {
        name: convert(value, hints[name], f"{where}: {kind.__name__}.{name}")
        for name, value in values.items()
    }
    try:
        return kind(**given)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ValueError(f"{where}: {error}") from error


def convert(value: object, hint: Any, name: str) -> Any:
    """A saved value as the type that a field has; ValueError for one of another type, a number that
    is not finite or too large, or a list that is too long.

    Args:
        hint: the type, of those that configurations use.
    """
    origin = get_origin(hint)
    inner = get_args(hint)
    if is_dataclass(hint):
        return value if isinstance(value, hint) else build_config(hint, value, name)  # type: ignore[arg-type]
    if origin in (Union, UnionType):
        if value is None and NoneType in inner:
            return None
        # Of several types, that of the value, a number or a list.
        is_list = isinstance(value, list | tuple)
        options = [part for part in inner if part is not NoneType]
        alike = [part for part in options if (get_origin(part) in (list, tuple)) == is_list]
        return convert(value, (alike or options)[0], name)
    if origin in (list, tuple) and isinstance(value, list | tuple):
        repeated = origin is list or inner[-1] is Ellipsis
        if len(value) <= _MAX_ITEMS and (repeated or len(value) == len(inner)):
            hints = [inner[0]] * len(value) if repeated else inner
            return origin(
                convert(item, part, f"{name}[{i}]")
                for i, (item, part) in enumerate(zip(value, hints, strict=True))
            )
    elif _fits(value, hint):
        return value
    raise ValueError(f"{name} is {_shown(value)}; it must be {_needed(hint)}")


def _needed(hint: Any) -> str:
    """What a value of a type is, for messages."""
    inner = get_args(hint)
    match get_origin(hint) or hint:
        case builtins.int:
            return f"a whole number of at most {_MAX_NUMBER:,}"
        case builtins.float:
            return "a finite number"
        case builtins.bool:
            return "true or false"
        case builtins.str:
            return "a text"
        case builtins.dict:
            return "a JSON object"
        case builtins.list | builtins.tuple:
            count = "" if Ellipsis in inner or len(inner) < 2 else f"{len(inner)} values, "
            return f"a list: {count}each {_needed(inner[0])}"
        case _:
            return "one of " + ", ".join(map(str, inner))


def _fits(value: object, hint: Any) -> bool:
    origin = get_origin(hint)
    if hint is Any:
        return True
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in get_args(hint))
    if isinstance(value, bool):  # which Python counts among the whole numbers
        return hint is bool
    if hint is float:
        return isinstance(value, int | float) and abs(value) <= _MAX_FLOAT
    if hint is int:
        return isinstance(value, int) and abs(value) <= _MAX_NUMBER
    return isinstance(value, origin or hint)


def _shown(value: object) -> str:
    """A value in a message: short, and on one line."""
    if isinstance(value, dict | list):
        return f"a {'JSON object' if isinstance(value, dict) else 'list'} of {len(value)}"
    if isinstance(value, int) and abs(value) > _MAX_NUMBER:
        return f"about 2^{math.floor(math.log2(abs(value)))}"
    return repr(value)[:60]
