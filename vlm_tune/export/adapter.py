"""Export what a stage trained as a peft folder: the adapters and the projector, for plain transformers models."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from vlm_tune.config.schema import Config, Train
from vlm_tune.console import tell
from vlm_tune.errors import ConfigError
from vlm_tune.export.merge import take_adapters
from vlm_tune.export.merge_plain import GENERATION
from vlm_tune.export.plain import read
from vlm_tune.model.build import Model
from vlm_tune.model.checkpoint import find_checkpoint, run_config, start_of
from vlm_tune.model.kernels.lora import ADAPTER
from vlm_tune.model.layouts.folder_files import read_object
from vlm_tune.model.layouts.folders import find_folder, model_kind
from vlm_tune.model.layouts.internvl import hf as internvl_hf
from vlm_tune.model.layouts.internvl.processor import save_processor
from vlm_tune.model.layouts.keys import Names, all_weights, stored_name
from vlm_tune.model.layouts.llava import hf as llava_hf
from vlm_tune.model.layouts.llava.processor import save_llava_processor
from vlm_tune.model.layouts.parts import PROJECTOR
from vlm_tune.model.layouts.pretrained import load_peft
from vlm_tune.model.parts.experts import WEIGHTS, expert_layers
from vlm_tune.model.parts.stage import PARTS, peft_config
from vlm_tune.model.vlm import VisionLanguageModel

BASE = "base"  # the folder next to the adapter, if its base exists nowhere else
NATIVE = {"hf": ("internvl",), "llava_hf": ("llava", "llava_next")}  # types of folders that the plain classes load
PLAIN_PROJECTOR = "model.multi_modal_projector."


@dataclass(frozen=True)
class Goal:
    """What is written, and where."""

    kind: str  # the layout of the plain model: hf, llava_hf, or parts: the language model alone
    partial: Path  # the folder while it is written
    folder: Path  # its final name
    dtype: torch.dtype
    shard: str
    layout: str = "adapter"  # or adapter_and_base: only LoRA, over a base that holds the rest

    @property
    def is_native(self) -> bool:
        """Whether transformers has a class of the whole model."""
        return self.kind in NATIVE


@dataclass(frozen=True)
class Base:
    """The base weights of an adapter."""

    name: str  # as in adapter_config.json: a folder, or a hub id
    folder: Path


def require_adapters(layout: str, ckpt: str, overrides: list[str]) -> None:
    """Raise ConfigError for a stage that trains more than adapters and projector."""
    stage = run_config(find_checkpoint(ckpt), overrides).stage
    how = {part: getattr(stage.train, part) for part in PARTS}
    told = ", ".join(f"{part}={each.value}" for part, each in how.items())
    full = [part for part, each in how.items() if each is Train.full and part != "projector"]
    if full:
        raise ConfigError(
            f"layout={layout}: stage {stage.name} trains every weight of {' and '.join(full)} ({told}), which is no "
            "adapter. Use layout=auto, which writes the whole model"
        )
    if Train.lora not in how.values():
        raise ConfigError(
            f"layout={layout}: stage {stage.name} trains no adapter ({told}). Use layout=auto, which writes the whole "
            "model"
        )


def require_language_model(layout: str, ckpt: str, overrides: list[str]) -> None:
    """Raise ConfigError for a trained encoder of a model without a class: a peft folder has no place for it."""
    checkpoint: Path | None = find_checkpoint(ckpt)
    while checkpoint is not None:
        stage = run_config(checkpoint, overrides).stage
        if stage.train.vision is not Train.frozen:
            raise ConfigError(
                f"layout={layout}: transformers has no class of this model's parts together, so the folder is the "
                f"language model's alone, but stage {stage.name} trains vision={stage.train.vision.value}. Use "
                "layout=parts"
            )
        checkpoint, overrides = start_of(checkpoint), []


def write_adapter(model: Model, config: Config, goal: Goal, console: Console) -> tuple[Any, str]:
    """Write the folder and load it back by plain transformers and peft; return the plain model and its base's name.

    The model's adapters are removed.
    """
    vlm, stage = model.vlm, config.stage
    names = plain_names(vlm, goal)
    adapters = {stored_name(name, names): weight for name, weight in take_adapters(vlm).items()}
    base = find_base(config, goal) if goal.layout == "adapter" else None
    differing = None if base is None else differences(read_base(base), plain_weights(vlm, goal))
    carries = goal.is_native and goal.layout == "adapter" and (stage.train.projector is Train.full or bool(differing))
    if differing is not None:
        differing = {name for name in differing if not (goal.is_native and name.startswith(PLAIN_PROJECTOR))}
    for parameter in vlm.parameters():  # buffers (the rotary frequencies) stay in float32
        parameter.data = parameter.data.to(goal.dtype)
    notes: list[str] = []
    if base is None or differing:
        base, notes = write_base(model, config, goal)
    if not goal.is_native:
        projector = {name: weight.contiguous() for name, weight in vlm.projector.state_dict().items()}
        save_file(projector, goal.partial / PROJECTOR)
    save_adapter(read_base(base), config, adapters | projector_weights(vlm, carries), (goal, base))
    notes += save_side_files(model, config, goal)
    vlm.float()
    tell(console, [*notes, *limits(model, goal, base)])
    plain = load_peft(read_base(base), goal.partial)
    # another's base may end its answers differently: the folder stores how (`limits` explains it)
    plain.get_base_model().generation_config = GenerationConfig.from_dict(read_object(goal.partial / GENERATION))
    return plain, base.name


def read_base(base: Base) -> PreTrainedModel:
    """Load the plain model of a base."""
    return read(base.folder)


def find_base(config: Config, goal: Goal) -> Base | None:
    """Find the folder that training started from, if plain transformers can load it, else None."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    model = config.model
    path, key = (model.path, "model.path") if goal.is_native else (model.llm.path, "model.llm.path")
    if not goal.is_native and model.path is not None and model_kind(find_folder(model.path, "model.path")) == "parts":
        path = str(find_folder(model.path, "model.path") / "llm")
    if path is None:
        return None
    folder = find_folder(path, key)
    known: Any = NATIVE[goal.kind] if goal.is_native else MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if model_kind(folder) not in known:
        return None
    is_here = path.startswith("recipe:") or Path(path).expanduser().is_dir()
    return Base(str(folder.resolve()) if is_here else path, folder)


