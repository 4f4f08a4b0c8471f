"""Open a model that answers: a finished run's, with its trained weights in place, or one that no run made."""

from dataclasses import replace
from pathlib import Path

import torch

from vlm_tune.config.schema import Config, Precision
from vlm_tune.model.build import Model, build_model, device_of
from vlm_tune.model.checkpoint import find_checkpoint, load_weights, run_config, start_of, trained_weights
from vlm_tune.model.kernels.freed import hand_back_freed_memory
from vlm_tune.model.parts.llm import dequantize
from vlm_tune.model.parts.stage import apply_stage
from vlm_tune.model.ready import config_of, is_model


def open_trained(
    ckpt: str, overrides: list[str], precision: Precision | None = None, dequantized: bool = False
) -> tuple[Model, Config]:
    """Load the model of a run folder or checkpoint, with its stage's adapters in place.

    Frozen parts that an earlier stage had trained (a pretrained projector) come from that stage's checkpoint. With
    `dequantized` the base of a quantized run is unpacked into float32, as it was in the run's own arithmetic. Such a
    model, or one of a given precision, is to be exported: it stays in main memory, which holds what a GPU may not.
    """
    checkpoint = find_checkpoint(ckpt)
    config = run_config(checkpoint, overrides)
    if precision is not None:
        config = replace(config, trainer=replace(config.trainer, precision=precision))
    model = build_model(config)
    config = model.config
    if dequantized:
        dequantize(model.vlm.llm)
        model.vlm.float()
        plain = replace(config, trainer=replace(config.trainer, precision=Precision.fp32))
        model = replace(model, config=plain)  # it answers in float32
    apply_stage(model.vlm, config)
    start = start_of(checkpoint)
    if start is not None:
        load_weights(model.vlm, trained_weights(start), start, complete=False)
    load_weights(model.vlm, trained_weights(checkpoint), Path(checkpoint), complete=True)
    is_exported = precision is not None or dequantized
    return to_be_asked(model, torch.device("cpu") if is_exported else device_of(config)), config


def open_any(ckpt: str, overrides: list[str], name: str = "") -> tuple[Model, Config]:
    """Load the model of a run folder, a checkpoint, a model's folder or a hub id; the latter as model=NAME is asked."""
    return open_untrained(config_of(ckpt, overrides, name)) if is_model(ckpt) else open_trained(ckpt, overrides)


def open_base(ckpt: str, overrides: list[str]) -> tuple[Model, Config]:
    """Load the model of a run as it was before any training: the weights that its configuration names."""
    return open_untrained(run_config(find_checkpoint(ckpt), overrides))


def open_untrained(config: Config) -> tuple[Model, Config]:
    """Load the model that a configuration names."""
    model = build_model(config)
    return to_be_asked(model, device_of(config)), model.config


def to_be_asked(model: Model, device: torch.device) -> Model:
    """Set a model up to answer on a device, and not to be trained."""
    model.vlm.requires_grad_(False)
    model.vlm.eval()
    model.vlm.to(device)
    hand_back_freed_memory()
    return model
