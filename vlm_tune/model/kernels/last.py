"""The last layer's MLP runs where the loss reads alone: no later layer reads the rest."""

from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from vlm_tune.model.kernels.norm import has_code_of


def read_rows(decoder: nn.Module) -> None:
    """Let a decoder with Llama's code take `reading`, the flat places (N,) of which it returns (1, N, D)."""
    last = last_layer(decoder)
    if last is not None and has_code_of(last, LlamaDecoderLayer):
        last.reads_rows = True
        last.forward = partial(_forward, last)


def last_layer(decoder: nn.Module) -> Any:
    """Return a decoder's last layer; None for an old kind that has no list of them."""
    layers: Any = getattr(decoder, "layers", None)
    return layers[-1] if layers else None


def _forward(layer: Any, hidden_states: Tensor, reading: Tensor | None = None, **options: Any) -> Any:
    if reading is None:
        return type(layer).forward(layer, hidden_states, **options)
    attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **options)
    read = (hidden_states + attended).flatten(0, 1)[reading].unsqueeze(0)  # (1, N, D)
    return read + layer.mlp(layer.post_attention_layernorm(read))
