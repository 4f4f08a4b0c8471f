"""Every container gives the same rows, each with its true place; every fault of a file is an error of its own."""

import gzip
import io
import json
import os
import pickle
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import openpyxl
import pyarrow as pa
import pyarrow.parquet
import pytest

from vlm_tune.data import rows_text
from vlm_tune.data.rows import Rows, open_rows
from vlm_tune.data.rows_cache import content_key
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


# Compression


@pytest.mark.parametrize("pack", ["gz", "zst"])
def test_compressed_rows_name_the_compressed_file(tmp_path: Path, pack: str) -> None:
    with pa.output_stream(str(tmp_path / f"a.jsonl.{pack}"), compression={"gz": "gzip", "zst": "zstd"}[pack]) as file:
        file.write("\n".join(LINES).encode())
    rows = open_rows(tmp_path / f"a.jsonl.{pack}")
    assert everything(rows) == RECORDS
    assert rows.where(2) == f"a.jsonl.{pack}:3"


def test_a_compressed_file_that_is_cut_off(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl.gz", gzip.compress("\n".join(LINES).encode())[:-20])
    with pytest.raises(DataError, match=r"a.jsonl.gz: cannot be unpacked: .* Copy or download it again."):
        open_rows(path)
    assert not list((tmp_path / "cache").rglob("*jsonl")), "half of a copy was left behind"


# Tables


@pytest.mark.parametrize(("name", "delimiter"), [("a.csv", ","), ("a.tsv", "\t")])
def test_csv_cells_stay_text(tmp_path: Path, name: str, delimiter: str) -> None:
    lines = [["id", "caption"], ["007", '"two\nlines ""quoted"""'], ["1e3", ""], ["NA", "菜"]]
    rows = open_rows(write(tmp_path / name, "\ufeff" + "\n".join(delimiter.join(line) for line in lines)))
    wanted = [("007", 'two\nlines "quoted"'), ("1e3", ""), ("NA", "菜")]
    assert everything(rows) == [{"id": number, "caption": caption} for number, caption in wanted]
    assert places(rows) == [f"{name}:{number}" for number in (2, 3, 4)]


def test_xlsx(tmp_path: Path) -> None:
    book = openpyxl.Workbook()
    for line in (["id", "question", "answer"], [7, "Q", None], [None, None, None], ["x", "R", 2.5], [None, "", None]):
        book.worksheets[0].append(line)
    book.create_sheet("empty")
    book.save(tmp_path / "a.xlsx")
    rows = open_rows(tmp_path / "a.xlsx")
    assert rows[0] == {"id": "7", "question": "Q", "answer": ""}
    assert rows[2] == {"id": "x", "question": "R", "answer": "2.5"}
    assert (len(rows), rows.where(2)) == (3, "a.xlsx:4")


def test_xlsx_with_two_sheets_is_refused(tmp_path: Path) -> None:
    book = openpyxl.Workbook()
    book.worksheets[0].append(["a"])
    book.create_sheet("more").append(["a"])
    book.save(tmp_path / "a.xlsx")
    with pytest.raises(DataError, match=r"a.xlsx: 2 sheets hold rows. Keep one sheet in a file."):
        open_rows(tmp_path / "a.xlsx")


@pytest.mark.parametrize("suffix", ["parquet", "arrow", "stream.arrow", "feather"])
def test_columnar_files(tmp_path: Path, suffix: str) -> None:
    records = [{"id": n, "image": {"bytes": b"\x89PNG", "path": None}, "tags": ["a", str(n)]} for n in range(3000)]
    table, path = pa.Table.from_pylist(records), tmp_path / f"a.{suffix}"
    if suffix == "parquet":
        pa.parquet.write_table(table, path, row_group_size=700)
    else:
        make = pa.ipc.new_stream if suffix == "stream.arrow" else pa.ipc.new_file
        with make(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=700)
    rows = open_rows(path)
    assert len(rows) == 3000
    assert [rows[number] for number in (0, 699, 700, 2999)] == [records[number] for number in (0, 699, 700, 2999)]
    assert rows.where(699) == f"a.{suffix}:700"
    assert pickle.loads(pickle.dumps(rows))[1] == records[1]


# Folders


def save_to_disk(folder: Path) -> None:
    """Write what datasets.Dataset.save_to_disk writes, in two shards."""
    folder.mkdir(parents=True)
    names = [f"data-0000{number}-of-00002.arrow" for number in range(2)]
    for number, name in enumerate(names):
        table = pa.Table.from_pylist(RECORDS[:3] if number == 0 else RECORDS[3:])
        with pa.ipc.new_stream(str(folder / name), table.schema) as writer:
            writer.write_table(table)
    write(folder / "state.json", json.dumps({"_data_files": [{"filename": name} for name in names]}))
    write(folder / "dataset_info.json", "{}")


def test_a_folder_of_save_to_disk(tmp_path: Path) -> None:
    save_to_disk(tmp_path / "set")
    rows = open_rows(tmp_path / "set")
    assert everything(rows) == RECORDS
    assert rows.where(3) == "data-00001-of-00002.arrow:1"


def test_a_folder_of_splits_names_them(tmp_path: Path) -> None:
    save_to_disk(tmp_path / "set" / "train")
    write(tmp_path / "set" / "dataset_dict.json", '{"splits": ["train"]}')
    with pytest.raises(DataError, match=r"set: holds the splits train. Name one: set/train."):
        open_rows(tmp_path / "set")


def test_a_saved_set_that_lacks_a_file(tmp_path: Path) -> None:
    save_to_disk(tmp_path / "set")
    (tmp_path / "set" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(DataError, match=r"set: lacks its file \['data-00001-of-00002.arrow'\]."):
        open_rows(tmp_path / "set")


@pytest.mark.parametrize("layout", ["", "data"])
def test_a_folder_of_parquet_shards(tmp_path: Path, layout: str) -> None:
    folder = tmp_path / "set" / layout
    folder.mkdir(parents=True)
    for number in range(2):
        table = pa.Table.from_pylist(RECORDS[:3] if number == 0 else RECORDS[3:])
        pa.parquet.write_table(table, folder / f"train-0000{number}-of-00002.parquet")
    write(tmp_path / "set" / "README.md", "x")
    assert everything(open_rows(tmp_path / "set")) == RECORDS


def test_a_folder_with_two_sets_is_refused(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    for name in ("train.jsonl", "test.jsonl"):
        write(tmp_path / "set" / name, LINES[0])
    with pytest.raises(DataError, match=r"holds more than one data set: test.jsonl, train.jsonl. Name one file, or"):
        open_rows(tmp_path / "set")


def test_a_folder_without_data(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    with pytest.raises(DataError, match=r"set: holds no data file. Known: .jsonl"):
        open_rows(tmp_path / "set")


def test_a_pattern_reads_its_files_in_order(tmp_path: Path) -> None:
    write(tmp_path / "train-1.jsonl", "\n".join(LINES[2:]))
    write(tmp_path / "train-0.jsonl", "\n".join(LINES[:2]))
    write(tmp_path / "val.jsonl", "{}")
    rows = open_rows(tmp_path / "train-*.jsonl", tmp_path / "index")
    assert everything(rows) == RECORDS
    assert rows.where(2) == "train-1.jsonl:1"
    assert everything(pickle.loads(pickle.dumps(rows))) == RECORDS


def test_datasets_itself_writes_what_is_read(tmp_path: Path) -> None:
    """Run in a process of its own: importing datasets takes seconds and keeps threads."""
    program = f"import datasets; datasets.Dataset.from_list({RECORDS!r}).save_to_disk({str(tmp_path / 'set')!r})"
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, timeout=120)
    assert everything(open_rows(tmp_path / "set")) == RECORDS


# Webdataset


def write_shard(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode, format=tarfile.PAX_FORMAT) as archive:  # type: ignore[call-overload]
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


MEMBERS = {
    "train/01.jpg": b"\xff\xd8\xff1",
    "train/01.json": b'{"id": "one", "image": "old.jpg", "caption": "A cat."}',
    "train/02.a.png": b"\x89PNG2",
    "train/02.b.png": b"\x89PNG3",
    "train/02.txt": "Zwei Bilder — 菜".encode(),
    "train/" + "long" * 60 + ".cls": b"3",
}


@pytest.mark.parametrize(("name", "mode"), [("a.tar", "w"), ("a.tar.gz", "w:gz"), ("a.tgz", "w:gz")])
def test_a_webdataset_shard(tmp_path: Path, name: str, mode: str) -> None:
    rows = open_rows(write_shard(tmp_path / name, MEMBERS, mode))
    one = {"id": "one", "images": [{"bytes": b"\xff\xd8\xff1", "path": "train/01.jpg"}], "caption": "A cat."}
    pictures = [{"bytes": b"\x89PNG2", "path": "train/02.a.png"}, {"bytes": b"\x89PNG3", "path": "train/02.b.png"}]
    two = {"id": "train/02", "images": pictures, "caption": "Zwei Bilder — 菜"}
    assert everything(rows) == [one, two, {"id": "train/" + "long" * 60}]
    assert places(rows)[:2] == [f"{name}:train/01", f"{name}:train/02"]
    assert everything(pickle.loads(pickle.dumps(rows)))[0] == one


@pytest.mark.parametrize(
    ("members", "text"),
    [
        ({"1.json": b"{"}, "a.tar:1: not JSON: "),
        ({"1.json": b"[]"}, "a.tar:1: the sample's .json is not an object. It must be {...}."),
        ({"1.txt": b"\xe9"}, "a.tar:1: not UTF-8: byte 0xe9 at column 1. Save the text as UTF-8."),
    ],
)
def test_a_faulty_sample_of_a_shard(tmp_path: Path, members: dict[str, bytes], text: str) -> None:
    with pytest.raises(DataError, match="^" + re.escape(text)):
        open_rows(write_shard(tmp_path / "a.tar", members))[0]


def test_a_shard_that_is_cut_off(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "a.tar", {"1.jpg": b"x" * 5000})
    write(path, path.read_bytes()[:3000])
    with pytest.raises(DataError, match=r"a.tar: (the archive is cut off|not a tar file, or damaged)"):
        open_rows(path)


# Scale


def test_a_large_file_is_scanned_in_blocks(tmp_path: Path) -> None:
    """A line end at every place around the end of a block is found."""
    rng = np.random.default_rng(0)
    lines = [json.dumps({"n": number, "x": "y" * int(rng.integers(0, 3000))}) for number in range(20_000)]
    rows = open_rows(write(tmp_path / "a.jsonl", "\n".join(lines)))
    assert len(rows) == 20_000
    assert all(rows[number]["n"] == number for number in range(0, 20_000, 37))
