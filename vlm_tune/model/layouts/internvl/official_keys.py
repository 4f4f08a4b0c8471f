"""Names of InternVL's original layout <-> ours: one table, read in both directions.

Sources: InternVL `tools/internvl_custom2hf.py`, `modeling_internlm2.py` (wqkv), transformers'
`convert_internvl_weights_to_hf.py`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vlm_tune.model.layouts.weights import Shape

PROJECTOR = {"layer_norm": "mlp1.0", "linear_1": "mlp1.1", "linear_2": "mlp1.3"}
VISION = {
    "embeddings.cls_token": "embeddings.class_embedding",
    "embeddings.position_embeddings": "embeddings.position_embedding",
    "embeddings.patch_embeddings.projection": "embeddings.patch_embedding",
    "encoder.layer.": "encoder.layers.",
    "lambda_": "ls",
    "attention.q_proj": "attn.qkv",
    "attention.k_proj": "attn.qkv",
    "attention.v_proj": "attn.qkv",
    "attention.projection_layer": "attn.proj",
    "attention.q_norm": "attn.q_norm",
    "attention.k_norm": "attn.k_norm",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
}
INTERNLM2 = {
    "model.embed_tokens": "model.tok_embeddings",
    "self_attn.q_proj": "attention.wqkv",
    "self_attn.k_proj": "attention.wqkv",
    "self_attn.v_proj": "attention.wqkv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "lm_head": "output",
}


@dataclass(frozen=True)
class Heads:
    """InternLM2's attention, whose fused rows stand by key head: its query heads, then the key, then the value."""

    num_kv: int
    groups: int  # query heads a key head

    @classmethod
    def of(cls, config: Any) -> "Heads":
        """Read them from the Llama configuration that describes an InternLM2."""
        return cls(config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads)


@dataclass(frozen=True)
class Entry:
    """One tensor of the original layout, and the one or three parameters of ours that it holds."""

    original: str
    ours: tuple[str, ...]
    shape: Shape  # of the original
    heads: Heads | None = None  # None: three parts stand one below the other

    def split(self, tensor: Tensor) -> list[Tensor]:
        """Take an original tensor apart: views of it, in the order of `ours`."""
        if len(self.ours) == 1:
            return [tensor]
        if self.heads is None:
            return list(tensor.chunk(3))
        rest = tensor.shape[1:]
        grouped = tensor.unflatten(0, (self.heads.num_kv, self.heads.groups + 2, -1))  # (kv, groups + 2, d, ...)
        parts = grouped.split([self.heads.groups, 1, 1], dim=1)
        return [part.reshape(-1, *rest) for part in parts]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Put an original tensor together: the inverse of `split`."""
        if len(parts) == 1:
            return parts[0]
        if self.heads is None:
            return torch.cat(list(parts))
        num_kv = self.heads.num_kv
        size = parts[1].shape[0] // num_kv
        grouped = [part.unflatten(0, (num_kv, -1, size)) for part in parts]
        return torch.cat(grouped, dim=1).flatten(0, 2)


def entries(shapes: Mapping[str, Shape], heads: Heads | None) -> list[Entry]:
    """List the tensors of the original layout of a model with these parameters; `heads` for InternLM2 alone."""
    ours: dict[str, list[str]] = {}
    for name in shapes:
        ours.setdefault(original_name(name, heads is not None), []).append(name)
    found = []
    for original, names in ours.items():
        rows, *rest = shapes[names[0]] or (1,)
        if len(names) > 1:
            rows = sum(shapes[name][0] for name in names)
        is_llm = original.startswith("language_model.")
        shape = (rows, *rest) if shapes[names[0]] else ()
        found.append(Entry(original, tuple(names), shape, heads if is_llm else None))
    return found


def part_entries(shapes: Mapping[str, Shape], ours: str, original: str, heads: Heads | None = None) -> list[Entry]:
    """List the tensors of one part in a folder of its own, whose names lack the prefixes of a whole model."""
    return [
        replace(
            entry,
            original=entry.original.removeprefix(original),
            ours=tuple(name.removeprefix(ours) for name in entry.ours),
        )
        for entry in entries({ours + name: shape for name, shape in shapes.items()}, heads)
    ]


def original_name(name: str, is_internlm2: bool) -> str:
    """Translate the name of a parameter of ours.

    >>> original_name("llm.model.layers.0.self_attn.k_proj.weight", True)
    'language_model.model.layers.0.attention.wqkv.weight'
    """
    part, _, rest = name.partition(".")
    if part == "projector":
        layer, _, leaf = rest.partition(".")
        return f"{PROJECTOR[layer]}.{leaf}"
    table = VISION if part == "vision" else INTERNLM2 if is_internlm2 else {}
    for new, old in table.items():
        rest = rest.replace(new, old)
    return f"vision_model.{rest.removeprefix('tower.')}" if part == "vision" else f"language_model.{rest}"
