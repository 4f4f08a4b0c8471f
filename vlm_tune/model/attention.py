"""Causal attention over packed samples: each token sees the earlier tokens of its own sample, and no mask is built.

Registered with transformers under the name `packed`. A `Segments` travels as the keyword `segments` through the
language model's forward pass. Without it (generation, padded batches) plain SDPA runs. A layer with a sliding window
(Mistral, Gemma 3) looks back no further than its window, in both.
"""

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "packed"
SHORT = 192  # on a CPU, samples up to this many tokens are multiplied together in one batch (benchmarks/README.md)
WASTE = 1.25  # a batch of short samples may be padded to at most this multiple of its shortest one


@dataclass(frozen=True)
class Segments:
    """Where the samples of a packed row lie. Made once a batch, used by every layer."""

    lengths: list[int]
    short: list[Tensor]  # (n, W) positions of n samples of like length, padded with the sample's first position
    long: list[tuple[int, int]]  # (start, length)
    order: Tensor  # (L,) where each token stands in the outputs of all short and long samples, joined

    @classmethod
    def plan(cls, lengths: list[int], device: torch.device) -> "Segments":
        """Group samples of like length; W is the longest of a group."""
        starts = list(accumulate(lengths, initial=0))[:-1]
        by_length = sorted(zip(lengths, starts, strict=True))
        groups: list[list[tuple[int, int]]] = []
        for length, start in by_length:
            if length > SHORT:
                break
            if not groups or length > WASTE * groups[-1][0][0]:
                groups.append([])
            groups[-1].append((length, start))
        long = [(start, length) for length, start in by_length if length > SHORT]
        short, joined, offset = [], torch.empty(sum(lengths), dtype=torch.long), 0
        for group in groups:
            width = group[-1][0]
            index = torch.tensor([[start + (i if i < length else 0) for i in range(width)] for length, start in group])
            for length, start in group:
                joined[start : start + length] = torch.arange(offset, offset + length)
                offset += width
            short.append(index.to(device))
        for start, length in long:
            joined[start : start + length] = torch.arange(offset, offset + length)
            offset += length
        return cls(lengths, short, long, joined.to(device))


def packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attend within each segment: query (1, heads, L, d), key and value (1, kv_heads, L, d) -> (1, L, heads, d)."""
    segments: Segments | None = options.pop("segments", None)
    if segments is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    scale, window = options.get("scaling") or query.shape[-1] ** -0.5, options.get("sliding_window")
    assert query.shape[0] == 1, "a pack is one row"
    assert options.get("softcap") is None, "a language model with capped scores is refused when it is loaded"
    assert sum(segments.lengths) == query.shape[2], "segments must fill the packed row"
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        return _varlen(query, key, value, segments.lengths, scale, window), None
    # q has all heads, k and v have kv_heads
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # (L, _, d)
    outputs = [_attend_short(q, k, v, index, scale, window) for index in segments.short]
    for start, length in segments.long:
        rows = slice(start, start + length)
        part_q, part_k, part_v = (tensor[:, :, rows] for tensor in (query, key, value))
        mask = None if window is None or length <= window else _visible(length, window, query.device)
        whole = scaled_dot_product_attention(
            part_q, part_k, part_v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True
        )
        outputs.append(whole[0].transpose(0, 1))
    return torch.cat(outputs).index_select(0, segments.order).unsqueeze(0), None


def _visible(length: int, window: int | None, device: torch.device) -> Tensor:
    """Say which earlier tokens each token of a sample sees: the `window` last ones, itself among them."""
    past = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return past if window is None else past.triu(1 - window)


def _attend_short(query: Tensor, key: Tensor, value: Tensor, index: Tensor, scale: float, window: int | None) -> Tensor:
    """Attend within n samples of like length by plain products: (L, heads, d), index (n, W) -> (n*W, heads, d).

    SDPA's kernel spends more on the start of each short sample than on its products, and its 16-bit backward pass on a
    CPU is several times slower than this. Padding comes last in a sample, so causality alone hides it.
    """
    count, width = index.shape
    flat = index.flatten()
    heads, kv_heads, size = query.shape[1], key.shape[1], query.shape[2]
    q, k, v = (
        tensor.index_select(0, flat).view(count, width, -1, size).transpose(1, 2) for tensor in (query, key, value)
    )
    grouped = q.reshape(count, kv_heads, heads // kv_heads * width, size)
    scores = torch.matmul(grouped, k.transpose(2, 3)).view(count, kv_heads, -1, width, width)
    unseen = ~_visible(width, window, query.device)
    scores = (scores.float() * scale).masked_fill(unseen, float("-inf"))
    shares = scores.softmax(-1).to(v.dtype).view(count, kv_heads, -1, width)
    output = torch.matmul(shares, v).view(count, heads, width, size)
    return output.transpose(1, 2).reshape(count * width, heads, size)


def _varlen(query: Tensor, key: Tensor, value: Tensor, lengths: list[int], scale: float, window: int | None) -> Tensor:
    """Run torch's variable-length flash attention: one kernel for all segments (CUDA, 16 bit)."""
    from torch.nn.attention.varlen import varlen_attn

    groups = query.shape[1] // key.shape[1]
    offsets = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=query.device)
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    if groups > 1:  # the kernel's own grouping is not in every torch 2 release
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    longest = max(lengths)
    back = -1 if window is None else window - 1
    out = varlen_attn(q, k, v, offsets, offsets, longest, longest, scale=scale, window_size=(back, 0))
    return out.unsqueeze(0)  # type: ignore[union-attr]


def packed_mask(
    *args: Any, attention_mask: Tensor | None = None, local_size: int | None = None, **options: Any
) -> Tensor | None:
    """Build a mask for padded generation and for sliding windows; else causality is enough, and none is built."""
    if attention_mask is None and local_size is None:
        return None
    return sdpa_mask(*args, attention_mask=attention_mask, local_size=local_size, **options)


ALL_ATTENTION_FUNCTIONS.register(NAME, packed_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, packed_mask)
