"""Apply a stage to a model: each part frozen, full, or through LoRA; and the table that shows it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import inject_adapter_in_model
from torch import nn

from vlm_tune.config.schema import Config, LoraConfig, StageConfig, Strategy, Train
from vlm_tune.errors import ConfigError
from vlm_tune.model.kernels.elementwise import join_gates, join_rotations
from vlm_tune.model.kernels.kept import spare
from vlm_tune.model.kernels.last import read_rows
from vlm_tune.model.kernels.lora import spare_casts
from vlm_tune.model.kernels.norm import join_norms
from vlm_tune.model.parts.chunks import chunk_mlp
from vlm_tune.model.parts.experts import WEIGHTS, expert_layers, has_adapters, join_products
from vlm_tune.model.parts.layers import drop_paths, recompute
from vlm_tune.model.parts.vision import layer_list
from vlm_tune.model.vlm import VisionLanguageModel

PARTS = ("vision", "projector", "llm")


@dataclass(frozen=True)
class PartSummary:
    """One row of the trained-parts table."""

    name: str
    how: Train
    num_trained: int
    num_total: int
    learning_rate: float


def apply_stage(model: VisionLanguageModel, config: Config) -> list[PartSummary]:
    """Freeze everything, then unfreeze what the stage trains. Trained weights are kept in float32.

    Raises ConfigError for a LoRA target that matches no layer, for what a mixture of experts cannot do, and for a stage
    that trains nothing.
    """
    stage = config.stage
    model.requires_grad_(False)
    targets = {"vision": config.model.vision.targets, "llm": config.model.llm.targets}
    for name in PARTS:
        part, how = getattr(model, name), getattr(stage.train, name)
        if how is Train.full:
            part.requires_grad_(True)
            if name == "vision":
                part.freeze_unread()
        elif how is Train.lora:
            add_lora(part, stage.lora, targets[name], f"model.{name}.targets")
    if config.strategy.name in (Strategy.zero3, Strategy.zero3_offload) and has_adapters(model.llm):
        raise ConfigError(
            f"strategy={config.strategy.name.value} gathers the weights of experts for their own layer alone, and "
            "their adapters read them too: use strategy=fsdp, or leave gate_up_proj and down_proj out of "
            "model.llm.targets"
        )
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    join_norms(model)
    join_gates(model)
    join_rotations(model.llm)
    read_rows(model.llm.get_decoder())
    set_aids(model, stage)
    set_modes(model, stage)
    summary = [_summarize(name, getattr(model, name), stage) for name in PARTS]
    if not any(row.num_trained for row in summary):
        raise ConfigError(
            f"stage.train: stage {stage.name} trains no parameter of this model: set a part to full or lora"
        )
    return summary


def add_lora(part: nn.Module, lora: LoraConfig, targets: list[str], key: str) -> None:
    """Add peft's adapters to every linear layer, and all experts of a mixture, whose name ends in one of the targets.

    Raises ConfigError for a target that there is not, and for what peft's adapters of experts cannot do.
    """
    linear = {name.split(".")[-1] for name, module in part.named_modules() if isinstance(module, nn.Linear)}
    experts = {f"{name.split('.')[-1]}.{weight}" for name in expert_layers(part) for weight in WEIGHTS}
    if experts:  # peft takes these names, of layers without experts, for those of experts
        linear -= {"gate_proj", "up_proj", "down_proj"}
    known = linear | {name.split(".")[-1] for name in experts}
    unmatched = [target for target in targets if target not in known]
    if unmatched or not targets:
        raise ConfigError(
            f"{key}={unmatched or targets} matches no linear layer. There are: {', '.join(sorted(known))}"
        )
    chosen = sorted(name for name in experts if name.split(".")[-1] in targets)
    if chosen and (lora.dropout or lora.dora):
        raise ConfigError(
            f"{key}: {', '.join(chosen)} are weights of experts, whose adapters have no dropout and no DoRA, but "
            f"stage.lora.dropout={lora.dropout}, stage.lora.dora={str(lora.dora).lower()}: set "
            f"stage.lora.dropout=0 stage.lora.dora=false, or leave them out of {key}"
        )
    modules = [target for target in targets if target in linear]
    adapter = peft_config(lora, target_modules=modules, target_parameters=chosen or None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # an adapter's initial weights belong to the stage: equal on every rank and after a resume
        inject_adapter_in_model(adapter, part)
    spare_casts(part)
    join_products(part)


def peft_config(lora: LoraConfig, **more: Any) -> PeftLoraConfig:
    """Return a stage's LoRA settings as a peft config."""
    return PeftLoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        **more,
    )


def set_aids(model: VisionLanguageModel, stage: StageConfig) -> None:
    """Set what acts only in training: noise, skipped layers, and activations that are recomputed, not kept.

    A frozen encoder is outside autograd: there is nothing to recompute.
    """
    model.neftune = stage.neftune
    model.router_loss = stage.router_loss
    if stage.router_loss and not expert_layers(model.llm):
        raise ConfigError(
            f"stage.router_loss={stage.router_loss} is about a mixture of experts, and the language model is a "
            f"{model.llm.config.model_type}, which has none: set it to 0"
        )
    if stage.drop_path:
        drop_paths(model.vision.tower, stage.drop_path)
    aids = stage.gradient_checkpointing
    layers: list[nn.Module] = [model.projector] if aids.projector else []
    if aids.vision and stage.train.vision is not Train.frozen:
        layers += layer_list(model.vision.tower, "stage.gradient_checkpointing.vision")
    for layer in layers:
        recompute(layer)
    keep_less(model.llm.get_decoder(), aids.llm)


def keep_less(decoder: nn.Module, way: bool | str) -> None:
    """Let the language model's layers keep less for the backward pass, in a way of `stage.gradient_checkpointing.llm`.

    Raises ConfigError where `mlp` is asked for and a layer has none of this name.
    """
    layers: Any = decoder.layers if way else getattr(decoder, "layers", ())  # an old kind of decoder keeps more
    for layer in layers:
        if way and not chunk_mlp(layer) and way == "mlp":
            kind = type(layer).__name__
            raise ConfigError(f"stage.gradient_checkpointing.llm=mlp: {kind} has no `mlp`; set it to true")
        if way in (False, "mlp"):
            spare(layer, always=way == "mlp")
        else:
            recompute(layer, way == "offload")


def set_modes(model: VisionLanguageModel, stage: StageConfig) -> None:
    """Switch trained parts to train mode (dropout on) and frozen parts to eval mode; Lightning does neither."""
    model.train()
    for name in PARTS:
        getattr(model, name).train(getattr(stage.train, name) is not Train.frozen)


def trained_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters that the stage trains."""
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def _summarize(name: str, part: nn.Module, stage: StageConfig) -> PartSummary:
    total = sum(parameter.numel() for parameter in part.parameters())
    trained = sum(parameter.numel() for parameter in part.parameters() if parameter.requires_grad)
    how = getattr(stage.train, name)
    return PartSummary(name, how, trained, total, getattr(stage.lr, name) if trained else 0.0)
