"""Sizes of all rows, found before the first step: tokens, supervised tokens, tiles; and every faulty row.

They are found once, by several processes, and cached as a memory-mapped array of 48 bytes a row. With them goes a hash
of the content of each row, by which an interrupted run recognises its rows.
"""

import gc
import hashlib
import json
import multiprocessing
import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from filelock import FileLock
from torch.utils.data import DataLoader, Dataset

from vlm_tune.data.example import Lengths
from vlm_tune.data.fit import SkippedSample
from vlm_tune.data.pictures.images import CheckedPictures, ImageReader
from vlm_tune.data.progress import Follow, unseen
from vlm_tune.data.rows.cache import content_key, hashed, sampled
from vlm_tune.data.rows.rows import find_files
from vlm_tune.data.sample import Picture, Sample
from vlm_tune.data.sets.dataset import Conversations, Tiling
from vlm_tune.data.sizes import ROW
from vlm_tune.errors import DataError
from vlm_tune.recipes.fetch import cache_folder

SHOWN = 20  # faults that an error message lists
CHUNK = 500  # rows that are tokenized together
MANY = 5000  # from this many rows on, starting processes pays off
SIZES, FINDINGS = "sizes.npy", "findings.json"
CODE = Path(__file__).parents[1]  # all of data/


@dataclass
class Findings:
    """What a pass over all rows found besides the sizes."""

    faults: list[DataError] = field(default_factory=list)
    skipped: list[DataError] = field(default_factory=list)  # rows that data.on_too_long=skip leaves out
    notes: list[str] = field(default_factory=list)  # rows that a policy for long rows changed
    fault_rows: list[int] = field(default_factory=list)  # the numbers of the rows in `faults`

    def merge(self, other: "Findings") -> None:
        """Add the findings in other rows."""
        for name, found in vars(other).items():
            getattr(self, name).extend(found)


Measured = tuple[npt.NDArray[np.void], Findings]


def open_index(data: Conversations, workers: int = 0, follow: Follow = unseen) -> Measured:
    """Read the sizes of all rows, a table of ROWs, from the cache, or measure and cache them.

    Faulty rows are measured again each time: their pictures may have been fixed since, which does not change the key of
    the cache. If several processes ask at once, one works and the others wait.
    """
    folder = cache_folder() / "index" / index_key(data)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        if not (folder / SIZES).is_file():
            table, findings = measure_all(data, np.arange(len(data)), workers, follow)
            save(folder, table, findings)
            return load(folder)
        table, findings = load(folder)
        if findings.faults:
            fixed, still = measure_all(data, np.array(findings.fault_rows), workers, follow)
            if still.fault_rows != findings.fault_rows:
                findings.faults, findings.fault_rows = [], []
                findings.merge(still)
                joined = np.concatenate([table, fixed])
                save(folder, joined[np.argsort(joined["row"])], findings)
                return load(folder)
    return table, findings


def index_key(data: Conversations) -> str:
    """Hash everything that the sizes and the faults of a file's rows depend on, including the code of this program."""
    facts = [str(data.path.resolve()), *(content_key(file) for file in find_files(data.path))]
    facts += [data.format, str(sorted(data.ignored)), str(data.root.resolve())]
    facts += [str(data.reader.config), str(data.pictures.tiles), data.encoder.fingerprint()]
    code = [file for file in sorted(CODE.rglob("*")) if file.suffix in (".py", ".yaml")]
    if ":" in data.format:
        code.append(Path(data.format.rpartition(":")[0]))
    facts += [hashlib.blake2b(file.read_bytes()).hexdigest() for file in code]
    return hashlib.blake2b("\n".join(facts).encode(), digest_size=12).hexdigest()


def save(folder: Path, table: npt.NDArray[np.void], findings: Findings) -> None:
    """Save sizes and findings. The sizes are written last and atomically: without them there is no index."""
    (folder / SIZES).unlink(missing_ok=True)  # a kill between the two files must not leave an old and a new one
    plain = {name: [as_json(each) for each in found] for name, found in vars(findings).items()}
    (folder / FINDINGS).write_text(json.dumps(plain, ensure_ascii=True), encoding="utf-8")
    partial = folder / f".{SIZES}"
    with partial.open("wb") as file:
        np.save(file, table)
    partial.replace(folder / SIZES)


