"""Kill runs at random moments and go on with them: the harness of the tests and of benchmarks/trust.py."""

import json
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from compare import assert_same, metrics_of
from processes import fork_cli, start_ranks
from toys import Toys, turns, write_jsonl

from vlm_tune.model.checkpoint import CHECKPOINTS, checkpoints, find_runs
from vlm_tune.training.module import VlmModule

ORDER = "VLM_TUNE_TEST_ORDER"  # names a file that each micro-batch writes its rows into
ALL = (
    "stage=finetune",
    "stage.init_from=none",
    "stage.lora.dropout=0.1",
    "stage.lr={projector: 0.01, llm: 0.01}",  # so large that the smallest difference would grow
    "stage.evaluate=false",
    "stage.packing=true",
    "stage.pack_length=100",
    "trainer.micro_batch=1",
    "trainer.save_every=3",
    "trainer.val_every=7",
    "trainer.chat_every=5",
    "trainer.num_chats=1",
    "data.workers=2",
)
ONE = ("trainer.global_batch=3",)  # gradients of three micro-batches
TWO = ("trainer.global_batch=6", "trainer.devices=2", "trainer.accelerator=cpu")  # and a strategy


@dataclass
class Outcome:
    """How often a run was killed, and in what it then differs from the one that was not."""

    kills: int = 0
    in_writes: int = 0
    differs: list[str] = field(default_factory=list)


def note_order() -> Callable[..., Any]:
    """Let each micro-batch write its rows down; return what was there before."""
    before = VlmModule.training_step

    def step(self: VlmModule, batch: Any, batch_idx: int) -> Any:
        if path := os.environ.get(ORDER):
            place = f"{self.global_step} {batch_idx % self.trainer.accumulate_grad_batches} {self.global_rank}"
            with open(path, "a", encoding="utf-8") as file:
                file.write(f"{place}\t{' '.join(batch.sample_ids)}\n")
        return before(self, batch, batch_idx)

    VlmModule.training_step = step  # type: ignore[method-assign]
    return before


def mixture(toys: Toys, folder: Path) -> Path:
    """Write two sets, one of pictures and one of text, and their meta file."""
    folder.mkdir(parents=True)
    text = [{"id": f"text_{i}", "conversations": turns((f"Say {i}, {i + 1}.", f"{i} {i + 1}"))} for i in range(40)]
    write_jsonl(folder / "text.jsonl", text)
    sets = {
        "pictures": {"root": str(toys.data), "annotation": str(toys.data / "train.jsonl"), "repeat_time": 1.5},
        "text": {"root": str(folder), "annotation": str(folder / "text.jsonl"), "repeat_time": 0.7},
    }
    (folder / "meta.json").write_text(json.dumps(sets), encoding="utf-8")
    return folder / "meta.json"


def arguments(toys: Toys, folder: Path, steps: int, *more: str) -> list[str]:
    """Name a run over the mixture in a folder."""
    meta = folder / "mixture"
    path = meta / "meta.json" if meta.exists() else mixture(toys, meta)
    own = (f"data.path={path}", f"data.val={toys.data / 'val.jsonl'}", f"stage.max_steps={steps}")
    chosen = {key.partition("=")[0]: key for key in (*ALL, *own, *more)}
    return toys.arguments(*chosen.values(), runs=folder / "runs")


def start(given: list[str], folder: Path, ranks: int, is_new: bool) -> list[BaseProcess]:
    """Start a run's processes, each in one thread."""
    if ranks == 1:
        return [fork_cli(given, folder / "0.log", **{ORDER: str(folder / "order")})]
    logs = [folder / f"{rank}.log" for rank in range(ranks)]
    return start_ranks(given, folder / "runs", logs, is_new, **{ORDER: str(folder / "order")})


