"""The longest pack that trains within 6 GB, by ways of `stage.gradient_checkpointing.llm` and beside another build.

COMMAND: python benchmarks/longest.py --base FOLDER [--kinds rows one] [--ways base defaults mlp true] [--most 65536]
FOLDER is a checkout of the other build (`git worktree add FOLDER 623c9bf`), which runs with its defaults. One optimizer
step of the demo's fine-tuning is tried, in a process of its own, in the precision that the processor has: lengths are
doubled while the process's largest resident memory stays within the limit, then halved between the last that did and
the first that did not, to a tenth. A process above the limit is ended. Writes results/longest.json and the table of
docs/scaling.md.

rows   packs of the demo's rows, about 20 tokens and a picture each
one    one sample alone: a picture, a long text to read, and an answer of 100 words
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from faster import EVERYBODY
from speed import processor

from vlm_tune.recipes.recipe import run_recipe

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "longest.json"
PAGE = HERE.parent / "docs" / "scaling.md"
LIMIT = 6e9  # bytes
NEAR = 1.1  # the first that did not fit, beside the last that did
POSITIONS = 2**20  # that the language model is said to know: the demo's own refuses a sample of more than 8,192
ROW = 22  # tokens of a row of the demo, about: a file is one pack, not quite full
KEY = "stage.gradient_checkpointing.llm"
WAYS = {"base": [], "defaults": [], "mlp": [f"{KEY}=mlp"], "true": [f"{KEY}=true"]}
NAMES = {"base": "the build before, defaults", "defaults": "defaults", "mlp": f"`{KEY}=mlp`", "true": f"`{KEY}=true`"}
COMMON = [
    *("stage=finetune", "model=demo", "stage.init_from=none", "stage.max_steps=1", "stage.pack_tiles=1000000"),
    *("data.val=none", "data.test=none", "data.workers=0"),
    "trainer={global_batch: 1, chat_every: 0, val_every: 1000, save_every: 1000}",
]


def write_llm(folder: Path) -> None:
    """Link the demo's language model, with more positions."""
    made = folder / "llm"
    made.mkdir()
    for file in run_recipe("demo_llm").iterdir():
        if file.name != "config.json":
            (made / file.name).symlink_to(file)
    config = json.loads((run_recipe("demo_llm") / "config.json").read_text(encoding="utf-8"))
    config["max_position_embeddings"] = POSITIONS
    (made / "config.json").write_text(json.dumps(config), encoding="utf-8")


