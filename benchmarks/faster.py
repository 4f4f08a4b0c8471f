"""Memory and time of a step beside another build of this project, in one run; write them into results/faster.json.

COMMAND: python benchmarks/faster.py --other FOLDER [--reps 3] [--steps 3] [--packs bf16 fp32] [--work WORK --peers DIR]
         [--demo RUNS --seeds 0 1 2]
FOLDER is a checkout of the other build. Each run is a process of its own, all in turns; time is processor time of the
steps after the first, memory the most that a process held beside mapped files. With WORK, the folder that DIR's
setup.sh built, w2 and w3 are measured too (see `speed.py`), and w2q beside the peers: w2's pictures, each with four
questions of one turn, one picture a step, pictures encoded (a first epoch). Ours shares what the four begin with.
With RUNS, a folder to fill, both train the demo with each seed, from downloads to reports: two stages, validation,
answers and pictures encoded anew; what is prepared once for all runs does not count. About 15 minutes a seed.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from demo import TASKS
from speed import counted, medians, precision, processor

HERE = Path(__file__).resolve().parent
EVERYBODY = {
    "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"), "GOMP_SPINCOUNT": "10000", "CUDA_VISIBLE_DEVICES": "",
    "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
}  # fmt: skip
RESULTS = HERE / "results" / "faster.json"
PACK = ["stage=finetune", "stage.init_from=none", "stage.pack_length=8192", "stage.pack_tiles=512", "data.workers=0"]
QUIET = [
    "data.val=none",
    "data.test=none",
    "trainer={global_batch: 1, chat_every: 0, val_every: 1000, save_every: 1000}",
]


def step_packs(dtype: str, steps: int, out: str) -> None:
    """Train a few steps on packs of 8,192 tokens of the demo; write what each took. Run with a build on PYTHONPATH."""
    from speed_steps import run_steps  # the build's own, as all that follows

    from vlm_tune.config.parse import load_config
    from vlm_tune.data.datamodule import DataModule
    from vlm_tune.data.encode import Encoder

    config = load_config([*PACK, *QUIET, f"stage.max_steps={steps}", f"trainer.precision={dtype}"])
    made: dict[str, Any] = {"steps": []}

    def open_rows(encoder: Encoder) -> DataModule:
        data = DataModule(config, encoder)
        data.setup()
        return data

    run_steps(config, steps, open_rows, made)
    made["peak_rss_mb"] = status("VmHWM") - status("RssFile")
    Path(out).write_text(json.dumps(made), encoding="utf-8")


def status(key: str) -> float:
    """Read VmHWM or RssFile of this process in MB."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{key}:"))


def run_packs(build: Path, dtype: str, steps: int) -> dict[str, float]:
    """Run the steps of one build in a process of its own."""
    with tempfile.NamedTemporaryFile(suffix=".json") as out:
        ours, theirs = (f"sys.path.insert(0, {str(place)!r})" for place in (HERE, build / "benchmarks"))
        call = f"faster.step_packs({dtype!r}, {steps}, {out.name!r})"
        code = (
            f"import sys; from vlm_tune.cli import quiet_libraries as quiet; quiet(); {ours}; import faster; {theirs}"
        )
        command = [sys.executable, "-P", "-c", f"{code}; {call}"]
        subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": str(build)})
        made = json.loads(Path(out.name).read_text(encoding="utf-8"))
    later = made["steps"][1:]
    return {
        "cpu": sum(step["cpu"] for step in later) / sum(step["nonpad"] for step in later),
        "peak_rss_mb": made["peak_rss_mb"],
        "loss": made["steps"][0]["loss"][0],
    }


def run_work(build: Path, work: Path, *options: str) -> dict[str, Any]:
    """Run a work of one build, in the precision that the processor has."""
    return run_trainer([sys.executable, str(build / "benchmarks" / "speed_steps.py")], work, build, *options)


def run_trainer(command: list[str], work: Path, build: Path | None, *options: str) -> dict[str, Any]:
    """Run a trainer for some steps; all have the environment of `speed.py`."""
    with tempfile.NamedTemporaryFile(suffix=".json") as out:
        paths = {"BENCH_WORK": str(work), "BENCH_OUT": out.name} | ({"PYTHONPATH": str(build)} if build else {})
        subprocess.run([*command, *options, "--dtype", precision()], check=True, env=os.environ | EVERYBODY | paths)
        made = json.loads(Path(out.name).read_text(encoding="utf-8"))
        return medians([made]) | {"steps": [step["cpu"] for step in counted(made)]}


