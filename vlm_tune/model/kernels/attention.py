"""Causal attention over packed samples: each token sees the earlier tokens of its own sample alone.

Registered with transformers under the name `packed`. A `Segments` travels as the keyword `segments` through the
language model's forward pass. Without it (generation, padded batches) plain SDPA runs. A layer with a sliding window
(Mistral, Gemma 3) looks back no further than its window, in both.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vlm_tune.model.kernels.attention_cpu import CACHED, PackedProducts, attend_all, lay_out, seen_lengths
from vlm_tune.model.kernels.exchange import to_heads, to_tokens

NAME = "packed"
KEPT_MASK = 1 << 18  # bytes

Stretches = tuple[tuple[int, ...], tuple[int, ...]]  # lengths and parents, as in Segments


@dataclass(frozen=True)
class Segments:
    """The stretches of a packed row: whole samples, or the prefix that some samples share, then the rest of each.

    lengths  tokens of each stretch, in the order of the row
    parents  the stretch before each that holds its prefix, whose keys its tokens see first; -1 = it has none
    group    the devices that each hold an equal part of the row's tokens; None = they are all here
    """

    lengths: list[int]
    parents: list[int] | None = None  # None = no stretch has one
    group: ProcessGroup | None = None


def uses_products(tensor: Tensor) -> bool:
    """Return whether to use matrix products for attention: SDPA's 16-bit kernel on a CPU is slower."""
    return tensor.device.type == "cpu" and tensor.dtype is torch.bfloat16


def has_kernel(tensor: Tensor) -> bool:
    """Return whether torch has a kernel for packs: in 16 bit, on NVIDIA GPUs of the Ampere generation or later."""
    is_half = tensor.dtype in (torch.bfloat16, torch.float16)
    return tensor.is_cuda and is_half and torch.cuda.get_device_capability(tensor.device) >= (8, 0)


def packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attend within each segment: query (1, heads, L, d), key and value (1, kv_heads, L, d) -> (1, L, heads, d)."""
    segments: Segments | None = options.pop("segments", None)
    scale, window = options.get("scaling") or query.shape[-1] ** -0.5, options.get("sliding_window")
    if segments is None:
        is_vision = not getattr(module, "is_causal", True) and attention_mask is None
        if is_vision and uses_products(query) and not torch.is_grad_enabled():
            return attend_all(query, key, value, scale), None
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    assert query.shape[0] == 1, "a pack is one row"
    assert options.get("softcap") is None, "a language model with capped scores is refused when it is loaded"
    query, key, value = as_autocast(query, key, value)
    if segments.group is not None:
        query, key, value = to_heads(query, key, value, segments.group)
    assert sum(segments.lengths) == query.shape[2], "segments must fill the packed row"
    output = _attend_packed(query, key, value, segments, scale, window)  # (1, L, heads, d)
    return (output if segments.group is None else to_tokens(output, segments.group)), None


def _attend_packed(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float, window: int | None
) -> Tensor:
    """Choose the way of a device and a type."""
    lengths = tuple(segments.lengths)
    parents = tuple(segments.parents or [-1] * len(lengths))
    if has_kernel(query):
        return _varlen(query, key, value, (lengths, parents), scale, window)
    if uses_products(query) and (window is None or max(seen_lengths(lengths, parents)) <= window):
        # q has all heads, k and v have kv_heads
        q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # (L, _, d)
        layout = lay_out(lengths, q.shape[1], k.shape[1], parents)
        made: Tensor = PackedProducts.apply(q, k, v, layout, scale)
        return made.unsqueeze(0)
    queries, keys, values = (tensor.split(segments.lengths, dim=2) for tensor in (query, key, value))
    outputs = []
    for q, k, v, parent in zip(queries, keys, values, parents, strict=True):
        if parent >= 0:
            k, v = torch.cat([keys[parent], k], dim=2), torch.cat([values[parent], v], dim=2)
        outputs.append(_attend(q, k, v, scale, window))
    return torch.cat(outputs, dim=2).transpose(1, 2)


def as_autocast(*tensors: Tensor) -> list[Tensor]:
    """Round to autocast's type, as it does for SDPA; float32 weights leave rotated queries and keys in float32."""
    device = tensors[0].device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return [tensor.to(dtype or tensor.dtype) for tensor in tensors]


