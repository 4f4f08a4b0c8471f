"""Speed beside the other trainers on the same work, in one run; write results/speed.json and the table of README.md.

COMMAND: python benchmarks/speed.py --peers FOLDER --work WORK [--reps 3] [--models R,V,packed]
FOLDER holds bench.py and setup.sh of the peers; `setup.sh WORK` has built WORK (environments, model, data). The run is
in turns: every trainer once, then every trainer again. Each has the same environment, threads and rows a step, in the
precision that this processor has.

Our rows: `ours` is a first epoch, with every picture encoded; `ours_later` a later one, whose features are kept. A
ratio compares processor seconds a step with those of the best peer on that work. `packed` is w3 in packs of 1,024
tokens beside XTuner, the one peer that packs on a CPU, and only in float32; packs differ, so tokens are compared.
This machine's rate of products, of which the floor is made, is measured first. What other runs left in WORK for the
same work is removed: bench.py would keep it as it is.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlm_tune.config.schema import Precision
from vlm_tune.model.build import resolve_precision

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "speed.json"
STEPS = f"{sys.executable} {HERE / 'speed_steps.py'}"
OURS = {"ours": STEPS, "ours_later": f"{STEPS} --cache 1"}
NAMES = {("R", "w1"): "w1", ("R", "w2"): "w2", ("R", "w3"): "w3", ("V", "w2"): "v"}
PEERS = ("hf", "trl", "llamafactory", "swift")
WARM = 2  # steps of a run that warm up


def precision() -> str:
    """The precision that this processor has units for."""
    return resolve_precision(Precision.auto).value


def processor() -> str:
    """Name the processor, as Linux does."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    name = next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
    return name + (" (bf16 units)" if precision() == "bf16" else "")


def run(arguments: argparse.Namespace, model: str, work: str, trainers: str, dtypes: str, ours: dict[str, str]) -> None:
    """Run every trainer `reps` times, in turns."""
    for left in (Path(arguments.work) / "res").glob(f"{model}.{work}.*"):
        left.unlink()
    added = [part for name, command in ours.items() for part in ("--add", f"{name}={command}")]
    subprocess.run(
        [
            *(sys.executable, f"{arguments.peers}/bench.py", "--work", arguments.work, "run", "--model", model),
            *("--workloads", work, "--dtypes", dtypes, "--reps", str(arguments.reps), "--peers", trainers),
            *added,
        ],
        check=True,
        env=os.environ | {"GOMP_SPINCOUNT": "10000"},  # ours sets it by itself: here everybody has it
    )


def read(work_folder: Path, model: str, work: str, dtype: str) -> dict[str, dict[str, float]]:
    """Read the runs of one work: each trainer's medians."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for path in sorted((work_folder / "res").glob(f"{model}.{work}.{dtype}.*.json")):
        made = json.loads(path.read_text(encoding="utf-8"))
        if len(made["steps"]) > WARM:
            runs.setdefault(path.name.split(".")[3], []).append(made)
    return {name: medians(made) for name, made in runs.items()}


def require_runs(rows: dict[str, dict[str, float]], names: list[str], logs: str) -> None:
    """Stop if no run of a trainer ended well: without it the best peer would be another."""
    missing = [name for name in names if name not in rows]
    if missing:
        raise SystemExit(
            f"no run of {', '.join(missing)} ended well: read " + ", ".join(logs.format(each) for each in missing)
        )


def medians(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Take the median of the runs of one trainer."""
    rows = []
    for made in runs:
        steps = counted(made)
        total = {key: sum(step[key] for step in steps) for key in ("wall", "cpu", "samples", "nonpad", "sup", "tiles")}
        first = made["steps"][0]["loss"]
        rows.append(
            {key: value / len(steps) for key, value in total.items()}
            | {"peak_rss_mb": made["peak_rss_mb"], "startup_s": made["startup_s"], "loss": sum(first) / len(first)}
        )
    return {key: statistics.median(row[key] for row in rows) for key in rows[0]} | {"runs": len(rows)}