def make_questions(work: Path) -> Path:
    """Make a work folder whose w2 has four questions of one turn for each picture, of the words of w2's turns."""
    made = work / "w2q"
    (made / "assets").mkdir(parents=True, exist_ok=True)
    for each in (*work.glob("assets/*"), work / "venvs"):
        place = made / each.relative_to(work)
        if each.name == "images":
            shutil.copytree(each, place, dirs_exist_ok=True)  # a link would lead out of the folder of pictures
        elif each.name not in ("mm.json", "mm.messages.jsonl") and not place.exists():
            place.symlink_to(each)
    rows = json.loads((work / "assets" / "mm.json").read_text(encoding="utf-8"))
    texts = [[turn["value"].removeprefix("<image>\n") for turn in row["conversations"]] for row in rows]
    turns = [(asked, " ".join(said.split()[:12])) for row in texts for asked, said in batched(row, 2)]
    asked = [
        {**row, "id": 4 * number + each, "image": str(made / Path(row["image"]).relative_to(work)), "conversations": [
            {"from": "human", "value": f"<image>\n{turns[(4 * number + each) % len(turns)][0]}"},
            {"from": "gpt", "value": turns[(4 * number + each) % len(turns)][1]},
        ]}
        for number, row in enumerate(rows) for each in range(4)
    ]  # fmt: skip
    (made / "assets" / "mm.json").write_text(json.dumps(asked), encoding="utf-8")
    roles = {"human": "user", "gpt": "assistant"}
    lines = [
        {"messages": [{"role": roles[each["from"]], "content": each["value"]} for each in row["conversations"]],
         "images": [row["image"]]}
        for row in asked
    ]  # fmt: skip
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (made / "assets" / "mm.messages.jsonl").write_text(text, encoding="utf-8")
    return made


def batched(items: list[str], size: int) -> list[tuple[str, ...]]:
    """Cut a list into tuples of one size."""
    return list(zip(*(items[first::size] for first in range(size)), strict=True))


def compare_questions(reps: int, other: Path, work: Path, peers: Path) -> dict[str, Any]:
    """Processor time a question of ours, of the other build and of the peers, in turns; `fastest` as in `compare`."""
    made = make_questions(work)
    options = ["--workload", "w2", "--bs", "4", "--steps", "8"]
    commands = {"hf": ("trl", "hf.py"), "swift": ("swift", "swift_sft.py")}
    rows: dict[str, list[float]] = {name: [] for name in ("ours", "today", *commands)}
    steps: dict[str, list[list[float]]] = {name: [] for name in rows}
    for _ in range(reps):
        for name in rows:
            if name in commands:
                venv, script = commands[name]
                command = [str(work / "venvs" / venv / "bin" / "python"), str(peers / "peers" / script)]
                found = run_trainer(command, made, None, *options)
            else:
                shares = ["--share", "1"] if name == "ours" else []
                found = run_work(HERE.parent if name == "ours" else other, made, *options, *shares)
            rows[name].append(found["cpu"] / found["samples"])
            steps[name].append([cpu / found["samples"] for cpu in found["steps"]])
    middle = {name: statistics.median(row) for name, row in rows.items()}
    least = {name: fastest(made) for name, made in steps.items()}
    return {"processor": processor(), "reps": reps, **middle, "fastest": least}


def run_demo(build: Path, seed: int, runs: Path) -> dict[str, float]:
    """Train both stages of the demo; return the processor seconds of all that ran, and what the photos' test scored."""
    runs /= "ours" if build == HERE.parent else "today"  # neither reads what the other has cached
    paths = EVERYBODY | {"PYTHONPATH": str(build), "VLM_TUNE_CACHE": str(runs / "cache")}
    prepare = "from vlm_tune.recipes.recipe import run_recipe as run; run('demo'), run('demo_llm'), run('demo_vision')"
    subprocess.run([sys.executable, "-P", "-c", prepare], check=True, env=os.environ | paths)
    shutil.rmtree(runs / "cache" / "features", ignore_errors=True)
    before, place = resource.getrusage(resource.RUSAGE_CHILDREN), runs / f"demo_{seed}"
    shutil.rmtree(place, ignore_errors=True)
    for stage in ("pretrain", "finetune"):
        command = [sys.executable, "-P", "-m", "vlm_tune", f"stage={stage}", f"seed={seed}", f"runs={place}"]
        subprocess.run(command, check=True, env=os.environ | paths, cwd=build)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    report = json.loads((place / "latest" / "report.json").read_text(encoding="utf-8"))
    return {
        "cpu": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "peak_rss_mb": report["peak_rss_mb"],
        **report["evaluation"]["after"],
    }


