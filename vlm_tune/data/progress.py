"""Long work is shown by whoever asks for it; and processes that should work, but do not move, are found."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

Follow = Callable[..., Iterator[Any]]  # (items, title, unit, total, size): as vlm_tune.console.follow, or `unseen`

LOOK = 5  # seconds between two looks at processes that are waited for
STILL = 45.0  # seconds without a move that count as frozen
IDLE = 5  # hundredths of a second of computing that waiting itself may take meanwhile


def unseen(items: Iterable[Any], *told: Any) -> Iterator[Any]:
    """Hand the items on and show nothing."""
    return iter(items)


class Patience(threading.Thread):
    """Ends processes that are waited for and do not move; `lost` then names them.

    To move is to compute, to be given a byte, or to wait for a disk: a slow disk and a huge picture are no stillness,
    however long they take. Only a process that is stopped, or waits for another one, is still. Who waits may be blocked
    by one of them (it asks a worker for the memory that a batch is in), so it cannot look by itself.
    """

    def __init__(self, processes: list[BaseProcess]) -> None:
        super().__init__(daemon=True, name="patience")
        self.processes = processes
        self.is_over = threading.Event()
        self.is_waiting = False
        self.lost = ""

    def run(self) -> None:
        """Look from time to time."""
        since, done = time.monotonic(), (0, 0)
        while not self.is_over.wait(LOOK):
            try:
                states, computed, given = zip(*(look_at(each.pid) for each in self.processes), strict=True)
            except (OSError, IndexError, ValueError):  # one has just ended, or this is not Linux
                continue
            has_moved = sum(computed) > done[0] + IDLE or sum(given) > done[1] or "D" in states
            if has_moved or not self.is_waiting:
                since, done = time.monotonic(), (sum(computed), sum(given))
            elif time.monotonic() - since > STILL:
                stopped = [each.pid for each, state in zip(self.processes, states, strict=True) if state in "Tt"]
                named = ", ".join(map(str, stopped or [each.pid for each in self.processes]))
                self.lost = f"{named} (stopped)" if stopped else named
                for process in self.processes:
                    process.kill()
                return


def look_at(pid: int | None) -> tuple[str, int, int]:
    """Return a process's state (R, S, D, T ...), the hundredths of a second that it computed, and the bytes it read."""
    state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    counts = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text(encoding="utf-8").splitlines())
    return state[0], int(state[11]) + int(state[12]), int(counts["rchar"]) + int(counts["read_bytes"])
