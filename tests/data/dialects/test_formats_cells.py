"""JSON in the cells of tables is the list or object that it is; JSON in an answer stays text."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import openpyxl
import pyarrow as pa
import pyarrow.parquet
import pytest

from vlm_tune.data.dialects.dialects import parse_record, recognise, recognise_rows
from vlm_tune.data.rows.rows import Rows, open_rows
from vlm_tune.data.sample import Picture, Sample
from vlm_tune.errors import DataError

HUMAN, GPT = {"from": "human", "value": "<image>\nColour?"}, {"from": "gpt", "value": '{"colour": ["green"]}'}
USER, ASSISTANT = {"role": "user", "content": "Colour?"}, {"role": "assistant", "content": "[1, 2]"}
AGENT = [
    {"from": "system", "value": '{"name": "search", "description": "finds"}'},
    {"from": "user", "value": "Rain?"},
    {"from": "assistant", "value": "No."},
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLM_TUNE_CACHE", str(tmp_path / "cache"))


def table(folder: Path, kind: str, *records: dict[str, str]) -> Rows:
    """Write records of text as a table of a kind, and open it."""
    path = folder / f"a.{kind}"
    lines = [list(records[0]), *(list(record.values()) for record in records)]
    if kind == "xlsx":
        book = openpyxl.Workbook()
        for line in lines:
            book.worksheets[0].append(line)
        book.save(path)
    elif kind == "parquet":
        pa.parquet.write_table(pa.Table.from_pylist(list(records)), path)
    else:
        with path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, delimiter="\t" if kind == "tsv" else ",").writerows(lines)
    return open_rows(path)


def read(rows: Rows) -> Sample:
    return parse_record(rows[0], recognise_rows(rows), rows.where(0), 0)


def texts(sample: Sample) -> list[str]:
    return [message.text for message in sample.messages]


@pytest.mark.parametrize("written", [json.dumps, repr], ids=["json", "python"])
@pytest.mark.parametrize("kind", ["csv", "tsv", "xlsx", "parquet"])
def test_turns_in_a_cell_are_a_list(tmp_path: Path, kind: str, written: Any) -> None:
    rows = table(tmp_path, kind, {"id": "1", "image": "p/a.png", "conversations": written([HUMAN, GPT])})
    sample = read(rows)
    assert texts(sample) == ["\nColour?", GPT["value"]]
    assert sample.pictures == (Picture("p/a.png"),)


@pytest.mark.parametrize(
    ("record", "wanted"),
    [
        ({"messages": json.dumps([USER, ASSISTANT])}, ["Colour?", "[1, 2]"]),
        ({"conversation": json.dumps([{"input": "Q", "output": "{}"}])}, ["Q", "{}"]),
        ({"instruction": "Q", "input": "", "output": "[]", "history": '[["q", "{1}"]]'}, ["q", "{1}", "Q\n", "[]"]),
        ({"instruction": '["Sort"]', "input": "{}", "output": '{"a": 1}', "history": ""}, ['["Sort"]\n{}', '{"a": 1}']),
        ({"conversations": {"from": ["human", "gpt"], "value": ["Q", "A"]}}, ["Q", "A"]),  # datasets' Sequence({...})
        ({"messages": {"role": ["user", "assistant"], "content": ["Q", "[A]"]}}, ["Q", "[A]"]),
    ],
)
def test_the_fields_that_are_lists_are_read_as_lists_and_no_other(record: dict[str, Any], wanted: list[str]) -> None:
    assert texts(parse_record(record, recognise(record), "a.csv:2", 0)) == wanted


@pytest.mark.parametrize(
    ("image", "paths"),
    [
        ('["a.png", "b.png"]', ["a.png", "b.png"]),
        ('{"path": "a.png", "bytes": null}', ["a.png"]),
        ("[{'path': 'a.png'}, {'path': 'b.png'}]", ["a.png", "b.png"]),
        ("[1].png", ["[1].png"]),
        ("{1}.png", ["{1}.png"]),
    ],
)
def test_pictures_in_a_cell(tmp_path: Path, image: str, paths: list[str]) -> None:
    turns = json.dumps([{"role": "user", "content": "<image>" * len(paths)}, ASSISTANT])
    sample = read(table(tmp_path, "csv", {"images": image, "messages": turns}))
    assert [picture.path for picture in sample.pictures] == paths


@pytest.mark.parametrize("name", ["messages", "conversations", "conversation", "history"])
@pytest.mark.parametrize("text", ["[{'a': array([1])}]", '[{"from": "human"', "hello"])
def test_text_in_place_of_turns_leads_out(tmp_path: Path, name: str, text: str) -> None:
    rows = table(tmp_path, "csv", {"id": "7", "instruction": "Q", "output": "A", name: text})
    reason = f'"{name}" is text, not a list of turns. It is neither JSON nor a Python list, and begins with {text!r}. '
    wanted = re.escape(f'a.csv:2 (id "7"): {reason}Write the list by json.dumps, or the rows as .jsonl.')
    with pytest.raises(DataError, match=f"^{wanted}$"):
        parse_record(rows[0], "auto", rows.where(0), 0)


@pytest.mark.parametrize(
    ("turns", "name"),
    [
        (AGENT, "msagent"),
        ([{"from": "user", "value": "Q"}, {"from": "assistant", "value": "A"}], "sharegpt"),
        ([{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}], "sharegpt"),
    ],
)
def test_turns_as_text_are_msagents_only_with_its_tools(turns: list[dict[str, str]], name: str) -> None:
    assert recognise({"conversations": json.dumps(turns)}) == name
    assert recognise({"conversations": repr(turns)}) == name


def test_a_function_of_the_users_own_gets_the_text(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("import json\ndef read(row): return {'messages': json.loads(row['messages'])}\n")
    record = {"messages": json.dumps([USER, ASSISTANT])}
    sample = parse_record(record, f"{tmp_path}/own.py:read", "a.csv:2", 0)
    assert texts(sample) == ["Colour?", "[1, 2]"]