def compare_demos(seeds: list[int], other: Path, runs: Path) -> dict[str, Any]:
    """Train the demo of both builds with each seed; return all rows, and ours as a share of the other's."""
    rows = in_turns([(seed, runs) for seed in seeds], other, run_demo)
    middle = {name: statistics.median(row["cpu"] for row in made) for name, made in rows.items()}
    return {"processor": processor(), "seeds": seeds, **rows, "time": middle["ours"] / middle["today"]}


def compare(reps: int, other: Path, run: Any, *arguments: Any) -> dict[str, Any]:
    """Run both builds `reps` times; return the medians of each, and ours as a share of the other's.

    `time_fastest` takes the fastest run of each step: beside others' work equal runs differ by more than two builds do.
    """
    rows = in_turns([arguments] * reps, other, run)
    steps = {name: [row.pop("steps") for row in made if "steps" in row] for name, made in rows.items()}
    least = {name: fastest(made) for name, made in steps.items() if made}
    middle = {
        name: {key: statistics.median(row[key] for row in made) for key in made[0]} for name, made in rows.items()
    }
    shares = {key: middle["ours"][key] / middle["today"][key] for key in ("cpu", "peak_rss_mb")}
    made = {"processor": processor(), "reps": reps, **middle, "time": shares["cpu"], "memory": shares["peak_rss_mb"]}
    return made | ({"time_fastest": least["ours"] / least["today"]} if least else {})


def fastest(runs: list[list[float]]) -> float:
    """Take the fastest run of each step, and the mean of the steps."""
    return statistics.mean(map(min, zip(*runs, strict=True)))


def in_turns(runs: Sequence[tuple[Any, ...]], other: Path, run: Any) -> dict[str, list[dict[str, Any]]]:
    """Run the other build and ours with the same arguments, one after the other, for each tuple of arguments."""
    rows: dict[str, list[dict[str, float]]] = {"today": [], "ours": []}
    for arguments in runs:
        for name, build in (("today", other), ("ours", HERE.parent)):
            rows[name].append(run(build, *arguments))
            print(name, *arguments, rows[name][-1], flush=True)
    return rows


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--other", type=Path, required=True)
    parser.add_argument("--reps", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--peers", type=Path)
    parser.add_argument("--packs", nargs="*", default=["bf16", "fp32"])
    parser.add_argument("--demo", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    other = options.other.resolve()
    made = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    made["processor"] = processor()
    for dtype in options.packs:
        found = compare(options.reps, other, run_packs, dtype, options.steps)
        made.setdefault("pack8192", {})[dtype] = found
        made.setdefault("pack8192_memory_vs_today", {})[dtype] = found["memory"]
        made.setdefault("pack8192_time_vs_today", {})[dtype] = found["time"]
    for name, size, steps in (("w2", "2", "16"), ("w3", "8", "32")) if options.work is not None else ():
        work = ["--workload", name, "--bs", size, "--steps", steps]
        made[name] = compare(options.reps, other, run_work, options.work.resolve(), *work)
        made[f"{name}_vs_today"] = 1 / made[name]["time"]
        made[f"{name}_memory_vs_today"] = made[name]["memory"]
    if options.work is not None and options.peers is not None:
        found = compare_questions(options.reps, other, options.work.resolve(), options.peers.resolve())
        made["w2q"] = found
        made["w2q_vs_today"] = found["today"] / found["ours"]
        made["w2q_vs_peer"] = min(found["hf"], found["swift"]) / found["ours"]
    if options.demo is not None:
        found = compare_demos(options.seeds, other, options.demo.resolve())
        made["demo"], made["demo_cpu_vs_today"] = found, found["time"]
        made["demo_accuracy"] = {
            task: [statistics.mean(row[task] for row in found[name]) for name in ("today", "ours")] for task in TASKS
        }
    RESULTS.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(made, indent=1))


if __name__ == "__main__":
    main()
