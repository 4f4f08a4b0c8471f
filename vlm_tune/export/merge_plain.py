"""Merge an adapter into a folder that a transformers class loads, as peft itself does."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from vlm_tune.errors import CheckpointError
from vlm_tune.export.peft_folder import PeftFolder, rows_after
from vlm_tune.export.plain import read, wrap
from vlm_tune.export.plain_names import KINDS, rename, today
from vlm_tune.model.layouts.folders import model_kind, read_json
from vlm_tune.model.layouts.weights import listed

GENERATION = "generation_config.json"
NUM_TOKENS = 64  # of the random text on which models are compared


def merge_plain(base: Path, adapter: PeftFolder, out: Path) -> dict[str, Any]:
    """Merge in float32, write weights and config in the base's dtype, load back; return how much the logits differ.

    Raises CheckpointError for an adapter that does not fit.
    """
    model, config, weights, whole = read(base), adapter.config, adapter.weights, adapter.whole
    if model_kind(base) in KINDS:
        config, weights = rename(config, weights)
        whole = {today(name): weight for name, weight in whole.items()}
    rows = rows_of(model, weights, adapter)
    ids = torch.randint(min(rows, num_rows(model)), (1, NUM_TOKENS), generator=torch.Generator().manual_seed(0))
    plain = logits(model, ids)
    put(model, whole, adapter.folder)
    if rows != num_rows(model):
        model.resize_token_embeddings(rows, mean_resizing=False)  # the adapter holds the contents of the new rows
    wrapped = wrap(model, config, weights, adapter.folder)
    before = logits(wrapped, ids)
    merged: Any = wrapped.merge_and_unload(safe_merge=True)  # weights that are not finite are refused
    after = logits(merged, ids)
    untie(merged)
    dtype = stored_dtype(base)
    merged.generation_config = GenerationConfig()  # some of the base's could not be saved: its file is copied as it is
    for parameter in merged.parameters():  # buffers (the rotary frequencies) stay in float32
        parameter.data = parameter.data.to(dtype)
    merged.save_pretrained(out)
    (out / GENERATION).unlink(missing_ok=True)
    rounded = logits(merged.float(), ids)
    return {
        "merged_in_float32": distance(after, before),
        "as_stored": distance(rounded, before),
        "loaded_back": distance(logits(read(out), ids), rounded),
        "dtype": str(dtype).removeprefix("torch."),
        "adapter_changes": distance(before, plain),
        "scale": float(before.abs().max()),
    }


def stored_dtype(base: Path) -> torch.dtype:
    """Return the dtype that a folder declares for its weights."""
    config = read_json(base)
    name = str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch.")
    dtype = getattr(torch, name, None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def num_rows(model: Any) -> int:
    """Count the rows of the token embedding table."""
    return int(model.get_input_embeddings().weight.shape[0])


def rows_of(model: Any, weights: dict[str, Tensor], adapter: PeftFolder) -> int:
    """Count the rows that the token embedding table has with the adapter."""
    head = model.get_output_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    tables = [names[id(each)] for each in (model.get_input_embeddings(), head) if each is not None]
    return rows_after(adapter, weights, tables, num_rows(model))


def put(model: nn.Module, whole: dict[str, Tensor], folder: Path) -> None:
    """Replace base weights with the adapter's whole ones; raise CheckpointError for those that match nothing."""
    places = model.state_dict()
    problems = [f"{name}: the base has no such weight" for name in whole if name not in places]
    problems += [
        f"{name}: {tuple(weight.shape)} there, {tuple(places[name].shape)} in the base"
        for name, weight in whole.items()
        if name in places and places[name].shape != weight.shape
    ]
    if problems:
        raise CheckpointError(
            f"adapter={folder}: its whole weights do not fit this base\n  {listed(problems)}\n  Name the base it was "
            "made for"
        )
    with torch.no_grad():
        for name, weight in whole.items():
            places[name].copy_(weight)


def untie(merged: Any) -> None:
    """Mark the head as untied in the configuration if the adapter gave it weights of its own."""
    head, configs = merged.get_output_embeddings(), (merged.config, merged.config.get_text_config())
    if head is None or not any(config.tie_word_embeddings for config in configs):
        return
    if torch.equal(head.weight, merged.get_input_embeddings().weight):
        merged.tie_weights()
        return
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    for config in configs:
        config.tie_word_embeddings = False
    merged.all_tied_weights_keys = {}


def logits(model: Any, ids: Tensor) -> Tensor:
    """Run a text of random tokens: (L, V)."""
    with torch.no_grad():
        found: Tensor = model(input_ids=ids, use_cache=False).logits[0]
    return found


def distance(one: Tensor, other: Tensor) -> float:
    """Return the largest difference over the tokens that both have."""
    both = min(one.shape[-1], other.shape[-1])
    return float((one[..., :both] - other[..., :both]).abs().max())
