"""Watch the ranks of a run: if one dies or hangs, the others report which, and exit.

Each rank writes a heartbeat to the store through which the processes connected, and reads those of the others.
torch's own timeouts do not name the rank, and would be too short while one rank writes sample answers.
"""

import json
import os
import sys
import threading
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import lightning as L
import torch.distributed as dist

from vlm_tune.training.callbacks.writer import CheckpointWriter

BEAT, SILENCE = 1.0, 20.0  # seconds between heartbeats; seconds without one until a rank counts as dead
HANG, SLOWER = (
    45.0,
    10.0,
)  # seconds in one place of a step that count as a hang: at least, and as a multiple of the longest
MANNERS = 5.0  # seconds for the main thread to report the error itself
PLACES = ("reads data", "computes", "computes gradients", "ends a step")
READS, COMPUTES, BACKWARD, ENDS = range(4)  # the last: validation, answers and checkpoints may take any time
OF_OTHERS = (
    "Connection",
    "gloo",
    "NCCL",
    "peer",
    "Timed out",
    "timeout",
)  # in the errors of a rank whose peer has left


@dataclass
class Sign:
    """A rank's heartbeat: where it is."""

    number: int = 0  # of the heartbeat
    step: int = 0  # steps done
    batch: int = -1  # number of the micro-batch, since the process started
    place: int = ENDS
    longest: float = 90.0  # seconds in one place so far; a guess until the first step is done
    ended: str = ""  # why it ended

    @property
    def position(self) -> tuple[int, int]:
        """Return what grows as a rank makes progress."""
        return self.batch, self.place


