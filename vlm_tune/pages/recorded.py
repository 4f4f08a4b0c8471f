"""Read what a run records while it trains: metrics.csv above all. Any of it may be half written, or missing.

Nothing here waits for torch.
"""

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict
from enum import Enum
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np

from vlm_tune.config.parse import read_config
from vlm_tune.config.schema import flatten
from vlm_tune.errors import ConfigError
from vlm_tune.evaluation.metrics import fold
from vlm_tune.model.checkpoint import CONFIG
from vlm_tune.model.preference.facts import FACTS

COLUMNS = (
    "step",
    "train/loss",
    "val/loss",
    "lr/vision",
    "lr/projector",
    "lr/llm",
    "grad/vision",
    "grad/projector",
    "grad/llm",
    "speed/samples",
    "speed/tokens",
    "speed/waiting",
    "speed/tflops",
    "speed/mfu",
    "speed/memory_mb",
    "imbalance/tokens",
    "imbalance/tiles",
    "skipped",
    "speed/seconds",
    "max_steps",
)
PAIR_COLUMNS = (*(f"{part}/{name}" for part in ("pairs", "val") for name in FACTS), "pairs/delta")  # of such runs alone
DRAWN = (*COLUMNS[1:-2], *PAIR_COLUMNS)
WHOLE = ("step", "max_steps")
METRICS, ANSWERS, UNUSUAL, REPORT = "metrics.csv", "sample_answers.jsonl", "unusual_steps.jsonl", "report.json"
LOOK = "data.image."  # how pictures are read, among the settings
MOST, MOST_UNUSUAL = 5, 200  # runs, and marked steps, that one page shows
MAX_POINTS = 400  # of a curve


def write_metrics(path: Path, rows: list[dict[str, float]], columns: Sequence[str] = COLUMNS) -> None:
    """Write the rows of a metrics file, below its header."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Read the rows of a metrics file; empty cells, and a row that a crash cut off, are left out."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        whole = [line for line in file if line.endswith("\n")]
    return [
        {name: int(float(value)) if name in WHOLE else float(value) for name, value in row.items() if value}
        for row in csv.DictReader(whole)
    ]


def open_run(name: str) -> Path:
    """Return the folder that a run's name on the command line means; raise ConfigError where there is no run."""
    run = Path(name).resolve()
    if not (run / CONFIG).is_file():
        raise ConfigError(f"{name}: no run folder. Name folders that hold a {CONFIG}, as in runs/latest")
    return run


def newest_runs(runs: Path, most: int = MOST) -> list[Path]:
    """List the run folders that were written last, the newest first; one without a checkpoint counts too."""
    found = [path.parent for path in runs.glob(f"*/{CONFIG}") if not path.parent.is_symlink()]
    return sorted(found, key=lambda run: max(changes(run)), reverse=True)[:most]


def changes(run: Path) -> list[int]:
    """Return when each file that a page shows was written, in nanoseconds; 0 for one that is not there."""
    paths = (run / name for name in (CONFIG, METRICS, ANSWERS, UNUSUAL, REPORT))
    return [path.stat().st_mtime_ns if path.exists() else 0 for path in paths]


def describe(run: Path) -> dict[str, Any]:
    """Describe a run as far as it has come, for its page and for a comparison: settings, curves, answers, state."""
    rows = [{name: value for name, value in row.items() if isfinite(value)} for row in read_metrics(run / METRICS)]
    trained = [row for row in rows if "train/loss" in row]
    validated = [row for row in rows if "val/loss" in row]
    last = trained[-1] if trained else {}
    report = read_report(run / REPORT)
    best = min(validated, key=lambda row: row["val/loss"]) if validated else None
    return {
        "name": run.name,
        "settings": read_settings(run),
        "step": last.get("step", 0),
        "max_steps": last.get("max_steps"),
        "last": {name: value for name, value in last.items() if name not in WHOLE},
        "best": [best["step"], best["val/loss"]] if best else None,
        "seconds_left": seconds_left(trained),
        "is_finished": bool(report) and changes(run)[4] >= changes(run)[1],
        "scores": ((report.get("evaluation") or {}).get("after") or {}) if isinstance(report, dict) else {},
        "curves": {name: curve(rows, name) for name in DRAWN if any(name in row for row in rows)},
        "unusual": [entry for entry in read_lines(run / UNUSUAL) if "step" in entry][-MOST_UNUSUAL:],
        "answers": group_answers(read_lines(run / ANSWERS)),
    }


def read_settings(run: Path) -> dict[str, Any]:
    """Return a run's settings, dotted; none where they cannot be read any more."""
    try:
        settings = flatten(asdict(read_config(run / CONFIG)))
    except ConfigError:
        return {}
    return {key: value.value if isinstance(value, Enum) else value for key, value in settings.items()}


def differing(runs: list[dict[str, Any]]) -> list[str]:
    """List the settings in which described runs differ."""
    known = dict.fromkeys(key for run in runs for key in run["settings"] if not key.startswith("resume"))
    return [key for key in known if len({json.dumps(run["settings"].get(key)) for run in runs if run["settings"]}) > 1]


def read_report(path: Path) -> dict[str, Any]:
    """Read report.json; nothing where it is not there, or half written."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read the whole lines of a JSON Lines file; what is no object is left out."""
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            entry = json.loads(line)
        except ValueError:  # being written
            continue
        found += [entry] if isinstance(entry, dict) else []
    return found


def seconds_left(rows: list[dict[str, float]]) -> float | None:
    """Estimate the time left from the last logged steps; None before there are two."""
    near = [row for row in rows[-50:] if "speed/seconds" in row and "max_steps" in row]
    if len(near) < 2 or near[-1]["step"] <= near[0]["step"]:
        return None
    pace = (near[-1]["speed/seconds"] - near[0]["speed/seconds"]) / (near[-1]["step"] - near[0]["step"])
    return max(0.0, pace * (near[-1]["max_steps"] - near[-1]["step"]))


def curve(rows: list[dict[str, float]], name: str) -> list[list[float]]:
    """Return a column as [step, mean, lowest, highest] of at most MAX_POINTS stretches, so that no spike is lost."""
    found = {row["step"]: row[name] for row in rows if name in row}  # of a step written twice, the later one
    steps, values = np.array(sorted(found)), np.array([found[step] for step in sorted(found)])
    starts = np.unique(np.linspace(0, len(values), min(len(values), MAX_POINTS), endpoint=False).astype(int))
    sizes = np.diff([*starts, len(values)])
    means = np.add.reduceat(values, starts) / sizes
    points = (
        steps[starts + sizes - 1],
        means,
        np.minimum.reduceat(values, starts),
        np.maximum.reduceat(values, starts),
    )
    return [[float(f"{value:.6g}") for value in point] for point in zip(*points, strict=True)]


def group_answers(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Put the answers to one question together: what was said at which step, and whether it was right."""
    groups: dict[tuple[str, str], dict[str, Any]] = {}
    for entry in entries:
        texts = {key: str(entry.get(key) or "") for key in ("id", "question", "expected", "answer", "picture")}
        key = texts["id"], texts["question"]
        group = groups.setdefault(key, {**texts, "said": []})
        said = [entry.get("step"), texts["answer"], fold(texts["answer"]) == fold(texts["expected"])]
        group["said"] = [each for each in group["said"] if each[0] != said[0]] + [said]
    for group in groups.values():
        del group["answer"]
        group["question"] = group["question"].replace("<image>", "").strip()
    return list(groups.values())
