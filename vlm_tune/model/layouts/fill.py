"""Fill a model that was made on the meta device: weights from a folder, and what no folder holds."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from vlm_tune.errors import CheckpointError
from vlm_tune.model.layouts.internvl.official_keys import Entry
from vlm_tune.model.layouts.weights import Shards
from vlm_tune.model.parts.quantize import quantized_weight


def fill(model: nn.Module, shards: Shards, table: list[Entry], dtype: torch.dtype) -> None:
    """Read the weights into an empty model; those of layers that were cut off are not read."""
    places = dict(model.named_parameters())
    wanted = {entry.original: entry for entry in table if all(name in places for name in entry.ours)}
    for key, tensor in shards.read(wanted):
        entry = wanted[key]
        for name, part in zip(entry.ours, entry.split(tensor), strict=True):
            parent, _, leaf = name.rpartition(".")
            # a copy of its own: a file that is replaced under a running process would change its weights
            weight = part.to(dtype, copy=True, memory_format=torch.contiguous_format)
            setattr(model.get_submodule(parent), leaf, quantized_weight(places[name], weight))


def restore_buffers(llm: PreTrainedModel) -> None:
    """Compute the rotary frequencies, which no file holds: left on the meta device, they would come out as noise.

    They are float32 whatever the weights are.
    """
    decoder: Any = llm.get_decoder()
    decoder.rotary_emb = type(decoder.rotary_emb)(config=llm.config)
    left = [name for name, tensor in (*llm.named_parameters(), *llm.named_buffers()) if tensor.is_meta]
    assert not left, f"no values for {left}"


def tie_head(llm: PreTrainedModel, shards: Shards, key: str) -> None:
    """Let a tied head be the embedding; some folders store it all the same, and then it must be equal."""
    if not llm.config.tie_word_embeddings:
        return
    embedding = llm.get_input_embeddings().weight
    llm.get_output_embeddings().weight = embedding
    for _, head in shards.read({key} & shards.shapes.keys()):
        if not torch.equal(head.to(embedding.dtype), embedding):
            raise CheckpointError(
                f"{shards.folder}: tie_word_embeddings=true in its config.json, but {key} differs from the embedding. "
                "Set it to false if the head was trained by itself"
            )