def load(folder: Path) -> Measured:
    """Memory-map the sizes and read the findings."""
    # an access to numpy's memmap class takes ten times as long as one to a plain view of it
    table = np.asarray(np.load(folder / SIZES, mmap_mode="r"))
    found: dict[str, list[Any]] = json.loads((folder / FINDINGS).read_text(encoding="utf-8"))
    faults = [DataError(**fault) for fault in found["faults"]]
    skipped: list[DataError] = [SkippedSample(**fault) for fault in found["skipped"]]
    return table, Findings(faults, skipped, found["notes"], found["fault_rows"])


def as_json(finding: DataError | str | int) -> object:
    """Return a finding as plain JSON values."""
    if isinstance(finding, DataError):
        return {"reason": finding.reason, "where": finding.where, "sample_id": finding.sample_id}
    return finding


def measure_all(data: Conversations, rows: npt.NDArray[np.int64], workers: int, follow: Follow = unseen) -> Measured:
    """Measure the given rows, many of them in two or more processes.

    Processes, not the tokenizer's threads: parsing and pictures take as much time as tokenizing.
    """
    chunks = Chunks(data, rows)
    loader = DataLoader(
        chunks,
        batch_size=None,
        collate_fn=as_it_is,
        num_workers=max(2, workers) if len(rows) >= MANY else 0,
        worker_init_fn=start_worker,
        generator=torch.Generator(),  # else it would draw from the generator that the run has seeded
    )
    tables, findings = [np.zeros(0, ROW)], Findings()
    try:
        for table, found in follow(loader, f"measuring {data.path.name}", "rows", len(rows), num_measured):
            tables.append(table)
            findings.merge(found)
    except KeyboardInterrupt:
        for process in multiprocessing.active_children():  # the loader would wait 5 seconds for each that is busy
            with suppress(RuntimeError):  # torch's, that a worker was killed
                process.kill()
                process.join()
        raise
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise DataError(
            f"a process that measures rows was ended from outside ({str(error).splitlines()[0]}): mostly the memory "
            f"was full. Free some, or set data.workers=2 (now {workers}), and start again",
            str(data.path),
        ) from error
    return np.concatenate(tables), findings


def as_it_is(measured: Any) -> Any:
    """Return the argument, so that DataLoader makes no tensors; a lambda cannot be pickled for a spawned process."""
    return measured


