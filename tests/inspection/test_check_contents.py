"""`check` shows what a data set teaches: its short answers, what held-out files know already, and some of its rows."""

import base64
import io
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlm_tune.inspection import check_shared
from vlm_tune.inspection.check_answers import MAX_KEPT, Answers
from vlm_tune.inspection.check_samples import NUM_PICTURES, NUM_ROWS

EVIL = "<script>alert(1)</script>"


def picture(seed: int, size: tuple[int, int] = (56, 28)) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3)).astype(np.uint8)
    with io.BytesIO() as file:
        Image.fromarray(noise).save(file, "BMP")  # every one of the same number of bytes
        return file.getvalue()


def row(image: str | list[str] | None, question: str = "What?", answer: str = "A wok.", **fields) -> dict:
    marks = "<image>\n" * (0 if image is None else 1 if isinstance(image, str) else len(image))
    turns = [{"from": "human", "value": f"{marks}{question}"}, {"from": "gpt", "value": answer}]
    return {"conversations": turns} | ({} if image is None else {"image": image}) | fields


class Checked:
    """What a run of `check` left behind."""

    def __init__(self, finished, out: Path) -> None:
        self.code, self.out, self.err = finished
        self.report = json.loads((out / "check.json").read_text())
        self.html = (out / "check.html").read_text()
        self.words = " ".join(self.out.split())

    def shared(self, part: str = "val") -> dict:
        return next(held for held in self.report["shared"] if held["part"] == part)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Give three pictures, and one of them again under another name."""
    for name, seed in (("0.bmp", 0), ("1.bmp", 1), ("2.bmp", 2), ("again.bmp", 0)):
        (tmp_path / name).write_bytes(picture(seed))
    return tmp_path


@pytest.fixture
def check(run_cli, parts, folder):
    """Give a function that checks rows beside those of other files (val=[...])."""

    def run(rows: list, *more: str, **held: list) -> Checked:
        for name, lines in ({"train": rows} | held).items():
            text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
            (folder / f"{name}.jsonl").write_text(text)
        finished = run_cli("check", f"data.path={folder}/train.jsonl", f"out={folder}/out", *parts, *more)
        return Checked(finished, folder / "out")

    return run


# --------------------------------------------------------------------------------------------------------- the answers


def test_an_answer_that_is_nearly_always_right_is_seen(check):
    found = check([row("0.bmp", f"Is it {number}?", "yes" if number else "no") for number in range(20)])
    assert found.report["answers"]["most"] == [["yes", 19], ["no", 1]]
    assert '20; "yes" 95.0%, "no" 5.0%' in found.words
    assert re.search(r'class="tile bad"><dt>most frequent answer</dt><dd>95%', found.html)


def test_answers_are_counted_for_each_question_that_is_asked_often(check):
    rows = [row("0.bmp", "Edible?", answer) for answer in ("yes", "yes", "yes", "no")] * 2
    rows += [row("1.bmp", "Colour?", "red")] * 6 + [row("2.bmp", "Seen once?", "red")]
    found = check(rows)
    assert found.report["answers"]["questions"] == [
        {"question": "Edible?", "times": 8, "answers": [["yes", 6], ["no", 2]]},
        {"question": "Colour?", "times": 6, "answers": [["red", 6]]},
    ]
    assert '"Edible?" 8 "yes" 75.0%, "no" 25.0%' in found.words


def test_long_answers_and_unsupervised_ones_are_not_weighed(check):
    turns = row(None, "One?", "yes", loss=None)["conversations"]
    masked = {"conversations": [turns[0], turns[1] | {"loss": False}, turns[0] | {"value": "Two?"}, turns[1]]}
    found = check([row(None, "Tell.", "a long story " * 9), masked])
    assert (found.report["answers"]["short"], found.report["answers"]["long"]) == (1, 1)


def test_plain_text_answers_nothing(check):
    assert check([{"text": "The wok."}] * 9, "repeated_ids=allow").report["answers"]["short"] == 0


def test_counting_answers_takes_bounded_memory():
    total, part = Answers(), Answers()
    part.short = Counter({"yes": 5})
    for start in range(0, 3 * MAX_KEPT, 1000):
        part.short = Counter({str(number): 1 for number in range(start, start + 1000)} | {"yes": 5})
        total.merge(part)
    assert len(total.short) <= MAX_KEPT
    assert total.short.most_common(1) == [("yes", 300)]


# ---------------------------------------------------------------------------------------------------- what is shared


def test_a_picture_that_is_held_out_too_is_found_by_its_content(check):
    rows = [row("0.bmp", "One?"), row("0.bmp", "Two?"), row("1.bmp")]
    found = check(rows, val=[row("2.bmp"), row("again.bmp", "Three?")])
    shared = found.shared()
    assert (shared["shared_pictures"], shared["rows_showing_them"], shared["shared_rows"]) == (1, 2, 0)
    assert shared["first_pictures"] == [
        {"picture": "0.bmp", "where": "train.jsonl:1", "held_picture": "again.bmp", "held_where": "val.jsonl:2"}
    ]
    assert "train.jsonl:1 shows 0.bmp: val.jsonl:2 shows it too (again.bmp)" in found.words
    assert re.search(r'class="tile bad"><dt>shared with val</dt><dd>1<', found.html)
    assert found.code == 0


def test_pictures_of_equal_size_and_other_content_are_not_shared(check):
    assert check([row("0.bmp")], val=[row("1.bmp"), row("2.bmp")]).shared()["shared_pictures"] == 0


def test_pictures_inside_rows_are_compared_too(check):
    inside = f"data:image/bmp;base64,{base64.b64encode(picture(0)).decode()}"
    assert check([row(inside)], test=[row("0.bmp", "Other?")]).shared("test")["shared_pictures"] == 1


@pytest.mark.parametrize(
    ("held", "number"),
    [
        (row("0.bmp", "Which?", "A pan."), 1),
        (row("again.bmp", "Which? ", "A  pan."), 1),  # another name, other spaces
        (row("1.bmp", "Which?", "A pan."), 0),
        (row("0.bmp", "Which?", "A pot."), 0),
        (row(None, "Which?", "A pan."), 0),
    ],
)
def test_a_row_is_shared_where_text_and_pictures_are_the_same(check, held, number):
    found = check([row("2.bmp"), row("0.bmp", "Which?", "A pan.")], val=[held])
    assert found.shared()["shared_rows"] == number
    assert [each["where"] for each in found.shared()["first_rows"]] == ["train.jsonl:2"] * number


def test_rows_of_text_are_compared(check):
    found = check([row(None, "1+1?", "2"), row(None, "1+2?", "3")], val=[row(None, "1+2?", "3")])
    assert "shares 1 whole row; 1 row compared" in found.words


def test_workers_find_the_same(check):
    rows = [row("0.bmp", f"{number}?") for number in range(600)]
    found = check(rows, "data.workers=2", val=[row("again.bmp"), row("1.bmp", "7?")])
    assert (found.shared()["shared_pictures"], found.shared()["rows_showing_them"]) == (1, 600)


def test_the_training_file_as_validation_is_seen(check, folder):
    found = check([row("0.bmp"), row("1.bmp")], f"data.val={folder}/train.jsonl")
    assert found.shared()["shared_rows"] == 2


def test_nothing_is_compared_where_nothing_is_held_out(check):
    assert check([row("0.bmp")], "data.val=none", val=[row("0.bmp")]).report["shared"] == []


@pytest.mark.parametrize(("second", "others"), [("0.bmp", ", and other rows show the same pictures"), ("1.bmp", "")])
def test_rows_that_are_put_aside_may_share_their_pictures(check, second, others):
    found = check([row("0.bmp"), row(second, "Other?")], "data.val_share=0.5")
    assert f"validation no file for it: 50% of the rows are put aside{others} " in found.words + " "
    assert ("other rows show" in found.words) == bool(others)


def test_too_few_rows_to_put_any_aside_are_told(check):
    found = check([row("0.bmp"), row("1.bmp")])
    assert "validation none: no file for it, and 2% of 2 rows is less than one" in found.words


def test_held_out_rows_that_cannot_be_read_are_told(check):
    found = check([row("0.bmp")], val=["{", row("gone.bmp"), row("1.bmp")], test=["", ""])
    assert "3 rows compared, 2 of them cannot be read: check that file too" in found.words
    assert "test.jsonl cannot be compared: test.jsonl: holds no rows" in found.words


def test_a_large_held_out_file_is_compared_in_part_and_that_is_said(check, monkeypatch):
    monkeypatch.setattr(check_shared, "MAX_ROWS", 2)
    found = check([row("0.bmp")], val=[row("1.bmp"), row("2.bmp"), row("0.bmp")])
    assert "shares nothing; the first 2 rows compared" in found.words


# ---------------------------------------------------------------------------------------------------------- some rows


def test_some_rows_are_shown_as_the_model_sees_them(check):
    found = check([row("0.bmp", "Name it.", "麻婆豆腐"), row(None, "Hi?", "Ho.")])
    first = found.report["samples"][0]
    assert (first["where"], first["row"], first["pictures"]) == ("train.jsonl:1", 0, ["56 x 28, 3 tiles"])
    assert ["image", "3 tiles: 3 tokens"] in first["runs"]
    assert ["supervised", "麻婆豆腐<|im_end|>"] in first["runs"]
    assert found.html.count("data:image/jpeg;base64,") == 1
    assert '<span class="supervised">麻婆豆腐&lt;|im_end|&gt;</span>' in found.html


def test_rows_are_shown_from_first_to_last_and_faulty_ones_are_not(check):
    rows = [row("0.bmp", f"{number}?") for number in range(100)]
    rows[0]["image"] = rows[99]["image"] = "gone.bmp"
    shown = [each["row"] for each in check(rows).report["samples"]]
    assert (len(shown), shown[0], shown[-1]) == (NUM_ROWS, 1, 98)


def test_each_row_is_shown_once_where_there_are_few(check):
    assert [each["row"] for each in check([row("0.bmp"), row("1.bmp"), row("2.bmp")]).report["samples"]] == [0, 1, 2]


def test_shown_text_is_escaped_and_bounded_and_so_are_pictures(check, folder):
    Image.effect_noise((1500, 900), 90).convert("RGB").save(folder / "large.png")
    rows = [row(["large.png"] * 9, EVIL, EVIL + "word " * 300, id=f"{EVIL}{n}") for n in range(20)]
    found = check(rows)
    assert EVIL not in found.html
    assert found.html.count("data:image/jpeg;base64,") == NUM_ROWS * NUM_PICTURES
    assert "and 5 more" in found.html
    assert not re.search(r'(src|href)="(?!data:)', found.html)
    assert len(found.html) < 1_500_000


def test_the_report_lies_beside_the_runs_under_the_name_of_the_data(run_cli, parts, folder, tmp_path, monkeypatch):
    place = tmp_path / "dishes"
    place.mkdir()
    (place / "train.jsonl").write_text(json.dumps(row(None)) + "\n")
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.iterdir())
    finished = run_cli("check", "data.path=dishes/train.jsonl", *parts)
    assert "report: runs/check_dishes_train/check.html, runs/check_dishes_train/check.json" in finished.out
    run_cli("inspect", "data.path=dishes/train.jsonl", "data.val=none", *parts)
    assert {path.name for path in set(tmp_path.iterdir()) - before} == {"runs"}
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {
        "check_dishes_train",
        "inspect_dishes_train_0.html",
    }


# ---------------------------------------------------------------------------------------- tokens and fields of the text


def test_tokens_that_belong_to_the_texts_are_counted(check):
    rows = [row("0.bmp", "Where is <ref>it</ref>?", f"<box>[[{number}, 2, 3, 4]]</box>") for number in range(3)]
    found = check([*rows, row(None, "Hi", "<|im_end|>")])
    assert found.report["markup"] == {"<ref>": 3, "</ref>": 3, "<box>": 3, "</box>": 3}
    assert "markup <ref> 3, </ref> 3, <box> 3, </box> 3: one token each" in found.words


@pytest.mark.parametrize(
    ("fields", "more", "kinds"),
    [
        ({"price": 3}, (), ["field not read"]),
        ({"price": 3}, ("data.ignore_fields=[price]",), []),
        ({"price": 3, "id": "a"}, ("data.ignore_fields=[id]",), ["field not read"]),
    ],
)
def test_fields_are_refused_and_ignored_as_in_training(check, fields, more, kinds):
    found = check([row("0.bmp", **fields)], *more)
    assert [bad["kind"] for bad in found.report["bad_rows"]] == kinds


def test_answers_that_are_thought_out_otherwise_are_no_repetition(check):
    turns = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "Three."}]
    rows = [{"messages": [turns[0], turns[1] | {"reasoning_content": why}]} for why in ("One and two.", "I count.")]
    assert check(rows).report["same_content"] == []