def counted(made: dict[str, Any]) -> list[dict[str, Any]]:
    """The steps of a run that count."""
    steps: list[dict[str, Any]] = made["steps"]
    return steps[WARM:]


def compare(rows: dict[str, dict[str, float]], floor: float) -> dict[str, Any]:
    """Ratios of one work: to the best peer, and to the floor in seconds of both threads."""
    peers = {name: row for name, row in rows.items() if name in PEERS}
    best = min(row["cpu"] for row in peers.values())
    first, later = rows["ours"], rows["ours_later"]
    return {
        "ratio_first_epoch": best / first["cpu"],
        "ratio_later_epochs": best / later["cpu"],
        "floor_first_epoch": first["cpu"] / 2 / floor,
        "floor_later_epochs": later["cpu"] / 2 / floor,
        "memory_ratio": first["peak_rss_mb"] / min(row["peak_rss_mb"] for row in peers.values()),
        "trainers": rows,
    }


def compare_packed(arguments: argparse.Namespace, work_folder: Path) -> dict[str, Any]:
    """Tokens a processor second in packs: ours in each precision of this processor, as multiples of XTuner's."""
    dtypes = sorted({"fp32", precision()}, reverse=True)
    run(arguments, "R", "w3p", "xtuner", ",".join(dtypes), {"ours": STEPS})
    rows = {
        f"{name}, {dtype}": row | {"tokens_per_cpu_s": row["nonpad"] / row["cpu"]}
        for dtype in dtypes
        for name, row in read(work_folder, "R", "w3p", dtype).items()
    }
    require_runs(rows, ["xtuner, fp32"], f"{work_folder}/res/R.w3p.fp32.xtuner.r0.log")
    theirs = rows["xtuner, fp32"]
    ratios = {f"ratio_{dtype}": rows[f"ours, {dtype}"]["tokens_per_cpu_s"] for dtype in dtypes}
    return {
        **{name: rate / theirs["tokens_per_cpu_s"] for name, rate in ratios.items()},
        "memory_ratio": rows["ours, fp32"]["peak_rss_mb"] / theirs["peak_rss_mb"],
        "trainers": rows,
    }


def packed_table(results: dict[str, Any]) -> str:
    """Write the comparison of packs as tables, one for each processor that made it."""
    return by_processor({where: found["w3p"] for where, found in results.items() if "w3p" in found}, rows_of_packs)


def rows_of_packs(result: dict[str, Any]) -> list[str]:
    """Write the comparison of packs of one processor."""
    best = result["trainers"]["xtuner, fp32"]["tokens_per_cpu_s"]
    return [
        "| trainer | runs | non-pad tokens per CPU s | CPU s a step | tokens a step | peak MB | loss 1 | "
        "times XTuner |",
        "|---|---|---|---|---|---|---|---|",
        *(
            f"| {name} | {row['runs']} | {row['tokens_per_cpu_s']:,.0f} | {row['cpu']:.2f} | {row['nonpad']:,.0f} | "
            f"{row['peak_rss_mb']:,.0f} | {row['loss']:.5f} | {row['tokens_per_cpu_s'] / best:.2f} |"
            for name, row in result["trainers"].items()
        ),
    ]


def floor_seconds(peers: str, work_folder: Path, model: str, work: str, step: dict[str, float]) -> float:
    """Ask the peers' own formula for the seconds that a step's necessary products take."""
    code = (
        "import sys, json; sys.argv = ['bench.py', 'table', '--work', sys.argv[1]]; import io, contextlib\n"
        f"sys.path.insert(0, {peers!r})\n"
        "with contextlib.redirect_stdout(io.StringIO()): import bench\n"
        f"rate = json.load(open({str(work_folder / 'gemm.json')!r}))[{precision()!r}] * 1e9\n"
        f"print(bench.floor_s(rate, bench.CFG[{model!r}], {work!r}, {step!r}))"
    )
    made = subprocess.run(
        [sys.executable, "-c", code, str(work_folder)], capture_output=True, text=True, check=True, cwd=peers
    )
    return float(made.stdout.split()[-1])


