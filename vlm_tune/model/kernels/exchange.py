"""Sequence parallelism: a group of devices computes one pack, each a stretch of its tokens, and attention by heads.

Around attention each device trades its stretch of all heads for all tokens of some heads, and back. Source: Jacobs et
al. 2023, "DeepSpeed Ulysses", arXiv 2309.14509. Everything that is sent goes through `Exchange`, whose backward pass is
an exchange too: a group's devices run the same layers, and so send in the same order.
"""

from math import gcd
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from transformers import PreTrainedModel

from vlm_tune.config.schema import Config
from vlm_tune.errors import ConfigError


def check_heads(llm: PreTrainedModel, config: Config) -> None:
    """Raise ConfigError where the attention heads of a language model cannot be shared out."""
    heads, size = llm.config.get_text_config().num_attention_heads, config.trainer.sequence_parallel
    if heads % size:
        possible = [str(number) for number in range(1, heads + 1) if heads % number == 0]
        raise ConfigError(
            f"trainer.sequence_parallel={size} shares out attention heads, and this language model has {heads}: set it "
            f"to {', '.join(possible[:-1])} or {possible[-1]}"
        )


def own_group(size: int) -> ProcessGroup | None:
    """Make groups of `size` processes that follow one another, all together; return this one's, None if it is alone."""
    return dist.new_subgroups(size)[0] if size > 1 else None


class Exchange(torch.autograd.Function):
    """Cut a tensor into equal parts along one dimension, one for each device, and join what they sent along another."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, cut: int, join: int, group: ProcessGroup) -> Tensor:  # noqa: D102
        ctx.cut, ctx.join, ctx.group = cut, join, group
        return exchange(tensor, cut, join, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None, None]:  # noqa: D102
        return exchange(gradients[0], ctx.join, ctx.cut, ctx.group), None, None, None


def exchange(tensor: Tensor, cut: int, join: int, group: ProcessGroup) -> Tensor:
    """Do what `Exchange` says, outside autograd."""
    sent = torch.stack(tensor.chunk(group.size(), cut))
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    return torch.cat(received.unbind(), join)


def to_heads(query: Tensor, key: Tensor, value: Tensor, group: ProcessGroup) -> list[Tensor]:
    """Trade a stretch of tokens for a share of the heads: (1, heads, l, d) each -> (1, heads/n, n*l, d).

    Keys and values (1, kv_heads, l, d) go where the queries that ask them go. Where there are too few for that they are
    repeated: of 2 each comes twice for 4 devices.
    """
    size = group.size()
    repeats = size // gcd(size, key.shape[1])
    if repeats > 1:
        key, value = (each.repeat_interleave(repeats, dim=1) for each in (key, value))
    shares = zip(*(each.chunk(size, dim=1) for each in (query, key, value)), strict=True)
    joined = torch.cat([each for share in shares for each in share], dim=1)  # one exchange of all three
    widths = [each.shape[1] // size for each in (query, key, value)]
    swapped: Tensor = Exchange.apply(joined, 1, 2, group)  # type: ignore[no-untyped-call]
    return list(swapped.split(widths, dim=1))


def to_tokens(output: Tensor, group: ProcessGroup) -> Tensor:
    """Trade a share of the heads for a stretch of tokens: (1, n*l, heads/n, d) -> (1, l, heads, d)."""
    swapped: Tensor = Exchange.apply(output, 1, 2, group)  # type: ignore[no-untyped-call]
    return swapped


def of_all(share: Tensor, group: ProcessGroup) -> Tensor:
    """Collect the shares of all devices (t, ...), in their order: (n*t, ...). Their gradients go back as a sum."""
    gathered: Tensor = Exchange.apply(share.expand(group.size(), *share.shape), 0, 0, group)  # type: ignore[no-untyped-call]
    return gathered.flatten(0, 1)
