"""Control characters of names and captions, on their way to a terminal."""

from __future__ import annotations

import json

import pytest

from pipeline.runtime.printable import escaped, printable

CONTROL = [
    *map(chr, range(9)),
    *map(chr, range(11, 32)),
    *map(chr, range(127, 160)),
    *"\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u2028\u2029",
]


def test_every_control_character_is_escaped():
    for character in CONTROL:
        text = escaped(f"a{character}b")
        assert text == f"a\\u{ord(character):04x}b" and text.isprintable(), repr(character)


def test_other_text_stays_as_it_is():
    text = "gr\u00fcn \u8d64 \U0001f31e caf\u00e9\tone\ntwo \\u001b \u200d"
    assert escaped(text) == text


def test_json_stays_json():
    text = json.dumps({"name": "a\x85\u2028b\u202e"}, ensure_ascii=False)
    assert json.loads(escaped(text)) == {"name": "a\x85\u2028b\u202e"}


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("a\nwrote everything", "a\\nwrote everything"),
        ("a\tb\rc", "a\tb\\u000dc"),
        ("a\udcffb", "a\\udcffb"),
        ("x" * 300, "x" * 200 + "..."),
    ],
)
def test_names_fit_on_one_line(name, line):
    assert printable(name) == line
