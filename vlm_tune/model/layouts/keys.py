"""Tables of stored weight names <-> ours: one mechanism for reading and writing, with shapes and fused weights."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlm_tune.config.schema import Quantize
from vlm_tune.errors import CheckpointError
from vlm_tune.model.layouts.weights import Shape, Shards
from vlm_tune.model.parts.llm import guard_4bit
from vlm_tune.model.parts.quantize import quantized_weight, use_quantized_layers
from vlm_tune.model.parts.vision import cut_layers, whole_weights
from vlm_tune.model.vlm import VisionLanguageModel

HEAD = "llm.lm_head.weight"
EXPERTS = {  # a parameter of ours that holds all experts of a layer -> the stored tensors of one, one below the other
    "experts.gate_up_proj": ("gate_proj", "up_proj"),
    "experts.down_proj": ("down_proj",),
}


@dataclass(frozen=True)
class Heads:
    """InternLM2's attention, whose fused rows are grouped by key head: query heads, then the key, then the value."""

    num_kv: int
    groups: int  # query heads a key head

    @classmethod
    def of(cls, config: Any) -> "Heads":
        """Read them from the Llama configuration that describes an InternLM2."""
        return cls(config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads)


@dataclass(frozen=True)
class Names:
    """What a layout calls the weights of one part: another prefix, and other words after it.

    Weights of ours that get one name, a query, a key and a value, are stored fused: concatenated,
    or grouped by `heads`.
    """

    ours: str
    stored: str
    words: Mapping[str, str] = field(default_factory=dict)  # ours -> stored
    heads: Heads | None = None


