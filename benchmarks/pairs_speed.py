"""Preference training on pictures beside other trainers, in one run; write results/pairs_speed.json and README's table.

COMMAND: python benchmarks/pairs_speed.py --work WORK [--reps 3] [--threads 2] [--trainers ours,swift,...] [--keep]
`setup.sh WORK` of the peers (see `speed.py`) has built WORK; peers_dpo/ holds the scripts that run them. The pairs are
those of `make_pairs`; sigmoid DPO with beta 0.1, LoRA r=16 on all linear layers of the language model and the projector
trained, up to 6 tiles and a thumbnail, 2 pairs a step, in the precision that this processor has. Each run is a process
of its own, in turns. On a busy machine one thread tells more: two wait for each other, and ours, of more and smaller
products, longer.

Time is processor time a pair: of the steps after the first two, and of ours also what it does before the first step
with all pairs (features of the pictures, log-probabilities of the reference), spread over one epoch. The peers compute
the reference in each step: TRL and ms-swift refuse to compute it ahead where there are pictures, LLaMA-Factory cannot.
`--keep` adds to the runs that WORK holds from earlier commands with as many threads.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from faster import EVERYBODY
from speed import counted, precision, processor, write_block

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "pairs_speed.json"
PEERS = ("swift", "llamafactory", "trl")
STEPS = [str(HERE / "speed_steps.py"), "--workload", "pairs"]
OURS = {
    "ours": ["--cache", "1"],  # as by default: a frozen encoder sees each picture once, and its features are kept
    "ours_encoding": ["--cache", "0"],  # it sees each picture for the reference, and in the step again
}
PACKAGES = ("torch", "transformers", "peft", "lightning")
NUM_PAIRS = 2  # pairs a step
EPOCH = 20  # pairs in all: one of each size that the pictures have


def make_pairs(assets: Path) -> None:
    """Make pairs of the pictures with conversations: the first question, its answer, and the next row's as rejected."""
    rows = json.loads((assets / "mm.json").read_text(encoding="utf-8"))
    asked, said = zip(*([turn["value"] for turn in row["conversations"][:2]] for row in rows), strict=True)
    pairs = [
        {"id": row["id"], "image": row["image"], "question": asked[place], "chosen": said[place],
         "rejected": said[(place + 1) % len(rows)]}
        for place, row in enumerate(rows[:EPOCH])
    ]  # fmt: skip
    (assets / "pairs.json").write_text(json.dumps(pairs, ensure_ascii=False, indent=1), encoding="utf-8")


def run(name: str, work: Path, threads: int, steps: int, out: Path) -> None:
    """Run a trainer for some steps; ours with an empty cache."""
    if name in OURS:
        command = [sys.executable, *STEPS, *OURS[name]]
    else:
        command = [str(work / "venvs" / name / "bin" / "python"), str(HERE / "peers_dpo" / f"{name}_dpo.py")]
    command += ["--bs", str(NUM_PAIRS), "--steps", str(steps), "--dtype", precision()]
    with tempfile.TemporaryDirectory(dir=work) as cache, out.with_suffix(".log").open("w", encoding="utf-8") as log:
        own = {"BENCH_WORK": str(work), "BENCH_OUT": str(out), "VLM_TUNE_CACHE": cache, "OMP_NUM_THREADS": str(threads)}
        subprocess.run(command, check=True, env=os.environ | EVERYBODY | own, stdout=log, stderr=log)
    load = os.getloadavg()[0]
    print(f"{out.stem}: {row_of(json.loads(out.read_text(encoding='utf-8')))['cpu']:.2f} s a pair, load {load:.1f}")


