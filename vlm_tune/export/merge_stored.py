"""Merge an adapter into a folder whose class transformers lacks, by the names of the stored weights.

InternVL's and LLaVA's own classes and InternLM2 name their modules as their files name the weights. A tree of layers
with those names is all that peft needs to merge; the code of the class is not needed.
"""

import json
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from vlm_tune.errors import CheckpointError
from vlm_tune.export.merge_plain import distance
from vlm_tune.export.peft_folder import PeftFolder, rows_after
from vlm_tune.export.plain import wrap
from vlm_tune.model.layouts.folders import LLAVA_ORIGINAL, model_kind, read_json
from vlm_tune.model.layouts.internvl.official_config import KIND
from vlm_tune.model.layouts.weights import Shards, listed, write_shards

KINDS = (KIND, "internlm2", LLAVA_ORIGINAL)
TABLES, HEADS = ("embed_tokens", "tok_embeddings"), ("lm_head", "output")
NEW = ("model.mm_projector.", "model.image_newline", "model.vision_tower.")  # what LLaVA's trainer adds to a base


def merge_stored(base: Path, adapter: PeftFolder, out: Path) -> dict[str, Any]:
    """Merge in float32, write each weight in its own dtype, read back; return how much layer outputs differ.

    Raises CheckpointError for an adapter that does not fit.
    """
    shards = Shards.find(base)
    stored = {key: tensor.clone() for key, tensor in shards.read(shards.shapes)}
    dtypes = {key: tensor.dtype for key, tensor in stored.items()}
    config = written_config(base, adapter)
    stored |= whole_weights(stored, adapter, config)
    resize(stored, adapter, config)
    tree = layers({key: tensor.float() for key, tensor in stored.items()})
    wrapped = wrap(tree, adapter.config, adapter.weights, adapter.folder)
    plain, before = outputs(wrapped, is_base=True), outputs(wrapped)
    merged: Any = wrapped.merge_and_unload(safe_merge=True)  # weights that are not finite are refused
    after = {name: run(merged.get_submodule(name)) for name in before}
    weights = {key: weight.detach() for key, weight in merged.state_dict().items()}
    if strange := sorted(weights.keys() ^ stored.keys()):
        raise CheckpointError(
            f"adapter={adapter.folder}: \n  {listed(strange)}\n  would be weights that the base has not"
        )
    first = next(iter(dtypes.values()))
    kinds = {key: dtypes.get(key, first) for key in weights}
    (out / "config.json").write_text(json.dumps(config, indent=1, ensure_ascii=False), encoding="utf-8")
    shapes = {key: tuple(weights[key].shape) for key in stored}
    write_shards(shapes, lambda key: weights[key].to(kinds[key]), out)
    back = dict(Shards.find(out).read(shapes))
    return {
        "merged_in_float32": max((distance(after[name], before[name]) for name in before), default=0.0),
        "as_stored": max(distance(weights[key].to(kinds[key]).float(), weights[key]) for key in weights),
        "loaded_back": max(distance(back[key].float(), weights[key].to(kinds[key]).float()) for key in weights),
        "dtype": str(first).removeprefix("torch."),
        "adapter_changes": max((distance(before[name], plain[name]) for name in before), default=0.0),
        "scale": max((float(each.abs().max()) for each in before.values()), default=1.0),
    }


def is_llava(adapter: PeftFolder) -> bool:
    """Return whether LLaVA's trainer made an adapter: it puts the whole model's config.json next to it."""
    return (adapter.folder / "config.json").is_file() and "mm_projector_type" in read_json(adapter.folder)


def written_config(base: Path, adapter: PeftFolder) -> dict[str, Any]:
    """Return the base's config.json, or LLaVA's own if the adapter turns a language model into a LLaVA."""
    if model_kind(base) != LLAVA_ORIGINAL and is_llava(adapter):
        return read_json(adapter.folder)
    return read_json(base)


