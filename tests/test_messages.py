"""What every error, warning and finding of the packages says: what to do, by names that exist."""

from __future__ import annotations

import inspect
import re
from functools import cache
from typing import get_args, get_type_hints

import pytest

from pipeline.cli.main import COMMANDS
from pipeline.cli.options import parse_options
from pipeline.config.describe import all_settings
from tests.helpers.architecture import ROOT
from tests.helpers.messages import Message, messages

ORDERS = """add ask build call change check choose close compare compress continue convert copy
correct crop decompress evaluate fetch fine-tune flatten free give go have install leave lower make
move name pass pip put raise rename repair replace resize resuming restart run sample save say scale
see send set shorten split start take train try unpack unset use wait write"""
REMEDY = re.compile(
    r"(?:^|[;:,.(?] |\bor |\band |\bto |\bso |\be\.g\. |\binstead )"
    rf"(?:{'|'.join(ORDERS.split())})\b"
    r"|\bmust\b|did you mean|\bneed(?:s|ed)?\b|accepted are|`minidalle|\bbelong in\b|\bat most\b",
    re.IGNORECASE,
)
"""An imperative at the start of a clause, or what is needed."""

FRAGMENT = re.compile(
    r"^(it|its|is|the header|there is no header|an extended header|lists and|there are none|"
    r"the bundle does not describe them)\b"
)
"""Parts that a caller completes with a name in front and a remedy behind."""

NO_REMEDY = {
    "continuing with": "says what is done instead",
    "is restored from": "says what is done instead",
    "held-out images of the stream:": "ends with an error that says what to do",
    "is delivered again": "says what is done instead",
    "take the place of the best": "says what is done instead",
    "chosen from here on alone": "says what is done instead",
    "skipped, {": "says what is done instead",
    "is left out: {": "says what is done instead",
    "the straight ones rounded": "says what is done instead",
    "another process of this job": "the command line adds how to resume",
    "could not be written": "the command line adds how to resume",
    "shards of {split} are complete": "adds a count to a message with a remedy",
    "images are complete in": "adds a count to a message with a remedy",
    "share their caption with another one": "a note of the doctor",
    "no more occur twice": "a note of the doctor",
    "are copies of others": "a note of the doctor, with a remedy where there are many",
    "look like others without": "a note of the doctor",
    "one plain surface": "a note of the doctor",
    "frames the first is used": "a note of the doctor",
    "of a source that goes on": "a note of the doctor",
    "so held-out metrics flatter": "a note of the doctor where the data are drawn",
    "data.tags can shuffle them": "a note of the doctor",
    "has no column": "lists the columns to choose among",
    "(the option size does)": "adds an option to a message with a remedy",
}
"""Messages without a remedy, by what they hold, and why."""

SETTING = re.compile(
    r"(?<![\w./{-])(?:data|tokenizer|prior|encode|text|sampling|sequence|train)(?:\.[a-z_][a-z_0-9]*)+"
)
FILE = re.compile(r"\.(?:json|md|py|yaml|txt|tar|safetensors)$")

OPTIONS_OF_LIBRARY = {
    "--config": "`load_experiment` takes arguments as the command line does",
    "--help": "every command has it",
    "--offline": "named beside HF_HUB_OFFLINE, which is for Python",
    "--sort": "tar's own",
}
"""Options that messages outside of the command line name, and why."""


@cache
def every_message() -> tuple[Message, ...]:
    return tuple(messages())


def plain(text: str) -> str:
    """Without the expressions that are filled in."""
    return re.sub(r"\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\}", "{}", text)


def shown(one: Message) -> str:
    return f"{one.path}:{one.line}: {one.text}"


def test_the_list_holds_messages_of_each_kind():
    kinds = {one.kind for one in every_message()}
    assert {"ValueError", "UsageError", "UnsafeFile", "warning", "problem", "finding"} <= kinds
    texts = [one.text for one in every_message()]
    assert "no image was given; give at least one file" in texts
    assert len(texts) > 600


