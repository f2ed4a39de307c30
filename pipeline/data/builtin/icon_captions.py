"""Captions of icons: a name and a style, in the wordings that training reads. Imports nothing."""

from __future__ import annotations


def styled_captions(name: str, style: str) -> list[str]:
    """Wordings of one drawing that name its style. The first is the one that metrics ask for."""
    article = "an" if name[:1].lower() in "aeiou" else "a"
    return [
        f"{name}, {style} style",
        f"{article} {name}, {style} style",
        f"{style} {name}",
        f"{article} {name} in {style} style",
    ]


def captions_of_icon(name: str, style: str) -> list[str]:
    """Wordings of one drawing, each as often as training reads it: the name alone, which leaves the
    style open, is one in 33."""
    return [*styled_captions(name, style) * 8, name]
