"""Compressed files, tables, folders and shards give the same rows, each with its true place."""

import gzip
import io
import json
import pickle
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import openpyxl
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest

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
    elif suffix == "feather":
        pa.feather.write_feather(table, path, compression="lz4", chunksize=700)
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
