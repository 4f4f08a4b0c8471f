"""How devices share the work: Lightning's strategies, with one kind of checkpoint for all of them.

A checkpoint holds the same, whatever wrote it: the trained weights in float32 and the state of the optimizer by
parameter, as one device would hold them. Any strategy can continue from it, with any number of devices.
"""

import os
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins import DeepSpeedPrecision
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy, ParallelStrategy
from lightning.pytorch.strategies import Strategy as LightningStrategy
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from vlm_tune.config.schema import Config, Precision, Strategy
from vlm_tune.model.build import DTYPES, resolve_precision
from vlm_tune.model.checkpoint import SHARED
from vlm_tune.model.optim import settings_of
from vlm_tune.model.parts.shards import copies, on_host, whole
from vlm_tune.model.parts.stage import trained_parameters
from vlm_tune.training.launch import TIMEOUT

ZERO = {Strategy.zero1: 1, Strategy.zero2: 2, Strategy.zero3: 3, Strategy.zero3_offload: 3}
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's state of a parameter, besides its step count


def make_strategy(config: Config, has_gpu: bool) -> Any:
    """Choose how devices share the work."""
    name, devices = config.strategy.name, config.trainer.devices * config.trainer.nodes
    backend = "nccl" if has_gpu else "gloo"
    if name is Strategy.auto and devices == 1:
        return "auto"
    if name in (Strategy.auto, Strategy.ddp):
        return DDPStrategy(process_group_backend=backend, timeout=TIMEOUT, find_unused_parameters=False)
    if name is Strategy.fsdp:
        return FullySharded(devices, backend)
    return Zero(config, has_gpu)


class WholeCheckpoints(ParallelStrategy):
    """Gathers what devices hold in shards into an ordinary checkpoint, and splits one again."""

    restore_checkpoint_after_setup = True
    lightning_restore_optimizer = True

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read it in every process."""
        return LightningStrategy.load_checkpoint(self, checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        """Do nothing: `resume.go_on_from` loads the weights before they are split."""

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Gather the trained weights one by one, and keep those that this process writes."""
        assert self.lightning_module is not None
        trained = trained_parameters(self.lightning_module.vlm)  # type: ignore[arg-type]
        weights = {f"vlm.{name}": parameter for name, parameter in trained}
        return copies(weights, self.checkpoint_io.parts, self.gather)  # type: ignore[attr-defined]

    def gather(self, parameter: Tensor) -> Tensor:
        """Return the whole of a trained parameter."""
        return whole(parameter)


class FullySharded(WholeCheckpoints, ModelParallelStrategy):
    """FSDP2: weights, gradients and optimizer are sharded; `VlmModule.configure_model` chooses the units."""

    def __init__(self, devices: int, backend: str) -> None:
        sizes = {"data_parallel_size": devices, "tensor_parallel_size": 1}
        super().__init__(  # type: ignore[arg-type]
            **sizes, save_distributed_checkpoint=False, process_group_backend=backend, timeout=TIMEOUT
        )

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Gather AdamW's state, and keep what this process writes."""
        state = optimizer.state_dict()
        return state | {"state": copies(state["state"], self.checkpoint_io.parts, whole)}  # type: ignore[attr-defined]

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        """Keep this device's shard of each moment."""
        (saved,), (optimizer,) = checkpoint["optimizer_states"], self.optimizers
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        state = {
            number: values | {key: part_of(values[key], parameters[number]) for key in MOMENTS}
            for number, values in saved["state"].items()
        }
        optimizer.load_state_dict(saved | {"state": state})


def snapshot(trainer: L.Trainer, **changed: Any) -> dict[str, Any]:
    """Copy into the host's memory what this process writes of a checkpoint, of which `changed` is given."""
    checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False) | changed
    if not isinstance(trainer.strategy, WholeCheckpoints):
        parts = trainer.strategy.checkpoint_io.parts  # type: ignore[attr-defined]
        checkpoint["state_dict"] = copies(checkpoint["state_dict"], parts)
        states = checkpoint["optimizer_states"]
        checkpoint["optimizer_states"] = [each | {"state": copies(each["state"], parts)} for each in states]
    rest = {key: value for key, value in checkpoint.items() if key not in SHARED}
    return checkpoint | apply_to_collection(rest, Tensor, on_host)  # lists and dictionaries are copied too


def part_of(value: Tensor, parameter: DTensor) -> Tensor:
    """Shard a whole tensor as a parameter is sharded; every process has the whole, so nothing is sent."""
    placed = value.to(parameter.device)
    return distribute_tensor(placed, parameter.device_mesh, parameter.placements, src_data_rank=None)


