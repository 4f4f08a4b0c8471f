"""The last layer computes the tokens that the loss reads, and what these are is as before."""

import pytest
import torch

from vlm_tune.model.kernels.last import last_layer
from vlm_tune.model.parts.stage import trained_parameters

STAGES = {
    "lora": ["stage=finetune", "stage.lora={rank: 4, dropout: 0}"],
    "all": ["stage.train.llm=full"],
    "recomputed": ["stage.train.llm=full", "stage.gradient_checkpointing.llm=true"],
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
