"""Answer many askers with one model: a thread of its own takes all greedy questions that wait, as one batch."""

import asyncio
import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from vlm_tune.config.schema import Config
from vlm_tune.model.build import Model
from vlm_tune.model.generate import GREEDY, Prompt, Sampling, Writer, room, write

MOST_AT_ONCE = 16  # questions of one batch
MOST_WAITING = 256  # then `waiting` is full


@dataclass
class Job:
    """One question, and the pieces of its answer as they come; None is its end."""

    prompt: Prompt
    limit: int  # tokens of the answer
    sampling: Sampling
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    pieces: "asyncio.Queue[str | None]" = field(default_factory=asyncio.Queue)
    is_left: bool = False  # nobody waits for it any more
    writer: Writer | None = None
    fault: str = ""

    def say(self, piece: str | None) -> bool:
        """Hand a piece over to the asker's own loop; return whether somebody still listens."""
        with suppress(RuntimeError):  # the loop has ended: the server stops
            self.loop.call_soon_threadsafe(self.pieces.put_nowait, piece)
        return not self.is_left


class Speaker:
    """A model, and the thread that answers with it."""

    def __init__(self, model: Model, config: Config) -> None:
        self.model, self.config = model, config
        self.waiting: queue.Queue[Job | None] = queue.Queue(MOST_WAITING)
        self.kept: Job | None = None  # taken from the queue, but for the next batch
        self.is_over = False
        self.thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self.thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.is_over = True
        with suppress(queue.Full):
            self.waiting.put_nowait(None)
        self.thread.join(timeout=30)

    def take(self, prompt: Prompt, limit: int, sampling: Sampling) -> Job:
        """Put a question of the running loop's asker into the queue; raise queue.Full where too many wait."""
        job = Job(prompt, min(limit, room(self.model, [prompt])), sampling)
        self.waiting.put_nowait(job)
        return job

    def _run(self) -> None:
        """Answer batch after batch."""
        while not self.is_over:
            first, self.kept = self.kept or self.waiting.get(), None
            if first is None:
                return
            jobs = self._batch(first)
            writers = [Writer(self.model, job.limit, self._listener(job)) for job in jobs]
            fault = ""
            try:
                write(self.model, [job.prompt for job in jobs], writers, first.sampling)
            except Exception as error:  # the thread must live on: the next batch may fit into memory
                fault = f"{type(error).__name__}: {error}"
            for job, writer in zip(jobs, writers, strict=True):
                job.writer, job.fault = writer, fault
                job.say(None)

    def _listener(self, job: Job) -> Callable[[str], bool]:
        return lambda piece: job.say(piece) and not self.is_over

    def _batch(self, first: Job) -> list[Job]:
        """Take what waits and can be answered together: greedy questions that all end before the positions do."""
        jobs = [first]
        while first.sampling == GREEDY and len(jobs) < MOST_AT_ONCE:
            try:
                job = self.waiting.get_nowait()
            except queue.Empty:
                break
            if job is None:
                break  # the end, which `is_over` says too
            together = [*jobs, job]
            fits = max(each.limit for each in together) <= room(self.model, [each.prompt for each in together])
            if job.sampling != GREEDY or not fits:
                self.kept = job
                break
            jobs = together
        return jobs