def whole_weights(stored: dict[str, Tensor], adapter: PeftFolder, config: dict[str, Any]) -> dict[str, Tensor]:
    """Return the weights that were trained whole; raise CheckpointError for those that fit nothing."""
    may_be_new = NEW if "mm_projector_type" in config else ()
    problems = [
        f"{name}: {tuple(weight.shape)} there, {tuple(stored[name].shape) if name in stored else 'none'} in the base"
        for name, weight in adapter.whole.items()
        if (stored[name].shape != weight.shape if name in stored else not name.startswith(may_be_new))
    ]
    if problems:
        raise CheckpointError(
            f"adapter={adapter.folder}: its whole weights do not fit this base\n  {listed(problems)}\n  Name the base "
            "it was made for"
        )
    return adapter.whole


def resize(stored: dict[str, Tensor], adapter: PeftFolder, config: dict[str, Any]) -> None:
    """Resize the token embedding table and the head to the adapter's rows; their weights are filled in later."""
    names = {key.removesuffix(".weight"): key for key in stored}
    tables = [name for name in names if name.rpartition(".")[2] in (*TABLES, *HEADS)]
    table = next((name for name in tables if name.rpartition(".")[2] in TABLES), None)
    if table is None:
        return
    rows = len(stored[names[table]])
    wanted = rows_after(adapter, adapter.weights, tables, rows)
    if wanted == rows:
        return
    for name in tables:
        weight = stored[names[name]]
        grown = weight.new_zeros(wanted, *weight.shape[1:])
        grown[: min(rows, wanted)] = weight[:wanted]
        stored[names[name]] = grown
    for part in (config, config.get("llm_config") or {}):
        if "vocab_size" in part:
            part["vocab_size"] = wanted


def layers(weights: dict[str, Tensor]) -> nn.Module:
    """Build a tree of layers from weight names: linear layers, embedding tables, convolutions, and bare weights."""
    tree = nn.Module()
    groups: dict[str, dict[str, Tensor]] = {}
    for key, weight in weights.items():
        path, _, leaf = key.rpartition(".")
        groups.setdefault(path, {})[leaf] = weight
    for path in sorted(groups):
        place, parts = tree, path.split(".") if path else []
        for part in parts[:-1]:
            if part not in dict(place.named_children()):
                place.add_module(part, nn.Module())
            place = place.get_submodule(part)
        if parts and parts[-1] not in dict(place.named_children()):
            place.add_module(parts[-1], layer(parts[-1], groups[path]))
        place = tree.get_submodule(path)
        for leaf, weight in groups[path].items():
            place.register_parameter(leaf, nn.Parameter(weight, requires_grad=False))
    return tree


def layer(name: str, leaves: dict[str, Tensor]) -> nn.Module:
    """Build the layer that holds these weights."""
    weight = leaves.get("weight")
    if weight is None or leaves.keys() - {"weight", "bias"} or weight.ndim not in (2, 4):
        return nn.Module()
    with torch.device("meta"):
        if weight.ndim == 4:
            kernel = (weight.shape[2], weight.shape[3])
            return nn.Conv2d(weight.shape[1], weight.shape[0], kernel, bias="bias" in leaves)
        if name in TABLES:
            return nn.Embedding(*weight.shape)
        return nn.Linear(weight.shape[1], weight.shape[0], bias="bias" in leaves)


def outputs(wrapped: nn.Module, is_base: bool = False) -> dict[str, Tensor]:
    """Run every layer that has an adapter, or only its base layer; return outputs by name."""
    inner = wrapped.get_base_model()  # type: ignore[operator]
    worn = {name: each for name, each in inner.named_modules() if isinstance(each, BaseTunerLayer)}
    return {name: run(each.get_base_layer() if is_base else each) for name, each in worn.items()}


def run(each: Any) -> Tensor:
    """Run a layer on random numbers that depend only on its size."""
    base = each.get_base_layer() if isinstance(each, BaseTunerLayer) else each
    numbers = torch.Generator().manual_seed(0)
    if isinstance(base, nn.Embedding):
        given = torch.randint(base.num_embeddings, (1, 8), generator=numbers)
    elif isinstance(base, nn.Conv2d):
        given = torch.randn(1, base.in_channels, *base.kernel_size, generator=numbers)
    else:
        given = torch.randn(8, base.in_features, generator=numbers)
    with torch.no_grad():
        found: Tensor = each(given)
    return found
