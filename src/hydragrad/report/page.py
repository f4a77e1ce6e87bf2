"""From content to HTML: one file that needs nothing else, everything in it escaped."""

from pathlib import Path
from typing import Any

import hydragrad
from hydragrad.errors import UnsupportedError, message
from hydragrad.report.content import Page

_TEMPLATES = Path(__file__).parent / "templates"


def render(page: Page) -> str:
    """The HTML of a page; raises UnsupportedError without jinja2."""
    try:
        import jinja2
    except ImportError as error:
        raise UnsupportedError(
            message("a report needs jinja2, which is not installed", remedy="pip install 'hydragrad[report]'")
        ) from error
    environment: Any = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,  # labels and texts are anybody's
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style = (_TEMPLATES / "style.css").read_text(encoding="utf-8")
    return environment.get_template("page.html").render(page=page, style=style, version=hydragrad.__version__)
