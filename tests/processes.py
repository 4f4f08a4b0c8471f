"""The command line in a process of its own, forked: importing everything anew takes seconds each."""

import json
import multiprocessing
import os
import socket
import sys
import time
import traceback
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from vlm_tune.cli import main
from vlm_tune.model.checkpoint import CONFIG, find_runs
from vlm_tune.training.run_folder import FOLDER_VARIABLE

PATIENCE = 200  # seconds until two ranks are taken to wait for one another for ever


def fork_cli(arguments: list[str], log: Path, **environment: str) -> BaseProcess:
    """Start `python -m vlm_tune ARGUMENTS` in one thread: a forked process cannot use its parent's."""
    process = multiprocessing.get_context("fork").Process(target=_run, args=(arguments, log, environment))
    process.start()
    return process


def _run(arguments: list[str], log: Path, environment: dict[str, str]) -> None:
    sys.stdout = sys.stderr = log.open("w", encoding="utf-8")
    torch.set_num_threads(1)
    os.environ |= environment
    code = 1
    try:
        code = main(arguments)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(code)  # no pytest here: it would report the tests a second time


def run_two(arguments: list[str], runs: Path, is_new: bool = True) -> Path:
    """Run two ranks. The second starts when the first has made the run's folder, which it is handed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "NODE_RANK": "0"}
    logs = [Path(f"{runs}.{rank}.log") for rank in range(2)]
    ends = time.monotonic() + PATIENCE
    ranks = [fork_cli(arguments, logs[0], **shared, LOCAL_RANK="0")]
    try:
        while is_new and not list(runs.glob(f"*/{CONFIG}")) and ranks[0].is_alive():
            time.sleep(0.01)
        handed = {FOLDER_VARIABLE: str(next(runs.glob(f"*/{CONFIG}")).parent.resolve())} if is_new else {}
        ranks.append(fork_cli(arguments, logs[1], **shared, **handed, LOCAL_RANK="1"))
        for rank in ranks:
            rank.join(max(0, ends - time.monotonic()))
        said = "\n".join(log.read_text(encoding="utf-8") for log in logs)
        assert [rank.exitcode for rank in ranks] == [0, 0], f"a rank failed, or waits for the other:\n{said}"
    finally:
        for rank in ranks:
            rank.kill()
    return find_runs(runs)[-1]


def keep_figure(group: str, name: str, value: float) -> None:
    """Write a figure into the file that VLM_TUNE_TRUST names: those that show what a run survives."""
    if path := os.environ.get("VLM_TUNE_TRUST"):
        known = json.loads(Path(path).read_text(encoding="utf-8")) if Path(path).exists() else {}
        known.setdefault(group, {})[name] = value
        Path(path).write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
