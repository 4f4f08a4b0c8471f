"""Sizes of all rows, found before the first step: tokens, supervised tokens, tiles; and every faulty row."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from vlm_tune.data.dataset import Conversations
from vlm_tune.data.encode import SkippedSample
from vlm_tune.errors import DataError

SHOWN = 20  # faults that an error message lists


@dataclass(frozen=True)
class Index:
    """Hold one entry for each good row; `rows` are their numbers in the file."""

    rows: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int32]
    supervised: npt.NDArray[np.int32]
    tiles: npt.NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, chosen: npt.NDArray[np.int64]) -> "Index":
        """Keep the chosen entries, in their order."""
        return Index(self.rows[chosen], self.tokens[chosen], self.supervised[chosen], self.tiles[chosen])


@dataclass
class Findings:
    """What the pass over all rows found beside the sizes."""

    faults: list[DataError]
    skipped: list[DataError]  # rows that data.on_too_long=skip leaves out
    notes: list[str]  # rows that a policy for long rows changed


def build_index(
    data: Conversations, report: Callable[[Iterable[int], int], Iterable[int]] = lambda rows, total: rows
) -> tuple[Index, Findings]:
    """Encode every row once, pictures by their headers alone. `report` may wrap the row numbers in a progress bar."""
    kept: list[tuple[int, int, int, int]] = []
    findings = Findings([], [], [])
    for row in report(range(len(data)), len(data)):
        try:
            example = data.encode(row, whole=True)
        except SkippedSample as skipped:
            findings.skipped.append(skipped)
            continue
        except DataError as fault:
            findings.faults.append(fault)
            continue
        if example.note:
            findings.notes.append(f"{example.where}: {example.note}")
        kept.append((row, len(example.input_ids), example.num_supervised, sum(example.num_tiles)))
    table = np.array(kept, dtype=np.int64).reshape(-1, 4)
    sizes = [table[:, column].astype(np.int32) for column in (1, 2, 3)]
    return Index(table[:, 0], *sizes), findings


def refuse_faults(findings: Findings, path: Path) -> None:
    """Stop before training when rows are faulty, with the list of them."""
    faults = findings.faults
    if len(faults) == 1:
        raise faults[0]
    if faults:
        shown = "\n".join(f"  {fault}" for fault in faults[:SHOWN])
        more = f"\n  ... and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        remedy = "Mend them (`python -m vlm_tune check` lists all), or leave them out with data.on_bad_sample=skip"
        raise DataError(f"{len(faults)} bad rows\n{shown}{more}\n  {remedy}", str(path))


def write_faults(faults: list[DataError], path: Path) -> None:
    """Write one JSON line a faulty row: where, id, reason."""
    lines = [{"where": fault.where, "id": fault.sample_id, "reason": fault.reason} for fault in faults]
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