class Zero(WholeCheckpoints, DeepSpeedStrategy):
    """DeepSpeed's ZeRO: optimizer (1), gradients (2) and weights (3) are sharded. It runs on CPUs and GPUs.

    DeepSpeed's own mixed precision would keep trained weights in 16 bit. They are float32 here, as under every other
    strategy, and autocast handles matrix products.
    """

    def __init__(self, config: Config, has_gpu: bool) -> None:
        self.is_on_gpu = has_gpu
        backend = "nccl" if has_gpu else "gloo"
        if not has_gpu:
            os.environ["DS_ACCELERATOR"] = "cpu"
        settings = zero_settings(config, has_gpu)
        super().__init__(config=settings, process_group_backend=backend, timeout=TIMEOUT)
        self.parameters: list[Tensor] = []  # in the optimizer's order

    @property
    def root_device(self) -> torch.device:
        """Return a device with an index, which DeepSpeed needs on CPUs too."""
        return super().root_device if self.is_on_gpu else torch.device("cpu", self.local_rank)

    def setup_environment(self) -> None:
        """Connect the processes; Lightning's own version refuses a CPU."""
        DDPStrategy.setup_environment(self)

    def setup_distributed(self) -> None:
        """Start DeepSpeed's communication."""
        if self.is_on_gpu:
            super().setup_distributed()
            return
        import deepspeed  # late: it takes seconds to import

        # of what DeepSpeed compiles at first use, a CPU run needs only this; gloo does the same
        deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    def _format_config(self) -> None:
        """Leave the precision as `zero_settings` wrote it: Lightning would request 16-bit weights."""
        self._format_batch_size_and_grad_accum_config()

    def setup(self, trainer: Any) -> None:
        """Make all processes run the same layers if the weights are sharded."""
        assert self.lightning_module is not None
        self.lightning_module.vlm.is_split = self.zero_stage_3  # type: ignore[union-attr]
        super().setup(trainer)

    def _init_optimizers(self) -> Any:
        """Remember the order of the parameters: DeepSpeed replaces them with flat pieces of many."""
        optimizer, schedule = super()._init_optimizers()
        self.parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.counts = [len(group["params"]) for group in optimizer.param_groups]
        return optimizer, schedule

    def init_deepspeed(self) -> None:
        """Start the engine, and lay out AdamW's state by parameter.

        DeepSpeed does so after the first step of the first parameter group, and finds no state for the others.
        """
        super().init_deepspeed()
        (zero,) = self.optimizers
        self.inner: Any = zero.optimizer  # type: ignore[attr-defined]
        if hasattr(zero, "fp32_partitioned_groups_flat"):
            self.pieces = zero.fp32_partitioned_groups_flat
        else:
            self.pieces = zero.single_partition_of_fp32_groups  # type: ignore[attr-defined]
        for piece in self.pieces:
            step = torch.zeros((), device=piece.device if self.inner.defaults["fused"] else "cpu")
            self.inner.state[piece] = {"step": step} | {key: torch.zeros_like(piece) for key in MOMENTS}
        if not self.zero_stage_3:
            zero._lazy_init_hp_params_optimizer_state()  # type: ignore[attr-defined]

    def gather(self, parameter: Tensor) -> Tensor:
        """Return the whole of a trained parameter."""
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(parameter)

    def gradients(self) -> list[Tensor]:
        """Return the gradients of a step that this device keeps: shards, or whole ones under zero1.

        DeepSpeed itself leaves out a step of which any is not finite, on all devices.
        """
        (zero,) = self.optimizers
        averaged = [each for group in zero.averaged_gradients.values() for each in group or []]  # type: ignore[attr-defined]
        return [each for each in (*averaged, *(piece.grad for piece in self.pieces)) if each is not None]

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Gather AdamW's state by parameter, and keep what this process writes."""
        from deepspeed.utils import safe_get_full_optimizer_state

        step = self.inner.state[self.pieces[0]]["step"]

        def gather(parameter: Tensor) -> dict[str, Tensor]:
            return {"step": step} | {key: safe_get_full_optimizer_state(parameter, key) for key in MOMENTS}

        numbers = iter(range(len(self.parameters)))
        groups = [
            settings_of(group) | {"params": [next(numbers) for _ in range(count)]}
            for group, count in zip(self.inner.param_groups, self.counts, strict=True)
        ]
        entries = dict(enumerate(self.parameters))
        return {"state": copies(entries, self.checkpoint_io.parts, gather), "param_groups": groups}  # type: ignore[attr-defined]

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        """Keep this device's shard of each moment, in DeepSpeed's flat pieces."""
        from deepspeed.utils import safe_set_full_optimizer_state

        (saved,) = checkpoint["optimizer_states"]
        for group, before in zip(self.inner.param_groups, saved["param_groups"], strict=True):
            group.update(settings_of(before))
        for piece in self.pieces if saved["state"] else []:
            self.inner.state[piece]["step"].copy_(saved["state"][0]["step"])
        for number, values in saved["state"].items():
            for key in MOMENTS:
                safe_set_full_optimizer_state(self.parameters[number], values[key].to(self.root_device), key)


class ZeroPrecision(DeepSpeedPrecision):
    """Leave batches and gradients as they are."""

    def convert_input(self, data: Any) -> Any:
        """Return a batch unchanged: Lightning would round its token weights to 16 bit."""
        return data

    def backward(self, tensor: Tensor, model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """Run a backward pass without dividing the loss by the accumulated batches: Lightning has done that."""
        super().backward(tensor, model, optimizer, *args, scale_wrt_gas=False, **kwargs)


def zero_settings(config: Config, has_gpu: bool) -> dict[str, Any]:
    """Write DeepSpeed's configuration: the stage, where weights are offloaded, and autocast in the run's precision."""
    name, precision = config.strategy.name, resolve_precision(config.trainer.precision)
    zero: dict[str, Any] = {"stage": ZERO[name], "overlap_comm": has_gpu, "contiguous_gradients": True}
    if ZERO[name] == 3:
        zero["stage3_param_persistence_threshold"] = 0
    if name is Strategy.zero3_offload:
        zero |= {key: {"device": "cpu", "pin_memory": has_gpu} for key in ("offload_optimizer", "offload_param")}
    settings: dict[str, Any] = {
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW runs on a CPU without a compiler
        "train_micro_batch_size_per_gpu": 1,  # only used in DeepSpeed's logs
    }
    if precision is not Precision.fp32:
        dtype = str(DTYPES[precision]).removeprefix("torch.")
        settings["torch_autocast"] = {"enabled": True, "dtype": dtype, "lower_precision_safe_modules": []}
    return settings
