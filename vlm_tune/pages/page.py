"""A page of `check` or `inspect`: one HTML file, no scripts, nothing from the network, all text of the data escaped."""

import base64
import html
import io
import re
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from PIL import Image

from vlm_tune import __version__


def write_page(path: Path, verb: str, blocks: dict[str, str]) -> None:
    """Write a page; `blocks` are the heading as text, and `facts` and `main` as HTML."""
    files = resources.files("vlm_tune.pages")
    css = "\n".join(files.joinpath(name).read_text(encoding="utf-8") for name in ("page.css", f"{verb}.css"))
    page = Template(files.joinpath("page.html").read_text(encoding="utf-8")).substitute(
        title=f"{escape(blocks['heading'])} · {verb}",
        eyebrow=f"vlm_tune {verb}",
        heading=escape(blocks["heading"]),
        facts=blocks["facts"],
        main=blocks["main"],
        css=css,
        footer=f"Written by vlm_tune {__version__}. {escape(blocks.get('footer', ''))}",
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8", errors="replace")  # half a surrogate pair of the data has no UTF-8


def data_name(path: Path) -> str:
    """Name a data file in the name of its report, together with its folder: most are called train.jsonl."""
    return "_".join(re.findall(r"\w+", f"{path.resolve().parent.name} {path.name.partition('.')[0]}"))


def escape(value: Any) -> str:
    """Make text of the data harmless in HTML, in attributes too."""
    return html.escape(str(value), quote=True)


def picture_url(picture: Image.Image, side: int) -> str:
    """Put a picture into the page, made smaller where a side has more than `side` pixels."""
    small = picture.copy()
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    with io.BytesIO() as file:
        small.save(file, "JPEG", quality=85, optimize=True)
        content = base64.b64encode(file.getvalue()).decode("ascii")
    return f"data:image/jpeg;base64,{content}"


def fact_list(items: Iterable[str]) -> str:
    """List short facts below the title."""
    return '<ul class="facts">' + "".join(f"<li>{escape(item)}</li>" for item in items) + "</ul>"


def tile(label: str, value: str, note: str = "", kind: str = "") -> str:
    """Return one headline number."""
    below = f'<dd class="note">{escape(note)}</dd>' if note else ""
    return f'<dl class="tile {kind}"><dt>{escape(label)}</dt><dd>{escape(value)}</dd>{below}</dl>'


def tiles(all_tiles: Iterable[str]) -> str:
    """Put headline numbers side by side."""
    return f'<section class="tiles">{"".join(all_tiles)}</section>'


def section(title: str, content: str, note: str = "") -> str:
    """Return a part of the page, `content` as HTML; nothing for one without content."""
    below = f'<p class="quiet below">{escape(note)}</p>' if note else ""
    return f"<section><h2>{escape(title)}</h2>{content}{below}</section>" if content else ""


def panel(content: str, kind: str = "") -> str:
    """Put HTML on paper."""
    return f'<div class="panel {kind}">{content}</div>' if content else ""


def table(head: list[str], rows: Iterable[Iterable[str]], numbers: tuple[int, ...] = ()) -> str:
    """Return a table whose cells are HTML; `numbers` are the columns to align as numbers."""

    def cell(kind: str, column: int, content: str) -> str:
        classes = ' class="number"' if column in numbers else ""
        return f"<{kind}{classes}>{content}</{kind}>"

    top = "".join(cell("th", column, escape(name)) for column, name in enumerate(head))
    lines = ("".join(cell("td", column, content) for column, content in enumerate(row)) for row in rows)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="wide-scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def pairs(named: dict[str, str]) -> str:
    """Return a table of names and values."""
    body = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in named.items())
    return f'<table class="pairs"><tbody>{body}</tbody></table>'
