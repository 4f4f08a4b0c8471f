"""The norm as one function equals transformers' own."""

import pytest
import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated

from vlm_tune.model.kernels.norm import join_norms


def make_norm(kind=Qwen2RMSNorm, dtype=torch.bfloat16):
    norm = kind(48, eps=1e-5).to(dtype).requires_grad_(False)
    norm.weight.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(0))
    return norm


def outcome(norm, dtype):
    inputs = torch.randn(2, 7, 48, generator=torch.Generator().manual_seed(1)).mul(3).to(dtype).requires_grad_()
    output = norm(inputs)
    output.backward(torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).to(dtype))
    return output, inputs.grad


@pytest.mark.parametrize("kind", [Qwen2RMSNorm, LlamaRMSNorm])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_outputs_and_gradients_equal_those_of_transformers(kind, dtype):
    joined, plain = make_norm(kind, dtype), make_norm(kind, dtype)
    join_norms(nn.Sequential(joined))
    exact = outcome(make_norm(kind, dtype).float(), torch.float32)
    for ours, theirs, right in zip(outcome(joined, dtype), outcome(plain, dtype), exact, strict=True):
        assert (ours - right).norm() <= 1.1 * (theirs - right).norm()
        torch.testing.assert_close(ours, theirs, atol=0.04, rtol=0.01)


@pytest.mark.parametrize("kind", [GemmaRMSNorm, Qwen3NextRMSNormGated])
def test_a_norm_of_other_arithmetic_keeps_its_own_function(kind):
    norm = kind(48)
    join_norms(nn.Sequential(norm.requires_grad_(False)))
    assert "forward" not in vars(norm)


def test_a_trained_norm_keeps_its_own_function():
    norm = make_norm().requires_grad_(True)
    join_norms(nn.Sequential(norm))
    assert "forward" not in vars(norm)
