"""Batch answers: every row once, in order, whatever stopped an earlier call; no other file is overwritten."""

import json
import shutil

import pytest
from toys import turns, write_jsonl

from vlm_tune.data.dialects.dialects import parse_record
from vlm_tune.evaluation.answers import with_place

QUIET = ("stage.init_from=none", "stage.max_steps=2", "stage.evaluate=false", "trainer.num_chats=0")


@pytest.fixture(scope="module")
def run(toys, tmp_path_factory):
    """Train a run."""
    from vlm_tune.cli import main

    folder = tmp_path_factory.mktemp("answering")
    assert main(["stage=finetune", *toys.arguments(*QUIET, runs=folder / "runs")]) == 0
    return folder / "runs" / "latest"


@pytest.fixture
def asked(toys, tmp_path):
    """Write questions: with an answer, without, and about a picture that is not there."""
    for number in range(2):
        shutil.copy(toys.data / "pictures" / f"test_{number}.png", tmp_path)
    rows = [
        {"id": "known", "image": "test_0.png", "question": "What colour?", "answer": "blue"},
        {"id": "gone", "image": "none.png", "question": "What colour?"},
        {"id": "open", "image": "test_1.png", "question": "What shape?"},
    ]
    write_jsonl(tmp_path / "asked.jsonl", rows)
    return tmp_path / "asked.jsonl"


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_are_answered_and_faults_counted(run, asked, tmp_path, run_cli):
    out = tmp_path / "out.jsonl"
    done = run_cli("answer", f"ckpt={run}", f"data.path={asked}", f"out={out}")
    assert done.code == 1
    assert '1 row could not be asked: "error" of their lines says why' in done.out
    known, gone, still = lines_of(out)
    assert known | {"answer": ""} == {
        "row": 0,
        "id": "known",
        "picture": str(tmp_path / "test_0.png"),
        "question": "What colour?",
        "answer": "",
        "ckpt": known["ckpt"],
    }
    assert isinstance(still["answer"], str)
    assert "no such picture" in gone["error"] or "none.png" in gone["error"]
    assert "answer" not in gone


def test_a_stopped_call_goes_on_where_it_was_and_keeps_what_is_there(run, asked, tmp_path, run_cli):
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    assert run_cli("answer", f"ckpt={run}", f"data.path={asked}", f"out={whole}").code == 1
    first, second, third = whole.read_text().splitlines(keepends=True)
    kept = first.replace('"answer": "', '"answer": "kept ')
    cut.write_text(kept + second + third[:4])
    done = run_cli("answer", f"ckpt={run}", f"data.path={asked}", f"out={cut}")
    assert f"2 answers of {cut} kept" in done.out
    assert cut.read_text() == kept + second + third
    assert run_cli("answer", f"ckpt={run}", f"data.path={asked}", f"out={cut}").code == 1  # nothing is left to do
    assert cut.read_text() == kept + second + third


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("my notes\n", "not a file of answers, and nothing else is overwritten"),
        ("my notes", "not a file of answers, and nothing else is overwritten"),
        ('{"id": 1}\n', "not a file of answers, and nothing else is overwritten"),
        ('{"row": 0, "ckpt": "another"}\n', "row 0 was answered by another. Name another file"),
        ('{"row": 0, "question": "Why?", "ckpt": CKPT}\n', "row 0 answers another question than"),
    ],
)
def test_no_other_file_is_touched(run, asked, tmp_path, run_cli, content, said):
    from vlm_tune.model.checkpoint import find_checkpoint

    out = tmp_path / "out.jsonl"
    content = content.replace("CKPT", json.dumps(str(find_checkpoint(str(run)))))
    out.write_text(content)
    done = run_cli("answer", f"ckpt={run}", f"data.path={asked}", f"out={out}")
    assert done.code == 2
    assert said in done.err
    assert out.read_text() == content


def test_one_question_is_asked_about_each_picture_of_a_folder(run, toys, tmp_path, run_cli):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name in ("b.png", "a.png"):
        (pictures / name).write_bytes((toys.data / "pictures" / "test_0.png").read_bytes())
    (pictures / "notes.txt").write_text("no picture")
    out = tmp_path / "out.jsonl"
    given = ("question=What colour?", f"data.path={pictures}", f"out={out}", "max_new_tokens=4")
    assert run_cli("answer", f"ckpt={run}", *given).code == 0
    lines = lines_of(out)
    assert [(line["id"], line["picture"], line["question"]) for line in lines] == [
        (name, str(pictures / name), "What colour?") for name in ("a.png", "b.png")
    ]
    assert lines[0]["answer"] == lines[1]["answer"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((), "data.path is not set. Name a file of questions or a folder of pictures"),
        (("data.path={asked}",), "out=: no .jsonl file in a folder that is there"),
        (("data.path={asked}", "out=x.txt"), "out=x.txt: no .jsonl file in a folder that is there"),
        (("data.path={asked}", "out=x.jsonl", "question=Why?"), "is no folder of pictures; its rows ask their own"),
        (("data.path={none}", "out=x.jsonl"), "no such file"),
    ],
)
def test_what_does_not_go_is_said(run, asked, tmp_path, run_cli, given, said):
    places = {"asked": asked, "none": tmp_path / "none.jsonl"}
    done = run_cli("answer", f"ckpt={run}", *(each.format(**places) for each in given))
    assert done.code == 2
    assert said in done.err


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": turns(("Hello", "Hi"))[:1]},
        {"conversations": [*turns(("Hello", "Hi")), {"from": "human", "value": "And?"}]},
        {"messages": [{"role": "user", "content": "And?"}]},
        {"query": "And?"},
        {"instruction": "And?"},
        {"question": "And?", "image": "a.png"},
        {"question": "And?", "image": "a.png", "choices": ["one", "other"]},
    ],
)
def test_a_question_needs_no_answer_in_any_dialect_of_conversations_and_tables(row):
    sample = parse_record(with_place(row), "auto", "asked.jsonl:1", 0)
    assert [message.role for message in sample.messages][-2:] == ["user", "assistant"]


def test_a_row_that_has_its_answer_stays_as_it_is():
    row = {"conversations": turns(("Hello", "Hi"))}
    assert with_place(row) == row
