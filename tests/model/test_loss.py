"""The loss is the plain cross entropy of the supervised positions, whatever is spared on the way."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from vlm_tune.model import loss
from vlm_tune.model.loss import supervised_loss

N, D, V = 37, 16, 50


@pytest.fixture
def case():
    """Hidden states (N, D), a head, targets (N,) and weights (N,)."""
    generator = torch.Generator().manual_seed(3)
    head = nn.Linear(D, V, bias=False)
    nn.init.normal_(head.weight, generator=generator)
    hidden = torch.randn(N, D, generator=generator)
    targets = torch.randint(0, V, (N,), generator=generator)
    return hidden.requires_grad_(), head, targets, torch.rand(N, generator=generator)


def gradients(value, hidden, head):
    return torch.autograd.grad(value, [hidden, head.weight])


def test_it_is_the_weighted_sum_of_cross_entropies(case):
    hidden, head, targets, weights = case
    full = (cross_entropy(head(hidden), targets, reduction="none") * weights).sum()
    torch.testing.assert_close(supervised_loss(*case), full)


def test_equal_weights_give_the_mean(case):
    hidden, head, targets, _ = case
    mean = supervised_loss(hidden, head, targets, torch.full((N,), 1 / N))
    torch.testing.assert_close(mean, cross_entropy(head(hidden), targets))


@pytest.mark.parametrize("chunk", [1, 7, 36, 37])
def test_chunks_change_neither_value_nor_gradients(case, monkeypatch, chunk):
    hidden, head, _, _ = case
    whole = supervised_loss(*case)
    monkeypatch.setattr(loss, "CHUNK", chunk)
    chunked = supervised_loss(*case)
    torch.testing.assert_close(chunked, whole)
    for one, other in zip(gradients(chunked, hidden, head), gradients(whole, hidden, head), strict=True):
        torch.testing.assert_close(one, other)


def test_chunks_bound_the_logits_that_live_at_one_time(case, monkeypatch):
    hidden, head, targets, weights = case
    monkeypatch.setattr(loss, "CHUNK", 5)
    seen = []
    head.register_forward_hook(lambda module, inputs, logits: seen.append(len(logits)))
    supervised_loss(hidden, head, targets, weights).backward()
    assert max(seen) == 5
    assert len(seen) == 2 * -(-N // 5), "each chunk is computed again in the backward pass instead of being kept"


def test_a_row_of_no_weight_has_no_gradient(case):
    hidden, head, targets, weights = case
    weights[4] = 0
    assert not gradients(supervised_loss(hidden, head, targets, weights), hidden, head)[0][4].any()


def test_16_bit_states_give_a_loss_of_32_bits(case):
    hidden, head, targets, weights = case
    value = supervised_loss(hidden.bfloat16(), head.bfloat16(), targets, weights)
    assert value.dtype is torch.float32


def test_no_supervised_row_is_a_loss_of_zero(case):
    hidden, head, targets, weights = case
    assert float(supervised_loss(hidden[:0], head, targets[:0], weights[:0])) == 0
