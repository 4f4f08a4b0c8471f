"""How a run takes being killed: SIGKILLs at random moments, of one process and of two, and a long run's memory.

COMMAND: python benchmarks/trust.py --kills 100 --ddp-kills 20 --fsdp-kills 10 --zero2-kills 10 --soak 20000
It takes about two hours on two CPU cores. Writes its figures into results/trust.json, beside those of others. The
model is the tests' toy model.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))

from kills import ONE, TWO, arguments, compare, kill_and_go_on, note_order, run_to_its_end, start  # noqa: E402
from toys import Toys, build_toys  # noqa: E402

STEPS, KILLS_A_RUN = 45, 12
RANK_STEPS, RANK_KILLS_A_RUN = 24, 5
RANKED = ("ddp", "fsdp", "zero1", "zero2", "zero3")  # strategies of two processes


def kills(toys: Toys, folder: Path, wanted: int, strategy: str, seed: int) -> None:
    """Kill runs until there are enough kills; count those of runs that end bit by bit as the one never killed."""
    ranks, more, steps, each = 1, ONE, STEPS, KILLS_A_RUN
    if strategy:
        ranks, more, steps, each = 2, (*TWO, f"strategy={strategy}"), RANK_STEPS, RANK_KILLS_A_RUN
    base = folder / (strategy or "one")
    straight_folder = base / "straight"
    straight_folder.mkdir(parents=True)
    straight = run_to_its_end(arguments(toys, straight_folder, steps, *more), straight_folder, ranks)
    chance, done, equal, in_writes, number = random.Random(seed), 0, 0, 0, 0
    while done < wanted:
        number += 1
        own = base / f"killed_{number}"
        own.mkdir()
        given = arguments(toys, own, steps, *more)
        run, outcome = kill_and_go_on(given, own, chance, min(each, wanted - done), ranks)
        differs = compare(run, straight, (own, straight_folder))
        done, in_writes = done + outcome.kills, in_writes + outcome.in_writes
        equal += 0 if differs else outcome.kills
        name = f"{strategy}_kills" if strategy else "kills"
        record({name: done, f"{name}_bit_equal": equal, f"{name}_inside_writes": in_writes})
        print(differs, flush=True)


def soak(toys: Toys, folder: Path, steps: int) -> dict[str, Any]:
    """Train many steps; compare the memory and the open files of all processes late with those early."""
    own = folder / "soak"
    own.mkdir()
    quiet = ("trainer.log_every=10", "trainer.val_every=1000", "trainer.save_every=1000", "trainer.chat_every=2500")
    (process,) = start(arguments(toys, own, steps, *ONE, *quiet), own, 1, is_new=True)
    seen = []
    while process.is_alive():
        metrics = next((own / "runs").glob("*/metrics.csv"), None)
        step = last_step(metrics) if metrics else 0
        if 0 < step < steps:  # at the last one the workers end
            seen.append((step, *usage(process.pid)))
        time.sleep(0.5)
    process.join()
    assert process.exitcode == 0, (own / "0.log").read_text(encoding="utf-8")

    def mean(tenth: int, value: int) -> float:
        chosen = [each[value] for each in seen if steps * (tenth - 1) < 10 * each[0] <= steps * tenth]
        return sum(chosen) / len(chosen)

    return {
        "soak_steps": steps,
        "soak_rss_growth": round(mean(10, 1) / mean(2, 1) - 1, 4),
        "soak_rss_mb": [round(mean(tenth, 1)) for tenth in range(1, 11)],
        "soak_open_files": [round(mean(tenth, 2), 1) for tenth in range(1, 11)],
    }


def last_step(metrics: Path) -> int:
    """Read the newest step of a metrics file."""
    lines = metrics.read_text(encoding="utf-8").splitlines()
    return int(lines[-1].split(",")[0]) if len(lines) > 1 else 0


def usage(pid: int | None) -> tuple[float, int]:
    """Sum up memory (MB, each process's share of what several hold) and open files of a process and its children.

    Pages of files are left out: a share of the libraries' code depends on what else runs on the machine.
    """
    memory, files = 0.0, 0
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    for each in [str(pid), *children]:
        try:
            rollup = Path(f"/proc/{each}/smaps_rollup").read_text()
            own = [line.split() for line in rollup.splitlines() if line.startswith(("Pss_Anon:", "Pss_Shmem:"))]
            memory += sum(int(size) for _, size, _ in own) / 1024
            files += len(list(Path(f"/proc/{each}/fd").iterdir()))
        except OSError:
            continue  # it has just ended
    return memory, files


def record(figures: dict[str, Any]) -> None:
    """Put figures beside those that are there."""
    path = HERE / "results" / "trust.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps(before | figures, indent=1) + "\n", encoding="utf-8")
    print(figures, flush=True)


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=0)
    for strategy in RANKED:
        parser.add_argument(f"--{strategy}-kills", type=int, default=0)
    parser.add_argument("--soak", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    note_order()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        toys = build_toys(folder / "toys")
        for strategy in ("", *RANKED):
            if wanted := getattr(asked, f"{strategy}_kills" if strategy else "kills"):
                kills(toys, folder, wanted, strategy, asked.seed)
        if asked.soak:
            record(soak(toys, folder, asked.soak))


if __name__ == "__main__":
    main()
