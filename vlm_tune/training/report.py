"""Write a run's report: report.json, and the same as one HTML page."""

import json
import os
import platform
import resource
import sys
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from vlm_tune.config.schema import Config
from vlm_tune.data.datamodule import DataModule
from vlm_tune.data.text.positions import length_notes
from vlm_tune.errors import TrainingError
from vlm_tune.evaluation.evaluate import score_table
from vlm_tune.model.build import resolve_precision
from vlm_tune.model.checkpoint import CONFIG, run_of
from vlm_tune.model.parts.stage import PartSummary
from vlm_tune.pages.recorded import PAIR_COLUMNS
from vlm_tune.pages.report_chart import write_loss_svg
from vlm_tune.pages.report_html import write_html
from vlm_tune.training.callbacks.metrics import read_metrics
from vlm_tune.training.module import VlmModule

Scores = dict[str, float]


@dataclass
class RunReport:
    """Collects a run's facts while it runs; `write` leaves report.json and report.html in its folder."""

    config: Config
    run: Path
    parts: list[PartSummary]
    start: Path | None  # the earlier stage's checkpoint
    evaluation: dict[str, Any] = field(default_factory=dict)  # before, after, blind, majority: scores by task
    answers: list[dict[str, Any]] = field(default_factory=list)

    def write(self, module: VlmModule, data: DataModule) -> Path:
        """Write both files; return the page's path."""
        earlier = previous_seconds(self.start)
        metrics = read_metrics(self.run / "metrics.csv")
        validation = [{"step": row["step"], "loss": row["val/loss"]} for row in metrics if "val/loss" in row]
        pairs = {name: [[row["step"], row[name]] for row in metrics if name in row] for name in PAIR_COLUMNS}
        report = {
            "run": self._run(module),
            "train_seconds": round(earlier + module.train_seconds, 1),
            "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
            "parts": [{**vars(part), "how": part.how.value} for part in self.parts],
            "data": describe_data(data),
            "evaluation": self.evaluation or None,
            "loss_curve": [point(row) for row in metrics if "train/loss" in row],
            "val_curve": validation,
            "pairs": {name: points for name, points in pairs.items() if points} or None,
            "best": min(validation, key=lambda row: row["loss"]) if validation else None,
            "answers": self.answers,
            "image": asdict(self.config.data.image),
            "config": (self.run / CONFIG).read_text(encoding="utf-8"),
            "environment": json.loads((self.run / "environment.json").read_text(encoding="utf-8")),
        }
        page = self.run / "report.html"
        try:
            (self.run / "report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False), encoding="utf-8")
            write_html(report, page)
            write_loss_svg(report, self.run / "loss.svg")
        except OSError as error:
            for path in (self.run / "report.json", page, self.run / "loss.svg"):
                path.unlink(missing_ok=True)
            raise TrainingError(
                f"{self.run}: its report could not be written ({error.strerror}). All steps are done and saved: free "
                "some space, and write it by resume=last"
            ) from error
        return page

    def _run(self, module: VlmModule) -> dict[str, Any]:
        has_gpu = module.device.type == "cuda"
        device = torch.cuda.get_device_name() if has_gpu else f"cpu ({os.cpu_count()} cores, {platform.machine()})"
        return {
            "name": self.run.name,
            "stage": self.config.stage.name,
            "model": self.config.model.name,
            "device": device,
            "precision": resolve_precision(self.config.trainer.precision).value,
            "started": datetime.fromtimestamp((self.run / CONFIG).stat().st_mtime).isoformat(timespec="seconds"),
            "seconds": round(module.train_seconds, 1),
            "steps": module.global_step,
            "samples": module.num_samples,
            "tokens": module.num_tokens,
            "init_from": str(self.start) if self.start else None,
            "command": f"python -m vlm_tune {' '.join(sys.argv[1:])}",
        }


def point(row: dict[str, float]) -> dict[str, Any]:
    """Return one point of the loss curve, with the learning rate of each part."""
    rates = {name.removeprefix("lr/"): value for name, value in row.items() if name.startswith("lr/")}
    return {"step": row["step"], "loss": row["train/loss"], "lr": rates}


def previous_seconds(start: Path | None) -> float:
    """Return the training seconds of the stages before this one."""
    path = run_of(start) / "report.json" if start else None
    if path is None or not path.exists():
        return 0.0
    return float(json.loads(path.read_text(encoding="utf-8"))["train_seconds"])


def describe_data(data: DataModule) -> dict[str, Any]:
    """Summarize the rows of a run: counts, and sizes at the median and the maximum."""
    assert data.train is not None
    index = data.train.index
    sizes = {
        name: {"p50": int(np.median(values)), "max": int(values.max())}
        for name, values in (("tokens", index.tokens), ("tiles", index.tiles))
    }
    return {
        "path": str(data.train.data.path),
        "rows": len(index),
        "val_rows": len(data.val.index) if data.val else 0,
        "skipped": len(data.train.findings.faults) + len(data.train.findings.skipped),
        "shortened": len(data.train.findings.notes),
        "supervised_share": round(float(index.supervised.sum() / index.tokens.sum()), 4),
        "pack_fill": round(data.stream().fill(), 4) if data.config.stage.packing else None,
        **sizes,
    }


def show_data(console: Console, data: DataModule) -> None:
    """Print what the run trains on."""
    facts = describe_data(data)
    fill = f", packs {facts['pack_fill']:.0%} full" if facts["pack_fill"] else ""
    console.print(
        f"data: {facts['rows']:,} rows, {facts['val_rows']:,} for validation, {facts['skipped']:,} left out; "
        f"{facts['tokens']['p50']} tokens a row (most {facts['tokens']['max']}), "
        f"{facts['tiles']['p50']} tiles (most {facts['tiles']['max']}), "
        f"{facts['supervised_share']:.0%} of the tokens supervised{fill}"
    )
    assert data.train is not None
    settings = data.encoder.settings
    for note in length_notes(settings.positions, settings.max_length, data.train.index.tokens):
        console.print(f"note: {note}")


def show_parts(console: Console, parts: list[PartSummary]) -> None:
    """Print what is trained, how, and at which learning rate."""
    table = Table("part", "trained", "parameters", "of", "learning rate")
    for part in parts:
        rate = f"{part.learning_rate:.1e}" if part.num_trained else "-"
        table.add_row(part.name, part.how.value, f"{part.num_trained:,}", f"{part.num_total:,}", rate)
    console.print(table)


def show_scores(console: Console, evaluation: dict[str, Any]) -> None:
    """Print the accuracy of each task: before, after, blind, majority."""
    columns = {name: evaluation[name] for name in ("before", "after", "blind", "majority") if evaluation.get(name)}
    console.print(score_table("exact match on the test file", evaluation["num_questions"], columns))
    for verdict in evaluation.get("verdicts", []):
        console.print(verdict, soft_wrap=True)