def test_every_message_says_what_to_do():
    silent = [
        shown(one)
        for one in every_message()
        if one.kind != "part"
        and re.search(r"[a-z]{3}", plain(one.text))
        and not REMEDY.search(plain(one.text))
        and not FRAGMENT.search(one.text)
        and not plain(one.text).endswith("{}")  # another message that is listed, or the end of one
        and not any(known in one.text for known in NO_REMEDY)
    ]
    assert not silent, "\n".join(silent)


@pytest.mark.parametrize("known", NO_REMEDY)
def test_messages_without_a_remedy_are_still_there(known):
    assert any(known in one.text for one in every_message())


def test_settings_in_messages_exist():
    names = {setting.name for setting in all_settings()}
    names |= {
        name[: name.index(".", i)] for name in names for i in range(len(name)) if "." in name[i:]
    }
    names |= {name.partition(".")[2] for name in names if ".train." in name}
    unknown = [
        f"{shown(one)}: {found}"
        for one in every_message()
        for found in SETTING.findall(plain(one.text))
        if found not in names and not FILE.search(found)
    ]
    assert not unknown, "\n".join(unknown)


def test_commands_in_messages_exist():
    named = [
        (command, shown(one))
        for one in every_message()
        for command in re.findall(r"`minidalle ([a-z-]+)", one.text)
    ]
    assert len(named) > 20
    assert not [where for command, where in named if command not in COMMANDS]


def options() -> set[str]:
    """Options of all commands, as they are typed."""
    found = {"--config", "--print-config", "--log-level", "--offline", "--traceback"}
    for command in COMMANDS.values():
        for parameter in inspect.signature(command).parameters.values():
            found.add(parameter.name)
        for hint in get_type_hints(command).values():
            for inner in get_args(hint):
                found |= set(getattr(inner, "__annotations__", {}))
    return {one if one.startswith("--") else f"--{one.replace('_', '-')}" for one in found}


def test_options_in_messages_exist():
    named = [
        (option, one)
        for one in every_message()
        for option in re.findall(r"(?<!\w)--[a-z][\w.-]*\w", plain(one.text))
    ]
    assert any(option == "--mask" for option, _ in named)
    assert not [
        shown(one) for option, one in named if option not in options() | set(OPTIONS_OF_LIBRARY)
    ]


def test_messages_of_the_library_name_no_options_of_the_command_line():
    """A caller in Python gave none: options are named without dashes, as their arguments are."""
    wrong = [
        shown(one)
        for one in every_message()
        if not one.path.startswith("pipeline/cli/")
        for option in re.findall(r"(?<!\w)--[a-z][\w-]*", plain(one.text))
        if option not in OPTIONS_OF_LIBRARY
    ]
    assert not wrong, "\n".join(wrong)


def test_files_in_messages_exist():
    named = [
        (file, shown(one))
        for one in every_message()
        for file in re.findall(r"\b(?:docs|configs)/[\w./-]+\.(?:md|yaml)", one.text)
    ]
    assert len(named) > 5
    assert not [where for file, where in named if not (ROOT / file).is_file()]


def test_python_names_in_messages_exist():
    named = [
        (name, shown(one))
        for one in every_message()
        for name in re.findall(r"stage1_tokenizer\.(\w+)", plain(one.text))
    ]
    assert named
    public = (ROOT / "stage1_tokenizer" / "__init__.py").read_text()
    assert not [where for name, where in named if f'"{name}"' not in public]


def test_messages_are_plain_lines():
    """One line, but for those that show the forms of a captions file."""
    long = [
        shown(one)
        for one in every_message()
        if "\n" in one.text and "accepted are" not in one.text and "{" not in one.text
    ]
    assert not long, "\n".join(long)


def test_nothing_is_deleted_before_other_ways():
    """Deleting is never the first way that a message names."""
    first = re.compile(r"; (?:delete|remove) (?!the section)")
    assert not [shown(one) for one in every_message() if first.search(one.text)]


def test_help_is_reached_as_messages_say():
    with pytest.raises(SystemExit):
        parse_options("run", COMMANDS["run"], ["--help"])
