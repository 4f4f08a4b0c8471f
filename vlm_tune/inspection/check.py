"""`python -m vlm_tune check data.path=FILE`: find every fault of a data set before a model is loaded."""

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from torch.utils.data import DataLoader

from vlm_tune.config.schema import Config
from vlm_tune.console import follow
from vlm_tune.data.encode import Encoder
from vlm_tune.data.sets.dataset import Conversations
from vlm_tune.data.sets.index import start_worker
from vlm_tune.data.sets.meta import MetaEntry, is_meta, read_meta
from vlm_tune.data.sets.mixture import open_data, open_set
from vlm_tune.data.sets.paths import find_file
from vlm_tune.errors import ConfigError, DataError
from vlm_tune.inspection.check_html import write_html
from vlm_tune.inspection.check_report import print_report, summarise
from vlm_tune.inspection.check_rows import ROW_KINDS, Findings, RowCheck, add_fault, add_repeats
from vlm_tune.inspection.check_samples import Look, look_at_some
from vlm_tune.inspection.check_shared import HeldOut, Shared, open_held
from vlm_tune.pages.page import data_name

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REPEATED_IDS = ("error", "allow")


def check(
    config: Config, read_by: "tuple[Encoder, PreTrainedTokenizerBase]", out: str, repeated_ids: str, console: Console
) -> int:
    """Check all rows of data.path, print what was found, and write check.json and check.html; return the exit code.

    They are written to `out`, or to a folder named after the data, next to the runs.
    0: clean. 1: there are bad rows. Raise ConfigError or DataError where there is nothing to check: no such file.
    """
    if repeated_ids not in REPEATED_IDS:
        raise ConfigError(f"repeated_ids={repeated_ids}: set it to {' or '.join(REPEATED_IDS)}")
    path = find_file(config.data.path)
    folder = Path(out) if out else Path(config.runs) / f"check_{data_name(path)}"
    try:  # before the work, so that no result is lost
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"out={folder}: {error.strerror}. Name a folder that can be written") from error
    started = time.perf_counter()
    encoder, tokenizer = read_by
    found, held = Findings(), list(open_held(config, encoder, path))
    files = open_files(config, encoder, path, found)
    check_rows(files, held, config, repeated_ids == "error", found)
    looks = look_at_some(files, tokenizer)
    report = summarise(found, config, encoder.settings)
    report |= {"shared": [each.summary(found.shared.get(each.part, Shared())) for each in held]}
    report |= {"samples": [as_json(look) for look in looks], "seconds": round(time.perf_counter() - started, 3)}
    (folder / "check.json").write_text(json.dumps(report, ensure_ascii=True, indent=1) + "\n", encoding="utf-8")
    write_html(report, looks, folder / "check.html")
    print_report(report, console, folder)
    return 1 if report["errors"] else 0


def check_file(config: Config, encoder: Encoder, path: Path) -> Findings:
    """Check the rows of a data file, or of all sets that the file of a mixture names."""
    total = Findings()
    check_rows(open_files(config, encoder, path, total), [], config, True, total)
    return total


def check_rows(
    files: Sequence[Conversations],
    held: Sequence[HeldOut],
    config: Config,
    are_ids_unique: bool,
    total: Findings,
) -> None:
    """Check the rows of all files, compare them with the held-out ones, and add the findings to `total`."""
    for data in files:
        found, chunks = Findings(), RowCheck(data, held)
        workers = config.data.workers if len(chunks) > 1 else 0
        loader = DataLoader(chunks, batch_size=None, num_workers=workers, worker_init_fn=start_worker)
        for part in follow(loader, f"checking {data.path.name}", "rows", len(data), lambda part: part.num_rows):
            found.merge(part)
        add_repeats(found, data, are_ids_unique)
        found.renumber(total.num_rows)
        total.merge(found)


def open_files(config: Config, encoder: Encoder, path: Path, found: Findings) -> list[Conversations]:
    """Open a data file as training does, or all sets of a mixture; a file that cannot be opened counts as one fault."""
    opened: list[Conversations] = []
    entries: Sequence[MetaEntry | None] = [None]
    try:
        entries = read_meta(path) if is_meta(path) else entries
    except DataError as error:
        add_fault(found, 0, error, ROW_KINDS)
        return []
    for entry in entries:
        try:
            opened.append(open_file(path, entry, config, encoder))
        except DataError as error:
            add_fault(found, 0, error, ROW_KINDS)
    return opened


def open_file(path: Path, entry: MetaEntry | None, config: Config, encoder: Encoder) -> Conversations:
    """Open one file of rows; if none of the first fits a dialect, each row reports that itself."""

    def opened(config: Config) -> Conversations:
        return (open_data(path, config, encoder) if entry is None else open_set(path, entry, config, encoder)).sets[0]

    try:
        return opened(config)
    except DataError:
        any_format = replace(config, data=replace(config.data, format="text"))
        entry = replace(entry, format="text") if entry is not None else None
        data = opened(any_format)  # fails as before, unless the dialect was the reason
        data.format = "auto"
        return data


def as_json(look: Look) -> dict[str, Any]:
    """Return a row that was looked at as plain values, without its pictures."""
    return vars(look) | {"pictures": [told for told, _ in look.pictures], "runs": [list(run) for run in look.runs]}
