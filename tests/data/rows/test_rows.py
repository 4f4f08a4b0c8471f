"""JSON text gives its rows with their true lines; every fault of a file is an error. Others: test_rows_containers."""

import json
import os
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vlm_tune.data.rows import text as rows_text
from vlm_tune.data.rows.cache import content_key
from vlm_tune.data.rows.rows import Rows, open_rows
from vlm_tune.errors import DataError

RECORDS = [{"id": str(number), "text": f'Zeile "{number}" \\ [x], {{y}} 菜\n'} for number in range(5)]
LINES = [json.dumps(record, ensure_ascii=number % 2 == 0) for number, record in enumerate(RECORDS)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLM_TUNE_CACHE", str(tmp_path / "cache"))


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def everything(rows: Rows) -> list[dict[str, object]]:
    return [rows[number] for number in range(len(rows))]


def places(rows: Rows) -> list[str]:
    return [rows.where(number) for number in range(len(rows))]


# Text


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        ("\n".join(LINES), [1, 2, 3, 4, 5]),
        ("\n".join(LINES) + "\n", [1, 2, 3, 4, 5]),
        ("\r\n".join(LINES) + "\r\n", [1, 2, 3, 4, 5]),
        ("\ufeff" + "\n".join(LINES), [1, 2, 3, 4, 5]),
        ("\n \n" + "\n\n".join(LINES) + "\n\t\n", [3, 5, 7, 9, 11]),
        ("  " + "\n  ".join(LINES), [1, 2, 3, 4, 5]),
        ("[" + ",\n".join(LINES) + "]", [1, 2, 3, 4, 5]),
        ("\ufeff\n[\n" + ",\n".join(LINES) + "\n]\n", [3, 4, 5, 6, 7]),
        (json.dumps(RECORDS, indent=2), [2, 6, 10, 14, 18]),
    ],
    ids=["plain", "last line end", "crlf", "bom", "blank lines", "indented", "array", "bom array", "pretty array"],
)
@pytest.mark.parametrize("name", ["train.jsonl", "train.json"])
@pytest.mark.parametrize("keeps_index", [False, True])
def test_json_text(tmp_path: Path, content: str, lines: list[int], name: str, keeps_index: bool) -> None:
    rows = open_rows(write(tmp_path / name, content), tmp_path / "index" if keeps_index else None)
    assert everything(rows) == RECORDS
    assert places(rows) == [f"{name}:{line}" for line in lines]


def test_rows_of_an_array_on_one_line_are_told_apart(tmp_path: Path) -> None:
    rows = open_rows(write(tmp_path / "a.json", json.dumps(RECORDS)))
    assert everything(rows) == RECORDS
    assert places(rows)[:2] == ["a.json:1", "a.json:1 row 2"]


def test_one_object_in_a_json_file_is_one_row(tmp_path: Path) -> None:
    rows = open_rows(write(tmp_path / "a.json", json.dumps(RECORDS[0], indent=2)))
    assert everything(rows) == RECORDS[:1]
    assert rows.where(0) == "a.json:1"


@pytest.mark.parametrize("block", [1, 2, 3, 7, 64])
@pytest.mark.parametrize(
    "make", [lambda: "\n\n".join(LINES), lambda: json.dumps(RECORDS), lambda: json.dumps(RECORDS, indent=1)]
)
def test_blocks_may_end_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int, make: Any) -> None:
    path = write(tmp_path / "a.json", make())
    whole = places(open_rows(path))
    monkeypatch.setattr(rows_text, "BLOCK", block * 16)
    monkeypatch.setattr(rows_text, "ARRAY_BLOCK", block)
    rows = open_rows(path)
    assert (everything(rows), places(rows)) == (RECORDS, whole)


def test_a_number_out_of_range_ends_an_iteration(tmp_path: Path) -> None:
    rows = open_rows(write(tmp_path / "a.jsonl", "\n".join(LINES)))
    with pytest.raises(IndexError, match="row 5 of 5"):
        rows[5]
    with pytest.raises(IndexError, match="row -1 of 5"):
        rows[-1]


