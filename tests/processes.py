"""The command line in a process of its own, forked: importing everything anew takes seconds each."""

import multiprocessing
import os
import sys
import traceback
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from vlm_tune.cli import main


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
