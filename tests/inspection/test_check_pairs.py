"""`check` and `inspect` know pairs of answers."""

import json

import pytest

from vlm_tune.inspection.check_rows import ROW_KINDS

GOOD = {"question": "Which is larger, 3 or 4?", "chosen": "4", "rejected": "3"}


@pytest.fixture
def check(run_cli, parts, tmp_path):
    """Give a function that checks rows under stage=dpo, and returns check.json."""

    def run(rows, *more):
        path = tmp_path / "train.jsonl"
        path.write_text(
            "".join(json.dumps({"id": str(n), **row}) + "\n" for n, row in enumerate(rows)), encoding="utf-8"
        )
        given = [*parts, "stage=dpo", f"data.path={path}", "data.val=none", "data.test=none", *more]
        finished = run_cli("check", *given, f"out={tmp_path / 'out'}")
        report = json.loads((tmp_path / "out" / "check.json").read_text(encoding="utf-8"))
        return finished, report, (tmp_path / "out" / "check.html").read_text(encoding="utf-8")

    return run


def test_good_pairs_are_counted_with_what_their_answers_share(check):
    finished, report, page = check([GOOD, GOOD | {"chosen": "4, of course", "rejected": "3, I think"}])
    assert finished.code == 0
    assert 0.5 < report["pair_share"] < 1
    assert "of the tokens are read for both answers at once" in " ".join(finished.out.split())
    assert "or, rejected: " in page


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        (GOOD | {"rejected": "4"}, "equal answers"),
        (GOOD | {"rejected": " 4"}, "equal answers"),
        (GOOD | {"rejected": "  "}, "no answer"),
        (GOOD | {"rejected": None}, "half a pair"),
        ({"chosen": "4", "rejected": "3"}, "half a pair"),
        (GOOD | {"chosen": "4 " * 300, "rejected": "3 " * 300}, "too long"),
        ({"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}, "pair or not"),
    ],
)
def test_a_bad_pair_is_found_with_its_kind(check, row, kind):
    assert kind in ROW_KINDS
    finished, report, _ = check([GOOD, row], "data.max_length=200", "model.tiles.max=1", "model.tiles.size=28")
    assert finished.code == 1
    assert report["faults"] == {kind: 1}


def test_which_answer_is_too_long_is_said(check):
    long = "3 " * 300
    limits = ["data.max_length=200", "model.tiles.max=1", "model.tiles.size=28"]
    for row, said in (
        ({"rejected": long}, "the rejected answer"),
        ({"rejected": long, "chosen": long + "4"}, "both answers"),
    ):
        _, report, _ = check([GOOD | row], *limits)
        assert report["bad_rows"][0]["reason"].startswith(f"with {said}: ")


def test_inspect_shows_the_rejected_answer(run_cli, parts, tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps({"id": "a", **GOOD}) + "\n", encoding="utf-8")
    given = [*parts, "stage=dpo", f"data.path={path}", "data.val=none", "row=0"]
    finished = run_cli("inspect", *given, "--text", f"out={tmp_path}/row.html")
    assert finished.code == 0, finished.err
    before, _, after = finished.out.partition("rejected answer")
    assert "4" in before
    assert "3" in after
    assert "Rejected answer" in (tmp_path / "row.html").read_text(encoding="utf-8")
