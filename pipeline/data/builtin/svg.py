"""SVG drawings as pixels with transparency, by resvg. Knows no names and no files.

Drawings come from others. One that needs a file or an address, that holds a script, or that unfolds
into very many shapes is refused before it is rendered: resvg opens local files that `href` names,
and overflows its stack where elements are nested too deeply. Style sheets, huge numbers and more
can still crash it or keep it busy, so drawings of others are rendered by svg_process.py.
"""

from __future__ import annotations

import importlib.util
import io
import re
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np
from PIL import Image

MAX_BYTES = 2**20
"""Of a drawing's text."""
MAX_SHAPES = 20_000
"""Elements of a drawing, those that `use` repeats counted each time."""
_MAX_STYLE = 10_000
"""Letters of all style sheets of a drawing; each rule is compared with each element."""
RENDER_VERSION = 3
"""Raised with each change of what is refused or drawn, so that images are rendered again."""
MAX_ASPECT = 20
"""Longer side per shorter side."""
_PIXELS = {"pt": 4 / 3, "pc": 16.0, "in": 96.0, "cm": 96 / 2.54, "mm": 96 / 25.4}
"""Pixels per unit of length."""
_LENGTH = re.compile(r"([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*([a-z%]*)")
_MAX_DEPTH = 100
_REFUSED = {
    "script": "remove it",
    "foreignObject": "remove it",
    "animate": "remove it",
    "set": "remove it",
    "image": "draw it as paths",
    "feImage": "draw it as paths",
    "text": "convert it to paths",
    "marker": "convert it to paths",
    "pattern": "convert it to paths",
    "feTurbulence": "remove it",
    "feConvolveMatrix": "remove it",
}
"""Elements that run, load, move, need a font of this machine, or can take hours or all memory; and
what to do."""
_NAMED = re.compile(r"url\(\s*['\"]?\s*#([^)'\"]+)")
"""An element that a property names."""
_ADDRESS = re.compile(r"url\(\s*['\"]?(?!\s*['\"]?#)|@import|expression\(", re.IGNORECASE)


class UnusableSvg(ValueError):
    """A drawing that is not rendered. The message says why."""


def render(svg: str, size: int) -> np.ndarray:
    """A drawing, centred in a square.

    Args:
        size: side of the image in pixels.

    Returns:
        (S,S,4) uint8: red, green, blue and alpha, not premultiplied.

    Raises:
        UnusableSvg: it is no SVG, or one that is not safe to render.
        ModuleNotFoundError: resvg-py is not installed; says how to install it.
    """
    wide = _aspect(check_svg(svg)) > 1
    try:
        # The longer side is given, since resvg makes the other as long as the drawing has it.
        image = _drawn(svg, width=size) if wide else _drawn(svg, height=size)
    except BaseException as error:
        # A fault of resvg is no Exception, so that nobody passes over it by chance.
        known = isinstance(error, ValueError | Image.DecompressionBombError)
        if not known and type(error).__name__ != "PanicException":
            raise
        raise UnusableSvg(f"it cannot be rendered by resvg ({error})") from error
    if max(image.size) > size:
        raise UnusableSvg(f"it was drawn at {image.width}x{image.height} pixels; add a viewBox")
    canvas = Image.new("RGBA", (size, size))
    canvas.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
    pixels = np.asarray(canvas)
    if not pixels[..., 3].any():
        raise UnusableSvg("it has nothing that can be seen")
    return pixels


def require_renderer() -> None:
    """Raises ModuleNotFoundError where resvg-py is not installed; says how to install it."""
    if importlib.util.find_spec("resvg_py") is None:
        raise ModuleNotFoundError(
            "drawings in SVG need the package resvg-py; pip install 'mini-dalle[icons]'"
        )


def _aspect(root: ElementTree.Element) -> float:
    """Width per height of a drawing, as resvg reads them.

    Raises:
        UnusableSvg: one side is very much longer than the other, a size is no number, or there is
            none: resvg would take the size of what is drawn.
    """
    box = root.get("viewBox")
    given = [(root.get(name) or "").strip() for name in ("width", "height")]
    given = ["" if length == "auto" else length for length in given]
    sides = ["100", "100"]
    if box is not None:
        sides = re.split(r"[\s,]+", box.strip())[2:]
        if len(sides) != 2:
            raise UnusableSvg(f"its viewBox {box[:40]!r} is not four numbers")
        if not all(given):  # a side that is not given follows from the view box
            given = ["100%", "100%"]
    elif any(not length or length.endswith("%") for length in given):
        raise UnusableSvg("it has no size; add a viewBox, or width and height")
    width, height = map(_pixels, given, sides)
    if not (0 < width < MAX_ASPECT * height and 0 < height < MAX_ASPECT * width):
        raise UnusableSvg(
            f"it has {width:g}x{height:g} pixels, and one side may have at most {MAX_ASPECT} times "
            "the other"
        )
    return width / height