def row_of(made: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of one run, a pair; what was done ahead, with all pairs, is spread over one epoch."""
    later, first = counted(made), made["steps"][0]
    pairs = NUM_PAIRS * len(later)
    step = sum(each["cpu"] for each in later) / pairs
    ahead = {key: made.get(f"{key}_cpu_s", 0.0) / EPOCH for key in ("encoding", "reference")}
    sizes = {key: sum(each[key] for each in later) / pairs for key in ("chosen", "rejected", "tiles")}
    known = {key: first[key] for key in ("loss", "logp_chosen", "logp_rejected") if key in first}
    known["loss"] = known["loss"][0] if isinstance(known["loss"], list) else known["loss"]
    return {
        "cpu": step + sum(ahead.values()), "cpu_step": step, "cpu_encoding_ahead": ahead["encoding"],
        "cpu_reference_ahead": ahead["reference"], "wall_step": sum(each["wall"] for each in later) / pairs,
        "peak_rss_mb": made["peak_rss_mb"], "startup_s": made["startup_s"], "trained": made["trained"],
    } | sizes | known  # fmt: skip


def middle(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Take the median of each figure of the runs of one trainer, and the least and most processor time."""
    found = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
    return found | {"cpu_range": [f(row["cpu"] for row in rows) for f in (min, max)], "runs": len(rows)}


def best_of(trainers: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Find the fastest peer's time and the smallest one's memory."""
    peers = [row for name, row in trainers.items() if name in PEERS]
    return {key: min(row[key] for row in peers) for key in ("cpu", "peak_rss_mb")}


def compare(trainers: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Ours as a share of the best peer: the fastest one's time, and the smallest one's memory."""
    best = best_of(trainers)
    ours = {name: trainers[name] for name in OURS if name in trainers}
    return {
        name: {"time": row["cpu"] / best["cpu"], "memory": row["peak_rss_mb"] / best["peak_rss_mb"]}
        for name, row in ours.items()
    }


def require_same_work(trainers: dict[str, dict[str, Any]]) -> None:
    """Stop if the trainers did not do the same work: tokens a pair within 1%, tiles, trained weights."""
    ours = trainers["ours"]
    for name, row in trainers.items():
        times = 2 if name in PEERS else 1  # they encode a picture for each answer
        same = row["tiles"] == times * ours["tiles"] and row["trained"] == ours["trained"]
        off = max(abs(row[key] / ours[key] - 1) for key in ("chosen", "rejected"))
        if not same or off > 0.01:
            raise SystemExit(f"{name} did other work than ours: {row} beside {ours}")


def table(measured: dict[str, Any]) -> str:
    """Write the results as a table, by number of threads."""
    lines = [
        f"{measured['processor']}, {measured['precision']}:",
        "",
        "| threads | trainer | runs | CPU s a pair | of it ahead | tokens chosen + rejected | tiles encoded a pair | "
        "trained weights | peak MB | loss 1 | log p chosen 1 | of the best peer's time | of its memory |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for threads, found in sorted(measured["threads"].items(), reverse=True):
        trainers = found["trainers"]
        best = best_of(trainers)
        for name, row in sorted(trainers.items(), key=lambda item: -item[1]["cpu"]):
            ahead = row["cpu_encoding_ahead"] + row["cpu_reference_ahead"]
            encoded = row["tiles"] * (1 if name == "ours" else 2)  # the peers: once for a step, once for its reference
            lines.append(
                f"| {threads} | {name} | {row['runs']} | {row['cpu']:.2f} | {ahead:.2f} | {row['chosen']:,.0f} + "
                f"{row['rejected']:,.0f} | {encoded:.1f} | {row['trained']:,} | {row['peak_rss_mb']:,.0f} | "
                f"{row['loss']:.4f} | {row['logp_chosen']:.1f} | {row['cpu'] / best['cpu']:.2f} | "
                f"{row['peak_rss_mb'] / best['peak_rss_mb']:.2f} |"
            )
    return "\n".join(lines)


def gather(runs: Path) -> dict[str, Any]:
    """Read the runs of a folder: each trainer's medians, its versions, and ours beside the best."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in (*PEERS, *OURS)}
    versions: dict[str, dict[str, str]] = {"ours": {name: version(name) for name in PACKAGES}}
    for path in sorted(runs.glob("*.json")):
        made = json.loads(path.read_text(encoding="utf-8"))
        name = path.name.split(".")[0]
        found[name].append(row_of(made))
        versions |= {name: made["versions"]} if "versions" in made else {}
    trainers = {name: middle(rows) for name, rows in found.items() if rows}
    require_same_work(trainers)
    return {"shares": compare(trainers), "trainers": trainers, "versions": versions}


def main() -> None:
    """Run, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--reps", type=int, default=3)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--trainers", default=",".join((*PEERS, *OURS)))
    parser.add_argument("--keep", action="store_true")
    options = parser.parse_args()
    work = options.work.resolve()
    make_pairs(work / "assets")
    runs = work / f"pairs_{options.threads}"
    if not options.keep:
        shutil.rmtree(runs, ignore_errors=True)
    runs.mkdir(exist_ok=True)
    for _ in range(options.reps):
        for name in options.trainers.split(","):
            out = runs / f"{name}.{len(list(runs.glob(f'{name}.*.json')))}.json"
            run(name, work, options.threads, options.steps, out)
    made = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    if made.get("processor") != processor():
        made = {"threads": {}}  # what another machine took is not beside this one's
    made |= {"processor": processor(), "precision": precision(), "pairs": EPOCH, "steps": options.steps}
    made["threads"][str(options.threads)] = gather(runs)
    RESULTS.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    write_block("pairs", table(made))


if __name__ == "__main__":
    main()
