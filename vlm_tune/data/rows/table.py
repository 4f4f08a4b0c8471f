"""Rows of tables: csv, tsv, xlsx, parquet and Arrow. All become Arrow files, memory-mapped and never loaded whole."""

import csv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from vlm_tune.data.rows.cache import derived
from vlm_tune.data.rows.features import cell_decoders
from vlm_tune.errors import DataError

SPREADSHEETS = (".csv", ".tsv", ".xlsx")  # the header is row 1, as every editor shows it
TABLES = (*SPREADSHEETS, ".parquet", ".arrow", ".feather")
_BATCH = 1024  # rows
_BATCH_BYTES = 1 << 24  # batches of large rows hold fewer rows
_READ_BYTES = 1 << 16  # read from a parquet column at a time; by default, pyarrow reads the whole row group's column
_MAX_ROW = 1 << 26  # bytes of a csv row: cells may hold base64 pictures


class TableRows:
    """Read single rows of a table; `where` counts as a spreadsheet does (parquet and Arrow: from 1, no header)."""

    def __init__(self, path: Path, name: str, folder: Path) -> None:
        """Open the table; everything but .arrow is converted once, into `folder` (.feather is mostly compressed).

        Raise DataError for a damaged file, rows of unequal length and text that is not UTF-8.
        """
        suffix = path.suffix.lower()
        self.name = name
        self._first_row = 2 if suffix in SPREADSHEETS else 1
        self._path = path
        if suffix != ".arrow":
            self._path = derived(path, folder, f"{path.name}.arrow", lambda target: _convert(path, name, target))
        self._open()
        self._ends = np.cumsum([batch.num_rows for batch in self._batches])
        if len(self) == 0:
            raise DataError("holds no rows.", name)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> dict[str, object]:
        """Read one row as plain Python values; pictures stay encoded bytes.

        Raise DataError for a cell that contradicts its column's feature, or whose feature is not supported.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        number = int(np.searchsorted(self._ends, index, side="right"))
        batch = self._batches[number]
        row: dict[str, object] = batch.slice(index - int(self._ends[number]) + batch.num_rows, 1).to_pylist()[0]
        for column, decode in self._decoders.items():
            try:
                row[column] = decode(row[column])
            except ValueError as error:
                raise DataError(f'"{column}" {error}.', self.where(index)) from error
        return row

    def where(self, index: int) -> str:
        """Return 'table.csv:17'."""
        return f"{self.name}:{index + self._first_row}"

    def __getstate__(self) -> dict[str, object]:
        """Drop the mapped table: another process maps it again, at no cost."""
        return self.__dict__ | {"_batches": None, "_decoders": None}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._open()

    def _open(self) -> None:
        self._batches = list(_batches(self._path, self.name))
        self._decoders = cell_decoders(self._batches[0].schema) if self._batches else {}


def _batches(path: Path, name: str) -> Iterator[pa.RecordBatch]:
    """Memory-map an Arrow file or stream (Hugging Face writes streams), one batch at a time."""
    try:
        source = pa.memory_map(str(path))
        try:
            reader = pa.ipc.open_file(source)
        except pa.ArrowInvalid:
            source.seek(0)
            yield from pa.ipc.open_stream(source)
        else:
            yield from (reader.get_batch(number) for number in range(reader.num_record_batches))
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"not an Arrow file, or damaged: {error}. Write or download it again.", name) from error


def _convert(path: Path, name: str, target: Path) -> None:
    """Write a table as an Arrow stream of small batches, so that reading a row does not read many neighbours."""
    readers = {".xlsx": _read_xlsx, ".parquet": _read_parquet, ".feather": _read_feather}
    batches = readers.get(path.suffix.lower(), _read_csv)(path, name)
    first = next(batches, None)
    if first is None:
        raise DataError("holds no rows.", name)
    with pa.ipc.new_stream(str(target), first.schema) as writer:
        writer.write_batch(first)
        for batch in batches:
            writer.write_batch(batch)


def _read_parquet(path: Path, name: str) -> Iterator[pa.RecordBatch]:
    try:
        with pa.parquet.ParquetFile(str(path), buffer_size=_READ_BYTES) as file:
            for group in range(file.num_row_groups):
                yield from _read_group(file, group)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"not a parquet file, or damaged: {error}. Write or download it again.", name) from error


def _read_group(file: pa.parquet.ParquetFile, group: int) -> Iterator[pa.RecordBatch]:
    """Read a row group in batches of about _BATCH_BYTES; a batch with over 2 GiB in one column cannot be read at all.

    Only the average size of the rows is known, and not even that with dictionary encoding. After a batch that is far
    too large, or too large to be read, the group is read again in smaller batches, skipping the rows already done.
    """
    facts = file.metadata.row_group(group)
    size = min(_BATCH, max(1, _BATCH_BYTES * facts.num_rows // max(1, facts.total_byte_size)))
    done = 0
    while done < facts.num_rows:
        position = 0
        try:
            for batch in file.iter_batches(size, row_groups=[group]):
                position += batch.num_rows
                if position <= done:
                    continue
                yield batch.slice(batch.num_rows - (position - done))
                done = position
                if batch.nbytes > 4 * _BATCH_BYTES and size > 1:
                    size = max(1, size * _BATCH_BYTES // batch.nbytes)
                    break
        except pa.ArrowNotImplementedError:  # "Nested data conversions not implemented for chunked array outputs"
            if size == 1:
                raise
            size = max(1, size // 8)


def _read_feather(path: Path, name: str) -> Iterator[pa.RecordBatch]:
    for batch in _batches(path, name):
        yield from (batch.slice(start, _BATCH) for start in range(0, batch.num_rows, _BATCH))


def _read_csv(path: Path, name: str) -> Iterator[pa.RecordBatch]:
    """Read every cell as text: what looks like a number may be an id such as 0042."""
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        header = next(csv.reader(file, delimiter=delimiter), [])
    _check_header(header, name)
    uneven: list[pa.csv.InvalidRow] = []

    def stop(row: pa.csv.InvalidRow) -> str:
        uneven.append(row)
        return "error"

    try:
        with pa.csv.open_csv(
            str(path),
            read_options=pa.csv.ReadOptions(use_threads=False, block_size=_MAX_ROW),
            parse_options=pa.csv.ParseOptions(
                delimiter=delimiter, newlines_in_values=True, invalid_row_handler=stop, ignore_empty_lines=True
            ),
            convert_options=pa.csv.ConvertOptions(column_types=dict.fromkeys(header, pa.string())),
        ) as reader:
            for block in reader:
                yield from (block.slice(start, _BATCH) for start in range(0, block.num_rows, _BATCH))
    except pa.ArrowInvalid as error:
        if uneven:
            row = uneven[0]
            reason = f"{row.actual_columns} cells, but the header has {row.expected_columns}. Quote cells that hold "
            raise DataError(f'{reason}"{delimiter}" or line ends.', f"{name}:{row.number}") from error
        _check_utf8(path, name)
        raise DataError(f"not a table: {error}. Write it again as UTF-8.", name) from error


def _check_header(header: list[str], name: str) -> None:
    if not header:
        raise DataError("holds no rows.", name)
    if "" in header or len(set(header)) < len(header):
        raise DataError(f"the header {header} has an empty or repeated name. Name each column once.", f"{name}:1")


def _check_utf8(path: Path, name: str) -> None:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                byte = f"byte 0x{line[error.start]:02x} at column {error.start + 1}"
                raise DataError(f"not UTF-8: {byte}. Save the file as UTF-8.", f"{name}:{number}") from error


def _read_xlsx(path: Path, name: str) -> Iterator[pa.RecordBatch]:
    """Read the only non-empty sheet of a workbook; every cell becomes text, an empty one ""."""
    try:
        import openpyxl  # only the few who have xlsx tables need it
    except ImportError as error:
        raise DataError("needs the package openpyxl: pip install openpyxl, or save it as csv.", name) from error
    try:
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
    except (OSError, KeyError, ValueError, zipfile.BadZipFile, openpyxl.utils.exceptions.InvalidFileException) as error:
        raise DataError(f"not an xlsx file, or damaged: {error}. Save it again.", name) from error
    filled = [sheet for sheet in book.worksheets if any(cell is not None for row in sheet.values for cell in row)]
    if len(filled) > 1:
        raise DataError(f"{len(filled)} sheets hold rows. Keep one sheet in a file.", name)
    if not filled:
        return
    cells = [["" if cell is None else str(cell) for cell in row] for row in filled[0].values]
    book.close()
    while cells and not any(cells[-1]):
        cells.pop()
    header, *rows = cells
    _check_header(header, name)
    columns = [[row[number] if number < len(row) else "" for row in rows] for number in range(len(header))]
    yield from pa.table(dict(zip(header, columns, strict=True))).to_batches(max_chunksize=_BATCH)
