"""An MLP in chunks of tokens: it keeps its input alone, and no tensor of (tokens, intermediate size) is ever whole.

A token's MLP does not see the other tokens. In the backward pass each chunk is computed again with the random state and
the arithmetic of its forward pass; gradients by weights are summed over chunks. Of a mixture of experts the experts run
so, and the router, which is small, runs once.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states, set_device_states

from vlm_tune.model.kernels.packs_cpu import added

TOKENS = 2048  # of a chunk, at most


def chunk_mlp(layer: nn.Module) -> bool:
    """Let a decoder layer's MLP, or its experts, run in chunks; return whether there is one by that name."""
    mlp: Any = getattr(layer, "mlp", None)
    mlp = getattr(mlp, "experts", mlp)
    if mlp is None:
        return False
    mlp.forward = partial(_forward, mlp, mlp.forward)
    return True


def _forward(mlp: nn.Module, forward: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Run an MLP on hidden states (..., D) and, of experts, what the router chose, a row a token: (..., D)."""
    weights = list(mlp.parameters())
    if any(hasattr(weight, "ds_id") for weight in weights):  # ZeRO-3 gathers weights when a layer is called, and then
        return forward(*inputs)
    trained = [weight for weight in weights if weight.requires_grad]
    rows = [inputs[0].flatten(0, -2), *inputs[1:]]  # (L, _) each
    first = Keep.apply(len(rows), *rows, *trained)  # type: ignore[no-untyped-call]
    made: Tensor = InChunks.apply(forward, first.grad_fn, len(rows), first, *rows[1:], *trained)  # type: ignore[no-untyped-call]
    return made.view_as(inputs[0])


class Keep(torch.autograd.Function):
    """Keep what an MLP reads, for `InChunks`: its first input (L, D) comes out again.

    What is kept before the MLP runs is there before it runs: a layer that is recomputed stops here, with all that its
    backward pass needs.
    """

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> Tensor:  # noqa: D102
        ctx.save_for_backward(*tensors[:count])
        ctx.others = len(tensors) - 1
        return tensors[0].view_as(tensors[0])

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:  # noqa: D102
        return None, gradients[0], *[None] * ctx.others


class InChunks(torch.autograd.Function):
    """An MLP of rows (L, D) -> (L, D), chunk by chunk in both directions. `count` of the tensors are its inputs."""

    @staticmethod
    def forward(ctx: Any, run: Callable[..., Tensor], kept: Any, count: int, *tensors: Tensor) -> Tensor:  # noqa: D102
        inputs, ctx.weights = tensors[:count], tensors[count:]
        ctx.run, ctx.kept, ctx.again = run, kept, _as_now(inputs)
        return torch.cat([run(*chunk) for chunk in _chunks(inputs)])

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:  # noqa: D102
        inputs, weights = ctx.kept.saved_tensors, ctx.weights
        asked = [each.is_floating_point() for each in inputs]
        d_inputs: list[Any] = []
        d_weights: list[Tensor | None] = [None] * len(weights)
        with ctx.again():
            for *chunk, d_made in _chunks((*inputs, gradients[0])):
                chunk = [each.detach().requires_grad_(is_asked) for each, is_asked in zip(chunk, asked, strict=True)]
                with torch.enable_grad():
                    made = ctx.run(*chunk)
                sources = [each for each in chunk if each.requires_grad]
                found = torch.autograd.grad(made, [*sources, *weights], d_made, allow_unused=True)
                del made
                d_inputs.append(found[: len(sources)])
                d_weights = [added(*pair) for pair in zip(d_weights, found[len(sources) :], strict=True)]
        whole = iter([torch.cat(parts) for parts in zip(*d_inputs, strict=True)])
        return None, None, None, *(next(whole) if is_asked else None for is_asked in asked), *d_weights


def _chunks(rows: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, ...]]:
    """Cut tensors of L rows into chunks of like length."""
    return zip(*(each.tensor_split(max(1, ceil(len(each) / TOKENS))) for each in rows), strict=True)


def _as_now(inputs: tuple[Tensor, ...]) -> Callable[[], Any]:
    """Note the random state and autocast; return a context in which both are so again."""
    device = inputs[0].device.type
    state = torch.get_rng_state()
    devices, states = get_device_states(*inputs) if torch.cuda.is_initialized() else ([], [])
    dtype, is_enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)

    @contextmanager
    def again() -> Iterator[None]:
        # a cast of a weight that is kept belongs to the graph of one chunk
        with torch.random.fork_rng(devices), torch.autocast(device, dtype, is_enabled, cache_enabled=False):
            torch.set_rng_state(state)
            set_device_states(devices, states)
            yield

    return again