def run_to_its_end(given: list[str], folder: Path, ranks: int = 1) -> Path:
    """Run without a kill."""
    processes = start(given, folder, ranks, is_new=True)
    for process in processes:
        process.join()
    said = (folder / "0.log").read_text(encoding="utf-8")
    assert [process.exitcode for process in processes] == [0] * ranks, said
    return find_runs(folder / "runs")[-1]


def kill_and_go_on(
    given: list[str], folder: Path, chance: random.Random, kills: int, ranks: int = 1
) -> tuple[Path, Outcome]:
    """Run with so many kills at random moments of the training (each third inside a checkpoint's writing)."""
    outcome = Outcome()
    while True:
        found = find_runs(folder / "runs")
        is_new = not found
        processes = start([*given, *([] if is_new else ["resume=last"])], folder, ranks, is_new)
        wants = outcome.kills < kills
        if wants and await_moment(processes[0], folder / "runs", chance, outcome):
            struck = processes if ranks == 1 or chance.random() < 0.5 else [chance.choice(processes)]
            for process in struck:
                process.kill()
        ends = time.monotonic() + 240
        while any(process.is_alive() for process in processes):  # join would wait for a killed one's data workers too
            assert time.monotonic() < ends, f"a rank waits: {(folder / '0.log').read_text(encoding='utf-8')}"
            time.sleep(0.02)
        codes = [process.exitcode for process in processes]
        if -signal.SIGKILL in codes:
            outcome.kills += 1
        elif codes == [0] * ranks:
            return find_runs(folder / "runs")[-1], outcome
        else:
            raise AssertionError(f"{codes}: {(folder / '0.log').read_text(encoding='utf-8')}")


def await_moment(process: BaseProcess, runs: Path, chance: random.Random, outcome: Outcome) -> bool:
    """Wait for some steps, and then for a random time or for a checkpoint that is being written."""
    is_first = not find_runs(runs)
    for _ in range(chance.randint(1, 5)):
        before = sizes(runs)
        while process.is_alive() and sizes(runs) == before:
            time.sleep(0.002)
    while is_first and process.is_alive() and not find_runs(runs):
        time.sleep(0.002)  # without a checkpoint nothing goes on
    if chance.random() < 1 / 3:
        while process.is_alive():
            if next(runs.glob(f"*/{CHECKPOINTS}/.*.partial"), None):
                time.sleep(chance.uniform(0, 0.004))
                outcome.in_writes += process.is_alive()
                return True
            time.sleep(0.001)
    time.sleep(chance.uniform(0, 0.1))
    return process.is_alive()


def sizes(runs: Path) -> list[tuple[str, int]]:
    """Tell whether the metrics of any run have changed: their sizes and times."""
    return [(str(path), path.stat().st_mtime_ns) for path in sorted(runs.glob("*/metrics.csv"))]


def order_of(folder: Path) -> dict[str, str]:
    """Read the rows of each micro-batch; what a killed process had begun is done again, with the same rows."""
    lines = (folder / "order").read_text(encoding="utf-8").splitlines()
    seen: dict[str, str] = {}
    for place, rows in (line.split("\t") for line in lines):
        assert seen.setdefault(place, rows) == rows, f"{place}: other rows after a kill"
    return seen


def compare(run: Path, straight: Path, folders: tuple[Path, Path]) -> list[str]:
    """Name what differs between a run that was killed and one that was not: nothing should."""
    ours, theirs = (torch.load(checkpoints(each)[-1], weights_only=True) for each in (run, straight))
    differs = []
    for name in ("state_dict", "optimizer_states", "lr_schedulers", "DataModule", "callbacks", "loops"):
        try:
            assert_same(ours[name], theirs[name], name)
        except AssertionError as error:
            differs.append(str(error))
    if metrics_of(run) != metrics_of(straight):
        differs.append("metrics.csv")
    if order_of(folders[0]) != order_of(folders[1]):
        differs.append("order of rows")
    answers = [(each / "sample_answers.jsonl").read_text(encoding="utf-8") for each in (run, straight)]
    if answers[0] != answers[1]:
        differs.append("sample answers")
    return differs