def plain_names(vlm: VisionLanguageModel, goal: Goal) -> list[Names]:
    """Return how the plain model in memory names the weights; a language model alone has no other parts."""
    if not goal.is_native:
        return [Names("llm.", "")]
    decoder, head = vlm.llm.get_decoder(), vlm.llm.get_output_embeddings()
    paths = {module: f"llm.{path}." for path, module in vlm.llm.named_modules()}
    return [
        Names("vision.tower.", "model.vision_tower."),
        Names("projector.newline", "model.image_newline"),
        Names("projector.", PLAIN_PROJECTOR),
        Names(paths[decoder], "model.language_model."),
        Names(paths[head], "lm_head."),
    ]


def plain_weights(vlm: VisionLanguageModel, goal: Goal) -> dict[str, Tensor]:
    """Return the weights under the plain model's names."""
    return all_weights(vlm, plain_names(vlm, goal), tied_too=True) if goal.is_native else dict(vlm.llm.state_dict())


def differences(plain: PreTrainedModel, weights: dict[str, Tensor]) -> set[str]:
    """Return the names of weights that a base lacks, or holds with other values."""
    stored = plain.state_dict()
    equal = {name for name in stored.keys() & weights.keys() if torch.equal(stored[name], weights[name].cpu())}
    return (stored.keys() | weights.keys()) - equal


def projector_weights(vlm: VisionLanguageModel, carries: bool) -> dict[str, Tensor]:
    """Return the projector's weights as peft's modules_to_save; a newline is in no module, so the base has it."""
    names = {name: weight for name, weight in vlm.projector.state_dict().items() if name != "newline"}
    saved = f"{PLAIN_PROJECTOR}modules_to_save.{ADAPTER}."
    return {saved + name: weight for name, weight in names.items()} if carries else {}


def write_native(model: Model, config: Config, kind: str, folder: Path, shard: str) -> list[str]:
    """Write a whole model, weights and processor, as the class of transformers that NATIVE names; return notes."""
    if kind == "hf":
        internvl_hf.save(model.vlm, folder, shard)
        save_processor(model.tokenizer, model.encoder, config.model, folder)
        return []
    llava_hf.save(model.vlm, config.model.tiles, folder, shard)
    return save_llava_processor(model.tokenizer, model.encoder, config.model, folder)


