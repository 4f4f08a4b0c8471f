"""Large rows of a table come in small batches, whatever the file's own row groups are."""

from pathlib import Path

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest

from vlm_tune.data.rows import table as rows_table
from vlm_tune.data.rows.rows import open_rows

LIMIT = 1 << 12  # bytes of a batch
SIZES = {
    "even": [500] * 300,
    "one is huge": [10] * 200 + [9000] + [10] * 99,
    "the last are large": [1] * 260 + [2000] * 40,
    "each is larger than a batch": [5000] * 12,
}


@pytest.fixture(autouse=True)
def _small_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLM_TUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(rows_table, "_BATCH_BYTES", LIMIT)


def batches(folder: Path) -> list[pa.RecordBatch]:
    (made,) = (folder / "cache" / "rows").glob("*.arrow")
    return list(pa.ipc.open_stream(pa.memory_map(str(made))))


@pytest.mark.parametrize("is_dictionary", [True, False], ids=["dictionary", "plain"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_rows_of_one_row_group_are_read_by_bytes(tmp_path: Path, sizes: list[int], is_dictionary: bool) -> None:
    records = [{"id": n, "image": {"bytes": bytes([n % 2]) * size, "path": None}} for n, size in enumerate(sizes)]
    table = pa.Table.from_pylist(records)
    pa.parquet.write_table(table, tmp_path / "a.parquet", use_dictionary=is_dictionary, row_group_size=1 << 20)
    rows = open_rows(tmp_path / "a.parquet")
    assert [rows[number] for number in range(len(rows))] == records
    made = batches(tmp_path)
    assert sum(batch.num_rows for batch in made) == len(records)
    assert len(made) >= min(len(records), table.nbytes // LIMIT // 8)
    # once a batch was far too large, those behind it are smaller
    too_large = [batch.num_rows for batch in made if batch.nbytes > 4 * LIMIT and batch.num_rows > 1]
    assert too_large == sorted(set(too_large), reverse=True)


def test_small_rows_stay_in_large_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("VLM_TUNE_CACHE", str(tmp_path / "cache"))
    pa.parquet.write_table(pa.table({"id": range(5000)}), tmp_path / "a.parquet", row_group_size=4000)
    assert open_rows(tmp_path / "a.parquet")[4999] == {"id": 4999}
    assert [batch.num_rows for batch in batches(tmp_path)] == [1024, 1024, 1024, 928, 1000]


def test_an_empty_row_group_holds_nothing(tmp_path: Path) -> None:
    table = pa.table({"id": [1, 2]})
    with pa.parquet.ParquetWriter(tmp_path / "a.parquet", table.schema) as writer:
        for part in (table, table.slice(0, 0), table):
            writer.write_table(part)
    rows = open_rows(tmp_path / "a.parquet")
    assert [rows[number]["id"] for number in range(len(rows))] == [1, 2, 1, 2]
