"""Write a page: one HTML file from a template, no scripts but the one of watch, no network, all data escaped."""

import base64
import io
import re
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from vlm_tune import __version__, words

FOLDER = Path(__file__).parent


def write_page(path: Path, template: str, **values: Any) -> None:
    """Write a page from its template in this folder; `values` are what the template names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(template, **values), encoding="utf-8", errors="replace")  # half a surrogate has no UTF-8


def render(template: str, **values: Any) -> str:
    """Fill a template: values are escaped, and a value that it names but was not given is an error."""
    return templates().get_template(template).render(values)


@cache
def templates() -> Environment:
    """Open the templates of this folder, with the functions that format their values."""
    found = Environment(
        loader=PackageLoader("vlm_tune", "pages"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    named = (picture_url, words.date, words.duration, words.loss, words.number, words.percent, words.rate)
    found.filters |= {function.__name__: function for function in named}
    found.globals["version"] = __version__
    return found


def picture_url(picture: Image.Image, quality: int = 85) -> str:
    """Return a picture as a data URI, as JPEG."""
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg(picture, quality)).decode('ascii')}"


def jpeg(picture: Image.Image, quality: int) -> bytes:
    """Return a picture as JPEG."""
    with io.BytesIO() as file:
        picture.save(file, "JPEG", quality=quality, optimize=True)
        return file.getvalue()


def data_name(path: Path) -> str:
    """Return a data file's name for its report, including its folder: most are called train.jsonl."""
    return "_".join(re.findall(r"\w+", f"{path.resolve().parent.name} {path.name.partition('.')[0]}"))
