"""The command line in a process of its own, forked: importing everything anew takes seconds each."""

import json
import multiprocessing
import os
import random
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
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
    signal.signal(signal.SIGINT, signal.default_int_handler)  # processes of pytest-xdist ignore it
    torch.set_num_threads(1)
    os.environ |= environment
    code = 1
    try:
        code = main(arguments)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(code)  # no pytest here: it would report the tests a second time


def free_port() -> str:
    """Find a port that nothing listens on, below those that connections of other tests are given meanwhile."""
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)  # runs seed the other one
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return str(port)


def start_ranks(
    arguments: list[str], runs: Path, logs: list[Path], is_new: bool = True, **environment: str
) -> list[BaseProcess]:
    """Start a rank for each log; the others follow when the first has made the run's folder, which they are handed."""
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    environment |= {"WORLD_SIZE": str(len(logs)), "NODE_RANK": "0"}
    known = made = set(runs.glob(f"*/{CONFIG}"))
    ranks = [fork_cli(arguments, logs[0], **environment, LOCAL_RANK="0")]
    while is_new and made == known:
        assert ranks[0].is_alive(), logs[0].read_text(encoding="utf-8")
        time.sleep(0.01)
        made = set(runs.glob(f"*/{CONFIG}"))
    handed = {FOLDER_VARIABLE: str((made - known).pop().parent.resolve())} if is_new else {}
    for rank, log in enumerate(logs[1:], 1):
        ranks.append(fork_cli(arguments, log, **environment, **handed, LOCAL_RANK=str(rank)))
    return ranks


@contextmanager
def two_ranks(
    arguments: list[str], runs: Path, is_new: bool = True, count: int = 2
) -> Iterator[tuple[list[BaseProcess], Callable[[int], str]]]:
    """Run two ranks (or `count`), and end them in any case; yield them and a function that reads what each has said."""
    logs = [Path(f"{runs}.{rank}.log") for rank in range(count)]
    ranks = start_ranks(arguments, runs, logs, is_new)
    try:
        yield ranks, lambda rank: logs[rank].read_text(encoding="utf-8")
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()


def run_two(arguments: list[str], runs: Path, is_new: bool = True, count: int = 2) -> Path:
    """Run two ranks (or `count`) to their end."""
    ends = time.monotonic() + PATIENCE
    with two_ranks(arguments, runs, is_new, count) as (ranks, read):
        for rank in ranks:
            rank.join(max(0, ends - time.monotonic()))
        said = "\n".join(map(read, range(count)))
        assert [rank.exitcode for rank in ranks] == [0] * count, f"a rank failed, or waits for the other:\n{said}"
    return find_runs(runs)[-1]


def keep_figure(group: str, name: str, value: float) -> None:
    """Write a figure into the file that VLM_TUNE_TRUST names: those that show what a run survives."""
    if path := os.environ.get("VLM_TUNE_TRUST"):
        known = json.loads(Path(path).read_text(encoding="utf-8")) if Path(path).exists() else {}
        known.setdefault(group, {})[name] = value
        Path(path).write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
