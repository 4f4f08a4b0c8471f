"""Write down what each step of a trainer on transformers' Trainer takes; imported first by the run scripts beside it.

Environment: BENCH_WORK (the folder that setup.sh of the peers built, with assets/pairs.json), BENCH_OUT (the JSON to
write). Nothing of the trainer is changed: its training_step and its callbacks are only watched.
"""

import argparse
import functools
import importlib.metadata
import json
import os
import resource
import time
from pathlib import Path
from typing import Any

STARTED = time.time()
WORK = Path(os.environ["BENCH_WORK"])
MODEL = str(WORK / "assets" / "R")
OUT = WORK / "out"
OUT.mkdir(parents=True, exist_ok=True)
PACKAGES = ("torch", "transformers", "peft", "accelerate", "trl", "llamafactory", "ms-swift")
RESULT: dict[str, Any] = {"steps": []}


def arguments() -> argparse.Namespace:
    """Read the command line: pairs a step, steps, precision."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--bs", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--dtype", choices=("bf16", "fp32"), required=True)
    return parser.parse_args()


def pairs() -> list[dict[str, str]]:
    """Read the rows: image, question, chosen, rejected."""
    rows: list[dict[str, str]] = json.loads((WORK / "assets" / "pairs.json").read_text(encoding="utf-8"))
    return rows


def processor_seconds() -> float:
    """Processor time of this process so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def counts(inputs: dict[str, Any]) -> dict[str, int]:
    """Count a batch whose first half are the chosen answers, each with its prompt, and whose second the rejected."""
    rows = len(inputs["input_ids"])
    tokens = inputs["attention_mask"].sum(1).tolist()
    if "completion_mask" in inputs:
        answers = inputs["completion_mask"].sum(1).tolist()
    else:
        answers = (inputs["labels"] != -100).sum(1).tolist()
    return {
        "pairs": rows // 2,
        "chosen": sum(tokens[: rows // 2]),
        "rejected": sum(tokens[rows // 2 :]),
        "answers": sum(answers),
        "padded": inputs["input_ids"].numel(),
        "tiles": len(inputs["pixel_values"]),
    }


class Watch:
    """The clock and the counts of the step at hand."""

    def __init__(self) -> None:
        self.counted: dict[str, Any] = {}

    def begin(self, model: Any) -> None:
        """Start the clock; write down what is trained."""
        RESULT["startup_s"], RESULT["startup_cpu_s"] = time.time() - STARTED, processor_seconds()
        RESULT["trained"] = sum(each.numel() for each in model.parameters() if each.requires_grad)
        self.last = time.perf_counter(), processor_seconds()

    def end(self) -> None:
        """Write down a step."""
        now = time.perf_counter(), processor_seconds()
        wall, cpu = now[0] - self.last[0], now[1] - self.last[1]
        RESULT["steps"].append({"wall": wall, "cpu": cpu} | self.counted)
        self.last = now

    def told(self, logs: dict[str, Any]) -> None:
        """Add to the last step what the trainer says of it, and write the JSON."""
        if "loss" in logs and RESULT["steps"]:
            known = {"loss": "loss", "logps/chosen": "logp_chosen", "logps/rejected": "logp_rejected"}
            RESULT["steps"][-1] |= {name: float(logs[key]) for key, name in known.items() if key in logs}
        RESULT["peak_rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        RESULT["versions"] = versions()
        Path(os.environ["BENCH_OUT"]).write_text(json.dumps(RESULT), encoding="utf-8")


def versions() -> dict[str, str]:
    """Name the versions of what runs."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def watch() -> None:
    """Watch every Trainer that is made from now on."""
    from transformers import Trainer, TrainerCallback

    watching = Watch()

    class Told(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            watching.begin(given["model"])

        def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            watching.end()

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **given: Any) -> None:
            watching.told(logs)

    made, stepped = Trainer.__init__, Trainer.training_step

    @functools.wraps(made)
    def make(self: Any, *args: Any, **given: Any) -> None:
        made(self, *args, **given)
        self.add_callback(Told())

    @functools.wraps(stepped)
    def step(self: Any, model: Any, inputs: dict[str, Any], *args: Any, **given: Any) -> Any:
        counted = counts(inputs)  # before the step: some take their inputs apart
        loss = stepped(self, model, inputs, *args, **given)
        watching.counted = counted
        return loss

    Trainer.__init__, Trainer.training_step = make, step
