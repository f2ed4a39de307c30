"""Options of a command, from the signature and the docstring of its function. Imports nothing
heavy.

jsonargparse, which reads the settings of an experiment, does not do this as well: it refuses
`generate "a" "b"` and a plain `--truncate`, and describes no option without one more package.
"""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Callable, Sequence
from functools import partial
from types import NoneType, UnionType
from typing import (
    TYPE_CHECKING,
    Any,
    Literal,
    NoReturn,
    ParamSpec,
    TypeVar,
    Union,
    Unpack,
    get_args,
    get_origin,
    get_type_hints,
)

from pipeline.config.option_names import spelled

if TYPE_CHECKING:
    from pipeline.config.experiment import Experiment

P = ParamSpec("P")
T = TypeVar("T")

LogLevel = Literal["debug", "info", "warning", "error"]

_SHOWN = {"int": "N", "float": "X", "str": "TEXT", "Path": "PATH", "bool": "{true,false}"}
"""Types in the help."""


class UsageError(Exception):
    """The command line itself is wrong."""


def as_usage(load: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What `load` returns; what it finds wrong with the settings is wrong usage."""
    try:
        return load(*args, **kwargs)
    except ValueError as error:
        raise UsageError(str(error)) from error


def check_at_least(option: str, value: int, least: int) -> None:
    """Raises UsageError where an option's value is below `least`."""
    if value < least:
        raise UsageError(f"{option} is {value}; it must be at least {least}")


def parse_experiment(settings: Sequence[str]) -> Experiment:
    from pipeline.config.load import load_experiment

    return as_usage(load_experiment, settings)


def parse_options(
    name: str, function: Callable[..., object], arguments: Sequence[str]
) -> dict[str, Any]:
    """The arguments to call a command's function with, and `log_level`, `traceback` and
    `offline`.

    Parameters in front of `*` take any number of positional arguments, all others are options. An
    option of type `tuple[T, ...]` takes one value or more. The `Args` of the docstring describe
    them. `**more: Unpack[D]` adds the keys of the typed dictionary D. `settings` takes what is no
    option, and goes to the settings of an experiment.

    Raises:
        UsageError: the arguments are wrong.
        SystemExit: they ask for help, which was printed.
    """
    parser = _Parser(prog=f"minidalle {name}", allow_abbrev=False)
    parser.description = (inspect.getdoc(function) or "").partition("\n\nArgs:")[0]
    _add_options(parser, function)
    _add_options(parser, _every_command)
    given = spelled(arguments, "-")
    own = inspect.signature(function).parameters
    if "settings" in own:
        needed = [
            f"--{key} {key.upper()}"
            for key, parameter in own.items()
            if key != "settings" and parameter.default is inspect.Parameter.empty
        ]
        given_by = " ".join(needed or ["--config FILE"])
        parser.usage = f"{parser.prog} [options] {given_by} [--key.path VALUE ...]"
        if not {"-h", "--help"}.isdisjoint(given):
            _add_settings(parser)
        options, settings = parser.parse_known_args(given)
        return vars(options) | {"settings": settings}
    options = parser.parse_args(given)
    several = {key: tuple(one) for key, one in vars(options).items() if isinstance(one, list)}
    return vars(options) | several


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        text = message.removeprefix("argument ")
        if ": is " in text:  # what `_choice` says
            raise UsageError(text.replace(": is ", " is ", 1))
        raise UsageError(f"{text}; see {self.prog} --help")


def _every_command(
    *, log_level: LogLevel = "info", traceback: bool = False, offline: bool = False
) -> None:
    """Options of every command.

    Args:
        log_level: least severe messages to show; above info, progress bars are hidden, too
        traceback: show where in the code an error arose
        offline: make no network call; what needs one is refused, as by HF_HUB_OFFLINE=1
    """


def _add_options(parser: argparse.ArgumentParser, source: Callable[..., object]) -> None:
    """Adds an option for each parameter of a function, or key of a typed dictionary."""
    arguments = r"(?m)^    (\w+): (.*(?:\n {8}.*)*)"
    descriptions = dict(re.findall(arguments, inspect.getdoc(source) or ""))
    parameters = {} if isinstance(source, type) else inspect.signature(source).parameters
    for name, hint in get_type_hints(source).items():
        if get_origin(hint) is Unpack:
            _add_options(parser, *get_args(hint))
        if name not in descriptions:  # `settings`, or what is returned
            continue
        given = parameters[name].default if name in parameters else None
        required = given is inspect.Parameter.empty
        default = None if required else given
        shown = f" ({default})" if default or type(default) is int else ""
        text = " ".join(descriptions[name].split()) + shown
        how = _reading(hint) | {"default": default, "help": text.replace("%", "%%")}
        if name in parameters and parameters[name].kind is not inspect.Parameter.KEYWORD_ONLY:
            parser.add_argument(name, **how | {"nargs": "+" if required else "*", "metavar": name})
        else:
            parser.add_argument(f"--{name.replace('_', '-')}", required=required, **how)


def _reading(hint: Any) -> dict[str, Any]:
    """How argparse reads a value of this type."""
    members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    kind, *literals = [one for one in members if one is not NoneType]
    inner = get_args(kind)
    if kind is bool:
        return {"action": "store_true"}
    if get_origin(kind) is tuple and Ellipsis in inner:
        return _reading(inner[0]) | {"nargs": "+"}
    if get_origin(kind) is tuple:
        return _reading(inner[0]) | {"nargs": len(inner)}
    if literals:  # a number, or a word in its place
        words = get_args(literals[0])
        shown = "|".join([_SHOWN[kind.__name__], *words])
        return {"type": partial(_number_or_word, kind, words), "metavar": shown}
    if inner:
        return {"type": partial(_choice, inner), "metavar": f"{{{','.join(inner)}}}"}
    return {"type": kind, "metavar": _SHOWN[kind.__name__]}


def _choice(choices: Sequence[str], text: str) -> str:
    if text not in choices:
        raise argparse.ArgumentTypeError(f"is {text!r}; choose one of: {', '.join(choices)}")
    return text


def _number_or_word(number: type[int], words: Sequence[str], text: str) -> int | str:
    if text in words:
        return text
    try:
        return number(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"is {text!r}; give a number or {' or '.join(words)}"
        ) from None


def _add_settings(parser: argparse.ArgumentParser) -> None:
    """Lists the settings in the help."""
    from pipeline.config.describe import all_settings

    about = "from --config FILE, a YAML as in configs/, or one by one; --print-config shows all"
    group = parser.add_argument_group("settings", about)
    for setting in all_settings():
        kind = setting.kind.removesuffix(" | None")
        default = f" ({setting.default})" if setting.default not in ("", "None") else ""
        group.add_argument(
            f"--{setting.name.replace('_', '-')}",
            metavar=_SHOWN.get(kind, re.sub("[ ']", "", kind)),
            help=(setting.description + default).replace("%", "%%"),
        )