def write_rows(folder: Path, length: int) -> None:
    """Write the demo's rows, over again under other ids, until they fill a pack."""
    rows = [json.loads(line) for line in (run_recipe("demo") / "finetune_train.jsonl").open(encoding="utf-8")]
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for number, row in enumerate(islice(cycle(rows), length // ROW)):
            file.write(json.dumps({**row, "id": str(number)}) + "\n")


def write_one(folder: Path, length: int) -> None:
    """Write one row of about that many tokens: our documentation to read, and its beginning as the answer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(run_recipe("demo_llm"))
    first = json.loads((run_recipe("demo") / "finetune_train.jsonl").open(encoding="utf-8").readline())
    text = " ".join(
        re.findall(r"\w+", " ".join(page.read_text(encoding="utf-8") for page in HERE.parent.glob("docs/*.md")))
    )
    said = " ".join(text.split()[:100])
    room = length - len(tokenizer(said).input_ids) - 100  # the picture, and the marks of turns
    ids = list(islice(cycle(tokenizer(text).input_ids), room))
    turns = [{"from": "human", "value": f"<image>\n{tokenizer.decode(ids)}"}, {"from": "gpt", "value": said}]
    row = {"id": "one", "image": first["image"], "conversations": turns}
    (folder / "rows.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")


WRITERS = {"rows": write_rows, "one": write_one}


def step(settings: list[str], out: str) -> None:
    """Train one step; write what it took. Run with a build on PYTHONPATH."""
    from speed_steps import run_steps  # the build's own, as all that follows

    from vlm_tune.config.parse import load_config
    from vlm_tune.data.datamodule import DataModule
    from vlm_tune.data.encode import Encoder

    config = load_config(settings)
    made: dict[str, Any] = {"steps": []}

    def open_rows(encoder: Encoder) -> DataModule:
        data = DataModule(config, encoder)
        data.setup()
        return data

    run_steps(config, 1, open_rows, made)
    Path(out).write_text(json.dumps(made["steps"][0]), encoding="utf-8")


def attempt(build: Path, kind: str, length: int, ways: list[str]) -> dict[str, Any]:
    """Try a pack of that length in a process of its own, which is ended where it takes more memory than it may."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        write_llm(folder)
        WRITERS[kind](folder, length)
        lengths = [f"stage.pack_length={length}", f"data.max_length={length}"]
        paths = [f"data.path={folder / 'rows.jsonl'}", f"model.llm.path={folder / 'llm'}"]
        paths.append(f"data.image.root={run_recipe('demo')}")
        call = f"longest.step({[*COMMON, *lengths, *paths, *ways]!r}, {str(folder / 'made.json')!r})"
        path = f"import sys; sys.path.append({str(HERE)!r})"
        code = f"from vlm_tune.cli import quiet_libraries; quiet_libraries(); {path}; import longest; {call}"
        search = os.pathsep.join([str(build), str(build / "benchmarks")])
        log = folder / "log"
        with log.open("w") as said:
            command = [sys.executable, "-P", "-c", code]
            environment = os.environ | EVERYBODY | {"PYTHONPATH": search}
            process = subprocess.Popen(command, env=environment, stdout=said, stderr=said)
            peak = watch(process)
        if peak <= LIMIT and process.returncode:
            raise SystemExit(f"{kind}, {length} tokens, {ways}:\n{log.read_text(encoding='utf-8')[-3000:]}")
        took = json.loads((folder / "made.json").read_text(encoding="utf-8")) if peak <= LIMIT else {}
    counts = {"tokens": took["nonpad"], "cpu_s": round(took["cpu"])} if took else {}
    return {"length": length, "fits": bool(took), "peak_gb": round(peak / 1e9, 2), **counts}


def watch(process: subprocess.Popen[bytes]) -> float:
    """Wait for a process, and end it above the limit; return the most bytes that were resident."""
    peak = 0.0
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
        except ProcessLookupError:
            break
        if found := re.search(r"VmHWM:\s+(\d+) kB", status):
            peak = int(found[1]) * 1024
        if peak > LIMIT:
            process.kill()
        time.sleep(0.05)
    process.wait()
    return peak


def longest(try_length: Callable[[int], dict[str, Any]], start: int, most: int) -> dict[str, Any]:
    """Search the longest that fits: {tokens, peak_gb, tries, is_bounded: no length up to `most` was too long}."""
    tries: list[dict[str, Any]] = []
    good, bad, length = 0, 0, start
    while True:
        tries.append(try_length(length))
        print(tries[-1], flush=True)
        good, bad = (length, bad) if tries[-1]["fits"] else (good, length)
        if good >= most or (good and bad and bad / good < NEAR):
            break
        length = (good + bad) // 2 if good and bad else min(2 * good, most) if good else bad // 2
    best = max((each for each in tries if each["fits"]), key=lambda each: each["tokens"])
    return {"tokens": best["tokens"], "peak_gb": best["peak_gb"], "is_bounded": not bad, "tries": tries}


def table(results: dict[str, Any]) -> str:
    """Write a row for each way: tokens of the longest pack, and how often the base's."""
    kinds = results["kinds"]
    lines = ["| | packs of the demo's rows | one long sample |", "|---|---|---|"]
    for way, name in NAMES.items():
        cells = []
        for kind in WRITERS:
            found, base = kinds.get(kind, {}).get(way), kinds.get(kind, {}).get("base")
            if found is None or base is None:
                cells.append("not measured")
                continue
            least = "at least " if found["is_bounded"] else ""
            times = f" ({found['tokens'] / base['tokens']:.1f} times)" if way != "base" else ""
            cells.append(f"{least}{found['tokens']:,}{times}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Search each way of each kind; write what was found as it is found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--kinds", nargs="+", choices=WRITERS, default=list(WRITERS))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--start", type=int, default=8192)
    parser.add_argument("--most", type=int, default=65536)
    options = parser.parse_args()
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    results |= {"processor": processor(), "limit_gb": LIMIT / 1e9, "kinds": results.get("kinds", {})}
    for kind in options.kinds:
        for way in options.ways:
            print(kind, way, flush=True)
            build = options.base.resolve() if way == "base" else HERE.parent

            def try_length(length: int, build: Path = build, kind: str = kind, way: str = way) -> dict[str, Any]:
                return attempt(build, kind, length, WAYS[way])

            found = longest(try_length, options.start, options.most)
            results["kinds"].setdefault(kind, {})[way] = found
            RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    text = PAGE.read_text(encoding="utf-8")
    block = f"<!-- longest -->\n{table(results)}\n<!-- /longest -->"
    PAGE.write_text(
        re.sub(r"<!-- longest -->.*<!-- /longest -->", lambda _: block, text, flags=re.DOTALL), encoding="utf-8"
    )


if __name__ == "__main__":
    main()
