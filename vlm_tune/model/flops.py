"""Estimate the floating-point operations that a step needs, and name a card's peak where its maker publishes one.

Counted is what the model asks for: a matrix product of a weight of n numbers takes 2n a token forward, as much again
for the gradient by its input and for the gradient by a trained weight; attention looks back only. Recomputed layers
and padding count nothing; of experts only those that a token takes count. Source: Chowdhery et al. 2022 (PaLM),
appendix B.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import yaml
from torch import nn

from vlm_tune.data.batch import Batch
from vlm_tune.model.kernels.last import last_layer
from vlm_tune.model.parts.experts import expert_layers, taken_share
from vlm_tune.model.parts.projector import tokens_per_tile
from vlm_tune.model.vlm import VisionLanguageModel

GPUS = Path(__file__).with_name("gpus.yaml")
FORMS = re.compile(r"nvidia|geforce|\bsxm\d*\b|\b\d+gb\b|\bhbm\w*\b|[\W_]")


@dataclass(frozen=True)
class Flops:
    """What a step costs, forward and backward, by what it holds of each."""

    token: float  # of the language model
    supervised: float  # at its head
    pair: float  # of tokens, one of which attends to the other
    tile: float  # in the vision encoder
    feature: float  # of a tile, in the projector

    def of(self, batch: Batch) -> float:
        """Count one forward and backward pass of a batch."""
        if batch.segments is None:
            rows, width = batch.input_ids.shape
            lengths = [width * batch.num_tokens / batch.input_ids.numel()] * rows  # of rows without their padding
            pairs = sum(length**2 / 2 for length in lengths)
        else:
            parents = batch.parents or [-1] * len(batch.segments)
            before = [batch.segments[parent] if parent >= 0 else 0 for parent in parents]
            pairs = sum(own**2 / 2 + own * seen for own, seen in zip(batch.segments, before, strict=True))
            pairs /= batch.cut.parts if batch.cut else 1
        total = self.token * batch.num_tokens + self.supervised * len(batch.targets) + self.pair * pairs
        for each, cost in ((batch.tiles, self.tile + self.feature), (batch.features, self.feature)):
            total += cost * len(each) if each is not None else 0
        return total


def count_flops(vlm: VisionLanguageModel) -> Flops | None:
    """Count a model as a stage trains it; None where its encoder is one of timm, or its projector a Q-Former."""
    if vlm.vision.is_timm or vlm.projector.reader is not None:
        return None
    text, sight, head = vlm.llm.config, vlm.vision.tower.config, vlm.llm.get_output_embeddings()
    width = text.num_attention_heads * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    sees, patches = is_trained(vlm.vision), vlm.vision.num_patches(vlm.tile_size)
    pixels = sum(layer.weight.numel() for layer in vlm.vision.modules() if isinstance(layer, nn.Conv2d))
    looks = 4 * vlm.vision.width * patches * sight.num_hidden_layers * (1 + 2 * sees)
    own = products(vlm.vision, sees) + 2 * pixels * (1 + sees) + looks
    projected = products(vlm.projector, sees or is_trained(vlm.projector))
    last = last_layer(vlm.llm.get_decoder())
    taken = taken_share(text)
    read = (
        products(last.mlp, True, taken) if hasattr(last, "reads_rows") and not vlm.router_loss else 0.0
    )  # by the loss alone
    return Flops(
        token=products(vlm.llm.get_decoder(), True, taken) - read,
        supervised=2 * head.weight.numel() * (2 + head.weight.requires_grad) + read,
        pair=3 * 4 * width * text.num_hidden_layers,
        tile=patches * own,
        feature=projected * tokens_per_tile(vlm.projector.config, patches),
    )


def is_trained(part: nn.Module) -> bool:
    """Return whether a stage trains anything of a part."""
    return any(weight.requires_grad for weight in part.parameters())


def products(part: nn.Module, passes_gradient: bool, taken: float = 1.0) -> float:
    """Count the matrix products of one token with the weights of a part, forward and backward.

    `taken` is the share of its experts that a token takes.
    """
    experts = expert_layers(part)
    total = 0.0
    for name, layer in part.named_modules():
        weights = []  # how many numbers, and whether they are trained
        if isinstance(layer, nn.Linear):
            weights = [(layer.in_features * layer.out_features, layer.weight.requires_grad)]
        elif name in experts:
            weights = [(weight.numel(), weight.requires_grad) for weight in layer.parameters(recurse=False)]
        share = taken if "experts" in name.split(".") else 1.0
        total += sum(2 * share * size * (1 + passes_gradient + trains) for size, trains in weights)
    return total


def peak_tflops(card: str) -> float | None:
    """Return the published rate of a card in 16 bit by the name that its driver gives; None for one not listed.

    A name has to match as a whole: an "H100 PCIe" is slower than the H100 of the list.
    """
    name = FORMS.sub("", card.lower().replace("-", " "))
    listed: dict[str, dict[str, float]] = yaml.safe_load(GPUS.read_text(encoding="utf-8"))
    return listed[name]["tflops"] if name in listed else None
