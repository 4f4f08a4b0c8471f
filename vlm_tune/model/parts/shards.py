"""Sharded weights: FSDP2's units, and what a device holds of a parameter.

A sharded weight is whole where it is used. FSDP2 gathers a unit's weights before the unit's forward pass and before
its backward pass, and those that belong to no layer (embeddings, head, projector) for the model's whole step, so that
functions that read several layers' weights at once (`kernels/lora.py`, `kernels/loss.py`) find plain tensors. ZeRO-3
gathers a layer's weights while that layer is called, and then alone: there such functions leave the work to
the layers.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from vlm_tune.errors import ConfigError
from vlm_tune.model.parts.vision import layer_list
from vlm_tune.model.vlm import VisionLanguageModel

Key = TypeVar("Key", int, str)


def fully_split(vlm: VisionLanguageModel, mesh: Any, dtype: torch.dtype) -> None:
    """Split a model over the devices of a mesh by FSDP2: each layer is a unit, what is left another.

    Weights are gathered in the type that they are kept in: trained ones in float32, frozen ones in that of the
    precision, `dtype`. A layer that is trained as a whole is gathered in `dtype`: autocast would keep a 16-bit copy of
    each of its weights until the backward pass. Gradients are summed in float32 and kept so.
    """
    exact = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    cast = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for layer in (*encoder_layers(vlm), *vlm.llm.get_decoder().layers):
        is_trained = all(weight.requires_grad for weight in layer.parameters())
        fully_shard(layer, mesh=mesh, mp_policy=cast if is_trained else exact)
    fully_shard(vlm, mesh=mesh, mp_policy=exact)
    register_fsdp_forward_method(vlm, "gather")
    vlm.is_split = True


def encoder_layers(vlm: VisionLanguageModel) -> list[nn.Module]:
    """List the layers of the vision encoder; a convolutional one has none, and is split as one unit."""
    try:
        return list(layer_list(vlm.vision.tower, "strategy"))
    except ConfigError:
        return []


def release(vlm: VisionLanguageModel) -> None:
    """Free the weights that `VisionLanguageModel.gather` gathered."""
    if isinstance(vlm, FSDPModule):
        vlm.reshard()


def held(parameter: Tensor) -> Tensor:
    """Return what this device holds of a parameter when nothing is gathered."""
    if isinstance(parameter, DTensor):
        return parameter.to_local()
    return getattr(parameter, "ds_tensor", parameter)  # ZeRO-3's shard


def size_of(value: Tensor) -> int:
    """Count the numbers of a tensor, whatever this device holds of them."""
    return int(getattr(value, "ds_numel", value.numel()))


def own_rank() -> int:
    """Return this process's number among those of the run."""
    return dist.get_rank() if dist.is_initialized() else 0


def copies(
    entries: Mapping[Key, Any], parts: int | None, gather: Callable[[Tensor], Any] | None = None
) -> dict[Key, Any]:
    """Copy into the host's memory the tensors that this process writes into a checkpoint: training changes the others.

    An entry is a tensor or several by name. It is kept by one of `parts` processes, the first one without, and they
    keep about equally much; each entry is gathered by all of them together, and freed where it is not kept.
    """
    sizes, loads, kept = {}, [0] * (parts or 1), {}
    for key, entry in entries.items():
        tensors = entry.values() if isinstance(entry, dict) else [entry]
        sizes[key] = sum(size_of(each) for each in tensors if isinstance(each, Tensor))
    owners = {}
    for key in sorted(sizes, key=lambda key: -sizes[key]):  # the largest first, to the process that has least
        owners[key] = loads.index(min(loads))
        loads[owners[key]] += sizes[key]
    for key, entry in entries.items():
        found = apply_to_collection(entry, Tensor, gather) if gather else entry
        if owners[key] == own_rank():
            kept[key] = apply_to_collection(found, Tensor, on_host)
    return kept


def on_host(value: Tensor) -> Tensor:
    """Copy a tensor into the host's memory."""
    return value.detach().to("cpu", copy=True)


def whole(value: Tensor) -> Tensor:
    """Gather a tensor that FSDP2 split; all devices call it together."""
    return value.full_tensor() if isinstance(value, DTensor) else value
