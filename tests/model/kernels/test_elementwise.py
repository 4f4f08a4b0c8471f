"""Gate and rotary positions as one function each equal transformers' own."""

import pytest
import torch
from torch import nn
from transformers import CohereConfig, LlamaConfig, MistralConfig, Phi3Config, Qwen2Config, Qwen3Config
from transformers.models.cohere.modeling_cohere import CohereAttention
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRotaryEmbedding
from transformers.models.mistral.modeling_mistral import MistralAttention
from transformers.models.phi3.modeling_phi3 import Phi3Attention, Phi3MLP
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from vlm_tune.model.kernels.elementwise import join_gates, join_rotations, rotate

SIZES = {
    "hidden_size": 48, "intermediate_size": 8, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8,
    "attn_implementation": "eager", "pad_token_id": 0,
}  # fmt: skip
ALIKE = [(LlamaConfig, LlamaAttention), (Qwen2Config, Qwen2Attention), (Qwen3Config, Qwen3Attention)]
ALIKE += [(MistralConfig, MistralAttention)]


def make_attention(config, kind, joined):
    torch.manual_seed(0)
    attention = kind(config(**SIZES), 0)
    if joined:
        join_rotations(nn.Sequential(attention))
    return attention


def outcome(attention):
    inputs = torch.randn(2, 7, 48, generator=torch.Generator().manual_seed(1)).requires_grad_()
    positions = torch.arange(7).expand(2, 7) + 100
    embedded = LlamaRotaryEmbedding(LlamaConfig(**SIZES))(torch.empty(0), positions)
    output, _ = attention(inputs, position_embeddings=embedded, attention_mask=None)
    output.backward(torch.randn(output.shape, generator=torch.Generator().manual_seed(2)))
    return output, inputs.grad, attention.k_proj.weight.grad


@pytest.mark.parametrize(("config", "kind"), ALIKE)
def test_attention_and_its_gradients_equal_those_of_transformers(config, kind):
    ours, theirs = (outcome(make_attention(config, kind, joined)) for joined in (True, False))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)


def test_in_16_bit_it_rounds_no_more_than_transformers():
    states = [torch.randn(1, heads, 9, 8, generator=torch.Generator().manual_seed(heads)) for heads in (6, 2)]
    cos, sin = LlamaRotaryEmbedding(LlamaConfig(**SIZES))(torch.empty(0), torch.arange(9).unsqueeze(0) + 50)
    angles = [each.bfloat16() for each in (cos, sin)]

    def run(function, dtype):
        inputs = [state.bfloat16().to(dtype).requires_grad_() for state in states]
        made = function(*inputs, *(each.to(dtype) for each in angles))
        return [*made, *torch.autograd.grad([each.square().sum() for each in made], inputs)]

    exact = run(modeling_llama.apply_rotary_pos_emb, torch.float32)
    theirs = run(modeling_llama.apply_rotary_pos_emb, torch.bfloat16)
    for ours, other, right in zip(run(rotate, torch.bfloat16), theirs, exact, strict=True):
        assert ours.dtype is torch.bfloat16
        assert (ours - right).norm() <= 1.01 * (other - right).norm()


def test_the_gradient_is_right_where_both_halves_have_angles_of_their_own():
    draw = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, heads, 3, 4, dtype=torch.float64, generator=draw, requires_grad=True) for heads in (2, 1)]
    angles = [torch.randn(1, 3, 4, dtype=torch.float64, generator=draw) for _ in range(2)]
    assert torch.autograd.gradcheck(lambda query, key: rotate(query, key, *angles), inputs)


def test_one_attention_has_the_function_and_transformers_itself_is_left_as_it_is():
    before = modeling_llama.apply_rotary_pos_emb
    joined = make_attention(LlamaConfig, LlamaAttention, True)
    assert joined.forward.__func__.__globals__["apply_rotary_pos_emb"] is rotate
    assert modeling_llama.apply_rotary_pos_emb is before
    assert LlamaAttention.forward.__globals__["apply_rotary_pos_emb"] is before


@pytest.mark.parametrize(("config", "kind"), [(CohereConfig, CohereAttention), (Phi3Config, Phi3Attention)])
def test_an_attention_of_other_arithmetic_keeps_its_own_function(config, kind):
    sizes = {key: value for key, value in SIZES.items() if key != "head_dim"}
    attention = kind(config(**sizes), 0)
    join_rotations(nn.Sequential(attention))
    assert "forward" not in vars(attention)


def test_an_mlp_of_other_arithmetic_keeps_its_own_function():
    others = nn.Sequential(
        Phi3MLP(Phi3Config(hidden_size=8, intermediate_size=8, num_attention_heads=2, pad_token_id=0)),
        LlamaMLP(LlamaConfig(hidden_act="gelu", hidden_size=8, intermediate_size=8, num_attention_heads=2)),
    )
    join_gates(others)
    assert all("forward" not in vars(each) for each in others)
