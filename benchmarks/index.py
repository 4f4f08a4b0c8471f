"""Measure the index of a million rows: seconds, memory, and the second start; write the table of benchmarks/README.md.

COMMAND: python benchmarks/index.py [--rows 1000000] [--samples 100000]
TIME: about 15 minutes on two CPU cores. Each measurement is a process of its own; the rows lie in a temporary folder.

The rows are LLaVA-like: 2 to 6 turns, 600 characters on average, a picture in 19 of 20, width and height given; the
tokenizer and the tiles are the demo's. Beside it: what LLaVA and XTuner do (json and a list), and datasets. Neither of
the two counts tokens or tiles or looks at a picture: that comes on top of their figures.
"""

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlm_tune.config.parse import load_config
from vlm_tune.recipes.recipe import run_recipe

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "data.json"
SIZES = ((640, 480), (480, 640), (640, 427), (500, 375), (336, 336), (1024, 768), (612, 612))
NUM_PICTURES = 1000
FEW = 1000  # rows of the small file, beside which memory is compared
CHARACTERS = 600  # of a row, on average
NUM_WORDS = 1_000_000


def write_rows(path: Path, num_rows: int) -> None:
    """Write LLaVA-like rows, and the pictures that they show."""
    rng = np.random.default_rng(0)
    (path.parent / "images").mkdir(exist_ok=True)
    for number in range(NUM_PICTURES):
        picture = path.parent / "images" / f"{number:04}.jpg"
        Image.new("RGB", SIZES[number % len(SIZES)], (number % 256, 90, 120)).save(picture, quality=40)
    pages = " ".join(page.read_text(encoding="utf-8") for page in sorted((HERE.parent / "docs").glob("*.md")))
    words = np.array(re.findall(r"[A-Za-z']+[,.?]?", pages))
    text = " ".join(words[rng.integers(0, len(words), NUM_WORDS)])
    pairs = rng.integers(1, 4, num_rows).tolist()  # question and answer: 2 to 6 turns
    lengths = (rng.gamma(2, (CHARACTERS - 40) / 2, num_rows) + 40).astype(int).tolist()
    starts = rng.integers(0, len(text) - max(lengths), num_rows).tolist()
    pictures = rng.integers(0, NUM_PICTURES, num_rows).tolist()
    with path.open("w", encoding="utf-8") as file:
        for row in range(num_rows):
            said = text[starts[row] : starts[row] + lengths[row]]
            record: dict[str, Any] = {"id": f"{row:09}"}
            if row % 20:
                width, height = SIZES[pictures[row] % len(SIZES)]
                record |= {"image": f"images/{pictures[row]:04}.jpg", "width": width, "height": height}
            record["conversations"] = turns(said, pairs[row], "image" in record)
            file.write(json.dumps(record) + "\n")


def turns(said: str, num_pairs: int, has_picture: bool) -> list[dict[str, str]]:
    """Part a text into questions, a quarter of it, and answers."""
    share = len(said) // (4 * num_pairs)
    ends = list(accumulate([share, 3 * share] * num_pairs, initial=0))
    parts = [said[start:end].strip() or "yes" for start, end in pairwise(ends)]
    parts[0] = f"<image>\n{parts[0]}" if has_picture else parts[0]
    return [{"from": ("human", "gpt")[number % 2], "value": part} for number, part in enumerate(parts)]


def open_data(path: Path) -> Any:
    """Open the rows as a run of the demo does, with everything imported and the tokenizer loaded."""
    from vlm_tune.data.datamodule import DataModule
    from vlm_tune.model.encoder import build_encoder

    config = load_config(["data=own", f"data.path={path}", "data.workers=2", *os.environ["PARTS"].split()])
    return DataModule(config, build_encoder(config)[0])