def test_rows_cost_offsets_and_not_objects(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", (LINES[0] + "\n") * 1000)
    assert len(pickle.dumps(open_rows(path))) < 9000  # 8 bytes a row
    assert len(pickle.dumps(open_rows(path, tmp_path / "index"))) < 500  # the offsets are found on disk again


def test_an_index_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.jsonl", "\n".join(LINES))
    open_rows(path, tmp_path / "index")
    monkeypatch.setattr(rows_text, "_scan_lines", None)
    assert everything(open_rows(path, tmp_path / "index")) == RECORDS


def test_a_changed_file_is_indexed_again(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"a": 1}\n{"a": 2}\n')
    times = (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    before = content_key(path)
    open_rows(path, tmp_path / "index")
    write(path, '{"a": 1, "b": 2}\n ')  # as long as before, and with its time
    os.utime(path, ns=times)
    assert content_key(path) != before
    assert everything(open_rows(path, tmp_path / "index")) == [{"a": 1, "b": 2}]


@pytest.mark.parametrize(
    ("content", "number", "text"),
    [
        ('{"a": 1}\n\n{"a" 2}\n', 1, "a.jsonl:3: not JSON: Expecting ':' delimiter at column 6. Write one JSON object"),
        ('{"a": 1}\n{"a": 2\n{"a": 3}', 1, "a.jsonl:2: not JSON: Expecting ',' delimiter at column 8."),
        ('{"a": 1}\n[1]\n', 1, "a.jsonl:2: not an object but a list. Each row must be {...}."),
        ("3\n", 0, "a.jsonl:1: not an object but a number."),
        ("null\n", 0, "a.jsonl:1: not an object but null."),
        (b'{"a": 1}\n{"a": "\xe9"}\n', 1, "a.jsonl:2: not UTF-8: byte 0xe9 at column 8. Save the file as UTF-8."),
        ("[" * 100_000 + "\n1\n", 0, "a.jsonl:1: not JSON: the array is never closed."),
        ('{"a": ' * 100_000 + "\n1\n", 0, "a.jsonl:1: not JSON: nested too deep at column 1. Remove this row."),
        ('{"a": ' + "9" * 5000 + "}\n", 0, "a.jsonl:1: not JSON: Exceeds the limit"),
        (
            '[{"a": 1},\n{"a" 2},\n{"a": 3}]',
            1,
            "a.jsonl:2: not JSON: Expecting ':' delimiter at column 6. Mend this row",
        ),
        ('[{"a": 1}\n{"a": 2}]', 0, "a.jsonl:2: not JSON: Extra data at column 1."),
        ('[{"a": 1},\n\n{"a": "x},\n{"a": 3}]', 1, "a.jsonl:3: not JSON: the array is never closed."),
        ('[{"a": 1},\n{"a": 2}},\n{"a": 3}]', 1, "a.jsonl:2: not JSON: the array ends here, but the file goes on."),
        ('[{"a": 1},\n{"a": [2},\n{"a": 3}]', 1, "a.jsonl:2: not JSON: the array is never closed."),
        ('[{"a": 1},\n{"a": 2}]\nx', 0, "a.jsonl:2: not JSON: the array ends here, but the file goes on."),
        ('[{"a": 1},\n]', 1, "a.jsonl:2: not JSON: Expecting value at column 1. Mend this row of the array."),
        ('[{"a": 1},\n3]', 1, "a.jsonl:2: not an object but a number."),
        ("{\n  'a': 1\n}", 0, "a.json:2: not JSON: Expecting property name enclosed in double quotes at column 3."),
    ],
)
def test_a_faulty_row_names_its_line(tmp_path: Path, content: str | bytes, number: int, text: str) -> None:
    path = write(tmp_path / text.split(":")[0], content)
    with pytest.raises(DataError, match="^" + re.escape(text)):
        open_rows(path)[number]


def test_a_faulty_row_of_an_array_leaves_the_others_alone(tmp_path: Path) -> None:
    rows = open_rows(write(tmp_path / "a.jsonl", '[{"a": 1},\n{"a": "x", "b: 2"},\n{"a": 3}]'))
    with pytest.raises(DataError, match=r"a.jsonl:2: not JSON"):
        rows[1]
    assert rows[2] == {"a": 3}


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("a.jsonl", "", "a.jsonl: holds no rows: the file is empty."),
        ("a.jsonl", "\n \n", "a.jsonl: holds no rows. Write one JSON object per line."),
        ("a.jsonl", "\ufeff", "a.jsonl: holds no rows."),
        ("a.json", "[ ]", "a.json: holds no rows."),
        ("a.jsonl", "{}".encode("utf-16"), "a.jsonl:1: not UTF-8 but UTF-16. Save the file as UTF-8."),
        ("a.txt", "x", "a.txt: unknown kind of file. Known: .jsonl, .json, "),
        ("a.jsonl.gz", "x", "a.jsonl.gz: cannot be unpacked: "),
        ("a.jsonl.zst", "x", "a.jsonl.zst: cannot be unpacked: "),
        ("a.csv", "a,b\n1,2\n1\n", 'a.csv:3: 1 cells, but the header has 2. Quote cells that hold "," or line ends.'),
        ("a.csv", b"a,b\n1,2\n1,\xe9\n", "a.csv:3: not UTF-8: byte 0xe9 at column 3. Save the file as UTF-8."),
        ("a.csv", "a,a\n1,2\n", "a.csv:1: the header ['a', 'a'] has an empty or repeated name."),
        ("a.csv", "a,b\n", "a.csv: holds no rows."),
        ("a.parquet", "x", "a.parquet: not a parquet file, or damaged: "),
        ("a.arrow", "x", "a.arrow: not an Arrow file, or damaged: "),
        ("a.xlsx", "x", "a.xlsx: not an xlsx file, or damaged: "),
        ("a.tar", "x", "a.tar: not a tar file, or damaged: "),
        ("a.tar", b"\0" * 10240, "a.tar: holds no rows."),
    ],
)
def test_a_faulty_file(tmp_path: Path, name: str, content: str | bytes, text: str) -> None:
    with pytest.raises(DataError, match="^" + re.escape(text)):
        open_rows(write(tmp_path / name, content))


def test_a_file_that_becomes_shorter(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", "\n".join(LINES))
    rows = open_rows(path)
    write(path, LINES[0])
    with pytest.raises(DataError, match=r"a.jsonl: became shorter while it was read."):
        rows[4]


def test_a_missing_file_names_what_is_near(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", "{}")
    with pytest.raises(DataError, match=r"tain.jsonl: no such file: did you mean train.jsonl\?"):
        open_rows(tmp_path / "tain.jsonl")
    with pytest.raises(DataError, match=r"no such folder. .* holds train.jsonl."):
        open_rows(tmp_path / "else" / "x.jsonl")
    with pytest.raises(DataError, match=r"no file matches this pattern."):
        open_rows(tmp_path / "val-*.jsonl")


# Scale


def test_a_large_file_is_scanned_in_blocks(tmp_path: Path) -> None:
    """A line end at every place around the end of a block is found."""
    rng = np.random.default_rng(0)
    lines = [json.dumps({"n": number, "x": "y" * int(rng.integers(0, 3000))}) for number in range(20_000)]
    rows = open_rows(write(tmp_path / "a.jsonl", "\n".join(lines)))
    assert len(rows) == 20_000
    assert all(rows[number]["n"] == number for number in range(0, 20_000, 37))