class WatchRanks(L.Callback):
    """Writes and reads heartbeats in a thread of its own; `lost` describes what happened to another rank."""

    def __init__(self) -> None:
        self.mine = Sign()
        self.longest = 0.0
        self.since = time.monotonic()
        self.lost = ""
        self.is_over = threading.Event()
        self.has_raised = threading.Event()  # the main thread, which then reports the error itself
        self.found = threading.Event()
        self.thread: threading.Thread | None = None
        self.answered = time.monotonic()  # when the store last did

    def setup(self, trainer: L.Trainer, module: Any, stage: str) -> None:
        """Start, if there are other ranks."""
        if trainer.world_size > 1 and self.thread is None:
            self.is_over.clear()
            self.mine.ended = ""
            self.writer: CheckpointWriter = trainer.strategy.checkpoint_io  # type: ignore[assignment]
            self.rank, self.world = trainer.global_rank, trainer.world_size
            self.store = dist.distributed_c10d._get_default_store().clone()  # a connection of its own
            self.store.set_timeout(timedelta(seconds=SILENCE))
            self.answered = time.monotonic()
            self.thread = threading.Thread(target=self._watch, daemon=True, name="watch-ranks")
            self.thread.start()
            threading.Thread(target=self._watch_store, daemon=True, name="watch-store").start()

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        """Mark where the main thread is."""
        self._mark(trainer, 0, READS)

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        """Mark where the main thread is."""
        self._mark(trainer, self.mine.batch, COMPUTES)

    def on_before_backward(self, trainer: L.Trainer, module: Any, loss: Any) -> None:
        """Mark where the main thread is."""
        self._mark(trainer, self.mine.batch, BACKWARD)

    def on_before_optimizer_step(self, trainer: L.Trainer, module: Any, optimizer: Any) -> None:
        """Mark where the main thread is: answers and a checkpoint may follow."""
        self._mark(trainer, self.mine.batch, ENDS)

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Mark where the main thread is."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.mine.longest = self.longest
        self._mark(trainer, self.mine.batch + 1, READS if trainer.global_step < trainer.max_steps else ENDS)

    def on_validation_start(self, trainer: L.Trainer, module: Any) -> None:
        """Mark where the main thread is."""
        self._mark(trainer, self.mine.batch, ENDS)

    def on_validation_end(self, trainer: L.Trainer, module: Any) -> None:
        """Mark where the main thread is."""
        self._mark(trainer, self.mine.batch, READS)

    def on_train_end(self, trainer: L.Trainer, module: Any) -> None:
        """Sign off: only the first rank has work left."""
        self._leave("has done its last step")

    def teardown(self, trainer: L.Trainer, module: Any, stage: str) -> None:
        """Sign off, also from a run that had no step left."""
        self._leave("has done its last step")

    def on_exception(self, trainer: L.Trainer, module: Any, exception: BaseException) -> None:
        """Return the others why this rank ends; if another one is the cause, wait until it is known which."""
        self.has_raised.set()
        said = f"{type(exception).__name__}: {first_line(exception)}"
        if self.thread is not None and isinstance(exception, RuntimeError) and any(each in said for each in OF_OTHERS):
            self.found.wait(SILENCE + 5)
            said = "" if self.lost else said
        self._leave(f"ended with {said}" if said else "lost another rank")

    def _mark(self, trainer: L.Trainer, batch: int, place: int) -> None:
        now = time.monotonic()
        if self.mine.place != ENDS:
            self.longest = max(self.longest, now - self.since)
        self.since = now
        self.mine.step, self.mine.batch, self.mine.place = trainer.global_step, batch, place

    def _leave(self, why: str) -> None:
        if self.thread is not None:
            self.mine.ended = why
            self.is_over.set()
            self.thread.join(0 if self.lost else SILENCE)  # it may wait for a store that is cut off
            self.thread = None

    def _watch(self) -> None:
        signs = {rank: Sign() for rank in range(self.world)}
        heard = moved = dict.fromkeys(signs, time.monotonic())
        try:
            while not self.lost:
                is_last = self.is_over.is_set()
                self.mine.number += 1
                self.store.set(f"vlm_tune_sign_{self.rank}", json.dumps(asdict(self.mine)))
                if is_last:
                    return
                new = {rank: self._read(rank) or sign for rank, sign in signs.items()}
                now = self.answered = time.monotonic()
                heard = {rank: now if new[rank].number > signs[rank].number else heard[rank] for rank in signs}
                moved = {rank: now if new[rank].position != signs[rank].position else moved[rank] for rank in signs}
                signs = new
                self._judge(
                    signs, {rank: now - heard[rank] for rank in signs}, {rank: now - moved[rank] for rank in signs}
                )
                self.is_over.wait(BEAT)
        except Exception as error:  # of the store: whatever it is, the process that holds it cannot be reached
            self._say_unreachable(first_line(error))

    def _watch_store(self) -> None:
        """Look whether the store answers: where a cable is cut, its sockets wait for a quarter of an hour."""
        while not self.lost and not self.is_over.wait(BEAT):
            silent = time.monotonic() - self.answered
            if silent > SILENCE:
                self._say_unreachable(f"no answer for {silent:.0f} s")

    def _say_unreachable(self, why: str) -> None:
        self._say(
            f"rank 0, or torchrun on its machine, cannot be reached any more ({why}): {self.mine.step} steps were done"
        )

    def _read(self, rank: int) -> Sign | None:
        key = f"vlm_tune_sign_{rank}"
        return Sign(**json.loads(self.store.get(key))) if self.store.check([key]) else None

    def _judge(self, signs: dict[int, Sign], silent: dict[int, float], still: dict[int, float]) -> None:
        """Look for a rank that has ended, is silent, or lags behind the others and stays there."""
        done = f"{max(sign.step for sign in [self.mine, *signs.values()])} steps were done"  # by all ranks, or by none
        for rank, sign in signs.items():
            if sign.ended.startswith("ended"):
                return self._say(f"rank {rank} {sign.ended}; {done}")
            if not sign.ended and silent[rank] > SILENCE:
                where = f"{done}, and it {PLACES[sign.place]}"
                return self._say(f"rank {rank} has given no sign of life for {silent[rank]:.0f} s: {where}")
        last = min(signs.values(), key=lambda sign: sign.position)
        longest = max(sign.longest for sign in signs.values())
        hanging = [rank for rank, sign in signs.items() if sign.position == last.position]
        is_timed = last.place != ENDS and not last.ended
        if is_timed and min(still[rank] for rank in hanging) > max(HANG, SLOWER * longest):
            ranks = " and ".join(str(rank) for rank in hanging)
            self._say(f"rank {ranks} has not moved for {still[hanging[0]]:.0f} s: {done}, and it {PLACES[last.place]}")

    def _say(self, lost: str) -> None:
        if self.is_over.is_set() or self.lost:
            return
        self.lost = lost
        self.found.set()
        if not self.has_raised.wait(MANNERS):
            self.writer.give_time(SILENCE)
            sys.stderr.write(f"TrainingError: {lost}. Start all processes again with resume=last\n")
            sys.stderr.flush()
            os._exit(2)  # the main thread is blocked in a library, waiting for the lost rank


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message."""
    return (str(error) or type(error).__name__).splitlines()[0]
