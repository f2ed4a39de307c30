"""Small sets of icons, as Iconify JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path


def body(colour: str, x: int = 0) -> str:
    """A square of a colour, the rest transparent."""
    return f'<rect x="{x}" width="4" height="4" fill="{colour}"/>'


def write_set(
    folder: Path,
    prefix: str,
    icons: Mapping[str, str],
    chars: Mapping[str, str] | None = None,
    *,
    licence: str | None = "MIT",
    **more: object,
) -> Path:
    """An unpacked set: SVG bodies by name, and names by code points."""
    path = folder / prefix
    path.mkdir(parents=True)
    content = {
        "prefix": prefix,
        "width": 8,
        "height": 8,
        "icons": {name: {"body": own} for name, own in icons.items()},
        **more,
    }
    (path / "icons.json").write_text(json.dumps(content))
    (path / "chars.json").write_text(json.dumps(chars or {}))
    info = {"license": {"spdx": licence}} if licence else {}
    (path / "info.json").write_text(json.dumps({**info, "author": {"name": "A. Painter"}}))
    return path


def write_names(folder: Path, names: Mapping[str, str]) -> Path:
    """English names by emoji, as the CLDR has them."""
    path = folder / "annotations" / "en.xml"
    path.parent.mkdir(parents=True)
    entries = "".join(
        f'<annotation cp="{text}" type="tts">{name}</annotation>' for text, name in names.items()
    )
    path.write_text(f"<ldml><annotations>{entries}</annotations></ldml>")
    return folder


def write_styles(folder: Path, styles: int = 2, names: int = 40) -> list[str]:
    """Sets of the same names in several styles: squares of a colour per name, at a place per style.
    Returns the names of the sets."""
    prefixes = [f"style{style}" for style in range(styles)]
    for style, prefix in enumerate(prefixes):
        icons = {
            f"thing-{i}": body(f"#{i * 6:02x}40{255 - i * 6:02x}", style) for i in range(names)
        }
        chars = {f"{0x1F400 + i:x}": f"thing-{i}" for i in range(names)}
        write_set(folder, prefix, icons, chars)
    return prefixes
