"""Processes started by torchrun or SLURM: they connect before the run has a folder, and share the first one's.

Where Lightning starts the processes itself, the first has made the folder by then, and passes its name on.
"""

import os
from collections.abc import Callable
from datetime import timedelta

import torch.distributed
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

from vlm_tune.config.schema import TrainerConfig
from vlm_tune.errors import ConfigError

TIMEOUT = timedelta(days=1)  # of a collective: one process may answer questions meanwhile. `WatchRanks` finds the dead


def meet(trainer: TrainerConfig, has_gpu: bool) -> None:
    """Connect the processes of a run that was started from outside; Lightning's strategies use that process group.

    Raise ConfigError if their number differs from the configuration's.
    """
    found = next((kind() for kind in (TorchElasticEnvironment, SLURMEnvironment) if kind.detect()), None)
    if has_gpu:  # before the model is made: quantized weights are stored where they are loaded
        torch.cuda.set_device(found.local_rank() if found is not None else int(os.environ.get("LOCAL_RANK", "0")))
    if found is None or torch.distributed.is_initialized():
        return
    wanted, started = trainer.devices * trainer.nodes, found.world_size()
    if wanted != started:
        raise ConfigError(
            f"trainer.devices*trainer.nodes={wanted}, but {started} processes were started (torchrun --nnodes and "
            "--nproc-per-node, or srun --nodes and --ntasks-per-node): set both to the same numbers"
        )
    os.environ |= {"MASTER_ADDR": found.main_address, "MASTER_PORT": str(found.main_port)}
    torch.distributed.init_process_group(
        "nccl" if has_gpu else "gloo", rank=found.global_rank(), world_size=found.world_size(), timeout=TIMEOUT
    )


def most_of_all(number: int) -> int:
    """Return the largest number that a connected process names; without others, this one."""
    if not torch.distributed.is_initialized():
        return number
    named = [number] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(named, number)
    return max(named)


def from_the_first(make: Callable[[], str]) -> str:
    """Return what `make` returns on the first of the connected processes; without others, call it here."""
    if not torch.distributed.is_initialized():
        return make()
    made = [make() if torch.distributed.get_rank() == 0 else ""]
    torch.distributed.broadcast_object_list(made)
    return made[0]
