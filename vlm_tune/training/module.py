"""(6) The LightningModule: batch -> loss on the supervised positions -> logs."""

import time
from dataclasses import asdict
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor

from vlm_tune.config.schema import Config, Precision
from vlm_tune.data.batch import Batch, cut
from vlm_tune.errors import TrainingError
from vlm_tune.model.build import DTYPES, Model, resolve_precision
from vlm_tune.model.flops import count_flops
from vlm_tune.model.kernels.exchange import own_group
from vlm_tune.model.optim import give_settings, make_optimizer, make_schedule, settings_of
from vlm_tune.model.parts.shards import fully_split, held
from vlm_tune.model.parts.stage import set_modes, trained_parameters
from vlm_tune.model.preference.facts import FACTS
from vlm_tune.model.preference.loss import RunningMean, judge
from vlm_tune.training.resume import count_anew


class VlmModule(L.LightningModule):
    """Train a VisionLanguageModel. Its checkpoints hold what the stage trains, and no frozen weights."""

    strict_loading = False  # frozen weights are not in the checkpoint; `resume.go_on_from` checks the trained ones

    def __init__(self, model: Model, config: Config, max_steps: int) -> None:
        super().__init__()
        self.vlm = model.vlm
        self.config = config
        self.max_steps = max_steps
        self.flops, self.num_flops = count_flops(model.vlm), 0.0  # estimated; of this process since its start
        self.num_samples = self.num_tokens = 0  # of the run so far, all processes; `WatchSteps` adds each step's
        self.step_sizes = (0, 0, 0)  # samples, tokens and tiles of the optimizer step so far, of this process
        self.step_loss = torch.zeros(())  # of the optimizer step so far
        self.step_facts = torch.zeros(0)  # FACTS of its pairs so far, shares of their mean
        self.delta = RunningMean()  # of the rewards of all steps so far
        self.step_ids: list[str] = []
        self.numbers: dict[str, float] = {}  # of the last step and the last validation, by the columns of metrics.csv
        self.is_in_step = False  # between the micro-batches of one
        self.train_seconds = 0.0  # wall time of the run so far, without interruptions

    def configure_model(self) -> None:
        """Split the weights where the strategy is FSDP2; find the devices that share packs with this one."""
        if self.device_mesh is not None and not self.vlm.is_split:
            dtype = DTYPES[resolve_precision(self.config.trainer.precision)]
            fully_split(self.vlm, self.device_mesh["data_parallel"], dtype)
        if self.vlm.group is None:
            self.vlm.group = own_group(self.config.trainer.sequence_parallel)

    def on_fit_start(self) -> None:
        """Start the clock."""
        self.clock = time.perf_counter()

    def seconds_so_far(self) -> float:
        """Return the wall time of the run up to now, without interruptions."""
        return self.train_seconds + time.perf_counter() - self.clock

    def on_train_start(self) -> None:
        """Set train or eval mode for each part, and the settings of a resumed run's optimizer as they are now."""
        set_modes(self.vlm, self.config.stage)
        give_settings(self.lr_schedulers(), self.group_settings)  # type: ignore[arg-type]

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Seed dropout by the position in the stream: a resumed run then needs no generator state."""
        self.seed_micro_batch(batch.place)

    def seed_micro_batch(self, place: int) -> None:
        """Seed the randomness of a micro-batch by its place in the step, which no number of devices changes.

        Devices that share a pack drop others each; the first of them as one that has it alone.
        """
        share = self.global_rank % self.config.trainer.sequence_parallel  # 0 adds nothing to a seed
        torch.manual_seed(dropout_seed(self.config.seed, self.global_step, place, share))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return this micro-batch's share of the optimizer step's mean loss.

        Weights are normalised over the whole step, all devices: Lightning divides by the accumulated batches and the
        strategies average over the devices, so both are multiplied back in.
        """
        loss, facts = self.loss_of(batch)
        self.step_ids = batch.sample_ids + (self.step_ids if self._continues(batch_idx) else [])
        samples, tokens, tiles = self.step_sizes if self._continues(batch_idx) else (0, 0, 0)
        self.step_sizes = samples + len(batch.sample_ids), tokens + batch.num_tokens, tiles + batch.num_tiles
        self.step_loss = loss.detach() + (self.step_loss if self._continues(batch_idx) else 0.0)
        self.step_facts = facts + (self.step_facts if self._continues(batch_idx) else 0.0)
        self.num_flops += self.flops.of(batch) if self.flops else 0.0
        self.is_in_step = self._continues(batch_idx + 1)
        if not self.is_in_step:
            groups = self.optimizers().param_groups  # type: ignore[union-attr]
            self.numbers |= {f"lr/{group['name']}": group["lr"] for group in groups}
            # callbacks save before this module's own hook at the batch's end would run, so the cursor moves here
            self.trainer.datamodule.cursor = batch.cursor  # type: ignore[attr-defined]
        return loss * self.trainer.accumulate_grad_batches * self.trainer.world_size

    def loss_of(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return a batch's share of the loss and, of pairs, of the means of their FACTS: a scalar, (facts,) or (0,).

        BCO's delta is the mean over the steps before this one: that of the step itself is only known at its end.
        """
        made = self.vlm(batch)
        if batch.answers is None:
            return made, made.new_zeros(0)
        assert batch.reference is not None, "the reference reads all pairs before the first step"
        num_tokens = made.new_tensor(batch.answers).view(-1, 2)
        losses, facts = judge(made, num_tokens, batch.reference, self.config.stage.preference, self.delta.value)
        return (losses * batch.weights).sum(), (facts * batch.weights).sum(1)  # no product: autocast would round it

    def note_pairs(self, facts: list[float], is_skipped: bool) -> None:
        """Note the means of a step's pairs over all devices, and move delta on."""
        known = dict(zip(FACTS, facts, strict=True))
        self.numbers |= {f"pairs/{name}": value for name, value in known.items()} | {"pairs/delta": self.delta.value}
        if not is_skipped:
            self.delta.add((known["reward_chosen"] + known["reward_rejected"]) / 2)

    def _continues(self, batch_idx: int) -> bool:
        return batch_idx % self.trainer.accumulate_grad_batches != 0

    def require_finite_weights(self) -> None:
        """Raise TrainingError if a trained weight is not finite: no step can repair that."""
        broken = [name for name, weight in trained_parameters(self.vlm) if not torch.isfinite(held(weight)).all()]
        if broken:
            raise TrainingError(
                f"{len(broken)} trained weights are no numbers any more after step {self.global_step} ({broken[0]}). "
                "No checkpoint holds them. Lower stage.lr, and go on with resume=last 'resume_allow=[stage.lr.llm]' "
                "(or of the part that you changed)"
            )

    def on_validation_epoch_start(self) -> None:
        """Reset the sums over the validation rows; dropout is off."""
        self.vlm.eval()
        num_facts = len(FACTS) if self.config.stage.preference.is_on else 0
        self.val_sums = torch.zeros(2 + num_facts, device=self.device)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add up loss and weight."""
        loss, facts = self.loss_of(batch)
        self.val_sums += torch.cat([torch.stack([loss, batch.weights.sum()]), facts])

    def on_validation_epoch_end(self) -> None:
        """Note the mean loss of all validation tokens, or pairs, over all devices."""
        total, weight, *facts = self.trainer.strategy.reduce(self.val_sums, reduce_op="sum")
        means = (torch.stack([total, *facts]) / weight).tolist()
        self.numbers |= {f"val/{name}": mean for name, mean in zip(("loss", *FACTS), means, strict=False)}
        set_modes(self.vlm, self.config.stage)

    def configure_optimizers(self) -> Any:
        """Return AdamW by part, with warmup and cosine by optimizer step."""
        is_scaled = resolve_precision(self.config.trainer.precision) is Precision.fp16
        optimizer = make_optimizer(self.vlm, self.config.stage, may_fuse=not is_scaled)
        schedule = make_schedule(optimizer, self.config.stage, self.max_steps)
        self.group_settings = [settings_of(group) for group in optimizer.param_groups]
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Copy a Batch, or this device's share of one."""
        size = self.config.trainer.sequence_parallel
        own = batch if size == 1 else cut(batch, self.global_rank % size, size)
        return own.to(device)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return only trained weights: a checkpoint of LoRA and projector takes megabytes, not gigabytes."""
        return {f"vlm.{name}": parameter.data for name, parameter in trained_parameters(self.vlm)}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the counts of the run; raise TrainingError rather than save weights that are not finite."""
        self.require_finite_weights()
        now = time.perf_counter()
        self.train_seconds, self.clock = self.train_seconds + now - self.clock, now
        checkpoint["counts"] = {"samples": self.num_samples, "tokens": self.num_tokens, "seconds": self.train_seconds}
        if self.config.stage.preference.is_on:
            checkpoint["delta"] = asdict(self.delta)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the counts."""
        counts = checkpoint["counts"]
        self.num_samples, self.num_tokens, self.train_seconds = (
            counts[key] for key in ("samples", "tokens", "seconds")
        )
        self.delta = RunningMean(**checkpoint.get("delta", {}))
        count_anew(checkpoint, self.trainer.accumulate_grad_batches)


def dropout_seed(*position: int) -> int:
    """Hash the numbers of a position (seed, step, place in it) to 64 bits, the same in every version of Python."""
    return int(np.random.SeedSequence(position).generate_state(1, np.uint64)[0])
