"""Memory and time of a step beside another build of this project, in one run; write them into results/faster.json.

COMMAND: python benchmarks/faster.py --other FOLDER [--reps 3] [--steps 3] [--work WORK] [--packs bf16 fp32]
FOLDER is a checkout of the other build. Each run is a process of its own, the two builds in turns; time is processor
time, memory the most that a process held beside mapped files, both of the steps after the first. With WORK, the folder
that `setup.sh` of the peers built, w2 is measured too (see `speed.py`).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from speed import medians

from vlm_tune.config.schema import Precision
from vlm_tune.model.build import resolve_precision

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "faster.json"
PACK = ["stage=finetune", "stage.init_from=none", "stage.pack_length=8192", "stage.pack_tiles=512", "data.workers=0"]
QUIET = [
    "data.val=none",
    "data.test=none",
    "trainer={global_batch: 1, chat_every: 0, val_every: 1000, save_every: 1000}",
]


def step_packs(precision: str, steps: int, out: str) -> None:
    """Train a few steps on packs of 8,192 tokens of the demo; write what each took. Run with a build on PYTHONPATH."""
    from speed_steps import run_steps  # the build's own, as all that follows

    from vlm_tune.config.parse import load_config
    from vlm_tune.data.datamodule import DataModule
    from vlm_tune.data.encode import Encoder

    config = load_config([*PACK, *QUIET, f"stage.max_steps={steps}", f"trainer.precision={precision}"])
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


def run_packs(build: Path, precision: str, steps: int) -> dict[str, float]:
    """Run the steps of one build in a process of its own."""
    with tempfile.NamedTemporaryFile(suffix=".json") as out:
        path = f"import sys; sys.path.append({str(HERE)!r})"
        call = f"faster.step_packs({precision!r}, {steps}, {out.name!r})"
        code = f"from vlm_tune.cli import quiet_libraries; quiet_libraries(); {path}; import faster; {call}"
        paths = os.pathsep.join([str(build), str(build / "benchmarks")])
        subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": paths})
        made = json.loads(Path(out.name).read_text(encoding="utf-8"))
    later = made["steps"][1:]
    return {
        "cpu": sum(step["cpu"] for step in later) / sum(step["nonpad"] for step in later),
        "peak_rss_mb": made["peak_rss_mb"],
        "loss": made["steps"][0]["loss"][0],
    }


def run_work(build: Path, work: Path) -> dict[str, float]:
    """Run w2 of one build, in the precision that the processor has."""
    with tempfile.NamedTemporaryFile(suffix=".json") as out:
        precision = resolve_precision(Precision.auto).value
        options = ["--workload", "w2", "--bs", "2", "--steps", "8", "--dtype", precision]
        paths = {"PYTHONPATH": str(build), "BENCH_WORK": str(work), "BENCH_OUT": out.name}
        steps = str(build / "benchmarks" / "speed_steps.py")
        subprocess.run([sys.executable, steps, *options], check=True, env=os.environ | paths)
        return medians([json.loads(Path(out.name).read_text(encoding="utf-8"))])


def in_turns(reps: int, other: Path, run: Any, *arguments: Any) -> dict[str, Any]:
    """Run both builds in turns; return the medians of each, and ours as a share of the other's."""
    rows: dict[str, list[dict[str, float]]] = {"today": [], "ours": []}
    for _ in range(reps):
        for name, build in (("today", other), ("ours", HERE.parent)):
            rows[name].append(run(build, *arguments))
    middle = {
        name: {key: statistics.median(row[key] for row in made) for key in made[0]} for name, made in rows.items()
    }
    shares = {key: middle["ours"][key] / middle["today"][key] for key in ("cpu", "peak_rss_mb")}
    return {"reps": reps, **middle, "time": shares["cpu"], "memory": shares["peak_rss_mb"]}


def processor() -> str:
    """Name the processor, as Linux does."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    name = next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
    return name + (" (bf16 units)" if resolve_precision(Precision.auto) is Precision.bf16 else "")


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--other", type=Path, required=True)
    parser.add_argument("--reps", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--packs", nargs="*", default=["bf16", "fp32"])
    options = parser.parse_args()
    other = options.other.resolve()
    made = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    made["processor"] = processor()
    for precision in options.packs:
        found = in_turns(options.reps, other, run_packs, precision, options.steps)
        made.setdefault("pack8192", {})[precision] = found
        made.setdefault("pack8192_memory_vs_today", {})[precision] = found["memory"]
        made.setdefault("pack8192_time_vs_today", {})[precision] = found["time"]
    if options.work is not None:
        made["w2"] = in_turns(options.reps, other, run_work, options.work.resolve())
        made["w2_memory_vs_today"] = made["w2"]["memory"]
    RESULTS.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(made, indent=1))


if __name__ == "__main__":
    main()
