"""Renders self-contained HTML pages: one style for all, pictures and charts inside the file, every text escaped.

A template extends `base.html.j2` and fills its blocks `title` and `body` (and `style`, for what only it needs).
"""

from __future__ import annotations

import base64
import io
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from PIL import Image


def page_environment(package: str) -> Environment:
    """Return the environment that renders a package's templates; texts are escaped unless marked as safe.

    Args:
        package: Dotted name of the package in whose folder the templates lie.
    """
    return Environment(
        loader=ChoiceLoader([PackageLoader(package, "."), PackageLoader("cloc_mllm.pages", ".")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=False,
    )


def render_page(package: str, template: str, **values: Any) -> str:
    """Render one template of a package; see :func:`page_environment`."""
    return page_environment(package).get_template(template).render(**values)


def data_uri(picture: Image.Image, *, photograph: bool = False) -> str:
    """Return a picture as the text an `<img>` takes.

    Args:
        picture: Any mode.
        photograph: Store it as JPEG, which is a fraction of the size where colours are many.
    """
    buffer = io.BytesIO()
    if photograph:
        picture.convert("RGB").save(buffer, format="JPEG", quality=82)
    else:
        picture.convert("RGB").quantize(256).save(buffer, format="PNG", optimize=True)
    kind = "jpeg" if photograph else "png"
    return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
