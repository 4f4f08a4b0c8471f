"""Read a peft folder that another tool wrote: every file that holds weights is read, or refused by name."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vlm_tune.errors import CheckpointError
from vlm_tune.model.layouts.folder_files import read_object
from vlm_tune.model.layouts.folders import ADAPTER_SETTINGS
from vlm_tune.model.layouts.pretrained import reading
from vlm_tune.model.layouts.weights import listed, read_tensors
from vlm_tune.model.parts.llm import load_tokenizer

ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
WHOLE = "non_lora_trainables.bin"  # of LLaVA's trainer: the weights that it trained in addition to the adapter
HOLDS_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".npz", ".h5", ".msgpack", ".onnx")
OF_TRAINERS = ("training_args.bin", "optimizer.", "scheduler.", "scaler.", "rng_state", "random_states", "latest")
TOKENIZER = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
PREFIX = "base_model.model."  # peft's, before each name
WHOLE_TABLES = ("weight", "base_layer.weight", "original_module.weight")  # that hold a table's rows
DELTA = "trainable_tokens_delta"  # the rows of single tokens
COPY = ".modules_to_save.weight"


@dataclass(frozen=True)
class PeftFolder:
    """The contents of a peft folder; weights have the names of modules, without peft's prefix."""

    folder: Path
    config: PeftConfig
    weights: dict[str, Tensor]  # of the adapter
    whole: dict[str, Tensor]  # that replace the base's
    tokenizer: PreTrainedTokenizerBase | None

    @property
    def tokenizer_files(self) -> list[Path]:
        """List the files of its tokenizer."""
        found = [self.folder / name for name in TOKENIZER]
        return [path for path in found if path.is_file()] if self.tokenizer is not None else []


def read_peft_folder(folder: Path) -> PeftFolder:
    """Read settings, weights and tokenizer of an adapter.

    Raises CheckpointError for weights in files of other names, for settings that the installed peft does not know,
    and for files that cannot be read.
    """
    refuse_other_weights(folder)
    file = next((folder / name for name in ADAPTERS if (folder / name).is_file()), None)
    if file is None:
        raise CheckpointError(f"adapter={folder}: there is no {' and no '.join(ADAPTERS)} in it. Copy it anew")
    weights = without_copies(without_prefix(read_tensors(file), file))
    whole = {}
    if (folder / WHOLE).is_file():
        whole = {name.removeprefix(PREFIX): weight for name, weight in read_tensors(folder / WHOLE).items()}
    has_tokenizer = any((folder / name).is_file() for name in TOKENIZER[:3])
    return PeftFolder(folder, read_config(folder), weights, whole, load_tokenizer(folder) if has_tokenizer else None)


def refuse_other_weights(folder: Path) -> None:
    """Raise CheckpointError for weight files with unknown names: they would be lost."""
    known = (*ADAPTERS, WHOLE)
    others = [
        path.name
        for path in sorted(folder.iterdir())
        if path.is_file()
        and path.name.endswith(HOLDS_WEIGHTS)
        and path.name not in known
        and not path.name.startswith(OF_TRAINERS)
    ]
    if others:
        raise CheckpointError(
            f"adapter={folder}: {', '.join(others)} beside the adapter: weights that are not read, and would be lost. "
            f"Known are {', '.join(known)}. Move them away if the merged model shall be without them"
        )


def read_config(folder: Path) -> PeftConfig:
    """Read adapter_config.json; raise CheckpointError for what the installed peft would ignore, or import."""
    path = folder / ADAPTER_SETTINGS
    settings = read_object(path)
    kind = PEFT_TYPE_TO_CONFIG_MAPPING.get(str(settings.get("peft_type")))
    if kind is None:
        raise CheckpointError(f"{path}: peft_type={settings.get('peft_type')}, which the installed peft does not know")
    known = {field.name for field in fields(kind)} | {"peft_version"}
    unknown = [f"{key}={value}" for key, value in settings.items() if key not in known and value]
    if unknown:
        raise CheckpointError(
            f"{path}: {', '.join(unknown)}: settings that the installed peft does not know, and would leave out. "
            f"Install the peft that wrote it ({settings.get('peft_version', 'its version is not noted')})"
        )
    if settings.get("megatron_config"):
        raise CheckpointError(f"{path}: megatron_config: an adapter of Megatron's layers, whose module is not imported")
    with reading(folder):
        config: PeftConfig = PeftConfig.from_peft_type(**{key: settings[key] for key in settings if key in known})
    if config.is_prompt_learning:
        raise CheckpointError(f"{path}: peft_type={settings['peft_type']} is a prompt, which no weight can take in")
    return config


def without_prefix(stored: dict[str, Tensor], file: Path) -> dict[str, Tensor]:
    """Strip peft's prefix from weight names; raise CheckpointError for names that are not peft's."""
    if wrong := sorted(name for name in stored if not name.startswith(PREFIX)):
        raise CheckpointError(f"{file}: \n  {listed(wrong)}\n  names that do not begin with {PREFIX}, as peft's do")
    return {name.removeprefix(PREFIX): weight for name, weight in stored.items()}


def without_copies(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Drop what peft wrote twice: a module to save, also under its in-memory name."""
    kept: dict[str, Tensor] = dict(weights)
    for name, weight in weights.items():
        if not name.endswith(COPY):
            continue
        plain = name.removesuffix(COPY) + ".weight"
        if plain not in weights or weights[plain].equal(weight):
            kept[plain] = kept.pop(name)
    return kept


def token_indices(config: Any) -> list[int]:
    """List the tokens for which peft trained single rows."""
    given = getattr(config, "trainable_token_indices", None) or getattr(config, "token_indices", None) or []
    groups = given.values() if isinstance(given, dict) else [given]
    return sorted({index for group in groups for index in group})


def rows_after(adapter: PeftFolder, weights: dict[str, Tensor], tables: list[str], rows: int) -> int:
    """Return how many rows the tables of a base, now with `rows`, have with an adapter: as many as the adapter's.

    `weights` are the adapter's under the base's names, `tables` the names of the token embeddings and of the head.
    Raises CheckpointError if the contents of a new row are unknown.
    """
    axes = dict.fromkeys(WHOLE_TABLES, 0) | {"lora_embedding_A": 1, "lora_B.weight": 0}
    found = {(name, leaf): weights.get(f"{name}.{leaf}") for name in tables for leaf in axes}
    counts = {each: weight.shape[axes[each[1]]] for each, weight in found.items() if weight is not None}
    indices = token_indices(adapter.config)
    num_tokens = max((0 if adapter.tokenizer is None else len(adapter.tokenizer), *(index + 1 for index in indices)))
    wanted = max(counts.values(), default=max(rows, num_tokens))
    most = max(wanted, num_tokens)
    whole = {name: max(counts.get((name, leaf), 0) for leaf in WHOLE_TABLES) for name in tables}
    if getattr(adapter.config, "ensure_weight_tying", False):
        whole = dict.fromkeys(tables, max(whole.values(), default=0))
    if set(range(rows, most)) <= set(indices):
        singly = {name for name in tables for stored in weights if stored.startswith(f"{name}.") and DELTA in stored}
        whole |= dict.fromkeys(singly, most)
    lacking = [name for name, count in whole.items() if count < most]
    if most > rows and lacking:
        raise CheckpointError(
            f"adapter={adapter.folder}: its vocabulary has {most} tokens, the base {rows} rows, and the adapter holds "
            f"no rows of {' and '.join(lacking)} for the new ones. Name the base whose tables were resized, or train "
            "with both in modules_to_save"
        )
    return wanted
