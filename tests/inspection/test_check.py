"""`check` finds every fault with its line, raises no false alarm, and says what becomes of long rows."""

import base64
import io
import json
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from PIL import Image

from vlm_tune.config.parse import load_config
from vlm_tune.data.sets.mixture import open_data, open_sizes
from vlm_tune.inspection.check_report import bins, quantile
from vlm_tune.model.build import build_model
from vlm_tune.model.encoder import build_encoder

SIZE = (60, 40)
LINE = 4  # of the planted fault, among eight good rows
QUESTION, ANSWER = {"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A wok."}
TEXT = {"from": "human", "value": "What is a wok?"}


def good_row(number: int) -> dict:
    width, height = SIZE
    row = {"id": f"row_{number}", "image": f"{number % 2}.png", "width": width, "height": height}
    return row | {"conversations": [QUESTION, ANSWER | {"value": f"Wok {number}."}]}


def png(size: tuple[int, int] = SIZE, colour: str = "red") -> bytes:
    with io.BytesIO() as file:
        Image.effect_noise(size, 90).convert("RGB").save(file, "PNG")
        return file.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return an image root with pictures good and bad, and one that lies beside it."""
    root = tmp_path / "root"
    root.mkdir()
    whole = png()
    for name, content in {"0.png": whole, "1.png": png(), "empty.png": b"", "text.png": b"<html>"}.items():
        (root / name).write_bytes(content)
    (root / "cut.png").write_bytes(whole[: len(whole) // 2])
    (root / "large.png").write_bytes(png((300, 300)))
    (tmp_path / "outside.png").write_bytes(whole)
    return root


class Checked:
    """What a run of `check` left behind."""

    def __init__(self, finished, out: Path) -> None:
        self.code, self.out, self.err = finished
        self.report = json.loads((out / "check.json").read_text()) if out.is_dir() else {}
        self.html = (out / "check.html").read_text() if out.is_dir() else ""

    @property
    def bad(self) -> list[tuple[int, str]]:
        return [(row["line"], row["kind"]) for row in self.report["bad_rows"]]


@pytest.fixture
def check(run_cli, parts, folder, tmp_path):
    """Give a function that writes lines (rows, or bytes as they are) to a file and checks it."""

    def run(lines: list, *more: str, name: str = "train.jsonl") -> Checked:
        raw = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
        (folder / name).write_bytes(b"".join(line + b"\n" for line in raw))
        finished = run_cli("check", f"data.path={folder / name}", f"out={tmp_path / 'out'}", *parts, *more)
        return Checked(finished, tmp_path / "out")

    return run


def changed(**fields) -> dict:
    return {key: value for key, value in (good_row(9) | {"id": "planted"} | fields).items() if value is not ...}


def shows(name: str) -> dict:
    return changed(image=name, width=..., height=...)


FAULTS = {
    "not JSON": (b'{"id": "planted", "image": }', "not JSON", "not JSON: .* at column"),
    "cut off": (b'{"id": "planted", "image": "0.png"', "not JSON", "not JSON"),
    "not an object": (b'["a", "b"]', "not an object", "not an object but a list"),
    "unknown dialect": ({"id": "planted", "foo": 1}, "unknown dialect", 'no "conversations"'),
    "another dialect": ({"instruction": "Hi", "output": "Ho"}, "unknown dialect", "name the right dialect"),
    "missing conversation": (changed(conversations=...), "unknown dialect", 'no "conversations"'),
    "empty conversation": (changed(conversations=[]), "empty conversation", "the conversation is empty"),
    "unknown role": (changed(conversations=[{"from": "bot", "value": "x"}]), "unknown role", "unknown role 'bot'"),
    "two turns of one role": (
        changed(conversations=[QUESTION, TEXT, ANSWER]),
        "turns out of order",
        "turns 1 and 2 are both from the user",
    ),
    "no answer": (changed(conversations=[QUESTION]), "no answer", "no answer"),
    "empty answer": (changed(conversations=[QUESTION, ANSWER | {"value": " "}]), "no answer", "the answer is empty"),
    "more marks": (
        changed(conversations=[QUESTION | {"value": "<image><image>?"}, ANSWER]),
        "marks and images differ",
        '2 "<image>" marks but 1 image',
    ),
    "fewer marks": (
        changed(conversations=[TEXT, ANSWER]),
        "marks and images differ",
        '0 "<image>" marks but 1 image',
    ),
    "missing image": (shows("gone.png"), "missing image", "is not there"),
    "zero-size image": (shows("empty.png"), "empty image", "is empty"),
    "truncated image": (shows("cut.png"), "truncated image", "truncated or damaged"),
    "not an image": (shows("text.png"), "not an image", "is not an image"),
    "too large image": (shows("large.png"), "image too large", "is too large: 300 x 300"),
    "out-of-root image": (shows("../outside.png"), "image outside the root", "lies outside the image root"),
    "URL": (shows("https://example.org/a.png"), "image outside the root", "is a URL"),
    "size that lies": (changed(width=61), "wrong size declared", "the row declares 61 x 40"),
    "over-length row": (changed(conversations=[QUESTION, ANSWER | {"value": "wok " * 200}]), "too long", "max_length"),
    "no supervised token": (
        changed(conversations=[QUESTION, ANSWER | {"loss": False}]),
        "no supervised token",
        "nothing to train on",
    ),
    "repeated id": (changed(id="row_1"), "repeated id", "the id is also that of train.jsonl:2"),
    "bad encoding": (b'{"id": "x\xe9"}', "bad encoding", "not UTF-8: byte 0xe9"),
    "half a character": (
        b'{"conversations": [{"from": "human", "value": "\\ud83d"}, {"from": "gpt", "value": "x"}]}',
        "bad encoding",
        "holds a broken character",
    ),
}
LIMITS = ("data.max_length=128", "data.image.max_pixels=50000")


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found_with_its_line_and_nothing_else(check, name):
    row, kind, words = FAULTS[name]
    lines = [good_row(number) for number in range(8)]
    lines.insert(LINE - 1, row)
    found = check(lines, *LIMITS)
    assert (found.code, found.bad) == (1, [(LINE, kind)])
    fault = found.report["bad_rows"][0]
    assert (fault["file"], fault["row"]) == ("train.jsonl", LINE - 1)
    assert re.search(words, fault["reason"])
    assert fault["where"] in found.out
    assert found.report["rows"] == 9


def test_all_faults_together_are_all_found(check):
    lines = [row for row, _, _ in FAULTS.values()]
    expected = [(number, kind) for number, (_, kind, _) in enumerate(FAULTS.values(), len(lines))]
    found = check([*[good_row(number + 100) for number in range(len(lines) - 2)], good_row(1), *lines], *LIMITS)
    places = [(line, kind) for line, kind in found.bad if kind != "repeated id"]
    assert places == [(line, kind) for line, kind in expected if kind != "repeated id"]
    assert found.report["num_bad_rows"] == len(lines)


def test_check_finds_what_stops_the_training(check, folder, parts):
    rows = [row for row, _, _ in FAULTS.values()]
    found = check([good_row(1), *rows, good_row(2)], *LIMITS)
    config = load_config([f"data.path={folder / 'train.jsonl'}", *parts, *LIMITS])
    encoder, _ = build_encoder(config)
    index, findings = open_sizes(open_data(folder / "train.jsonl", config, encoder), 0)
    reported = [row for row in found.report["bad_rows"] if row["kind"] != "repeated id"]
    assert [row["row"] for row in reported] == findings.fault_rows
    assert [row["reason"] for row in reported] == [fault.reason for fault in findings.faults]
    assert found.report["trained"]["tokens"] == index.tokens.sum()
    assert found.report["trained"]["supervised"] == index.supervised.sum()


def test_a_bad_row_of_an_array_in_a_jsonl_file_has_its_line(check):
    rows = [json.dumps(good_row(number)) for number in range(4)]
    rows[2] = '{"id": "x", "image": "0.png", "conversations": [}'
    found = check([("[" + ",\n".join(rows) + "]").encode()])
    assert (found.code, found.bad) == (1, [(3, "not JSON")])


def test_an_array_that_is_never_closed_is_one_fault_of_the_file(check):
    found = check([b'[{"a": 1},', b'{"b": 2'])
    assert (found.code, found.bad) == (1, [(2, "not JSON")])
    assert "the array is never closed" in found.out


def test_a_file_of_an_unknown_dialect_names_every_row(check):
    found = check([{"foo": number} for number in range(3)])
    assert found.bad == [(line, "unknown dialect") for line in (1, 2, 3)]
    assert found.report["dialects"] == {"unknown": 3}


@pytest.mark.parametrize("workers", [0, 2])
def test_clean_data_gives_no_alarm(check, workers):
    lines = [good_row(number) for number in range(600)]
    lines[5] = {"id": "text", "conversations": [TEXT, ANSWER]}
    found = check(lines, f"data.workers={workers}")
    report = found.report
    assert (found.code, report["errors"], report["bad_rows"], report["long_rows"]) == (0, 0, [], [])
    assert report["rows"] == report["trained"]["rows"] == 600
    assert report["dialects"] == {"llava": 600}
    assert report["images"] == {"found": 599, "missing": 0, "broken": 0, "distinct": 2}
    assert sum(rows for _, _, rows in report["tokens"]["histogram"]) == 600
    assert "600 rows, no errors" in found.out


def test_rows_without_an_id_do_not_repeat_one(check):
    lines = [changed(id=..., conversations=[QUESTION, ANSWER | {"value": str(number)}]) for number in range(3)]
    found = check([*lines, changed(id=1)])  # 1 is also what messages call the second row
    assert found.code == 0


def test_repeated_ids_may_be_allowed_and_are_counted_still(check):
    found = check([good_row(1), good_row(1) | {"conversations": [QUESTION, ANSWER]}], "repeated_ids=allow")
    assert (found.code, found.report["errors"]) == (0, 0)
    assert [row["line"] for row in found.report["same_id"]] == [2]
    assert "1 id" in found.out


def test_repeated_conversations_are_listed_and_no_error(check):
    found = check([good_row(1), good_row(2), good_row(1) | {"id": "other"}])
    assert found.code == 0
    assert found.report["same_content"] == [
        {"file": "train.jsonl", "line": 3, "where": "train.jsonl:3", "first": "train.jsonl:1"}
    ]


@pytest.mark.parametrize(
    ("policy", "outcome", "code"),
    [
        ("error", "error: stops the run", 1),
        ("skip", "skip: left out", 0),
        ("fewer_tiles", "fewer_tiles: 5 -> 1 tiles", 0),
        ("trim_text", "trim_text: 1 of 2 turns left out", 0),
    ],
)
def test_long_rows_are_listed_with_what_the_policy_does(check, folder, policy, outcome, code):
    (folder / "square.png").write_bytes(png((56, 56)))
    turns = [QUESTION, ANSWER, TEXT, ANSWER | {"value": "wok " * 8}]
    row = {"id": "long", "image": "square.png", "conversations": turns}
    found = check([good_row(0), row], "data.max_length=62", f"data.on_too_long={policy}")
    assert [(long["line"], long["outcome"]) for long in found.report["long_rows"]] == [(2, outcome)]
    assert found.report["long_rows"][0]["tokens"] == found.report["tokens"]["max"] > 62
    assert found.code == code
    assert found.report["trained"]["rows"] == (1 if policy in ("error", "skip") else 2)


def test_the_rules_are_compared_with_one_another(check, folder):
    (folder / "small.png").write_bytes(png((40, 20)))
    rows = check([shows("small.png") | {"id": str(number)} for number in range(3)]).report["tokens_by_rule"]
    assert rows["area"]["sum"] < rows["dynamic"]["sum"]


def test_embedded_pictures_are_checked(check):
    good, cut = (f"data:image/png;base64,{base64.b64encode(raw).decode()}" for raw in (png(), png()[:900]))
    found = check([shows(good), shows(cut) | {"id": "cut"}])
    assert found.bad == [(2, "truncated image")]
    assert found.report["images"] == {"found": 1, "missing": 0, "broken": 1, "distinct": 2}


def test_a_row_with_two_bad_pictures_has_two_faults(check):
    row = shows(["gone.png", "cut.png"])
    row["conversations"] = [QUESTION | {"value": "<image><image>?"}, ANSWER]
    found = check([good_row(0), row])
    assert found.bad == [(2, "missing image"), (2, "truncated image")]
    assert found.report["num_bad_rows"] == 1


def test_each_set_of_a_meta_file_is_checked_under_its_own_root(check, folder, tmp_path):
    other = tmp_path / "other"
    (other / "photos").mkdir(parents=True)
    (other / "photos" / "0.png").write_bytes(png())
    (other / "more.jsonl").write_text(json.dumps(good_row(0)) + "\n" + json.dumps(shows("1.png")) + "\n")
    (folder / "first.jsonl").write_text(json.dumps(good_row(0)) + "\n")
    meta = {
        "first": {"root": str(folder), "annotation": str(folder / "first.jsonl")},
        "more": {"root": str(other / "photos"), "annotation": str(other / "more.jsonl"), "max_dynamic_patch": 1},
    }
    found = check([meta], name="meta.json")
    assert [row["where"] for row in found.report["bad_rows"]] == ["more.jsonl:2"]
    assert found.report["rows"] == 3
    assert found.report["tiles"]["min"] == 1


def test_text_of_the_data_is_escaped_in_the_page(check):
    evil = "<script>alert(1)</script>"
    found = check([good_row(0), changed(id=evil), shows(f"{evil}.png"), changed(conversations=[{"from": evil}])])
    assert evil not in found.html
    assert "&lt;script&gt;" in found.html
    assert "http://" not in found.html


def test_text_of_the_data_is_no_markup_in_the_terminal(check):
    assert "[red]gone[/red].png" in check([good_row(0), shows("[red]gone[/red].png")]).out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("data.pth=x",), "data.pth: no such key"),
        (("repeated_ids=maybe",), "set it to error or allow"),
        (("model.llm.path=null",), "names no weights"),
        (("model.tiles.size=42", "model.projector.shuffle=2"), "does not divide the 9 patches"),
    ],
)
def test_a_fault_of_the_configuration_is_no_fault_of_the_data(check, arguments, words):
    found = check([good_row(0)], *arguments)
    assert found.code == 2
    assert words in found.err


def test_a_report_that_cannot_be_written_is_an_error(run_cli, parts, folder):
    (folder / "train.jsonl").write_text(json.dumps(good_row(0)))
    finished = run_cli("check", f"data.path={folder}/train.jsonl", f"out={folder}/0.png", *parts)
    assert finished.code == 2
    assert "0.png: File exists. Name a folder" in finished.err


def test_a_missing_file_is_an_error_of_the_command(run_cli, parts, tmp_path):
    finished = run_cli("check", f"data.path={tmp_path / 'gone.jsonl'}", *parts)
    assert finished.code == 2
    assert "no such file" in finished.err


def test_the_encoder_without_weights_is_that_of_the_model(toys):
    config = load_config(toys.arguments())
    encoder, tokenizer = build_encoder(config)
    whole = build_model(config)
    assert encoder.settings == whole.encoder.settings
    assert (encoder.template, encoder.context_id) == (whole.encoder.template, whole.encoder.context_id)
    assert len(tokenizer) == len(whole.tokenizer)


def test_bins_cover_everything_in_round_steps():
    counts = Counter({37: 10, 95: 500, 410: 3, 9000: 1})
    ranges = bins([counts])
    assert ranges[0][0] <= 37
    assert ranges[-1][1] == 9000
    assert all(first[1] + 1 == second[0] for first, second in pairwise(ranges))
    assert (quantile(counts, 0.5), quantile(counts, 1.0)) == (95, 9000)
