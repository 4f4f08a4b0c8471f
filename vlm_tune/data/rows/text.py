"""Rows of .jsonl and .json files: found by byte offset in one scan, parsed one at a time.

Ten million rows cost one int64 array. Reads go through `pread`: forked workers share the file without sharing its
position, and unlike with a memory map, a shuffled pass does not count the whole file as memory of the process.
"""

import codecs
import json
import os
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from vlm_tune.data.rows.cache import BLOCK, derived
from vlm_tune.errors import DataError

Offsets = npt.NDArray[np.int64]

ARRAY_BLOCK = BLOCK >> 4  # scanning an array takes some 100 bytes of memory per byte

_LONGEST_FIRST_LINE = 1 << 24  # bytes; a longer one is a whole array or object
_NEWLINE, _QUOTE, _BACKSLASH, _COMMA = (ord(character) for character in '\n"\\,')
_OPEN, _CLOSE = np.zeros(256, bool), np.zeros(256, bool)
_OPEN[[ord("["), ord("{")]] = True
_CLOSE[[ord("]"), ord("}")]] = True
_STRUCTURE = _OPEN | _CLOSE
_STRUCTURE[[_NEWLINE, _QUOTE, _BACKSLASH, _COMMA]] = True
_BLANK = np.zeros(256, bool)
_BLANK[list(b" \t\r\n\v\f")] = True
_REMEDIES = {
    "lines": "Write one JSON object per line.",
    "array": "Mend this row of the array.",
    "object": "Fix the file.",
}


class TextRows:
    """Read single rows of a JSON text file; `where` gives the true line, counting blank lines."""

    def __init__(self, path: Path, name: str, folder: Path) -> None:
        """Scan the file, or load its offsets from `folder`, where another process may have saved them.

        Raise DataError for a file without rows, an array that is never closed, and UTF-16.
        """
        self.path, self.name = path, name
        self._layout, start = _layout(path, name)
        self._index = derived(path, folder, f"{path.name}.npy", lambda target: self._save(start, target))
        self._offsets = np.load(self._index, mmap_mode="r")
        self._file: BinaryIO | None = None
        if len(self) == 0:
            raise DataError("holds no rows. Write one JSON object per line.", name)

    def __len__(self) -> int:
        return int(self._offsets.shape[1]) - 1

    def __getitem__(self, index: int) -> dict[str, object]:
        """Parse one row. Raise DataError, with line and column, if it is not UTF-8, not JSON or not an object."""
        raw = self._raw(index)
        try:
            record = json.loads(raw.decode("utf-8"))
        except UnicodeDecodeError as error:
            column = error.start - raw.rfind(b"\n", 0, error.start)
            where = self._where(index, raw, raw.count(b"\n", 0, error.start))
            byte = f"byte 0x{raw[error.start]:02x} at column {column}"
            raise DataError(f"not UTF-8: {byte}. Save the file as UTF-8.", where) from error
        except json.JSONDecodeError as error:
            where = self._where(index, raw, error.lineno - 1)
            reason = f"not JSON: {error.msg} at column {error.colno}. {_REMEDIES[self._layout]}"
            raise DataError(reason, where) from error
        except (RecursionError, ValueError) as error:  # nested too deep; a number of more than 4300 digits
            reason = "nested too deep" if isinstance(error, RecursionError) else str(error)
            raise DataError(f"not JSON: {reason} at column 1. Remove this row.", self._where(index, raw, 0)) from error
        if not isinstance(record, dict):
            kinds = {list: "a list", str: "text", type(None): "null", bool: "true or false"}
            kind = kinds.get(type(record), "a number")
            raise DataError(f"not an object but {kind}. Each row must be {{...}}.", self.where(index))
        return record

    def where(self, index: int) -> str:
        """Return 'train.jsonl:17'; for rows of an array that share a line, also their number."""
        return self._where(index, self._raw(index) if self._layout == "array" else b"", 0)

    def __getstate__(self) -> dict[str, object]:
        """Drop the open file and the offsets, which every process can map from disk."""
        return self.__dict__ | {"_file": None, "_offsets": None}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._offsets = np.load(self._index, mmap_mode="r")

    def __del__(self) -> None:
        if getattr(self, "_file", None) is not None:
            self._file.close()  # type: ignore[union-attr]

    def _raw(self, index: int) -> bytes:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        if self._file is None:
            self._file = self.path.open("rb", buffering=0)
        start, end = int(self._offsets[0, index]), int(self._offsets[0, index + 1])
        raw = os.pread(self._file.fileno(), end - start, start)
        if len(raw) < end - start:
            raise DataError("became shorter while it was read. Start again when nothing writes to it.", self.name)
        return raw[:-1] if self._layout == "array" else raw.rstrip()  # [:-1]: the comma or bracket that ends the row

    def _where(self, index: int, raw: bytes, lines_down: int) -> str:
        """Return the line `lines_down` below the start of a row; in an array, white space before the row is skipped."""
        if self._offsets.shape[0] == 1:
            return f"{self.name}:{index + 1 + lines_down}"
        above = raw[: len(raw) - len(raw.lstrip())].count(b"\n")
        line = int(self._offsets[1, index]) + max(above, lines_down)
        shares_line = self._layout == "array" and index > 0 and above == 0
        return f"{self.name}:{line} row {index + 1}" if shares_line else f"{self.name}:{line}"

    def _scan(self, start: int) -> Offsets:
        if self._layout == "object":
            return np.array([[start, self.path.stat().st_size]], np.int64)
        if self._layout == "array":
            return _scan_array(self.path, self.name, start)
        return _scan_lines(self.path, start)

    def _save(self, start: int, target: Path) -> None:
        with target.open("wb") as file:
            np.save(file, self._scan(start))


