"""Agree across ranks, before each optimizer step, whether to make it, and whether to save or stop after it.

This costs one all-reduce and one device synchronisation, which a check of the loss alone would cost too.
"""

import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from rich.console import Console
from torch import Tensor
from torch.nn.utils import get_total_norm

from vlm_tune.config.schema import Precision
from vlm_tune.data.batch import Batch
from vlm_tune.errors import TrainingError
from vlm_tune.model.build import resolve_precision
from vlm_tune.model.parts.shards import held
from vlm_tune.model.parts.stage import PARTS
from vlm_tune.training.callbacks.culprit import Culprit, find_culprit, of_all_ranks
from vlm_tune.training.callbacks.stop import StopWhenAsked
from vlm_tune.training.run_folder import append, drop_lines_after
from vlm_tune.training.strategies import Zero

REMEMBERED, LEAST = 50, 20  # losses that a new one is compared with, and the fewest needed
FAR = 10  # a spike is this many median deviations above their median, and at least 1.5 times the median


class WatchSteps(L.Callback):
    """Skips the step of a loss or gradient that is not finite, and records loss spikes, both with their rows.

    Both go into RUN/unusual_steps.jsonl. A skipped step changes neither weights nor moments; the schedule and the data
    continue. After `max_bad_steps` of them in a row the run ends, with its state saved.
    """

    def __init__(
        self, run: Path, max_bad_steps: int, save_minutes: float | None, stop: StopWhenAsked, console: Console
    ) -> None:
        self.path = run / "unusual_steps.jsonl"
        self.max_bad_steps = max_bad_steps
        self.save_seconds = math.inf if save_minutes is None else 60 * save_minutes
        self.stop = stop
        self.console = console
        self.losses: list[float] = []  # of the last steps
        self.skipped = self.in_row = 0  # steps skipped so far, and since the last one made
        self.saved_at = time.monotonic()
        self.must_stop = self.must_save = False
        self.error: TrainingError | None = None

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        """Start counting the minutes; drop records after the step that the run continues from."""
        self.saved_at = time.monotonic()
        if trainer.is_global_zero:
            drop_lines_after(self.path, trainer.global_step)

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Batch, batch_idx: int) -> None:
        """Remember where in the data a step begins, so that its batches can be rebuilt to find a bad one."""
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self.cursor = trainer.datamodule.cursor  # type: ignore[attr-defined]

    def on_before_optimizer_step(self, trainer: L.Trainer, module: Any, optimizer: torch.optim.Optimizer) -> None:
        """Collect from all ranks how the step went; note its loss; drop its gradients if they are not finite."""
        if module.is_in_step:  # DeepSpeed calls this for each micro-batch
            return
        is_due = trainer.is_global_zero and time.monotonic() - self.saved_at >= self.save_seconds
        samples, tokens, tiles = module.step_sizes
        shares = [0] * (2 * trainer.world_size)  # tokens of each rank, and tiles: a sum over ranks leaves each its own
        shares[trainer.global_rank], shares[trainer.global_rank - trainer.world_size] = tokens, tiles
        wishes = module.step_loss.new_tensor([bool(self.stop.asked), is_due, samples, *shares])
        known = module.step_loss.view(1), gradient_squares(trainer, module, optimizer), wishes, module.step_facts
        facts = torch.cat(known)
        loss, *summed = trainer.strategy.reduce(facts, reduce_op="sum").tolist()
        squares, (stop, save, samples, *dealt) = summed[: len(PARTS)], summed[len(PARTS) :]
        ranks = trainer.world_size
        tokens_of, tiles_of, pairs = dealt[:ranks], dealt[ranks : 2 * ranks], dealt[2 * ranks :]
        module.num_samples += int(samples) // module.config.trainer.sequence_parallel  # each counted by its whole group
        module.num_tokens += int(sum(tokens_of))
        self.must_stop, self.must_save = stop > 0, save > 0
        # the squares of large numbers may be infinite, which they are not
        is_sure = all(map(math.isfinite, squares)) or is_scaled(trainer, module)
        is_gradient_bad = not is_sure and not is_every_gradient_finite(trainer, module, optimizer)
        is_skipped = not math.isfinite(loss) or is_gradient_bad
        if is_skipped:
            self._skip(trainer, module, loss, is_gradient_bad)
        else:
            self.in_row = 0
            self._compare(trainer, module, loss)
        module.numbers["train/loss"] = loss
        if pairs:
            module.note_pairs(pairs, is_skipped)
        module.numbers |= {"imbalance/tokens": imbalance(tokens_of), "imbalance/tiles": imbalance(tiles_of)}
        module.numbers["skipped"] = float(self.skipped)
        is_logged = (trainer.global_step + 1) % module.config.trainer.log_every == 0
        if is_logged and not isinstance(trainer.strategy, Zero) and not is_scaled(trainer, module):
            copies = 1 if module.vlm.is_split else trainer.world_size  # ranks that hold the same gradients
            norms = {f"grad/{part}": math.sqrt(each / copies) for part, each in zip(PARTS, squares, strict=True)}
            module.numbers |= {name: norm for name, norm in norms.items() if norm}  # 0: frozen

    def _skip(self, trainer: L.Trainer, module: Any, loss: float, is_gradient_bad: bool) -> None:
        module.require_finite_weights()
        culprit = find_culprit(trainer, module, self.cursor)
        rows = ", ".join(culprit.rows)
        said = f"the loss is {loss} at step {trainer.global_step}, rows {rows}"
        if math.isfinite(loss):
            said = f"a gradient is no number at step {trainer.global_step}, rows {rows}"
        if isinstance(trainer.strategy, Zero):
            if not is_gradient_bad:  # DeepSpeed looks at gradients alone, and would make the step
                raise TrainingError(f"{said}: no weight was changed by it. {way_out(culprit)}")
        else:
            for group in trainer.optimizers[0].param_groups:  # under FSDP2 the model itself may name gathered weights
                for parameter in group["params"]:
                    parameter.grad = None  # the optimizer skips it, and its moments
        self.skipped, self.in_row = self.skipped + 1, self.in_row + 1
        self._note(trainer, "skipped", loss, culprit)
        if self.in_row >= min(self.max_bad_steps, trainer.max_steps):
            steps = f"; {self.in_row} steps in a row (trainer.max_bad_steps)" if self.in_row > 1 else ""
            self.error = TrainingError(f"{said}: no weight was changed by it{steps}. {way_out(culprit)}")

    def _compare(self, trainer: L.Trainer, module: Any, loss: float) -> None:
        if len(self.losses) >= LEAST:
            usual = statistics.median(self.losses)
            spread = statistics.median(abs(each - usual) for each in self.losses)
            if loss > usual + FAR * spread and loss > 1.5 * usual:
                rows = dict.fromkeys(row for rank in of_all_ranks(trainer, module.step_ids) for row in rank)
                self._note(trainer, "spike", loss, Culprit(list(rows), None))
        self.losses = [*self.losses, loss][-REMEMBERED:]

    def _note(self, trainer: L.Trainer, kind: str, loss: float, culprit: Culprit) -> None:
        if not trainer.is_global_zero:
            return
        step = trainer.global_step + 1  # as metrics.csv counts
        entry = {"step": step, "kind": kind, "loss": repr(loss), "rows": culprit.rows, "module": culprit.module}
        append(self.path, json.dumps(entry, ensure_ascii=False) + "\n")
        where = f"; first seen in {culprit.module}" if culprit.module else ""
        what = (
            "is skipped, its loss or gradient is no number"
            if kind == "skipped"
            else f"has a leap of the loss, {loss:.4g}"
        )
        self.console.print(f"step {step} {what}{where}. Rows: {', '.join(culprit.rows)}", soft_wrap=True)

    def state_dict(self) -> dict[str, Any]:
        """Remember the last losses and the counts, so that a resumed run judges as an uninterrupted one."""
        return {"losses": self.losses, "skipped": self.skipped, "in_row": self.in_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore them."""
        self.losses, self.skipped = list(state_dict["losses"]), state_dict["skipped"]
        self.in_row = state_dict["in_row"]


def imbalance(shares: list[float]) -> float:
    """Return the largest share of a step over the mean: 1 where all ranks have the same, or none has any."""
    return max(shares) * len(shares) / sum(shares) if any(shares) else 1.0


def is_scaled(trainer: L.Trainer, module: Any) -> bool:
    """Return whether gradients are scaled, in fp16: the scaler checks them, and while it searches none is a fault."""
    if isinstance(trainer.strategy, Zero):
        return resolve_precision(module.config.trainer.precision) is Precision.fp16
    plugin = trainer.precision_plugin
    return isinstance(plugin, MixedPrecision) and plugin.scaler is not None


def gradients(trainer: L.Trainer, optimizer: torch.optim.Optimizer) -> dict[str, list[Tensor]]:
    """List what this rank holds of the gradients of each part, before they are clipped; DeepSpeed mixes the parts."""
    if isinstance(trainer.strategy, Zero):
        found = {PARTS[0]: trainer.strategy.gradients()}
    else:
        found = {part: [] for part in PARTS}
        for group in optimizer.param_groups:
            found[group["name"]] += [held(each.grad) for each in group["params"] if each.grad is not None]
    # a rank may hold no row of a small weight
    return {part: [each for each in local if each.numel()] for part, local in found.items()}


def gradient_squares(trainer: L.Trainer, module: Any, optimizer: torch.optim.Optimizer) -> Tensor:
    """Return the sum of the squares of this rank's gradients of each part, in the order of PARTS: (3,)."""
    found = gradients(trainer, optimizer)
    none = module.step_loss.new_zeros(())
    norms = [get_total_norm(found[part]).to(none) if found.get(part) else none for part in PARTS]
    return torch.stack(norms) ** 2


def is_every_gradient_finite(trainer: L.Trainer, module: Any, optimizer: torch.optim.Optimizer) -> bool:
    """Return whether no rank has a gradient that is not finite; all ranks call it together."""
    local = [each for part in gradients(trainer, optimizer).values() for each in part]
    is_bad = ~torch.isfinite(get_total_norm(local, norm_type=math.inf)) if local else module.step_loss.new_zeros(())
    return not trainer.strategy.reduce(is_bad.to(module.step_loss), reduce_op="sum").item()


def way_out(culprit: Culprit) -> str:
    """Describe what to do."""
    where = f"It is first seen in {culprit.module}. " if culprit.module else ""
    return f"{where}Look at these rows, lower stage.lr, or set trainer.precision=bf16; then go on with resume=last"
