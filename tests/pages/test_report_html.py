"""The report's page: everything of the report is on it, nothing of the data can break it, nothing missing stops it."""

import copy
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlm_tune.pages.report_html import MAX_PICTURES, margin, write_html

FREE_NAMES = {"food_group", "vegetarian", "projector", "llm", "python", "torch", "rows"}
VOID = {"meta", "img", "br", "hr", "link", "input"}
HOSTILE = "\"'></style></pre><script>alert(1)</script><img src=x onerror=alert(2)>${x}$title"


class Page(HTMLParser):
    """Read a page: its tags with their attributes, its text, and whether all tags are closed in order."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert self.open == []
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def count(self, tag: str, kind: str | None = None) -> int:
        return sum(name == tag and (kind is None or attributes.get("class") == kind) for name, attributes in self.tags)


@pytest.fixture
def photo(tmp_path: Path) -> str:
    Image.new("RGB", (900, 500), "olive").save(tmp_path / "okra.jpeg")
    return str(tmp_path / "okra.jpeg")


@pytest.fixture
def report(photo: str) -> dict[str, Any]:
    ask = {"picture": photo, "before": "a salad"}
    points = [{"step": step, "loss": 6 / step, "lr": {"projector": 1e-3, "llm": 2e-4}} for step in range(1, 41)]
    val = [{"step": 20, "loss": 0.5}, {"step": 40, "loss": 0.41}]
    return {
        "run": {
            "name": "2026-11-21_23-19-11_finetune_demo",
            "stage": "finetune",
            "model": "demo",
            "device": "cpu (2 cores)",
            "precision": "bf16",
            "started": "2026-11-21T23:19:11",
            "seconds": 200.0,
            "steps": 40,
            "samples": 5000,
            "tokens": 300000,
            "init_from": "runs/earlier/checkpoints/step_00000200.ckpt",
            "command": "python -m vlm_tune stage=finetune",
        },
        "train_seconds": 280.1,
        "peak_rss_mb": 2300,
        "parts": [
            {"name": "vision", "how": "frozen", "num_trained": 0, "num_total": 22056576, "learning_rate": 0.0},
            {"name": "projector", "how": "full", "num_trained": 1217088, "num_total": 1217088, "learning_rate": 1e-3},
        ],
        "data": {
            "path": "train.json",
            "rows": 2000,
            "skipped": 3,
            "pack_fill": 0.97,
            "tokens": {"p50": 60, "max": 1200},
        },
        "evaluation": {
            "after": {"food_group": 0.683, "vegetarian": 0.75},
            "before": {"food_group": 0.008, "vegetarian": 0.0},
            "blind": {"food_group": 0.2, "vegetarian": 0.8},
            "majority": {"food_group": 0.25, "vegetarian": 0.79},
            "num_questions": {"food_group": 1120, "vegetarian": 120},
        },
        "loss_curve": points,
        "val_curve": val,
        "best": val[1],
        "answers": [
            {**ask, "question": "<image>\nWhich food group?", "expected": "Vegetables", "after": "vegetables."},
            {**ask, "question": "Is it vegetarian?", "expected": "Yes", "after": "No"},
        ],
        "config": "seed: 0\nstage:\n  name: finetune",
        "environment": {"python": "3.11", "torch": "2.9.1"},
    }


def page_of(report: dict[str, Any], tmp_path: Path) -> Page:
    write_html(report, tmp_path / "report.html")
    return Page(tmp_path / "report.html")


def test_the_page_says_everything_of_the_report(report, tmp_path):
    page = page_of(report, tmp_path)
    expected = """
        demo · finetune | 21 November 2026, 23:19 | 300,000 tokens | runs/earlier/checkpoints/step_00000200.ckpt
        68.3% | 43.3 points above always the most frequent answer | 5.0 points below the same model without the picture
        best validation 0.410, at step 40 | 3.3 min | 4.7 min with the stages before | 1,500 tokens a second | 2.2 GiB
        ± 2.7 | 1,120 | 1,217,088 | 5.23% | 1e-3 | median 60, at most 1,200 | 97.0% | name: finetune | 2.9.1
        Which food group? | 1 of 2 right after training (marked ✓), 0 before."""
    expected = [text.strip() for line in expected.splitlines() for text in line.split("|") if text.strip()]
    assert [text for text in expected if text not in page.text] == []
    assert page.count("svg", "chart") == 2  # a wide and a narrow one


def test_the_page_is_one_file_without_scripts_or_network(report, tmp_path):
    page = page_of(report, tmp_path)
    assert page.source.replace("http://www.w3.org/2000/svg", "").count("://") == 0
    assert {"script", "link", "iframe", "object", "form"}.isdisjoint(tag for tag, _ in page.tags)
    policy = next(attributes for _, attributes in page.tags if attributes.get("http-equiv"))
    assert str(policy["content"]).startswith("default-src 'none'")


def test_a_picture_is_shown_once_and_small_with_all_its_questions(report, tmp_path):
    page = page_of(report, tmp_path)
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert [(image["alt"], image["width"], image["height"]) for image in images] == [("okra.jpeg", "560", "311")]
    assert (page.count("article"), page.count("div", "question"), page.count("div", "right")) == (1, 2, 1)


def poison(value: Any) -> Any:
    """Put markup into every text and every free-form name."""
    if isinstance(value, dict):
        return {HOSTILE + key if key in FREE_NAMES else key: poison(item) for key, item in value.items()}
    if isinstance(value, list):
        return [poison(item) for item in value]
    return HOSTILE if isinstance(value, str) else value


def test_no_text_of_the_data_becomes_markup(report, tmp_path):
    plain, page = page_of(report, tmp_path), page_of(poison(copy.deepcopy(report)), tmp_path)
    assert {tag for tag, _ in page.tags} <= {tag for tag, _ in plain.tags}
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert page.text.count("<script>alert(1)</script>") > 20
    assert "${x}$title" in page.text


@pytest.mark.parametrize(
    "block", ["run", "parts", "data", "evaluation", "loss_curve", "val_curve", "best", "answers", "config"]
)
def test_a_missing_block_is_left_out(report, tmp_path, block):
    for missing in ({key: value for key, value in report.items() if key != block}, {**report, block: None}):
        assert page_of(missing, tmp_path).count("h1") == 1


def test_an_empty_report_is_a_page(tmp_path):
    assert page_of({}, tmp_path).text.endswith("report.json beside this page.")


def test_a_text_only_run_has_no_pictures(report, tmp_path):
    for answer in report["answers"]:
        answer["picture"] = None
    page = page_of(report, tmp_path)
    assert (page.count("img"), page.count("article"), page.count("div", "missing")) == (0, 2, 0)


def test_a_picture_that_cannot_be_read_leaves_a_placeholder(report, tmp_path):
    (tmp_path / "broken.jpeg").write_bytes(b"\xff\xd8\xff no picture")
    report["answers"] += [{"picture": str(tmp_path / name), "question": "?"} for name in ("gone.png", "broken.jpeg")]
    page = page_of(report, tmp_path)
    assert (page.count("img"), page.count("div", "missing")) == (1, 2)
    assert "no picture: gone.png cannot be read" in page.text


def test_more_pictures_than_a_page_holds_are_counted(report, tmp_path):
    report["answers"] = [{"picture": None, "question": f"question {n}", "after": "x"} for n in range(MAX_PICTURES + 5)]
    page = page_of(report, tmp_path)
    assert page.count("article") == MAX_PICTURES
    assert f"The first {MAX_PICTURES} of {MAX_PICTURES + 5} are shown" in page.text


def test_text_that_utf8_cannot_hold_and_empty_answers_are_written(report, tmp_path):
    report["answers"][0] |= {"before": "", "after": "half a pair \ud83d, \x00 and مرحبا"}
    page = page_of(report, tmp_path)
    assert "half a pair ?" in page.text
    assert page.count("span", "empty") == 1


def test_losses_that_are_not_numbers_are_counted(report, tmp_path):
    report["loss_curve"][3]["loss"] = math.nan
    report["loss_curve"][4]["loss"] = None
    assert "2 of 40 logged losses are not finite numbers." in page_of(report, tmp_path).text
    report |= {"loss_curve": [{"step": 1, "loss": math.inf}], "val_curve": [], "best": None}
    assert "1 of 1 logged losses" in page_of(report, tmp_path).text


def test_many_tasks_are_headed_by_their_mean_and_each_has_its_bars(report, tmp_path):
    report["evaluation"] = {"after": {f"task_{n}": n / 10 for n in range(5)}, "majority": {"task_0": 0.1}}
    page = page_of(report, tmp_path)
    assert "right answers, mean of 5 tasks 20.0%" in page.text
    assert (page.count("div", "bar after"), page.count("div", "bar majority"), page.count("div", "bar blind")) == (
        5,
        1,
        0,
    )
    assert "95% margin" not in page.text


def test_the_margin_is_near_the_textbook_one_and_never_zero():
    assert margin(0.5, 1000) == pytest.approx(0.031, abs=5e-4)
    assert margin(1.0, 100) > 0.02
