"""HTML pages that stand alone: a jinja2 template, and images within the page. Knows no report."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

CONTENT_SECURITY_POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; "
    "form-action 'none'"
)
"""What a page may load and run: images within it and its own styles. Browsers run no script on it,
whatever a name or a caption holds."""


def render(template: Path, **values: object) -> str:
    """The page that a template file makes of these values. Every value is escaped. The template
    takes `content_security_policy` for its meta tag."""
    environment = Environment(
        loader=FileSystemLoader(template.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["content_security_policy"] = Markup(CONTENT_SECURITY_POLICY)
    return environment.get_template(template.name).render(values) + "\n"


def data_uri(image: Image.Image, **options: int) -> str:
    """An image as a `data:` URI: JPEG where `quality` is given, PNG otherwise."""
    format = "JPEG" if "quality" in options else "PNG"
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return f"data:image/{format.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