def _pixels(length: str, side: str) -> float:
    """A length in pixels, given the side of the view box that it may be a part of."""
    found = _LENGTH.fullmatch(length.strip())
    whole = _LENGTH.fullmatch(side)
    if found is None or whole is None:
        raise UnusableSvg(f"its size {(length if found is None else side)[:20]!r} is no length")
    number = float(found[1])
    return number * float(whole[1]) / 100 if found[2] == "%" else number * _PIXELS.get(found[2], 1)


def _drawn(svg: str, width: int | None = None, height: int | None = None) -> Image.Image:
    require_renderer()
    import resvg_py

    # Without dots per inch it refuses sizes in millimetres and the like.
    png = resvg_py.svg_to_bytes(
        svg_string=svg, width=width, height=height, dpi=96, skip_system_fonts=True
    )
    return Image.open(io.BytesIO(png)).convert("RGBA")


def check_svg(svg: str) -> ElementTree.Element:
    """The root of a drawing. Raises UnusableSvg where it could read files, load addresses, run, or
    unfold into very much.

    Only `href="#..."` and `url(#...)` are followed, both within the drawing.
    """
    if len(svg) > MAX_BYTES:
        raise UnusableSvg(f"it has {len(svg):,} characters, and at most {MAX_BYTES:,} are read")
    if "<!DOCTYPE" in svg or "<!ENTITY" in svg:
        raise UnusableSvg("it has a document type, <!DOCTYPE ...>; save it without")
    try:
        root = ElementTree.fromstring(svg)
    except ElementTree.ParseError as error:
        raise UnusableSvg(f"it is no XML ({error})") from error
    if _local(root.tag) != "svg":
        raise UnusableSvg(f"it begins with <{_local(root.tag)}> and must begin with <svg>")
    by_id: dict[str, list[ElementTree.Element]] = {}
    letters = 0
    for element in root.iter():
        if (tag := _local(element.tag)) in _REFUSED:
            raise UnusableSvg(f"it has an element <{tag}>, which is not rendered; {_REFUSED[tag]}")
        if tag == "style":
            letters += len("".join(element.itertext()))
            if letters > _MAX_STYLE:
                raise UnusableSvg(f"it has style sheets of more than {_MAX_STYLE:,} letters")
        for attribute, value in element.attrib.items():
            _check_attribute(_local(attribute), value)
            if _local(attribute) == "id":  # xml:id, too
                by_id.setdefault(value.strip(), []).append(element)
        if _ADDRESS.search(element.text or ""):
            raise UnusableSvg("its style loads an address")
    if _Unfolding(by_id).measure(root, 0).shapes > MAX_SHAPES:
        raise UnusableSvg(f"it unfolds into more than {MAX_SHAPES:,} shapes")
    return root


def _check_attribute(name: str, value: str) -> None:
    if re.fullmatch("on[a-z]+", name):
        raise UnusableSvg(f"its attribute {name} would run a script")
    if name == "href" and not value.startswith("#"):
        raise UnusableSvg(
            f"it refers to {value[:60]!r}, and only references within it are followed"
        )
    if _ADDRESS.search(value):
        raise UnusableSvg(f"its attribute {name} loads an address")


class _Size(NamedTuple):
    """Of one element's drawing."""

    shapes: int
    """At most slightly more than MAX_SHAPES."""
    height: int
    """Elements that are nested in it."""


class _Unfolding:
    """Measures elements as `use` repeats them; nested repetition multiplies.

    Args:
        by_id: elements by their names; where several have one, each counts.
    """

    def __init__(self, by_id: dict[str, list[ElementTree.Element]]) -> None:
        self._by_id = by_id
        self._sizes: dict[ElementTree.Element, _Size] = {}

    def measure(self, element: ElementTree.Element, depth: int) -> _Size:
        """The size of an element that is nested so deep."""
        known = self._sizes.get(element)
        if depth + (known.height if known else 0) > _MAX_DEPTH:
            raise UnusableSvg(f"its elements are nested more than {_MAX_DEPTH} deep")
        if known:
            return known
        shapes = 1
        height = 0
        for child in [*element, *self._referenced(element)]:
            below = self.measure(child, depth + 1)
            shapes += below.shapes
            height = max(height, below.height + 1)
            if shapes > MAX_SHAPES:
                break
        self._sizes[element] = _Size(shapes, height)
        return self._sizes[element]

    def _referenced(self, element: ElementTree.Element) -> list[ElementTree.Element]:
        """What an element draws by reference."""
        names = [value[1:] for name, value in element.attrib.items() if _local(name) == "href"]
        names += _NAMED.findall(" ".join(element.attrib.values()))
        return [each for name in names for each in self._by_id.get(name.strip(), [])]


def _local(name: object) -> str:
    """A name without its namespace; comments have none."""
    return name.rpartition("}")[2] if isinstance(name, str) else ""
