"""The loss of pairs of answers: functions of the log-probabilities of their answers alone.

A reward is beta times the logarithm of how much likelier an answer is than under the reference, summed over its tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from vlm_tune.config.schema import PreferenceConfig


def dpo(rewards: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Return DPO's loss of each pair: rewards (pairs, 2), chosen and rejected -> (pairs,).

    Source: Rafailov et al. 2023, "Direct Preference Optimization"; label smoothing as in Mitchell 2023, "A note on DPO
    with noisy preferences": the share of the pairs that are taken to be the wrong way round.
    """
    margins = rewards[:, 0] - rewards[:, 1]
    return -(1 - label_smoothing) * logsigmoid(margins) - label_smoothing * logsigmoid(-margins)


def bco(rewards: Tensor, delta: float) -> Tensor:
    """Return BCO's loss of each pair: rewards (pairs, 2) -> (pairs,). `delta` is the mean of all rewards so far.

    Source: Jung et al. 2024, "Binary Classifier Optimization for Large Language Model Alignment".
    """
    return -logsigmoid(rewards[:, 0] - delta) - logsigmoid(delta - rewards[:, 1])


@dataclass
class RunningMean:
    """The mean of the mean rewards of the steps so far, each counted alike: BCO's delta."""

    value: float = 0.0
    num_steps: int = 0

    def add(self, mean: float) -> None:
        """Add the mean reward of a step's answers."""
        self.num_steps += 1
        self.value += (mean - self.value) / self.num_steps


def judge(
    logps: Tensor, num_tokens: Tensor, reference: Tensor, config: PreferenceConfig, delta: float
) -> tuple[Tensor, Tensor]:
    """Return the loss of each pair, and its FACTS without a gradient: (pairs,), (facts, pairs).

    logps, reference   (pairs, 2) log-probabilities of the chosen and the rejected answer, summed over their tokens
    num_tokens         (pairs, 2) those tokens; the chosen answer's loss is the mean over its own
    """
    rewards = config.beta * (logps - reference)
    chosen, rejected = rewards.unbind(1)
    sigmoid, pair = dpo(rewards, config.label_smoothing), bco(rewards, delta)
    nll = -logps[:, 0] / num_tokens[:, 0]
    loss = config.sigmoid * sigmoid + config.bco * pair + config.nll * nll
    facts = (sigmoid, pair, nll, chosen > rejected, chosen - rejected, chosen, rejected, *logps.unbind(1))
    return loss, torch.stack([fact.detach().to(logps.dtype) for fact in facts])
