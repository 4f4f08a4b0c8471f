"""The only way to load folders with transformers: their code is never run, and their faults are CheckpointErrors.

Every `from_pretrained` and `from_config` of the project is here; a test looks.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from vlm_tune.errors import CheckpointError, VlmTuneError
from vlm_tune.model.kernels import attention
from vlm_tune.model.layouts.folders import model_kind, read_json
from vlm_tune.model.layouts.weights import Shards, listed

MACHINE = (MemoryError, torch.OutOfMemoryError, torch.AcceleratorError)
FULL = (errno.ENOSPC, errno.EDQUOT)  # of a disk
OURS = (VlmTuneError, AssertionError, ImportError, *MACHINE)  # not the folder's fault


def load_pretrained(kind: Any, folder: Path, *, part: str | None = None, **options: Any) -> Any:
    """Load a model by a class of transformers, its weight files checked before: `kind.from_pretrained(folder)`.

    `part` names what is read of a folder that may hold more. Raises CheckpointError for a folder that would need code
    of its own, for files that are not those of a model, for weights that are missing (transformers would draw them at
    random) and, without `part`, for those that belong nowhere.
    """
    if "gguf_file" not in options:  # such a folder has no other file
        refuse_code(folder)
        Shards.find(folder)
    with reading(folder):
        model, found = kind.from_pretrained(folder, trust_remote_code=False, output_loading_info=True, **options)
    wrong = {how: sorted(found[f"{how}_keys"]) for how in ("missing", "unexpected")}
    if part is not None:
        refuse_missing(wrong["missing"], part, folder)
    elif any(wrong.values()):
        problems = "\n  ".join(f"{how}: {name}" for how, names in wrong.items() for name in names[:10])
        raise CheckpointError(f"{folder}: its weights are not those of its config.json\n  {problems}\n  Copy it again")
    return model


def refuse_missing(names: list[str], part: str, folder: Path) -> None:
    """Raise CheckpointError that lists the weights which a part lacks."""
    if names:
        raise CheckpointError(f"{folder}: weights of {part} are missing\n  {listed(names)}\n  Copy it again")


def read_settings(kind: Any, folder: Path, **options: Any) -> Any:
    """Read what holds no weights, a configuration or a tokenizer, by a class of transformers.

    Raises CheckpointError as `load_pretrained` does.
    """
    if kind.__name__ == "AutoConfig":
        refuse_code(folder)
    with reading(folder):
        return kind.from_pretrained(folder, trust_remote_code=False, **options)


def make_empty(kind: Any, config: Any, **options: Any) -> Any:
    """Make a model of a configuration on the meta device, with packed attention: `kind.from_config(config)`."""
    with torch.device("meta"):
        return kind.from_config(config, trust_remote_code=False, attn_implementation=attention.NAME, **options)


def empty_llm(config: Any, **options: Any) -> Any:
    """Make a causal LM as `make_empty` does; it keeps no cache while it trains."""
    llm = make_empty(AutoModelForCausalLM, config, **options)
    llm.config.use_cache = False
    return llm


def refuse_code(folder: Path) -> None:
    """Raise CheckpointError for a folder whose model transformers has no class of: its own code is never run."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = model_kind(folder)
    if kind in CONFIG_MAPPING:  # transformers' own class is taken, also where auto_map offers another
        return
    wants = "its auto_map names code" if "auto_map" in read_json(folder) else "it would need code of its own"
    raise CheckpointError(
        f"{folder}: a model of type {kind}, which transformers does not know; {wants}, and no code out of a folder is "
        "run. Convert it to a type that is known"
    )


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Turn a library's error about a folder's files into a CheckpointError that names the folder."""
    try:
        yield
    except OURS:
        raise
    except Exception as error:
        if getattr(error, "errno", None) in FULL or "No space left" in str(error):  # a full disk is no fault of it
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        reason = " ".join(str(error).split())[:400]
        raise CheckpointError(
            f"{folder}: its files cannot be read as a model's ({type(error).__name__}: {reason}). Compare config.json "
            "and the tokenizer's files with those of the original, or copy the folder anew"
        ) from error


def load_peft(model: Any, folder: Path) -> Any:
    """Load an adapter onto a model as any user would: `PeftModel.from_pretrained(model, folder)`."""
    from peft import PeftModel  # late: it takes seconds to import

    with reading(folder):
        return PeftModel.from_pretrained(model, folder).eval()