def write_base(model: Model, config: Config, goal: Goal) -> tuple[Base, list[str]]:
    """Write the base without adapters next to the adapter, as it exists nowhere else. Return it, and notes."""
    folder, notes = goal.partial / BASE, []
    if goal.is_native:
        notes = write_native(model, config, goal.kind, folder, goal.shard)
    else:
        model.vlm.llm.save_pretrained(folder, max_shard_size=goal.shard)
        model.tokenizer.save_pretrained(folder)
    return Base(str((goal.folder / BASE).resolve()), folder), notes


def save_side_files(model: Model, config: Config, goal: Goal) -> list[str]:
    """Write the tokenizer, the generation settings and a processor, if any, next to the adapter; return its notes."""
    notes: list[str] = []
    model.vlm.llm.generation_config.save_pretrained(goal.partial)
    if goal.kind == "hf":
        save_processor(model.tokenizer, model.encoder, config.model, goal.partial)
    elif goal.kind == "llava_hf":
        description = goal.partial / "config.json"  # the processor is built from it; a peft folder has none
        description.write_text(json.dumps(llava_hf.native_config(model.vlm, config.model.tiles).to_dict()))
        notes = save_llava_processor(model.tokenizer, model.encoder, config.model, goal.partial)
        description.unlink()
    else:
        model.tokenizer.save_pretrained(goal.partial)
    return notes


def save_adapter(plain: Any, config: Config, weights: dict[str, Tensor], place: tuple[Goal, Base]) -> None:
    """Let peft itself build the plain model's adapter and write it, with the trained weights filled in."""
    goal, base = place
    layers = sorted({name.partition(".lora_")[0] for name in weights if not name.startswith(PLAIN_PROJECTOR)})
    experts = {name for name in expert_layers(plain) if name in layers}
    weights_of = [weight for weight in WEIGHTS if weight in config.model.llm.targets]
    carries = any(name.startswith(PLAIN_PROJECTOR) for name in weights)
    settings = peft_config(
        config.stage.lora,
        target_modules=[name for name in layers if name.partition(".base_layer")[0] not in experts],
        target_parameters=[f"{name}.{weight}" for name in sorted(experts) for weight in weights_of] or None,
        modules_to_save=["multi_modal_projector"] if carries else None,
        task_type=None if goal.is_native else "CAUSAL_LM",
    )
    wrapped = get_peft_model(plain, settings)
    found = wrapped.get_base_model().load_state_dict(weights, strict=False)
    assert not found.unexpected_keys, f"the plain model has no {found.unexpected_keys[:3]}"
    for weight in wrapped.parameters():
        weight.data = weight.data.to(goal.dtype)
    wrapped.peft_config[ADAPTER].base_model_name_or_path = base.name
    wrapped.save_pretrained(goal.partial, save_embedding_layers=False)
    (goal.partial / "README.md").unlink(missing_ok=True)  # peft's empty model card template


def limits(model: Model, goal: Goal, base: Base) -> Iterator[str]:
    """Describe which base the adapter needs, and what the folder cannot do."""
    theirs, ours = base.folder / GENERATION, model.vlm.llm.generation_config
    settings = read_object(theirs) if theirs.is_file() else {}
    if settings.get("eos_token_id") != ours.eos_token_id or settings.get("do_sample"):
        yield (
            f"answers end at the tokens {ours.eos_token_id}, greedily; the base's {GENERATION} says otherwise: "
            "generate(..., generation_config=GenerationConfig.from_pretrained(FOLDER)) takes those of the adapter"
        )
    if goal.layout != "adapter":
        yield f"the trained projector is in the base, {goal.folder / BASE}, and LoRA alone in the adapter"
    elif base.folder == goal.partial / BASE:
        yield (
            f"no folder holds the base of this adapter as plain transformers loads it (parts that were joined, tokens "
            f"or weights that earlier stages added): it is written to {goal.folder / BASE}"
        )
    if not goal.is_native:
        yield (
            f"transformers has no class of these parts together: the adapter is the language model's alone, and the "
            f"trained projector is in {PROJECTOR}"
        )
