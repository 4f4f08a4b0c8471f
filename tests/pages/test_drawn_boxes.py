"""Boxes that texts name are drawn over their picture: in its pixels, clipped to it, whatever a model wrote."""

import json
import re

import pytest
from PIL import Image

from vlm_tune.pages.boxes import MAX_BOXES, clipped_boxes, with_boxes
from vlm_tune.pages.report_html import write_html

WHITE = (255, 255, 255)
FOUND = "<ref>it</ref><box>[[250, 500, 750, 1000]]</box>"


def rects(page):
    """Return the boxes of a page by kind: (x, y, width, height), in the order of the page."""
    groups = re.findall(r'<g class="box (\w+)">.*?<rect x="(.*?)" y="(.*?)" width="(.*?)" height="(.*?)"/>', page, re.S)
    return [(kind, *map(float, numbers)) for kind, *numbers in groups]


@pytest.mark.parametrize(
    ("text", "boxes"),
    [
        (FOUND, [(50, 50, 150, 100)]),
        ("<box>[[0, 0, 500, 500], [500, 500, 1000, 1000]]</box>", [(0, 0, 100, 50), (100, 50, 200, 100)]),
        ("<box>[[-50, 500, 2000, 99999]]</box>", [(0, 50, 200, 100)]),
        (f"<box>[[0, 0, {'9' * 400}, 1000]]</box>", [(0, 0, 200, 100)]),
        ("<box>[[500, 500, 500, 900]]</box>", []),
        ("<box>[[900, 0, 100, 900]]</box>", []),
        ("<box>[[2000, 2000, 3000, 3000]]</box>", []),
        ("<box>[[1, 2, 3", []),
        ("a list, [1, 2, 3, 4]", []),
        ("", []),
    ],
)
def test_boxes_become_pixels_of_the_picture_and_stay_inside(text, boxes):
    assert clipped_boxes(text, (200, 100)) == boxes


def test_an_answer_without_end_has_a_limited_number_of_boxes():
    assert len(clipped_boxes("<box>" + "[0, 0, 9, 9]," * 5000, (200, 100))) == MAX_BOXES


def test_a_copy_of_the_picture_carries_the_box_and_the_picture_stays():
    picture = Image.new("RGB", (200, 100), WHITE)
    drawn = with_boxes(picture, FOUND)
    assert picture.getcolors() == [(20000, WHITE)]
    changed = [(x, y) for x in range(200) for y in range(100) if drawn.getpixel((x, y)) != WHITE]
    assert (min(changed), max(changed)) == ((50, 50), (150, 99))
    assert drawn.getpixel((100, 75)) == WHITE  # only the outline


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "I;16"])
def test_pictures_of_every_kind_are_drawn_on(mode):
    assert with_boxes(Image.new(mode, (40, 30)), FOUND).size == (40, 30)


def test_without_a_box_there_is_no_copy():
    assert with_boxes(Image.new("RGB", (200, 100)), "in the middle") is None


@pytest.fixture
def report(tmp_path):
    """Make a report of two questions about one wide picture, larger than a page shows it."""
    Image.new("RGB", (1120, 560), WHITE).save(tmp_path / "wide.png")
    asked = {"picture": str(tmp_path / "wide.png"), "question": "Where is <ref>it</ref>?", "before": "no"}
    other = {"expected": "<box>[[0, 0, 500, 500]]</box>", "after": "<box>[[0, 0, 100, 9999]]</box>"}
    answers = [asked | {"expected": FOUND, "after": FOUND}, asked | other]
    return {"answers": answers, "evaluation": {"after": {"all": 0.5}}}


def page_of(report, tmp_path):
    write_html(report, tmp_path / "report.html")
    return (tmp_path / "report.html").read_text()


def test_the_report_draws_expected_and_answered_boxes_of_every_question(report, tmp_path):
    page = page_of(report, tmp_path)
    assert rects(page) == [
        ("expected", 140, 140, 280, 140),
        ("after", 140, 140, 280, 140),
        ("expected", 0, 0, 280, 140),
        ("after", 0, 0, 56, 280),
    ]
    assert re.findall(r"<text [^>]*>(.*?)</text>", page) == ["1", "1", "2", "2"]
    assert '<p dir="auto">1. Where is' in page
    assert "expected box" in page
    assert "box after training" in page
    assert "IoU" in page


def test_a_report_without_boxes_names_none(report, tmp_path):
    for answer in report["answers"]:
        answer.update(expected="Rice", after="a list, [0, 0, 500, 500]")
    page = page_of(report, tmp_path)
    assert rects(page) == []
    assert "expected box" not in page


def test_what_a_model_writes_around_its_boxes_stays_text(report, tmp_path):
    report["answers"][0]["after"] = '<box>[[0, 0, 500, 500]]</box>"/></svg><script>alert(1)</script>'
    assert "<script>" not in page_of(report, tmp_path)


@pytest.mark.parametrize(("pictures", "drawn"), [(1, [("expected", 20.0, 10.0, 80.0, 70.0)]), (2, [])])
def test_inspect_draws_the_boxes_of_a_row_with_one_picture(run_cli, parts, tmp_path, pictures, drawn):
    Image.new("RGB", (200, 100), WHITE).save(tmp_path / "a.png")
    marks = "<image>" * pictures
    turns = [
        {"role": "user", "content": f"{marks}Where is <ref-object>?"},
        {"role": "assistant", "content": "At <bbox>."},
    ]
    row = {"messages": turns, "images": ["a.png"] * pictures}
    row["objects"] = {"ref": ["it"], "bbox": [[20, 10, 100, 80]]}
    (tmp_path / "train.jsonl").write_text(json.dumps(row))
    out = tmp_path / "row.html"
    done = run_cli("inspect", "row=0", f"data.path={tmp_path / 'train.jsonl'}", "data.val=none", *parts, f"out={out}")
    assert done.code == 0, done.err
    assert rects(out.read_text()) == drawn
    assert ("does not say of which picture" in out.read_text()) == (pictures > 1)
