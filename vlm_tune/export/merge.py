"""Merge adapters into the weights that they were trained on, in float32, or remove them unmerged."""

from collections.abc import Iterator

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn


def merge_adapters(model: nn.Module) -> int:
    """Merge every adapter into its base layer; return how many there were."""
    count = 0
    for _, module in _unwrap(model):
        module.merge(safe_merge=True)
        count += 1
    return count


def take_adapters(model: nn.Module) -> dict[str, Tensor]:
    """Remove every adapter, leaving the base layers unchanged; return the adapters' weights by name."""
    return {
        f"{path}.{name}": weight
        for path, module in _unwrap(model)
        for name, weight in module.state_dict().items()
        if not name.startswith("base_layer.")
    }


def _unwrap(model: nn.Module) -> Iterator[tuple[str, BaseTunerLayer]]:
    """Yield every layer that has an adapter, and replace it with its base layer afterwards."""
    wrapped = [(name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    for name, module in wrapped:
        yield name, module
        parent, _, child = name.rpartition(".")
        if child != "base_layer":  # experts have a layer for each of their weights, one around the other
            setattr(model.get_submodule(parent), child, module.get_base_layer())
