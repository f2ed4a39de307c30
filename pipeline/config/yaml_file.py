"""YAML as settings are written in it, or what is wrong with it. Knows no settings.

A short YAML can stand for endless values: aliases repeat what they name, and may name themselves.
"""

from __future__ import annotations

from pathlib import Path

MAX_BYTES = 2**20
"""Of a file of settings."""
MAX_VALUES = 100_000
"""Of a file of settings, with those that aliases repeat."""
MAX_DEPTH = 50
"""Sections and lists inside each other."""


def read_yaml(path: Path) -> object:
    """The value that a YAML file holds: text, numbers, lists, and sections with names.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no regular file, too large, no YAML in UTF-8, or holds other values; says
            where.
    """
    if not path.is_file():
        if path.exists():
            raise ValueError(f"{path} is no regular file; give a file of settings in YAML")
        raise FileNotFoundError(
            f"there is no configuration file {path}; give another path (the shipped ones are in "
            "configs/)"
        )
    if (size := path.stat().st_size) > MAX_BYTES:
        raise ValueError(
            f"{path} has {size:,} bytes, and a file of settings has at most {MAX_BYTES:,}; give a "
            "file of settings in YAML"
        )
    try:
        return parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        why = " ".join(str(error).split())[:300]
        raise ValueError(f"{path} is not readable YAML: {why}; correct it there") from error


def parse_yaml(text: str) -> object:
    """The value of a YAML text, as `read_yaml`. Raises ValueError."""
    import yaml

    try:
        value: object = yaml.safe_load(text)
    except RecursionError:
        raise _too_deep() from None
    # Dates that no calendar has, and more than 4,300 digits, raise ValueError; odd keys the others.
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, LookupError) as error:
        raise ValueError(" ".join(str(error).split())) from error
    _check(value)
    return value


def _check(value: object) -> None:
    """Raises ValueError where a value is none of settings."""
    count = 0
    left: list[tuple[str, object, int]] = [("the file", value, 0)]
    while left:
        where, one, depth = left.pop()
        count += 1
        if depth > MAX_DEPTH:
            raise _too_deep()
        if isinstance(one, dict):
            for key in one:
                if not isinstance(key, str | int | float):
                    raise ValueError(f"{where} has the name {key!r}; name settings by text")
                if not str(key).isprintable():
                    raise ValueError(f"{where} has the name {key!a}; name settings by words")
            left += [(str(key), inner, depth + 1) for key, inner in one.items()]
        elif isinstance(one, list):
            left += [(where, inner, depth + 1) for inner in one]
        elif not isinstance(one, str | int | float | None):
            raise ValueError(
                f"{where} is a {type(one).__name__} ({one!s:.40}); put it in quotes if it is text"
            )
        if count + len(left) > MAX_VALUES:
            raise ValueError(f"it holds more than {MAX_VALUES:,} values; write it without aliases")


def _too_deep() -> ValueError:
    return ValueError(
        f"sections and lists are more than {MAX_DEPTH} deep in each other; write fewer"
    )