def _layout(path: Path, name: str) -> tuple[str, int]:
    """Return what a JSON file holds ("lines", one object each, an "array" of rows, or one "object"), and its start.

    The file name does not decide: tutorials write arrays into .jsonl files and lines into .json files.
    """
    with path.open("rb") as file:
        head = file.read(1 << 16)
        if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise DataError("not UTF-8 but UTF-16. Save the file as UTF-8.", f"{name}:1")
        start = len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0
        text = head[start:].lstrip()
        if not text:
            return "lines", start
        kind = "array" if text.startswith(b"[") else "object"
        if kind == "object" and not path.name.lower().endswith(".json"):
            return "lines", start
        file.seek(len(head) - len(text))
        first = file.readline(_LONGEST_FIRST_LINE)
        rest = file.read(1 << 16) if first.endswith(b"\n") else b""
        if rest.strip():
            try:
                json.loads(first)
            except (ValueError, RecursionError):
                return kind, start
            return "lines", start
        return kind, start


def _scan_lines(path: Path, start: int) -> Offsets:
    """Find the start of each line that is not blank: (1, N+1) offsets; (2, N+1) with line numbers if any is blank.

    A row extends to the start of the next one; blank lines in between are white space.
    """
    starts, suspects = [], []
    position, is_fresh = start, True  # is_fresh: the block begins with a new line
    with path.open("rb") as file:
        file.seek(start)
        while block := file.read(BLOCK):
            codes = np.frombuffer(block, np.uint8)
            begins = np.flatnonzero(codes == _NEWLINE) + 1
            if is_fresh:
                begins = np.concatenate([[0], begins])
            is_fresh = block[-1] == _NEWLINE
            if is_fresh:
                begins = begins[:-1]
            starts.append(begins + position)
            suspects.append(begins[_BLANK[codes[begins]]] + position)
            position += len(block)
        offsets = np.concatenate([*starts, np.array([position])]).astype(np.int64)
        keep = np.ones(len(offsets), bool)
        for line in np.searchsorted(offsets, np.concatenate([*suspects, np.array([], np.int64)])).tolist():
            file.seek(int(offsets[line]))
            keep[line] = bool(file.read(int(offsets[line + 1] - offsets[line])).strip())
    if keep.all():
        return offsets[None]
    return np.stack([offsets, np.arange(1, len(offsets) + 1)])[:, keep]


