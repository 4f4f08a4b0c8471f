"""How far long work is, and how long it still takes, in a terminal and in a log file."""

import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

LINE_SECONDS = 15  # how often a log file (no terminal) gets a line
Item = TypeVar("Item")


class Estimate:
    """Tell the time left. The first piece is left out: it also warms up."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.first: tuple[int, float] | None = None

    def advance(self, done: int, now: float) -> str:
        """Note that `done` pieces are done at the time `now` (seconds); return the time left, "" until two are."""
        self.first = self.first or (done, now)
        pieces, seconds = done - self.first[0], now - self.first[1]
        return f"{duration((self.total - done) * seconds / pieces)} left" if pieces > 0 else ""


def duration(seconds: float) -> str:
    """Write seconds as people read them: 42 s, 3 min 20 s, 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def follow(items: Sequence[Item], title: str, unit: str) -> Iterator[Item]:
    """Hand the items on, and show how many are done, how many a second, and the time left."""
    console, estimate, start = Console(), Estimate(len(items)), time.perf_counter()
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    task, shown = bar.add_task(title, total=len(items)), 0.0
    with bar:
        for done, item in enumerate(items, 1):
            yield item
            seconds = time.perf_counter() - start
            text = f"{done / max(seconds, 1e-9):,.1f} {unit}/s  {estimate.advance(done, seconds)}".rstrip()
            bar.update(task, completed=done, description=f"{title}  {text}")
            if not console.is_terminal and seconds - shown >= LINE_SECONDS:
                shown = seconds
                console.print(f"{title}: {done:,} of {len(items):,}, {text}", highlight=False)