def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
    """Run SDPA on one stretch; a mask is built only where it has a prefix or its window is shorter."""
    num_queries, num_keys = query.shape[2], key.shape[2]
    mask = None
    if num_queries < num_keys or (window is not None and num_keys > window):
        mask = seen(num_queries, num_keys, window, query.device)
    return scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True
    )


def seen(num_queries: int, num_keys: int, window: int | None, device: torch.device) -> Tensor:
    """Whether the last `num_queries` of `num_keys` tokens see each of them: (num_queries, num_keys).

    Small masks are kept for the other layers; a large one is soon made, beside its attention.
    """
    make = kept_mask if num_queries * num_keys <= KEPT_MASK else kept_mask.__wrapped__
    return make(num_queries, num_keys, window, device)


@lru_cache(maxsize=64)
def kept_mask(num_queries: int, num_keys: int, window: int | None, device: torch.device) -> Tensor:
    """Make a mask of `seen`."""
    before = num_keys - num_queries
    mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril(before)
    return mask if window is None else mask.triu(before + 1 - window)


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, stretches: Stretches, scale: float, window: int | None
) -> Tensor:
    """Run torch's variable-length flash attention: one kernel for all stretches (CUDA, 16 bit).

    Keys and values of a prefix are copied in front of each stretch that sees them. The kernel is causal from the lower
    right: the last query of a stretch sees all of its keys.
    """
    from torch.nn.attention.varlen import varlen_attn

    lengths, parents = stretches
    seen = tuple(seen_lengths(lengths, parents))
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    if seen != lengths:
        rows = key_rows(lengths, parents, query.device)
        k, v = k.index_select(0, rows), v.index_select(0, rows)
    back = -1 if window is None else window - 1
    options: dict[str, Any] = {"scale": scale, "window_size": (back, 0), "enable_gqa": q.shape[1] != k.shape[1]}
    offsets = segment_offsets(lengths, query.device), segment_offsets(seen, query.device)
    out = varlen_attn(q, k, v, *offsets, max(lengths), max(seen), **options)
    return out.unsqueeze(0)  # type: ignore[union-attr]


@lru_cache(maxsize=8)
def segment_offsets(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Count the tokens before each stretch, and all, for n stretches: (n+1,) int32.

    Made once for all layers of a pack: each copy to a GPU would make it wait for the CPU.
    """
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


@lru_cache(maxsize=4)
def key_rows(lengths: tuple[int, ...], parents: tuple[int, ...], device: torch.device) -> Tensor:
    """Find the token of each key, where the keys of a prefix are copied in front of each stretch that sees them."""
    starts = list(accumulate(lengths, initial=0))
    seen = [each for number, parent in enumerate(parents) for each in (parent, number) if each >= 0]
    return torch.cat([torch.arange(starts[each], starts[each + 1]) for each in seen]).to(device)


def forget() -> None:
    """Drop what is kept of the last packs: a pass of fake tensors must not leave them to a real one."""
    for cached in (kept_mask, segment_offsets, key_rows, *CACHED):
        cached.cache_clear()


def packed_mask(
    *args: Any, attention_mask: Tensor | None = None, local_size: int | None = None, **options: Any
) -> Tensor | None:
    """Build a mask for padded generation and for sliding windows; else causality is enough, and none is built."""
    if attention_mask is None and local_size is None:
        return None
    return sdpa_mask(*args, attention_mask=attention_mask, local_size=local_size, **options)


ALL_ATTENTION_FUNCTIONS.register(NAME, packed_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, packed_mask)