def _scan_array(path: Path, name: str, start: int) -> Offsets:
    """Find the rows of a JSON array: (2, N+1) offsets behind the bracket and commas that bound them, and their lines.

    Only brackets, commas, quotes, backslashes and line ends are examined, so a faulty row is an error of that row only.
    A line end closes an open string (JSON allows none inside): a missing quote affects only its own line.
    """
    offsets, lines = [], []
    position, line, depth, in_text, ended_by = start, 1, 0, 0, 0
    with path.open("rb") as file:
        file.seek(start)
        while not ended_by and (block := file.read(ARRAY_BLOCK)):
            while block[-1] == _BACKSLASH and (more := file.read(1)):  # an escape must not be cut in two
                block += more
            at, code = _structure(np.frombuffer(block, np.uint8))
            quotes = in_text + np.cumsum(code == _QUOTE)
            is_newline = code == _NEWLINE
            is_inside = (quotes - np.maximum.accumulate(np.where(is_newline, quotes, 0))) & 1 == 1
            step = (_OPEN[code].astype(np.int64) - _CLOSE[code]) * ~is_inside
            depths = depth + np.cumsum(step)
            ends = np.flatnonzero((depths <= 0) & (step < 0))[:1]
            is_bound = (depths == 1) & ~is_inside & ((code == _COMMA) | (step > 0))
            is_bound[ends] = True
            bounds = np.flatnonzero(is_bound)
            if len(ends):
                bounds = bounds[bounds <= ends[0]]
                ended_by = int(code[ends[0]])
            offsets.append(at[bounds] + (position + 1))
            lines.append(line + np.cumsum(is_newline)[bounds])
            if len(code):
                depth, in_text, line = int(depths[-1]), int(is_inside[-1]), line + int(is_newline.sum())
            position += len(block)
        found = np.stack([np.concatenate(offsets), np.concatenate(lines)]).astype(np.int64)
        _check_array(file, name, found, ended_by)
        file.seek(int(found[0, 0]))
        is_empty = found.shape[1] == 2 and not file.read(int(found[0, 1] - found[0, 0]))[:-1].strip()
    return found[:, :1] if is_empty else found


def _structure(codes: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]]:
    """Return the positions and codes of JSON's structural characters, leaving out escaped quotes."""
    at = np.flatnonzero(_STRUCTURE[codes])
    code = codes[at]
    is_escape = code == _BACKSLASH
    if not is_escape.any():
        return at, code
    number = np.arange(len(at))
    follows = np.zeros(len(at), bool)  # directly behind a backslash
    follows[1:] = is_escape[:-1] & (at[1:] == at[:-1] + 1)
    run_start = np.maximum.accumulate(np.where(is_escape & ~follows, number, 0))
    is_escaped = follows & ((number - np.roll(run_start, 1)) & 1 == 1)
    keep = ~is_escape & ~(is_escaped & (code == _QUOTE))
    return at[keep], code[keep]


def _check_array(file: BinaryIO, name: str, found: Offsets, ended_by: int) -> None:
    """Refuse an array whose brackets do not match: the rows behind the fault cannot be separated."""
    last, line = found[:, -1].tolist()
    file.seek(last)
    rest = file.read(1 << 16)
    if not ended_by:
        line += rest[: len(rest) - len(rest.lstrip())].count(b"\n")
        reason = "the array is never closed. A bracket or a quote is missing in this row, or the file is cut off."
        raise DataError(f"not JSON: {reason}", f"{name}:{line}")
    if ended_by != ord("]") or rest.strip():
        reason = "not JSON: the array ends here, but the file goes on. Remove the bracket that is too many in this row."
        raise DataError(reason, f"{name}:{line}")
