"""What a layer keeps for the backward pass: a tensor that is cheap to make again is not kept.

autograd keeps the input of every product whose weights are trained. Most of these follow from what is kept anyway: a
normalised input from the norm's own input, the input of an MLP's last product from gate and up. `made_again` says how,
and in a spared layer whatever asks for such a tensor to be kept (LoRA of any kind, a trained or a quantized layer)
has it made again in the backward pass. No product and no attention is computed twice.
"""

from collections.abc import Callable
from contextvars import ContextVar
from functools import partial
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

FEW = 2304  # tokens of a call on a CPU that keep all, as a part of a pack: to make it again takes a twentieth of a step

Saved = tuple[Tensor, int]  # a tensor, and how often it had been written when it was kept


class Again:
    """A tensor, and how to make it again: once for all who kept it, and gone after the last of them."""

    def __init__(self, made: Tensor, make: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> None:
        self.made, self.version = ref(made), made._version
        self.make, self.inputs = make, [_save(each) for each in inputs]
        self.readers = 0
        self.values: Tensor | None = None

    def holds(self, tensor: Tensor) -> bool:
        """Return whether a tensor is this one, or a view of it."""
        made = self.made()
        if made is None or made.dtype is not tensor.dtype or tensor._version != self.version:
            return False
        return made.untyped_storage()._cdata == tensor.untyped_storage()._cdata

    def read(self) -> Tensor:
        """Make it, or take what an earlier reader made."""
        values = self.values
        if values is None:
            with torch.no_grad():
                values = self.make(*(_load(each) for each in self.inputs))
        self.readers -= 1
        self.values = values if self.readers > 0 else None
        return values


_known: ContextVar[list[Again] | None] = ContextVar("known", default=None)  # of the layer that runs


def spare(layer: nn.Module, always: bool = False) -> None:
    """Let a layer keep nothing that `made_again` named, of FEW tokens too if `always`. Not for a recomputed layer."""
    layer.forward = partial(_spared, layer, layer.forward, always)  # type: ignore[method-assign]


def made_again(made: Tensor, make: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Return a tensor of a spared layer, to be made again by `make(*inputs)`: these are kept in its place.

    `made` must be the beginning of its own memory, contiguous, as what `make` returns.
    """
    known = _known.get()
    if known is not None and torch.is_grad_enabled():
        known.append(Again(made, make, inputs))
    return made


def _spared(layer: nn.Module, forward: Callable[..., Any], always: bool, *inputs: Any, **options: Any) -> Any:
    hidden: Tensor = inputs[0] if inputs else options["hidden_states"]  # (B, L, D)
    is_short = not always and hidden.device.type == "cpu" and hidden.shape[:-1].numel() <= FEW
    # ZeRO-3 (ds_id) empties a layer's weights after its call: nothing can be made again from them
    if is_short or not torch.is_grad_enabled() or any(hasattr(weight, "ds_id") for weight in layer.parameters()):
        return forward(*inputs, **options)
    token = _known.set([])
    try:
        with saved_tensors_hooks(_pack, _unpack):
            return forward(*inputs, **options)
    finally:
        _known.reset(token)


def _pack(tensor: Tensor) -> Any:
    again = next((each for each in _known.get() or () if each.holds(tensor)), None)
    if again is None:
        return _save(tensor)
    again.readers += 1
    return again, (tensor.shape, tensor.stride(), tensor.storage_offset())


def _unpack(packed: Any) -> Tensor:
    first, second = packed
    return first.read().as_strided(*second) if isinstance(first, Again) else _load(packed)


def _save(tensor: Tensor) -> Saved:
    return (tensor if tensor.grad_fn is None else tensor.detach()), tensor._version


def _load(saved: Saved) -> Tensor:
    tensor, version = saved
    assert tensor._version == version, "a tensor that the backward pass needs was written into"
    return tensor
