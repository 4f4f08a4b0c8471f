"""Compare an exported model with the trained one: logits and greedy answers on real questions."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlm_tune.model.build import Model
from vlm_tune.model.generate import Prompt, answer_ids, answering, embed_prompts
from vlm_tune.model.parts.experts import expert_layers

FLOAT32_BOUND = 2e-5  # largest difference of a logit, float32 export, as a share of the largest logit ...
LEAST_SCALE = 5.0  # ... or of this, where all logits are smaller
MEAN_BOUND = 0.05  # mean difference, 16-bit export
AGREEMENT_BOUND = 0.99  # share of equal greedy tokens, 16-bit export
NEW_TOKENS = 64


@contextmanager
def precisely(network: nn.Module) -> Iterator[None]:
    """Compute in float64 where all weights are float32, and restore the same bits afterwards."""
    is_plain = {weight.dtype for weight in network.parameters()} == {torch.float32}
    ways: Any = {id(layer.config): layer.config for layer in expert_layers(network).values()} if is_plain else {}
    usual = {key: config._experts_implementation for key, config in ways.items()}
    if is_plain:
        network.double()
    for config in ways.values():
        config._experts_implementation = "eager"  # torch's grouped products know no float64
    try:
        yield
    finally:
        for key, config in ways.items():
            config._experts_implementation = usual[key]
        if is_plain:
            network.float()


@dataclass(frozen=True)
class Parity:
    """One model's output on the sample prompts."""

    logits: list[Tensor]  # (L, V) for each prompt
    answers: list[list[int]]  # token ids

    @classmethod
    def measure(cls, model: Model, prompts: list[Prompt]) -> "Parity":
        """Run each prompt on its own: logits at every position, and the greedy answer.

        Logits of a float32 model are computed in float64: its own rounding would dominate the difference.
        """
        logits = []
        with precisely(model.vlm):
            for prompt in prompts:
                with answering(model):
                    embeddings, mask = embed_prompts(model, [prompt])
                    output = model.vlm.llm(inputs_embeds=embeddings, attention_mask=mask, use_cache=False)
                logits.append(output.logits[0].float().cpu())  # (L, V)
        answers = [answer_ids(model, [prompt], NEW_TOKENS)[0].tolist() for prompt in prompts]
        return cls(logits, answers)


@dataclass(frozen=True)
class ParityReport:
    """How far apart two models are."""

    num_prompts: int
    max_difference: float
    mean_difference: float
    greedy_agreement: float
    passed: bool

    @property
    def summary(self) -> str:
        """Summarise the report in one line."""
        if not self.num_prompts:
            return "not compared: there is no test file with questions (data.test=FILE)"
        return (
            f"logits differ by {self.max_difference:.1e} at most, {self.mean_difference:.1e} on average; "
            f"{self.greedy_agreement:.0%} of the greedy tokens agree on {self.num_prompts} questions"
        )


def compare(trained: Parity, exported: Parity, dtype: str) -> ParityReport:
    """Compare logits position by position and answers token by token, and judge by the dtype's bound."""
    differences = [(a - b).abs() for a, b in zip(trained.logits, exported.logits, strict=True)]
    largest = max((float(difference.max()) for difference in differences), default=0.0)
    mean = float(torch.stack([difference.mean() for difference in differences]).mean()) if differences else 0.0
    pairs = list(zip(trained.answers, exported.answers, strict=True))
    agreed = sum(map(agreement, *zip(*pairs, strict=True))) / len(pairs) if pairs else 1.0
    # weights are merged in float32, whose steps grow with the numbers
    scale = max([LEAST_SCALE, *(float(logits.abs().max()) for logits in trained.logits)])
    # 8 bits were requested and move logits more than 16 do: their answers must stay the same
    is_close = largest <= FLOAT32_BOUND * scale if dtype == "fp32" else mean <= MEAN_BOUND or dtype == "q8_0"
    passed = is_close and (dtype == "fp32" or agreed >= AGREEMENT_BOUND)
    return ParityReport(len(differences), largest, mean, agreed, passed)


def agreement(first: list[int], second: list[int]) -> float:
    """Share of equal tokens before the first that differs."""
    unequal = (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    equal = next(unequal, min(len(first), len(second)))
    return equal / max(len(first), len(second), 1) if first or second else 1.0