class Chunks(Dataset[Measured]):
    """Measure rows a chunk at a time; a DataLoader distributes the chunks over processes."""

    def __init__(self, data: Conversations, rows: npt.NDArray[np.int64]) -> None:
        self.data = data
        self.rows = rows
        self.checked = CheckedPictures(data.reader)

    def __len__(self) -> int:
        return -(-len(self.rows) // CHUNK)

    def __getitem__(self, number: int) -> Measured:
        """Measure one chunk; only the headers and last bytes of pictures are read."""
        rows = self.rows[number * CHUNK : (number + 1) * CHUNK].tolist()
        outcomes: dict[int, Lengths | DataError] = {}
        read: dict[int, tuple[Sample, Tiling]] = {}
        for row in rows:
            try:
                sample = self.data.sample(row)
                read[row] = sample, self.data.tiling(sample, self.checked.check)
            except DataError as fault:
                outcomes[row] = fault
        samples, tilings = zip(*read.values(), strict=True) if read else ((), ())
        outcomes.update(zip(read, self.data.encoder.encode_lengths(samples, tilings), strict=True))
        sizes, findings = [], Findings()
        for row in rows:
            outcome = outcomes[row]
            if isinstance(outcome, SkippedSample):
                findings.skipped.append(outcome)
            elif isinstance(outcome, DataError):
                findings.faults.append(outcome)
                findings.fault_rows.append(row)
            else:
                counts = outcome.num_tokens, outcome.num_supervised, sum(outcome.num_tiles)
                sample = read[row][0]
                head = self._head(sample, outcome), outcome.num_head
                sizes.append(
                    (row, *counts, hashed(trained_content(sample)), *head, picture_files(sample, self.data.reader))
                )
                findings.notes += [f"{self.data.rows.where(row)}: {outcome.note}"] if outcome.note else []
        return np.array(sizes, ROW), findings

    def _head(self, sample: Sample, lengths: Lengths) -> int:
        """Hash a sample's pictures and what stands before the last one's end; 0 where there is none."""
        if not lengths.head:
            return 0
        pictures = [each for picture in sample.pictures for each in named_picture(picture, is_whole=True)]
        facts = f"{self.data.root} {lengths.num_tiles} {lengths.max_tiles} {lengths.head}"
        return hashed([facts.encode("utf-8", "surrogatepass"), *pictures])


def trained_content(sample: Sample) -> Iterator[bytes]:
    """Yield what is trained on in a row: its turns, and its pictures by their paths, or by samples of their bytes.

    Its id, its file and the kind of the file do not count.
    """
    yield b"plain" if sample.is_plain else b""
    for message in sample.turns:
        yield f"{message.role} {message.supervised}".encode()
        yield message.reasoning.encode("utf-8", "surrogatepass")
        for part in message.parts:
            if isinstance(part, str):
                yield part.encode("utf-8", "surrogatepass")
            else:
                yield from named_picture(part)


def picture_files(sample: Sample, reader: ImageReader) -> int:
    """Hash what the files of a row's pictures hold, not their times: a copy of a data set is the same; 0 = no files."""
    files = {picture.path: picture for picture in sample.pictures if picture.content is None}
    parts = [reader.read_ends(picture, sample.where, sample.id) for picture in files.values()]
    return hashed(parts) if parts else 0


def named_picture(picture: Picture, is_whole: bool = False) -> Iterator[bytes]:
    """Yield what names a picture: its path, or samples of its bytes, or all of them.

    Samples miss a small change of an uncompressed picture: they do where two would not be taken for one another.
    """
    yield f"picture {picture.is_frame} {picture.frame}".encode()
    yield picture.path.encode("utf-8", "surrogatepass")
    if picture.content is not None:
        yield from [picture.content] if is_whole else sampled(picture.content)


def start_worker(number: int) -> None:
    """Limit a process to one thread, and keep its garbage collector off inherited objects."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to all: the main process ends the others
    gc.freeze()


def num_measured(measured: Measured) -> int:
    """Count the rows of a chunk, those without sizes included."""
    table, findings = measured
    return len(table) + len(findings.faults) + len(findings.skipped)


def refuse_faults(findings: Findings, path: Path) -> None:
    """Raise an error that lists the faulty rows, each kind of fault once."""
    faults = findings.faults
    if len(faults) == 1:
        raise faults[0]
    if faults:
        alike: dict[tuple[str, str], list[DataError]] = {}
        for fault in faults:
            alike.setdefault((fault.where.rpartition(":")[0], fault.reason), []).append(fault)
        lines = [f"  {first}{_and_more(len(others))}" for first, *others in alike.values()]
        shown = "\n".join(lines[:SHOWN])
        more = f"\n  ... and {len(lines) - SHOWN} more kinds" if len(lines) > SHOWN else ""
        remedy = "Mend them (`python -m vlm_tune check` lists all), or leave them out with data.on_bad_sample=skip"
        raise DataError(f"{len(faults)} bad rows\n{shown}{more}\n  {remedy}", str(path))


def _and_more(num: int) -> str:
    return f" (so do {num:,} more rows)" if num > 1 else " (so does 1 more row)" if num else ""


def write_faults(faults: list[DataError], path: Path) -> None:
    """Write one line of JSON per faulty row: where, id, reason."""
    lines = [{"where": fault.where, "id": fault.sample_id, "reason": fault.reason} for fault in faults]
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
