"""The loss is the plain cross entropy of the supervised positions, whatever is spared on the way."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from vlm_tune.model.kernels import loss
from vlm_tune.model.kernels.loss import supervised_loss

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


@pytest.mark.parametrize("cache", [3 * V, 2**18])
@pytest.mark.parametrize("chunk", [5, N])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_beside_a_frozen_head_value_and_gradient_are_those_of_cross_entropy(case, monkeypatch, cache, chunk, dtype):
    hidden, head, targets, weights = case
    monkeypatch.setattr(loss, "CHUNK", chunk)
    monkeypatch.setattr(loss, "CACHE", cache)
    head.to(dtype).requires_grad_(False)
    rows = hidden.detach().to(dtype).requires_grad_()
    frozen = supervised_loss(rows, head, targets, weights)
    full = (cross_entropy(head(rows).float(), targets, reduction="none") * weights).sum()
    torch.testing.assert_close(frozen, full)
    found, wanted = (torch.autograd.grad(2 * value, rows)[0] for value in (frozen, full))
    torch.testing.assert_close(found, wanted, **({} if dtype is torch.float32 else {"atol": 0.02, "rtol": 0.02}))


def test_a_head_whose_weights_are_gathered_when_it_is_called_is_called(case):
    hidden, head, targets, weights = case
    head.requires_grad_(False)
    calls = []
    head.register_forward_hook(lambda *_: calls.append(1))
    beside = supervised_loss(hidden, head, targets, weights)
    assert not calls
    head.weight.ds_id = 0  # DeepSpeed's mark of a weight that ZeRO-3 has cut into parts
    torch.testing.assert_close(supervised_loss(hidden, head, targets, weights), beside)
    assert calls


def test_a_loss_beyond_the_range_of_exp_stays_exact():
    head = nn.Linear(2, 3, bias=False).requires_grad_(False)
    head.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]))
    hidden = torch.tensor([[300.0, 0.0]], requires_grad=True)
    value = supervised_loss(hidden, head, torch.tensor([1]), torch.ones(1))
    assert float(value) == 300.0


def test_small_weights_survive_sixteen_bit(case):
    hidden, head, targets, weights = case
    head.half().requires_grad_(False)
    rows = hidden.detach().requires_grad_()  # autocast hands over float32 hidden states of a float32 norm
    tiny = supervised_loss(rows, head, targets, weights * 1e-6)
    (found,) = torch.autograd.grad(tiny * 1e6, rows)
    (wanted,) = torch.autograd.grad(supervised_loss(rows, head, targets, weights), rows)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-3)
