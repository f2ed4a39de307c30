"""The model card of a bundle: README.md, from what the bundle records. Knows texts; reads no file
but its template, and judges nothing."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.inference.known_prompts import KnownPrompts
from pipeline.runtime.printable import printable

FILE = "README.md"
_START = "<!-- metrics -->"
_END = "<!-- end of metrics -->"
_NONE = "Not evaluated yet. `minidalle evaluate --config FILE` writes its results here."


def model_card(
    description: Mapping[str, Any], known: KnownPrompts | None, parts: Mapping[str, Any]
) -> str:
    """The card, in Markdown.

    Args:
        description: what `pipeline.json` holds.
        parts: sizes of both models, by the names in the template.
    """
    # Here, since a bundle that is read needs neither.
    import yaml
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    template = Path(__file__).with_suffix(".md")
    environment = Environment(
        loader=FileSystemLoader(template.parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["cell"] = _cell
    environment.filters["address"] = _address
    environment.filters["shell"] = shlex.quote
    environment.filters["python"] = partial(json.dumps, ensure_ascii=False)
    trained_on = description["trained_on"]
    sampling = {name: one for name, one in description["sampling"].items() if one is not None}
    configuration = _without_folders(trained_on.get("configuration"))
    return environment.get_template(template.name).render(
        parts,
        name=printable(str(trained_on.get("experiment", "A bundle"))),
        example=_example(known),
        sampling=", ".join(f"{name} {one}" for name, one in sampling.items()),
        source=printable(
            _without_folders(str(trained_on.get("data", {}).get("source", "unknown")))
        ),
        trained=trained_on.get("num_images", {}).get("train"),
        repeats=trained_on.get("data", {}).get("icons", {}).get("untoned_repeats", 1) > 1,
        known=known,
        licences=trained_on.get("licences", []),
        configuration=yaml.safe_dump(configuration, sort_keys=False) if configuration else None,
        started_from=_started_from(_without_folders(trained_on.get("started_from", {}))),
        metrics=_between_marks(_NONE),
        fingerprints={
            part: description[f"{part}_fingerprint"]
            for part in ("tokenizer", "prior", "text_tokenizer")
        },
    )


def with_metrics(card: str, evaluation: Mapping[str, Any]) -> str:
    """A card with the results of an evaluation in the place of earlier ones; the rest stays. A card
    without that place stays as it is.

    Args:
        evaluation: what `evaluate` writes: numbers by name, `intervals` and `settings`.
    """
    intervals = evaluation.get("intervals", {})
    lines = ["| metric | value | 95% interval | images |", "|---|---|---|---|"]
    for name, value in evaluation.items():
        if not isinstance(value, int | float):
            continue
        low, high, count = intervals.get(name, (None, None, None))
        bounds = f"{low:.4g} to {high:.4g}" if low is not None else ""
        lines.append(f"| {_cell(name)} | {value:.4g} | {bounds} | {count or ''} |")
    images = evaluation.get("settings", {}).get("images")
    lines += ["", f"Measured by `minidalle evaluate` on {images} held-out images."]
    section = _between_marks("\n".join(lines))
    return re.sub(rf"{_START}.*?{_END}", lambda _: section, card, flags=re.DOTALL)


def _between_marks(text: str) -> str:
    return f"{_START}\n{text}\n{_END}"


def _example(known: KnownPrompts | None) -> str:
    """A prompt of the bundle's own words."""
    if known is None or not (known.names and known.styles):
        return "..."
    name = "red heart" if "red heart" in known.names else known.names[0]
    return printable(f"{name}, {known.styles[-1]} style")


def _started_from(parents: Mapping[str, Any]) -> str:
    """The fingerprints of what each stage started from; a prior's vocabulary has its own."""
    parts: dict[str, Any] = {}
    for stage, parent in parents.items():
        parts |= parent if isinstance(parent, Mapping) else {stage: parent}
    return ", ".join(f"{part} from `{parent}`" for part, parent in parts.items() if parent)


def _without_folders(value: Any) -> Any:
    """Settings whose absolute paths are their last parts alone: a card is made to be shown to
    others, who have no use for the folders of the machine that trained."""
    if isinstance(value, Mapping):
        return {key: _without_folders(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_without_folders(one) for one in value]
    if isinstance(value, str) and Path(value).is_absolute():
        return Path(value).name or value
    return value


def _address(url: str | None) -> str:
    """An address behind what it belongs to; nothing where there is none."""
    return f", {_cell(url)}" if url else ""


def _cell(text: str | None) -> str:
    """A text of the data in a table: on one line, and no HTML."""
    plain = printable(text or "")
    for letter, written in (("&", "&amp;"), ("<", "&lt;"), ("|", "&#124;")):
        plain = plain.replace(letter, written)
    return plain
