"""Find the rows and the module that produced a value that is not finite, by rerunning the step's forward passes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from vlm_tune.data.batch import Batch
from vlm_tune.data.stream import Cursor
from vlm_tune.model.parts.shards import held
from vlm_tune.model.parts.stage import trained_parameters


@dataclass(frozen=True)
class Culprit:
    """The rows of the micro-batches that failed (of the whole step, if none stands out), and the first module."""

    rows: list[str]
    module: str | None


def find_culprit(trainer: L.Trainer, module: Any, cursor: Cursor) -> Culprit:
    """Search on every rank and share the result: batches are rebuilt from the cursor and their seeds."""
    found = of_all_ranks(trainer, find_here(trainer, module, cursor))
    failing = [each for each in found if each.module] or found
    rows = [row for each in failing for row in each.rows]  # the ranks of a group name the same
    return Culprit(list(dict.fromkeys(rows)), failing[0].module)


def of_all_ranks(trainer: L.Trainer, value: Any) -> list[Any]:
    """Gather a value of each rank, in their order."""
    if trainer.world_size == 1:
        return [value]
    gathered = [None] * trainer.world_size
    torch.distributed.all_gather_object(gathered, value)
    return gathered


def find_here(trainer: L.Trainer, module: Any, cursor: Cursor) -> Culprit:
    """Rerun this rank's micro-batches of the step; find what fails in the forward pass, else in the gradients."""
    gradients = [
        name for name, each in trained_parameters(module.vlm) if each.grad is not None and not is_finite(each.grad)
    ]
    rows, first = [], None
    for batch in batches_of_step(trainer, cursor):
        module.seed_micro_batch(batch.place)
        with torch.no_grad(), watched(module.vlm) as seen, trainer.precision_plugin.forward_context():
            loss = module.vlm(module.transfer_batch_to_device(batch, module.device, 0))
        if seen or not is_finite(loss):
            rows += batch.sample_ids
            first = first or (seen[0] if seen else "the loss")
    if first is None and gradients:  # a backward pass starts from the end
        first = f"the gradient of {gradients[-1]}"
    return Culprit(rows or module.step_ids, first)


def batches_of_step(trainer: L.Trainer, cursor: Cursor) -> Iterator[Batch]:
    """Rebuild this rank's micro-batches of the optimizer step that begins at a cursor."""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    after, data.cursor = data.cursor, cursor
    stream = data.stream(*data.group())
    data.cursor = after
    batches: Any = trainer.train_dataloader
    for item in islice(stream, trainer.accumulate_grad_batches):
        yield batches.dataset.batches[item]


@contextmanager
def watched(model: nn.Module) -> Iterator[list[str]]:
    """Collect the names of modules whose output is not finite, in order: inner modules before outer ones."""
    seen: list[str] = []

    def look(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, inputs: Any, output: Any) -> None:
            if not seen and not all(is_finite(each) for each in tensors_of(output)):
                seen.append(name)

        return hook

    handles = [each.register_forward_hook(look(name)) for name, each in model.named_modules() if name]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def tensors_of(output: Any) -> Iterator[Tensor]:
    """Yield the floating-point tensors of a module's output, at any depth."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, dict):
        for each in output.values():
            yield from tensors_of(each)
    elif isinstance(output, list | tuple):
        for each in output:
            yield from tensors_of(each)


def is_finite(tensor: Tensor) -> bool:
    """Return whether all values are finite; of a sharded tensor, those of the local shard."""
    return bool(torch.isfinite(held(tensor)).all())