def table(results: dict[str, Any]) -> str:
    """Write the results as tables, one for each processor."""
    works = {where: {work: found[work] for work in found if work != "w3p"} for where, found in results.items()}
    return by_processor({where: found for where, found in works.items() if found}, rows_of_works)


def by_processor(results: dict[str, Any], rows_of: Callable[[dict[str, Any]], list[str]]) -> str:
    """Write a table below the name of each processor and its precision."""
    return "\n\n".join("\n".join([f"{where}:", "", *rows_of(found)]) for where, found in results.items())


def rows_of_works(results: dict[str, Any]) -> list[str]:
    """Write the results of one processor."""
    lines = [
        "| work | trainer | runs | CPU s a step | samples/s | non-pad tokens/s | supervised tokens/s | peak MB | "
        "loss 1 | times the best peer | times the floor |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for work, result in results.items():
        best = min(row["cpu"] for name, row in result["trainers"].items() if name in PEERS)
        floor = result["trainers"]["ours"]["cpu"] / 2 / result["floor_first_epoch"]
        for name, row in sorted(result["trainers"].items(), key=lambda item: -item[1]["cpu"]):
            rates = (
                f"{row[key] / row['wall']:,.{digits}f}" for key, digits in (("samples", 2), ("nonpad", 0), ("sup", 0))
            )
            lines.append(
                f"| {work} | {name} | {row['runs']} | {row['cpu']:.2f} | {' | '.join(rates)} | "
                f"{row['peak_rss_mb']:,.0f} | {row['loss']:.5f} | {best / row['cpu']:.2f} | "
                f"{row['cpu'] / 2 / floor:.1f} |"
            )
    return lines


def main() -> None:
    """Run, compare, write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--peers", required=True)
    parser.add_argument("--work", required=True)
    parser.add_argument("--reps", type=int, default=3)
    parser.add_argument("--models", default="R,V,packed")
    parser.add_argument("--trainers", default="hf,trl,llamafactory,swift")
    arguments = parser.parse_args()
    work_folder = Path(arguments.work).resolve()
    arguments.work, arguments.peers = str(work_folder), str(Path(arguments.peers).resolve())
    require_environments(arguments)
    results: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    found = results.setdefault(f"{processor()}, {precision()}", {})
    subprocess.run([sys.executable, f"{arguments.peers}/bench.py", "--work", arguments.work, "gemm"], check=True)
    models = arguments.models.split(",")
    for model, work in [pair for pair in NAMES if pair[0] in models]:
        run(arguments, model, work, arguments.trainers, precision(), OURS)
        rows = read(work_folder, model, work, precision())
        logs = f"{work_folder}/res/{model}.{work}.{precision()}.{{}}.r0.log"
        require_runs(rows, [*arguments.trainers.split(","), *OURS], logs)
        floor = floor_seconds(arguments.peers, work_folder, model, work, rows["ours"])
        found[NAMES[model, work]] = compare(rows, floor)
    if "packed" in models:
        found["w3p"] = compare_packed(arguments, work_folder)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    write_block("speed", table(results))
    write_block("packed", packed_table(results))


def require_environments(arguments: argparse.Namespace) -> None:
    """Stop before anything is measured if a trainer's environment was not built."""
    names = {"trl" if name == "hf" else name for name in arguments.trainers.split(",")}
    names |= {"xtuner"} if "packed" in arguments.models.split(",") else set()
    missing = " ".join(sorted(name for name in names if not Path(arguments.work, "venvs", name).is_dir()))
    if missing:
        build = f"{arguments.peers}/setup.sh {arguments.work} {missing}"
        raise SystemExit(f"no environment for {missing}: run {build}, or leave it out of --trainers and --models")


def write_block(name: str, text: str) -> None:
    """Put a table into README.md between its two marks, and on the screen."""
    readme = HERE / "README.md"
    block = f"<!-- {name} -->\n{text}\n<!-- /{name} -->"
    whole = readme.read_text(encoding="utf-8")
    whole = re.sub(rf"<!-- {name} -->.*<!-- /{name} -->", lambda _: block, whole, flags=re.S)
    readme.write_text(whole, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
