"""The last layer computes the tokens that the loss reads, and what these are is as before."""

import pytest
import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaDecoderLayer
from transformers.models.gemma3.modeling_gemma3 import Gemma3DecoderLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.phi3.modeling_phi3 import Phi3DecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

from vlm_tune.model.kernels.last import last_layer, read_rows
from vlm_tune.model.parts.stage import trained_parameters

STAGES = {
    "lora": ["stage=finetune", "stage.lora={rank: 4, dropout: 0}"],
    "all": ["stage.train.llm=full"],
    "recomputed": ["stage.train.llm=full", "stage.gradient_checkpointing.llm=true"],
    "chunked": ["stage.train.llm=full", "stage.gradient_checkpointing.llm=mlp"],
    "padded": ["stage=finetune", "stage.lora={rank: 4, dropout: 0}", "stage.packing=false"],
}


def learn(staged, batch):
    """Take the loss, its gradients, and the rows that the last MLP saw."""
    vlm, rows = staged.model.vlm, []
    mlp = last_layer(vlm.llm.get_decoder()).mlp
    watch = mlp.register_forward_pre_hook(lambda module, inputs: rows.append(inputs[0][..., 0].numel()))
    vlm.zero_grad()
    loss = vlm(batch)
    loss.backward()
    watch.remove()
    return loss.detach(), [weight.grad for _, weight in trained_parameters(vlm)], rows[0]


@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES)
def test_its_mlp_sees_what_the_loss_reads_alone_and_nothing_else_changes(toys, stage):
    staged = toys.staged(*stage)
    batch = staged.batch([0, 1, 2, 3], packing="stage.packing=false" not in stage)
    loss, gradients, rows = learn(staged, batch)
    del last_layer(staged.model.vlm.llm.get_decoder()).reads_rows
    right, wanted, all_rows = learn(staged, batch)
    assert (rows, all_rows) == (len(batch.predicting), batch.input_ids.numel())
    torch.testing.assert_close(loss, right, atol=1e-6, rtol=1e-6)
    for one, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("layer", "is_llamas"),
    [
        (LlamaDecoderLayer, True),
        (Qwen2DecoderLayer, True),
        (MistralDecoderLayer, True),
        (Phi3DecoderLayer, False),  # drops out what it adds
        (GemmaDecoderLayer, True),
        (Gemma3DecoderLayer, False),  # has four norms
    ],
)
def test_a_layer_of_other_arithmetic_is_left_as_it_is(layer, is_llamas):
    decoder = nn.Module()
    decoder.layers = [layer.__new__(layer)]
    nn.Module.__init__(decoder.layers[0])
    read_rows(decoder)
    assert hasattr(decoder.layers[0], "reads_rows") is is_llamas
