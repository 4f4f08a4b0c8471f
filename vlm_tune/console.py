"""Terminal output: the one console that all verbs print to, and the progress of long work."""

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from rich.console import Console

LINE_SECONDS = 15  # how often a log file (no terminal) gets a line
PIPE_WIDTH = 1_000_000  # columns: a pipe has no width, so no line is wrapped
Item = TypeVar("Item")


def make_console(stderr: bool = False) -> "Console":
    """Make a console that shows text as it is, with colours only in a terminal.

    A pipe, a file, or a terminal with VLM_TUNE_QUIET=1 gets plain lines: no colours, no cursor movement. Of several
    processes of a run, only the first one on each machine prints.
    """
    from rich.console import Console  # late: `help` and `configs` should not wait for it

    is_terminal = (sys.stderr if stderr else sys.stdout).isatty()
    return Console(
        stderr=stderr,
        quiet=os.environ.get("LOCAL_RANK", "0") != "0",
        force_terminal=is_terminal and not is_quiet(),
        width=None if is_terminal else PIPE_WIDTH,
        highlight=False,
        markup=False,  # answers and paths may contain what rich would take for markup: [/INST], :x:
        emoji=False,
    )


def tell(console: "Console", notes: Iterable[str]) -> None:
    """Print notes, one line each, without wrapping."""
    for note in notes:
        console.print(note, soft_wrap=True)


def is_quiet() -> bool:
    """Return whether VLM_TUNE_QUIET asks for plain lines without progress."""
    return os.environ.get("VLM_TUNE_QUIET", "0") not in ("", "0")


class Estimate:
    """Estimate the time left. The first piece is left out, since it includes the warm-up."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.first: tuple[int, float] | None = None

    def advance(self, done: int, now: float) -> str:
        """Record that `done` pieces are done at time `now` (seconds); return the time left, "" before the second."""
        self.first = self.first or (done, now)
        pieces, seconds = done - self.first[0], now - self.first[1]
        return f"{duration((self.total - done) * seconds / pieces)} left" if pieces > 0 else ""


def duration(seconds: float) -> str:
    """Format seconds for people: 42 s, 3 min 20 s, 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60:02d} min"


def follow(
    items: Iterable[Item], title: str, unit: str, total: int | None = None, size: Callable[[Any], int] = lambda item: 1
) -> Iterator[Item]:
    """Yield the items, and show how many are done, how many per second, and the time left.

    An item counts as `size` units of `total`: a chunk of rows as its rows. Progress goes to standard error, so that a
    pipe reads only the results.
    """
    from rich.progress import BarColumn, Progress, TextColumn

    total = len(items) if total is None else total  # type: ignore[arg-type]
    console, estimate, start = make_console(stderr=True), Estimate(total), time.perf_counter()
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    task, done, shown = bar.add_task(title, total=total), 0, 0.0
    with bar:
        for item in items:
            yield item
            done += size(item)
            seconds = time.perf_counter() - start
            text = f"{done / max(seconds, 1e-9):,.1f} {unit}/s  {estimate.advance(done, seconds)}".rstrip()
            bar.update(task, completed=done, description=f"{title}  {text}")
            if not (console.is_terminal or is_quiet()) and seconds - shown >= LINE_SECONDS:
                shown = seconds
                console.print(f"{title}: {done:,} of {total:,}, {text}")
