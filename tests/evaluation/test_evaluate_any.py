"""Runs and model folders are scored on one file, side by side, and the worst answers are a page."""

import json
import shutil

import pytest
from toys import write_jsonl

QUIET = ("stage.init_from=none", "stage.max_steps=2", "stage.evaluate=false", "trainer.num_chats=0")
TINY = ("model=tiny", "model.tiles.size=56", "model.tiles.max=2", "trainer.precision=fp32")
NASTY = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def made(toys, tmp_path_factory):
    """Train a run, export it, and write a test file with categories and text that a page must not take for its own."""
    from vlm_tune.cli import main

    folder = tmp_path_factory.mktemp("made")
    assert main(["stage=finetune", *toys.arguments(*QUIET, runs=folder / "runs")]) == 0
    assert main(["export", f"ckpt={folder}/runs/latest", f"out={folder}/model", "layout=hf"]) == 0
    rows = [
        {
            "image": f"test_{number}.png",
            "question": f"What is this? {NASTY}",
            "answer": NASTY,
            "category": f"kind {number % 2}",
            "answers": [NASTY, "a thing"],
        }
        for number in range(3)
    ]
    write_jsonl(folder / "test.jsonl", rows)
    for number in range(3):
        shutil.copy(toys.data / "pictures" / f"test_{number}.png", folder)
    return folder


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_and_its_export_are_scored_side_by_side(made, tmp_path, run_cli):
    ckpt = f"ckpt={made}/runs/latest,{made}/model"
    given = (f"data.test={made}/test.jsonl", "data.format=vqa", "by=category", "metric=anls", *TINY)
    done = run_cli("evaluate", ckpt, *given, f"out={tmp_path}/out.jsonl", f"page={tmp_path}/page.html")
    assert done.code == 0, done.err
    assert "ANLS" in done.out
    header, *table = [line.split() for line in done.out.splitlines() if line.startswith(("┃", "│"))]
    assert header[1:-1:2] == ["task", "questions", "latest", "model", "majority"]
    assert [row[1:3] for row in table] == [["kind", "0"], ["kind", "1"]]
    answers = lines_of(tmp_path / "out.jsonl")
    assert [line["ckpt"] for line in answers] == ["latest"] * 3 + ["model"] * 3
    assert [line["answer"] for line in answers[:3]] == [line["answer"] for line in answers[3:]]
    assert answers[0]["answers"] == [NASTY, "a thing"]
    page = (tmp_path / "page.html").read_text()
    assert NASTY not in page
    assert page.count("<article") == 3
    assert page.count("data:image/jpeg") == 3


def test_the_page_is_bounded(made, tmp_path, run_cli, monkeypatch):
    monkeypatch.setattr("vlm_tune.pages.worst.MAX_PICTURES", 2)
    given = (f"data.test={made}/test.jsonl", "data.format=vqa", f"page={tmp_path}/page.html")
    assert run_cli("evaluate", f"ckpt={made}/runs/latest", *given).code == 0
    page = (tmp_path / "page.html").read_text()
    assert page.count("<article") == 2
    assert "3 of 3 questions were not answered as expected; the worst 2 are shown." in page


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("ckpt={made}/model",), "out is not set, and one run alone keeps its answers itself"),
        (("ckpt={made}/model", "out={new}"), "is a model without a run: its template and tiles are not known"),
        (("ckpt={made}/model", "out={new}", *TINY), "model is no run that has one. Name a file: data.test=FILE"),
        (("ckpt={made}/runs/latest", "model=tiny"), "is a run, which has its own. Leave model out"),
        (("ckpt={made}/runs/latest,", "out={new}"), "a name is missing, or given twice"),
        (("ckpt={made}/runs/latest", "metric=f1"), "metric=f1: no such metric"),
        (("ckpt={made}/runs/latest", "max_new_tokens=0"), "max_new_tokens=0: give a whole number from 1"),
        (("ckpt={made}/runs/latest", "by=colour"), "by=colour: no row of"),
        (("ckpt={made}/runs/latest", "metric=iou"), "has no box in its expected answer"),
        (("ckpt={made}/runs/latest", "page={made}/test.jsonl"), "page={made}/test.jsonl: the file is there already"),
        (("ckpt=nobody/nothing", "out={new}", "data.test={made}/test.jsonl", *TINY), "the hub cannot be reached"),
    ],
)
def test_what_does_not_go_is_said(made, tmp_path, run_cli, given, said):
    places = {"made": made, "new": tmp_path / "new.jsonl"}
    done = run_cli("evaluate", *(each.format(**places) for each in given))
    assert done.code == 2
    assert said.format(**places) in done.err


def test_a_picture_that_cannot_be_read_is_said_before_anything_is_asked(made, tmp_path, run_cli, monkeypatch):
    rows = [json.loads(line) for line in (made / "test.jsonl").read_text(encoding="utf-8").splitlines()]
    write_jsonl(tmp_path / "test.jsonl", [*rows, rows[-1] | {"image": "lost.png"}])
    monkeypatch.setattr("vlm_tune.evaluation.verb.ask", None)
    asked = (f"data.test={tmp_path}/test.jsonl", f"data.image.root={made}", f"out={tmp_path}/new.jsonl")
    done = run_cli("evaluate", f"ckpt={made}/runs/latest", *asked)
    assert done.code == 2
    assert "lost.png" in done.err


def test_a_hub_id_that_a_choice_names_has_its_settings():
    from vlm_tune.model.ready import config_of

    config = config_of("OpenGVLab/InternVL3-1B", ["data.test=test.jsonl"])
    assert (config.model.template, config.model.tiles.max) == ("internvl2_5", 12)
