"""Merge adapters into the weights that they were trained on, in float32."""

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


def merge_adapters(model: nn.Module) -> int:
    """Fold every adapter into its base layer and take it off; return how many there were."""
    wrapped = [(name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    for name, module in wrapped:
        module.merge(safe_merge=True)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module.get_base_layer())
    return len(wrapped)
