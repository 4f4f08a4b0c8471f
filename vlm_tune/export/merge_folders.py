"""`python -m vlm_tune merge base=DIR adapter=DIR out=DIR`: fold an adapter of peft into the folder it belongs to."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import AutoConfig

from vlm_tune.errors import ConfigError
from vlm_tune.export.export import settle
from vlm_tune.export.parity import FLOAT32_BOUND
from vlm_tune.export.plain import load_adapter, read
from vlm_tune.export.wanted import empty_folder

WEIGHTS = (".safetensors", ".bin", ".index.json", ".gguf")
NUM_TOKENS = 64  # of the random text on which both are compared


def merge(base: str, adapter: str, out: str) -> Path:
    """Merge in float32, write in the base's dtype with its tokenizer and processor, load back and compare.

    Raises ConfigError or CheckpointError for a folder that is none, a packed base, and weights that match nothing.
    """
    folder = empty_folder(out)
    base_folder, adapter_folder = find(base, "base", "config.json"), find(adapter, "adapter", "adapter_config.json")
    config = AutoConfig.from_pretrained(base_folder)
    if getattr(config, "quantization_config", None):
        raise ConfigError(
            f"base={base}: its weights are packed, and nothing is merged into those. Name the 16-bit base"
        )
    model = read(base_folder, config)
    dtype = getattr(torch, str(config.dtype).removeprefix("torch.")) if config.dtype else torch.float32
    ids = torch.randint(
        config.get_text_config().vocab_size, (1, NUM_TOKENS), generator=torch.Generator().manual_seed(0)
    )
    plain = logits(model, ids)
    wrapped = load_adapter(model, adapter_folder)
    before = logits(wrapped, ids)
    merged = wrapped.merge_and_unload(safe_merge=True)
    exact = float((logits(merged, ids) - before).abs().max())

    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    merged.to(dtype).save_pretrained(partial)
    for file in base_folder.iterdir():
        if file.is_file() and not file.name.endswith(WEIGHTS) and not (partial / file.name).exists():
            shutil.copy(file, partial / file.name)
    after = logits(read(partial, config), ids)
    report = {
        "merged_in_float32": exact,
        "as_stored": float((after - before).abs().max()),
        "dtype": str(dtype).removeprefix("torch."),
        "adapter_changes": float((before - plain).abs().max()),
    }
    (partial / "parity.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    summary = (
        f"logits differ by {exact:.1e} at most after merging in float32, by {report['as_stored']:.1e} as stored in "
        f"{report['dtype']}; the adapter itself changes them by {report['adapter_changes']:.1e}"
    )
    Console().print(summary, highlight=False)
    return settle(partial, folder, exact <= FLOAT32_BOUND * max(1.0, float(before.abs().max())), summary)


def find(path: str, key: str, file: str) -> Path:
    """Return a local folder that holds a file; raise ConfigError when there is none."""
    folder = Path(path).expanduser()
    if not (folder / file).is_file():
        raise ConfigError(f"{key}={path}: there is no {file} in it. Name a local folder: {key}=FOLDER")
    return folder


def logits(model: Any, ids: Tensor) -> Tensor:
    """Run a text of random tokens: (L, V)."""
    with torch.no_grad():
        found: Tensor = model(input_ids=ids, use_cache=False).logits[0]
    return found