def start(path: Path, _: int) -> dict[str, Any]:
    """Index the rows, or find the index there, and make the first batch."""
    data = open_data(path)
    clock = Clock()
    data.setup()
    figures = clock.read("setup")
    next(iter(data.train_dataloader()))
    efficiency = data.stream().fill()
    return figures | clock.read("first_batch") | {"max_steps": data.max_steps(), "packing_efficiency": efficiency}


def read(path: Path, num_samples: int) -> dict[str, Any]:
    """Read many samples with two workers; memory of the main process and of a worker after each tenth."""
    data = open_data(path)
    data.setup()
    clock = Clock()
    memory: list[tuple[float, float]] = []
    done = 0
    for batch in data.train_dataloader():
        done += len(batch.sample_ids)
        if done >= num_samples * (len(memory) + 1) // 10:
            workers = [resident(child.pid or 0) for child in multiprocessing.active_children()]
            memory.append((resident(os.getpid()), max(workers)))
        if done >= num_samples:
            break
    return clock.read("read") | {"samples": done, "memory_mb": memory}


def json_list(path: Path, _: int) -> dict[str, Any]:
    """Do as LLaVA and XTuner: every row a Python object, in one list."""
    clock = Clock()
    with path.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return clock.read("setup") | {"rows": len(rows)}


def json_datasets(path: Path, _: int) -> dict[str, Any]:
    """Read the rows with datasets into its Arrow files."""
    from datasets import load_dataset

    clock = Clock()
    rows = load_dataset("json", data_files=str(path), split="train", cache_dir=str(path.parent / "datasets"))
    assert rows[0]["id"] is not None
    return clock.read("setup") | {"rows": len(rows)}


PROGRAMS: dict[str, Callable[[Path, int], dict[str, Any]]] = {
    "start": start,
    "read": read,
    "json_list": json_list,
    "json_datasets": json_datasets,
}


class Clock:
    """Measure wall time, and the processor time of this process and its finished children."""

    def __init__(self) -> None:
        self.wall, self.processor = time.perf_counter(), self._processor()

    def read(self, name: str) -> dict[str, float]:
        """Seconds since the start."""
        wall, processor = time.perf_counter() - self.wall, self._processor() - self.processor
        return {f"{name}_seconds": round(wall, 2), f"{name}_cpu_seconds": round(processor, 2)}

    @staticmethod
    def _processor() -> float:
        return sum(os.times()[:4])


