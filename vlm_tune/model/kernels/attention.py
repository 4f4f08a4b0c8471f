"""Causal attention over packed samples: each token sees the earlier tokens of its own sample, and no mask is built.

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
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vlm_tune.model.kernels.attention_cpu import PackedProducts, attend_all, lay_out

NAME = "packed"


@dataclass(frozen=True)
class Segments:
    """The lengths of the samples of a packed row."""

    lengths: list[int]


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
    assert sum(segments.lengths) == query.shape[2], "segments must fill the packed row"
    query, key, value = as_autocast(query, key, value)
    if has_kernel(query):
        return _varlen(query, key, value, segments.lengths, scale, window), None
    if uses_products(query) and (window is None or max(segments.lengths) <= window):
        # q has all heads, k and v have kv_heads
        q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # (L, _, d)
        layout = lay_out(tuple(segments.lengths), q.shape[1], k.shape[1])
        made: Tensor = PackedProducts.apply(q, k, v, layout, scale)
        return made.unsqueeze(0), None
    parts = [tensor.split(segments.lengths, dim=2) for tensor in (query, key, value)]
    outputs = [_attend(q, k, v, scale, window) for q, k, v in zip(*parts, strict=True)]
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def as_autocast(*tensors: Tensor) -> list[Tensor]:
    """Round to autocast's type, as it does for SDPA; float32 weights leave rotated queries and keys in float32."""
    device = tensors[0].device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return [tensor.to(dtype or tensor.dtype) for tensor in tensors]


def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
    """Run SDPA on one sample; a mask is built only where its window is shorter than the sample."""
    length = query.shape[2]
    mask = None
    if window is not None and length > window:
        mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril().triu(1 - window)
    return scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True
    )


def _varlen(query: Tensor, key: Tensor, value: Tensor, lengths: list[int], scale: float, window: int | None) -> Tensor:
    """Run torch's variable-length flash attention: one kernel for all segments (CUDA, 16 bit)."""
    from torch.nn.attention.varlen import varlen_attn

    offsets = segment_offsets(tuple(lengths), query.device)
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    longest = max(lengths)
    back = -1 if window is None else window - 1
    options: dict[str, Any] = {"scale": scale, "window_size": (back, 0), "enable_gqa": q.shape[1] != k.shape[1]}
    out = varlen_attn(q, k, v, offsets, offsets, longest, longest, **options)
    return out.unsqueeze(0)  # type: ignore[union-attr]


@lru_cache(maxsize=4)
def segment_offsets(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Count the tokens before each segment, and all, for n segments: (n+1,) int32.

    Made once for all layers of a pack: each copy to a GPU would make it wait for the CPU.
    """
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


def packed_mask(
    *args: Any, attention_mask: Tensor | None = None, local_size: int | None = None, **options: Any
) -> Tensor | None:
    """Build a mask for padded generation and for sliding windows; else causality is enough, and none is built."""
    if attention_mask is None and local_size is None:
        return None
    return sdpa_mask(*args, attention_mask=attention_mask, local_size=local_size, **options)


ALL_ATTENTION_FUNCTIONS.register(NAME, packed_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, packed_mask)
