"""Stop when asked to, by Ctrl-C, SIGTERM or SLURM's signal: after the step, state saved, on all ranks at once."""

import os
import signal
import threading
from typing import Any

import lightning as L

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)  # SLURM sends one of the last two, if so told


class StopWhenAsked(L.Callback):
    """Notes that a stop was requested; `WatchSteps` tells all ranks, and `SaveCheckpoints` saves and stops."""

    def __init__(self) -> None:
        self.asked = ""
        self.before: dict[signal.Signals, Any] = {}

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        """Take the signals over from Lightning, whose handler for SIGTERM would end the step halfway."""
        if threading.current_thread() is not threading.main_thread():
            return
        if trainer.received_sigterm:  # since Lightning took them
            self.asked = "SIGTERM"
            trainer._signal_connector.received_sigterm = False
        self.before = {each: signal.signal(each, self._note) for each in SIGNALS}

    def on_train_end(self, trainer: L.Trainer, module: Any) -> None:
        """Restore the signal handlers: the last state is saved, and what follows may be interrupted at once."""
        for each, handler in self.before.items():
            signal.signal(each, handler)
        self.before = {}

    def on_exception(self, trainer: L.Trainer, module: Any, exception: BaseException) -> None:
        """Restore the signal handlers."""
        self.on_train_end(trainer, module)

    def _note(self, number: int, frame: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = signal.Signals(number).name
        said = "at the end of this step the state is saved, and the run stops. Once more stops it at once"
        # it may arrive during a print, which is not reentrant
        os.write(2, f"\n{self.asked}: {said}\n".encode())
