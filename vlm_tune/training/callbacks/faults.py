"""Explain what ends a run from outside: memory that is full, a data worker or a rank that died."""

from typing import Any

import lightning as L
import torch

from vlm_tune.config.schema import Config, SharePrefix
from vlm_tune.data.batch import Batch
from vlm_tune.errors import Stopped, TrainingError, VlmTuneError
from vlm_tune.model.find_batch import is_full
from vlm_tune.training.callbacks.ranks import WatchRanks
from vlm_tune.training.callbacks.stop import StopWhenAsked

LIMITS = {"stage.pack_length": "tokens of a pack", "stage.pack_tiles": "tiles of a pack"}


class LastBatch(L.Callback):
    """Remembers the sizes of the current batch, which mostly decide how much memory a device needs."""

    said = "before the first batch"

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Batch, batch_idx: int) -> None:
        """Note a training batch."""
        self._note(f"in step {trainer.global_step + 1}", batch)

    def on_validation_batch_start(self, trainer: L.Trainer, module: Any, batch: Batch, *_: Any) -> None:
        """Note a validation batch."""
        self._note(f"in the validation after step {trainer.global_step}", batch)

    def _note(self, when: str, batch: Batch) -> None:
        longest = max(batch.segments) if batch.segments else batch.input_ids.shape[1]
        self.said = (
            f"{when}, at a batch of {len(batch.sample_ids)} rows, {batch.num_tokens:,} tokens (the longest row "
            f"{longest:,}) and {batch.num_tiles} tiles: {', '.join(batch.sample_ids[:5])}"
        )


def find(trainer: L.Trainer, kind: type) -> Any:
    """Return the trainer's callback of a kind."""
    return next(each for each in trainer.callbacks if isinstance(each, kind))  # type: ignore[attr-defined]


def explain(error: BaseException, trainer: L.Trainer, config: Config) -> Exception | None:
    """Return our own error for one of a library; None where it is the program's own fault.

    torch raises an error whenever a data worker ends, also while one of ours is on its way: that one is returned.
    """
    text, before = str(error), error.__context__
    while before is not None:
        if isinstance(before, (VlmTuneError, Stopped)):
            return before
        before = before.__context__
    first = text.splitlines()[0] if text else type(error).__name__
    lost = find(trainer, WatchRanks).lost
    if lost:
        return TrainingError(f"{lost}. The other processes have ended: start all of them again with resume=last")
    if is_full(error):
        return TrainingError(out_of_memory(first, find(trainer, LastBatch).said, config))
    if "DataLoader worker" in text and not text.startswith("Caught "):  # Caught: its own error
        asked = find(trainer, StopWhenAsked).asked
        if asked:  # the signal reached the workers too, and ended them before the step could end
            return Stopped(trainer.global_step, asked)
        return TrainingError(
            f"a process that reads data was ended from outside ({first}): mostly the memory was "
            f"full. Set data.workers below {config.data.workers} (0 reads in the main process), then go on with "
            "resume=last"
        )
    return None


def out_of_memory(reason: str, batch: str, config: Config) -> str:
    """Describe which batch did not fit, and how to make it smaller."""
    stage, trainer = config.stage, config.trainer
    settings = {"stage.pack_length": stage.pack_length, "stage.pack_tiles": stage.pack_tiles} if stage.packing else {}
    settings |= {"trainer.micro_batch": trainer.micro_batch} if trainer.micro_batch > 1 else {}
    settings |= {"model.tiles.max": config.model.tiles.max, "data.max_length": config.data.max_length}
    lower = ", ".join(f"{key}={value}" for key, value in settings.items())
    lower += " (stage.share_prefix=off needs less, too)" if stage.share_prefix is not SharePrefix.off else ""
    held = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_initialized() else 0
    most = f"; {held:.1f} GiB were in use at most" if held else ""
    off = [part for part, way in vars(stage.gradient_checkpointing).items() if way in (False, "mlp")]
    keys = ", ".join(f"stage.gradient_checkpointing.{part}" for part in off if part != "projector")
    switch = (
        f" Or recompute layers, which changes no result and may be resumed (resume_allow): {keys}=true." if keys else ""
    )
    return f"memory is full {batch} ({reason}{most}). Lower one of {lower}, and start anew.{switch}"