def resident(pid: int, field: str = "VmRSS") -> float:
    """Memory of a process in MiB; VmHWM is its highest."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    return round(int(next(line for line in status.splitlines() if line.startswith(field)).split()[1]) / 1024, 1)


def run(program: str, path: Path, samples: int = 0) -> dict[str, Any]:
    """Run one program in a process of its own; return its figures and its highest memory."""
    command = [sys.executable, __file__, "--program", program, "--path", str(path), "--samples", str(samples)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"{program:13} {path.name:13} {figures}", flush=True)
    return figures


def measure(folder: Path, num_rows: int, num_samples: int) -> dict[str, dict[str, Any]]:
    """Run all programs on a large file and on a small one."""
    large, small = folder / "rows.jsonl", folder / "few.jsonl"
    for path, count in ((large, num_rows), (small, FEW)):
        write_rows(path, count)
    print(f"{num_rows:,} rows, {large.stat().st_size / 1e9:.2f} GB, load {os.getloadavg()[0]:.1f}", flush=True)
    figures = {f"{name}_few": run("start", small) for name in ("first", "second")}
    figures |= {name: run("start", large) for name in ("first", "second")}
    figures["read"] = run("read", large, num_samples)
    for name, program in (("list", "json_list"), ("datasets", "json_datasets"), ("datasets_second", "json_datasets")):
        figures[f"{name}_few"] = run(program, small)
        figures[name] = run(program, large)
    return figures


def table(figures: dict[str, dict[str, Any]], num_rows: int) -> str:
    """Write the table of benchmarks/README.md."""
    lines = [
        f"{num_rows:,} rows; load average {figures['load']['before']:.1f} before the first measurement.",
        "",
        "| | seconds | processor seconds | main process grows by |",
        "|---|---|---|---|",
    ]
    for title, name in (
        ("vlm_tune: full index (offsets, tokens, tiles, faults)", "first"),
        ("vlm_tune: second start", "second"),
        ("`json.loads` into a list, at every start", "list"),
        ("`datasets.load_dataset('json')`, first", "datasets"),
        ("`datasets.load_dataset('json')`, second", "datasets_second"),
    ):
        each = figures[name]
        lines.append(
            f"| {title} | {each['setup_seconds']} | {each['setup_cpu_seconds']} | {growth(figures, name):,.0f} MiB |"
        )
    first, last = figures["read"]["memory_mb"][0], figures["read"]["memory_mb"][-1]
    return "\n".join(
        [
            *lines,
            "",
            f"First batch {figures['second']['first_batch_seconds']} s after `DataModule.setup()` begins, in a warm "
            f"process. Packing efficiency {figures['second']['packing_efficiency']:.1%}.",
            f"Reading {figures['read']['samples']:,} samples with two workers: main process {first[0]:,.0f} MiB after "
            f"the first tenth, {last[0]:,.0f} MiB after the last; a worker {first[1]:,.0f} and {last[1]:,.0f} MiB.",
        ]
    )


def growth(figures: dict[str, dict[str, Any]], name: str) -> float:
    """Highest memory of a program, beyond that of the same program on few rows."""
    return float(figures[name]["highest_mb"] - figures[f"{name}_few"]["highest_mb"])


def fill_markers(page: Path, name: str, text: str) -> None:
    """Put a text between <!-- name --> and <!-- /name -->."""
    before, start_mark, rest = page.read_text(encoding="utf-8").partition(f"<!-- {name} -->\n")
    _, end_mark, after = rest.partition(f"<!-- /{name} -->")
    assert start_mark, f"{page} has no <!-- {name} -->"
    assert end_mark, f"{page} has no <!-- /{name} -->"
    page.write_text(f"{before}{start_mark}{text}\n{end_mark}{after}", encoding="utf-8")


def main() -> None:
    """Measure, or be one of the measured programs."""
    parser = argparse.ArgumentParser(description="Measure the index of many rows.")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--samples", type=int, default=100_000, help="read with two workers")
    parser.add_argument("--program", choices=PROGRAMS)
    parser.add_argument("--path", type=Path)
    arguments = parser.parse_args()
    if arguments.program:
        figures = PROGRAMS[arguments.program](arguments.path, arguments.samples)
        print(json.dumps(figures | {"highest_mb": resident(os.getpid(), "VmHWM")}))
        return
    os.environ["PARTS"] = " ".join(parts())
    with tempfile.TemporaryDirectory() as folder:
        os.environ["VLM_TUNE_CACHE"] = f"{folder}/cache"  # from here on: the tokenizer stays where it is
        load = {"before": os.getloadavg()[0]}
        figures = measure(Path(folder), arguments.rows, arguments.samples) | {"load": load}
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    results |= {
        "index_seconds_per_million": round(figures["first"]["setup_seconds"] * 1e6 / arguments.rows, 1),
        "second_first_batch_seconds": figures["second"]["first_batch_seconds"],
        "rss_growth_mb": round(max(growth(figures, name) for name in ("first", "second")), 1),
        "packing_efficiency": round(figures["second"]["packing_efficiency"], 4),
    }
    RESULTS.write_text(json.dumps(results, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    fill_markers(HERE / "README.md", "index", table(figures, arguments.rows))


def parts() -> Iterator[str]:
    """Name the demo's prepared tokenizer and encoder, since the measured programs have a cache of their own."""
    for part in ("vision", "llm"):
        yield f"model.{part}.path={run_recipe(f'demo_{part}')}"


if __name__ == "__main__":
    main()
