"""Run folders as a run leaves them behind, or is about to: written here, so that no test has to train."""

import json
from pathlib import Path

from PIL import Image

from vlm_tune.config.parse import load_config, write_config
from vlm_tune.pages.recorded import write_metrics


def step_row(step: int, loss: float) -> dict[str, float]:
    """Return a row of a training step."""
    speed = {"speed/tokens": 900.0 + step, "speed/waiting": 0.1, "speed/memory_mb": 2048.0, "speed/seconds": 2.0 * step}
    return {"step": step, "train/loss": loss, "lr/llm": 1e-4, "grad/llm": 2.0, "skipped": 0, "max_steps": 40, **speed}


def rows_up_to(step: int, start: float = 4.0) -> list[dict[str, float]]:
    """Return the rows of the steps from 1, and of a validation every ten."""
    rows: list[dict[str, float]] = []
    for number in range(1, step + 1):
        rows.append(step_row(number, start / number**0.5))
        rows += [] if number % 10 else [{"step": number, "val/loss": start / number**0.4}]
    return rows


def write_run(runs: Path, name: str, steps: int = 20, start: float = 4.0, *settings: str) -> Path:
    """Write a run folder with metrics, and answers about one picture."""
    run = runs / name
    (run / "checkpoints").mkdir(parents=True)
    write_config(load_config(["model=tiny", *settings]), run / "config.yaml")
    write_metrics(run / "metrics.csv", rows_up_to(steps, start))
    Image.new("RGB", (64, 32), (220, 30, 30)).save(run / "red.png")
    say(run, 0, "no idea")
    say(run, 20, "Red.")
    return run


def say(run: Path, step: int, answer: str, question: str = "What <b>colour</b>?") -> None:
    """Add a sample answer."""
    entry = {"step": step, "id": "row_1", "question": question, "expected": "red", "answer": answer}
    with (run / "sample_answers.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry | {"picture": str(run / "red.png")}) + "\n")
