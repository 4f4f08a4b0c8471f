"""Causal attention over packed samples: each token sees the earlier tokens of its own sample, and no mask is built.

Registered with transformers under the name `packed`. The lengths of the samples travel as the keyword `segments`
through the language model's forward pass. Without it (generation, padded batches) plain SDPA runs.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "packed"


def packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attend within each segment: query (B, heads, L, d), key and value (B, kv_heads, L, d) -> (B, L, heads, d).

    `options["segments"]` lists the lengths of the samples that lie one after the other in the only row (B = 1).
    """
    segments: list[int] | None = options.pop("segments", None)
    if segments is None or len(segments) == 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    assert query.shape[0] == 1 and sum(segments) == query.shape[2], "segments must fill the packed row"
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        return _varlen(query, key, value, segments, options.get("scaling")), None
    pieces = [
        scaled_dot_product_attention(q, k, v, is_causal=True, scale=options.get("scaling"), enable_gqa=True)
        for q, k, v in zip(*(tensor.split(segments, dim=2) for tensor in (query, key, value)), strict=True)
    ]
    return torch.cat(pieces, dim=2).transpose(1, 2), None


def _varlen(query: Tensor, key: Tensor, value: Tensor, segments: list[int], scale: float | None) -> Tensor:
    """Run torch's variable-length flash attention: one kernel for all segments (CUDA, 16 bit)."""
    from torch.nn.attention.varlen import varlen_attn

    groups = query.shape[1] // key.shape[1]
    offsets = torch.tensor([0, *segments], device=query.device).cumsum(0, dtype=torch.int32)
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    if groups > 1:  # the kernel's own grouping is not in every torch 2 release
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    longest = max(segments)
    out = varlen_attn(q, k, v, offsets, offsets, longest, longest, scale=scale, window_size=(-1, 0))
    return out.unsqueeze(0)  # type: ignore[union-attr]


def packed_mask(*args: Any, attention_mask: Tensor | None = None, **options: Any) -> Tensor | None:
    """Build a mask only for padded generation; packing and right padding need none, causality is enough."""
    if attention_mask is None:
        return None
    return sdpa_mask(*args, attention_mask=attention_mask, **options)


ALL_ATTENTION_FUNCTIONS.register(NAME, packed_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, packed_mask)