@dataclass(frozen=True)
class Entry:
    """One stored tensor, and the one or three parameters of ours that it holds, or the part of one that it is."""

    stored: str
    ours: tuple[str, ...]
    shape: Shape  # of the stored one
    heads: Heads | None = None  # None: three parts are concatenated
    place: tuple[int, slice] | None = None  # expert and rows, in a parameter that holds all experts

    def split(self, tensor: Tensor) -> list[Tensor]:
        """Split a stored tensor: views of it, in the order of `ours`."""
        if len(self.ours) == 1:
            return [tensor]
        if self.heads is None:
            return list(tensor.chunk(3))
        rest = tensor.shape[1:]
        grouped = tensor.unflatten(0, (self.heads.num_kv, self.heads.groups + 2, -1))  # (kv, groups + 2, d, ...)
        parts = grouped.split([self.heads.groups, 1, 1], dim=1)
        return [part.reshape(-1, *rest) for part in parts]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Join parts into a stored tensor: the inverse of `split`."""
        if self.place is not None:
            return parts[0][self.place]
        if len(parts) == 1:
            return parts[0]
        if self.heads is None:
            return torch.cat(list(parts))
        num_kv = self.heads.num_kv
        size = parts[1].shape[0] // num_kv
        grouped = [part.unflatten(0, (num_kv, -1, size)) for part in parts]
        return torch.cat(grouped, dim=1).flatten(0, 2)


def stored_name(name: str, table: Sequence[Names]) -> str:
    """Translate the name of a weight of ours, by the first part whose prefix fits; "" where no part does.

    >>> stored_name("llm.model.norm.weight", [Names("llm.", "language_model.")])
    'language_model.model.norm.weight'
    """
    part = next((part for part in table if name.startswith(part.ours)), None)
    if part is None:
        return ""
    rest = name.removeprefix(part.ours)
    for word, stored in part.words.items():
        rest = rest.replace(word, stored)
    return part.stored + rest


def entries(model: nn.Module, table: Sequence[Names]) -> list[Entry]:
    """List the stored tensors that make up a model; weights that no part of the table names are stored elsewhere."""
    shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    ours: dict[str, list[str]] = {}
    for name in shapes:
        if stored := stored_name(name, table):
            ours.setdefault(stored, []).append(name)
    found = []
    for stored, names in ours.items():
        first = shapes[names[0]]
        if words := next((words for fused, words in EXPERTS.items() if stored.endswith(fused)), None):
            found += _of_experts(stored.rpartition(".")[0], names[0], first, words)
            continue
        shape = (sum(shapes[name][0] for name in names), *first[1:]) if first else ()
        heads = next(part.heads for part in table if names[0].startswith(part.ours))
        found.append(Entry(stored, tuple(names), shape, heads))
    return found


def _of_experts(path: str, name: str, shape: Shape, words: Sequence[str]) -> list[Entry]:
    """List the stored tensors (O, I) of the E experts that a parameter of ours, (E, O, I) or (E, 2 O, I), holds."""
    num_experts, all_rows, *rest = shape
    rows = all_rows // len(words)
    return [
        Entry(
            f"{path}.{expert}.{word}.weight",
            (name,),
            (rows, *rest),
            place=(expert, slice(number * rows, (number + 1) * rows)),
        )
        for expert in range(num_experts)
        for number, word in enumerate(words)
    ]


def fill(
    model: Any,
    folder: Path,
    table: Sequence[Names],
    storage: tuple[torch.dtype, Quantize],
    select_layer: int = -1,
    known: Iterable[str] = (),
) -> None:
    """Read the weights of a model that was made empty, tensor by tensor, and compute what no file holds.

    `storage` is the dtype, and how the language model is packed; weights that are not empty keep their own dtype. The
    encoder's layers after `select_layer` are cut off: their weights are known, but not read. So are those of `known`.
    Raises CheckpointError that lists every missing, unexpected and misshapen weight.
    """
    is_whole = isinstance(model, VisionLanguageModel)
    llm, head = (model.llm, stored_name(HEAD, table)) if is_whole else (model, stored_name("lm_head.weight", table))
    has_head, wanted = llm.get_output_embeddings() is not None, entries(model, table)
    is_tied = has_head and llm.config.tie_word_embeddings
    if is_whole:
        cut_layers(model.vision.tower, select_layer)
    use_quantized_layers(llm, *storage)
    shards = Shards.find(folder)
    shards.compare({entry.stored: entry.shape for entry in wanted}, [*known, *([head] if is_tied else [])])
    _read(model, shards, wanted, storage[0])
    if is_tied:
        _tie_head(llm, shards, head)
    if has_head:
        decoder = llm.get_decoder()
        decoder.rotary_emb = type(decoder.rotary_emb)(config=llm.config)  # float32 whatever the weights are
        guard_4bit(llm)
    left = [name for name, tensor in (*llm.named_parameters(), *llm.named_buffers()) if tensor.is_meta]
    assert not left, f"no values for {left}"


def _read(model: nn.Module, shards: Shards, table: list[Entry], dtype: torch.dtype) -> None:
    places = dict(model.named_parameters())
    wanted = {entry.stored: entry for entry in table if all(name in places for name in entry.ours)}
    for key, tensor in shards.read(wanted):
        entry = wanted[key]
        for name, part in zip(entry.ours, entry.split(tensor), strict=True):
            parent, _, leaf = name.rpartition(".")
            owner = model.get_submodule(parent)
            kind = dtype if places[name].is_meta else places[name].dtype
            if entry.place is not None:
                if getattr(owner, leaf).is_meta:
                    setattr(owner, leaf, nn.Parameter(torch.empty_like(places[name], dtype=kind, device="cpu")))
                getattr(owner, leaf).data[entry.place] = part
                continue
            # a copy of its own: a file that is replaced under a running process would change its weights
            weight = part.to(kind, copy=True, memory_format=torch.contiguous_format)
            setattr(owner, leaf, quantized_weight(places[name], weight))


def _tie_head(llm: Any, shards: Shards, key: str) -> None:
    """Tie the head to the embedding; some folders store it anyway, and then it must be equal."""
    embedding = llm.get_input_embeddings().weight
    llm.get_output_embeddings().weight = embedding
    for _, head in shards.read({key} & shards.shapes.keys()):
        if not torch.equal(head.to(embedding.dtype), embedding):
            raise CheckpointError(
                f"{shards.folder}: tie_word_embeddings=true in its config.json, but {key} differs from the embedding. "
                "Set it to false if the head was trained by itself"
            )


def all_weights(vlm: VisionLanguageModel, table: Sequence[Names], tied_too: bool = False) -> dict[str, Tensor]:
    """Return all weights under their stored names, with the encoder's unused layers, and a tied head if asked for."""
    parts = {
        "vision.tower.": whole_weights(vlm.vision),
        "projector.": vlm.projector.state_dict(),
        "llm.": vlm.llm.state_dict(),
    }
    weights = {prefix + name: weight for prefix, part in parts.items() for name, weight in part.items()}
    if vlm.llm.config.tie_word_embeddings and not tied_too:
        weights.pop(HEAD, None)
    return {stored_name(name, table): weight for name, weight in weights.items()}
