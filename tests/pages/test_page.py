"""Every page is a template: what it is given is escaped, and what it names and nobody gave is an error."""

import re
from pathlib import Path

import pytest
from jinja2 import UndefinedError

from vlm_tune.pages.page import render, templates

FOLDER = Path(__file__).parents[2] / "vlm_tune" / "pages"
TEMPLATES = [path.name for path in sorted(FOLDER.iterdir()) if path.suffix in (".html", ".svg", ".css")]
PAGES = ("check.html", "inspect.html", "report.html")
HOSTILE = "<script>alert('x')</script>{{ 7 * 7 }}\"'&"


@pytest.mark.parametrize("name", TEMPLATES)
def test_no_template_takes_text_for_markup(name):
    assert not re.search(r"\|\s*safe\b|autoescape|Markup", (FOLDER / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("macro", ["facts", "seen_text", "place", "pairs"])
def test_a_macro_escapes_text(macro):
    given = {"facts": [HOSTILE], "pairs": {HOSTILE: HOSTILE}}.get(macro, HOSTILE)
    written = str(getattr(templates().get_template("macros.html").module, macro)(given))
    assert "<script>" not in written
    assert "{{ 7 * 7 }}&#34;&#39;&amp;" in written


@pytest.mark.parametrize("name", PAGES)
def test_a_value_that_nobody_gave_is_an_error(name):
    with pytest.raises(UndefinedError):
        render(name, heading="A page")


@pytest.mark.parametrize("name", PAGES)
def test_pages_share_one_frame_and_bring_no_style_of_their_own(name):
    source = (FOLDER / name).read_text(encoding="utf-8")
    assert source.startswith('{% extends "page.html" %}')
    assert "<style" not in source
    assert "<script" not in source
