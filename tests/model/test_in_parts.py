"""A long pack that is trained in parts has the loss and the gradients of the whole."""

import pytest
import torch

from vlm_tune.model.kernels import in_parts
from vlm_tune.model.parts.stage import trained_parameters

ROWS = list(range(8))
STAGES = {
    "projector": ["stage=pretrain"],
    "lora": ["stage=finetune", "stage.lora={rank: 4, dropout: 0}"],
    "all": ["stage.train.vision=full", "stage.train.projector=full", "stage.train.llm=full"],
    "recomputed": ["stage.train.llm=full", "stage.gradient_checkpointing.llm=true"],
    "chunked": ["stage.train.llm=full", "stage.gradient_checkpointing.llm=mlp"],
    "trees": ["stage=finetune", "stage.lora={rank: 4, dropout: 0}", "stage.share_prefix=on"],
}


def learn(staged, precision="fp32"):
    """Take one step's loss and gradients; count the parts."""
    batch, seen = staged.batch(ROWS), []
    decoder = staged.model.vlm.llm.get_decoder()
    watch = decoder.register_forward_pre_hook(
        lambda module, inputs, options: seen.append(options["inputs_embeds"].shape[1]), with_kwargs=True
    )
    staged.model.vlm.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        loss = staged.model.vlm(batch)
    (loss * 0.5).backward()
    watch.remove()
    return loss.detach(), {name: weight.grad for name, weight in trained_parameters(staged.model.vlm)}, seen


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES)
def test_a_pack_in_parts_learns_what_the_whole_does(toys, monkeypatch, stage, precision):
    staged = toys.staged(*stage, f"trainer.precision={precision}")
    whole, wanted, once = learn(staged, precision)
    monkeypatch.setattr(in_parts, "LONGEST", sum(once) // 3)
    loss, found, several = learn(staged, precision)
    assert len(once) == 1 < len(several)
    assert sum(several) == sum(once)
    close = {"atol": 1e-5, "rtol": 1e-5} if precision == "fp32" else {"atol": 0.02, "rtol": 0.02}
    torch.testing.assert_close(loss, whole, **close)
    for name, right in wanted.items():
        assert (found[name] is None) is (right is None), name
        if right is not None:
            scale = right.abs().max().clamp(min=1e-6)
            torch.testing.assert_close(
                found[name] / scale, right / scale, **close, msg=lambda text, name=name: name + text
            )


def test_rows_that_share_tokens_stay_together(toys, monkeypatch):
    batch = toys.staged("stage=finetune", "stage.share_prefix=on").batch(ROWS)
    batch.segments, batch.parents = [30, 5, 5, 20, 40, 3, 4], [-1, 0, 0, -1, -1, 4, 4]
    monkeypatch.setattr(in_parts, "LONGEST", 60)
    parts = [(place.start, place.stop, part.segments, part.parents) for place, part in in_parts.cut(batch)]
    assert parts == [(0, 60, [30, 5, 5, 20], [-1, 0, 0, -1]), (60, 107, [40, 3, 4], [-1, 0, 0])]


def test_a_pack_of_a_gpu_and_an_answer_to_no_gradient_are_not_cut(toys, monkeypatch):
    monkeypatch.setattr(in_parts, "LONGEST", 1)
    batch = toys.staged().batch(ROWS)
    assert in_parts.is_long(torch.zeros(1, 9, 2), batch)
    assert not in_parts.is_long(torch.zeros(1, 9, 2, device="meta"), batch)
    with torch.no_grad():
        assert not in_parts.is_long(torch.zeros(1, 9, 2), batch)
