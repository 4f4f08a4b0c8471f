"""A part's layers during training: recomputed in the backward pass, or skipped at random.

Neither touches names or weights, and neither does anything while the model answers.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from vlm_tune.errors import ConfigError
from vlm_tune.model.parts.vision import layer_list

BRANCHES = ("attention", "attn", "self_attn", "mlp")  # what a layer adds to its input, as libraries name it


def recompute(layer: nn.Module, waits_in_main_memory: bool = False) -> None:
    """Keep only a layer's input for the backward pass (gradient checkpointing), also where the layer is frozen.

    transformers' own switch works in train mode alone; a frozen language model that a projector learns from is not.
    The input of a layer on a GPU may wait in main memory.
    """
    layer.forward = partial(_recomputed, layer.forward, waits_in_main_memory)  # type: ignore[method-assign]


def _recomputed(forward: Callable[..., Any], waits_in_main_memory: bool, *inputs: Any, **options: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*inputs, **options)
    with saved_tensors_hooks(put_away, bring_back) if waits_in_main_memory else nullcontext():
        return checkpoint(forward, *inputs, use_reentrant=False, **options)  # the random state is kept and put back


def put_away(tensor: Tensor) -> tuple[Tensor, torch.device]:
    """Copy a tensor of a GPU into main memory, for which nobody waits; one of a CPU stays."""
    if not tensor.is_cuda:
        return tensor.detach(), tensor.device
    kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return kept.copy_(tensor, non_blocking=True), tensor.device


def bring_back(kept: tuple[Tensor, torch.device]) -> Tensor:
    """Copy it back, behind what the GPU has to do before."""
    tensor, device = kept
    return tensor.to(device, non_blocking=True)


def drop_paths(tower: nn.Module, rate: float) -> None:
    """Skip each branch of layer i of n with probability rate*i/(n-1), tile by tile, while the encoder is in train mode.

    Source: Huang et al. 2016, "Deep networks with stochastic depth"; InternVL `modeling_intern_vit.py` (drop_path1, 2).
    Raises ConfigError for an encoder whose layers have no such branches.
    """
    layers = layer_list(tower, "stage.drop_path")
    for number, layer in enumerate(layers):
        branches = [getattr(layer, name) for name in BRANCHES if isinstance(getattr(layer, name, None), nn.Module)]
        if len(branches) != 2:
            raise ConfigError(f"stage.drop_path: {type(layer).__name__} has no attention and MLP to skip; set it to 0")
        for branch in branches:
            branch.register_forward_hook(partial(_drop, rate * number / max(1, len(layers) - 1)))


def _drop(rate: float, branch: nn.Module, inputs: Any, output: Any) -> Any:
    """Set a branch's output (T, P, C) to zero for some tiles, and scale up the others so that the mean is unchanged."""
    if not branch.training or rate == 0:
        return output
    values: Tensor = output[0] if isinstance(output, tuple) else output
    kept = torch.rand(len(values), 1, 1, device=values.device) >= rate  # (T, 1, 1)
    values = values * (kept.to(values.dtype) / (1 - rate))
    return (values, *output[1:]) if isinstance(output, tuple) else values
