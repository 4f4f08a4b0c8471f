"""Measure how fast `check` reads rows whose pictures' headers it reads: two processes, 100,000 rows.

    python benchmarks/check.py [--rows 100000] [--workers 2]

The rows have the demo's photos, conversations of 2 to 6 turns and about 600 characters, declared sizes, and the
demo's tokenizer. Each row shows a file of its own (a hard link to one of the photos), so that every header and every
file's last bytes are read once and none twice. Writes `check_rows_per_second` to benchmarks/results/data.json.
"""

import argparse
import json
import os
import random
import tempfile
import time
from pathlib import Path

from PIL import Image

from vlm_tune.cli import quiet_libraries
from vlm_tune.config.parse import load_config
from vlm_tune.inspection.check import check_file
from vlm_tune.model.encoder import build_encoder
from vlm_tune.recipes.fetch import cache_folder
from vlm_tune.recipes.recipe import run_recipe

RESULTS = Path(__file__).resolve().parent / "results" / "data.json"
TURN = 150  # characters of one turn, on average


def main() -> None:
    """Write the rows, check them once, and write the figure."""
    parser = argparse.ArgumentParser(description="Measure the speed of `check`.")
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    quiet_libraries()
    cache_folder().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_folder()) as folder:  # hard links need the photos' own disk
        path = write_rows(Path(folder), options.rows)
        config = load_config([f"data.path={path}", f"data.workers={options.workers}"])
        encoder, _ = build_encoder(config)
        start, busy = time.perf_counter(), processor_seconds()
        found = check_file(config, encoder, path)
        seconds, busy = time.perf_counter() - start, processor_seconds() - busy
    assert (found.num_rows, found.faults) == (options.rows, []), found.faults[:3]
    assert found.images["found"] == options.rows
    speed = options.rows / seconds
    print(f"{options.rows:,} rows in {seconds:.1f} s with {options.workers} processes: {speed:,.0f} rows a second")
    print(f"{1e6 * busy / options.rows:,.0f} microseconds of processor time a row, all processes together")
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results["check_rows_per_second"] = round(speed)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=2, sort_keys=True) + "\n")


def processor_seconds() -> float:
    """Return the processor time of this process and of those that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def write_rows(folder: Path, count: int) -> Path:
    """Write `count` rows, each with a picture file of its own, and return their file."""
    demo = run_recipe("demo")
    photos = sorted((demo / "images").iterdir())
    sizes = [Image.open(photo).size for photo in photos]
    words = sorted({word for line in (demo / "pretrain_train.jsonl").open() for word in line.split() if word.isalpha()})
    chance = random.Random(0)
    path = folder / "train.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            which = number % len(photos)
            name = f"{number // 1000:03}/{number}.jpeg"
            (folder / name).parent.mkdir(exist_ok=True)
            os.link(photos[which], folder / name)
            width, height = sizes[which]
            row = {"id": f"row_{number}", "image": name, "width": width, "height": height}
            file.write(json.dumps(row | {"conversations": conversation(chance, words)}) + "\n")
    return path


def conversation(chance: random.Random, words: list[str]) -> list[dict[str, str]]:
    """Make 2 to 6 turns of random words."""
    turns = []
    for number in range(chance.choice((2, 4, 6))):
        length, text = chance.uniform(0.2, 1.8) * TURN, ""
        while len(text) < length:
            text += f"{chance.choice(words)} "
        text = f"<image>\n{text}" if number == 0 else text
        turns.append({"from": ("human", "gpt")[number % 2], "value": text.strip()})
    return turns


if __name__ == "__main__":
    main()
