"""Train both demos with several seeds, and one blind; write the table of benchmarks/README.md between its markers.

COMMAND: python benchmarks/demo.py [--models demo demo_cnn] [--seeds 0 1 2]
TIME: about 5 minutes a model and seed on two CPU cores. Finished runs are kept and not repeated.
"""

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from PIL import Image

from vlm_tune.recipes.recipe import run_recipe

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "demo.json"
TASKS = ("food_group", "vegetarian")


def run_stages(model: str, seed: int, runs: Path, data: Path) -> dict[str, Any]:
    """Pretrain and fine-tune one model with one seed; return the fine-tuning's report."""
    if not (runs / "latest" / "report.json").is_file() or "finetune" not in (runs / "latest").resolve().name:
        shutil.rmtree(runs, ignore_errors=True)
        for stage, file in (("pretrain", "pretrain_train"), ("finetune", "finetune_train")):
            settings = [
                f"stage={stage}",
                f"model={model}",
                f"seed={seed}",
                f"runs={runs}",
                f"data.path={data}/{file}.jsonl",
            ]
            subprocess.run([sys.executable, "-m", "vlm_tune", *settings], check=True)
    report: dict[str, Any] = json.loads((runs / "latest" / "report.json").read_text(encoding="utf-8"))
    return report


def blank_copy(data: Path, to: Path) -> Path:
    """Copy the demo's data with every photo replaced by a grey one of its size."""
    shutil.copytree(data, to, dirs_exist_ok=True)
    for path in (to / "images").iterdir():
        with Image.open(path) as photo:
            Image.new("RGB", photo.size, (128, 128, 128)).save(path)
    return to


def spread(values: list[float]) -> str:
    """Write percentages as mean and range."""
    mean = statistics.mean(values)
    return f"{mean:.1%} ({min(values):.1%} to {max(values):.1%})" if len(values) > 1 else f"{mean:.1%}"


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """Write one row a model."""
    lines = [
        "| model | seeds | food group: after | blind | majority | vegetarian: after | blind | majority "
        "| training s | memory MB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, reports in results.items():
        cells = []
        for task in TASKS:
            for when in ("after", "blind", "majority"):
                cells.append(spread([report["evaluation"][when][task] for report in reports]))
        seconds = statistics.mean(report["train_seconds"] for report in reports)
        memory = max(report["peak_rss_mb"] for report in reports)
        lines.append(f"| {name} | {len(reports)} | {' | '.join(cells)} | {seconds:.0f} | {memory:,} |")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, then write results and table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["demo", "demo_cnn"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmark"))
    options = parser.parse_args()
    data = run_recipe("demo")
    results: dict[str, list[dict[str, Any]]] = {}
    for model in options.models:
        folders = [(seed, options.runs / f"{model}_{seed}") for seed in options.seeds]
        results[model] = [run_stages(model, seed, folder, data) for seed, folder in folders]
    blind = blank_copy(data, options.runs / "blank_data")
    results["demo, trained blind"] = [run_stages("demo", 0, options.runs / "demo_blind", blind)]
    kept = {
        name: [{key: report[key] for key in ("evaluation", "train_seconds", "peak_rss_mb")} for report in reports]
        for name, reports in results.items()
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(kept, indent=1), encoding="utf-8")
    readme = HERE / "README.md"
    text = readme.read_text(encoding="utf-8")
    block = f"<!-- demo -->\n{table(results)}\n<!-- /demo -->"
    readme.write_text(
        re.sub(r"<!-- demo -->.*<!-- /demo -->", lambda _: block, text, flags=re.DOTALL), encoding="utf-8"
    )


if __name__ == "__main__":
    main()
