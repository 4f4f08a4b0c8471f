"""A sweep: runs of several command lines, one after the other, each in a process of its own, and a table of all."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from vlm_tune.console import tell
from vlm_tune.errors import Stopped
from vlm_tune.model.checkpoint import CONFIG
from vlm_tune.pages.compare import compare_runs


def sweep(lines: list[list[str]], runs: Path, console: Console) -> int:
    """Train each line; return 0, or 2 when one of the runs failed. A run that is asked to stop ends the sweep."""
    made: list[Path] = []
    failed: list[str] = []
    code = 0
    for number, line in enumerate(lines, 1):
        console.print(f"run {number} of {len(lines)}: {' '.join(line)}", soft_wrap=True)
        before = folders(runs)
        code = run_to_end([sys.executable, "-m", "vlm_tune", *line])
        mine = [run for run in sorted(folders(runs) - before) if is_of(run, line)]
        made += mine
        if code == Stopped.code:
            break
        if code:
            failed.append(f"run {number} failed (exit code {code}): {' '.join(line)}")
    if made:
        console.print(compare_runs(made, ""))
        console.print(f"their curves: python -m vlm_tune watch {' '.join(map(str, made))}", soft_wrap=True)
    tell(console, failed)
    return Stopped.code if code == Stopped.code else 2 if failed else 0


def run_to_end(command: list[str]) -> int:
    """Run a command and return its exit code; Ctrl-C and SIGTERM are for it to follow: it saves its state."""
    process = subprocess.Popen(command)
    before: Any = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    try:
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:  # which the terminal sent to both
                continue
    finally:
        signal.signal(signal.SIGTERM, before)


def folders(runs: Path) -> set[Path]:
    """Return the run folders that are there."""
    return {path.parent for path in runs.glob(f"*/{CONFIG}") if not path.parent.is_symlink()}


def is_of(run: Path, line: list[str]) -> bool:
    """Return whether a run was started by a command line: others may start runs meanwhile."""
    environment = run / "environment.json"
    return environment.exists() and json.loads(environment.read_text(encoding="utf-8"))["command"].endswith(
        " ".join(line)
    )
