"""A long pack trained in parts, and one whose sizes are rounded up, have the loss and the gradients of the whole."""

from dataclasses import replace

import pytest
import torch
from pair_toys import pair_arguments
from torch.utils._python_dispatch import TorchDispatchMode

from vlm_tune.data.batch import cut
from vlm_tune.model.kernels import packs_cpu
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


def learn(staged, precision="fp32", batch=None):
    """Take one step's loss and gradients; of each part, note which places hold a token and not an added zero."""
    batch, seen = batch or staged.batch(ROWS), []
    decoder = staged.model.vlm.llm.get_decoder()
    watch = decoder.register_forward_pre_hook(
        lambda module, inputs, options: seen.append(options["inputs_embeds"][0].any(-1)), with_kwargs=True
    )
    staged.model.vlm.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        loss = staged.model.vlm(batch)
    (loss * 0.5).sum().backward()
    watch.remove()
    return loss.detach(), {name: weight.grad for name, weight in trained_parameters(staged.model.vlm)}, seen


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES)
def test_a_pack_in_parts_learns_what_the_whole_does(toys, monkeypatch, stage, precision):
    staged = toys.staged(*stage, f"trainer.precision={precision}")
    whole, wanted, once = learn(staged, precision)
    monkeypatch.setattr(packs_cpu, "LONGEST", int(torch.cat(once).sum()) // 3)
    loss, found, several = learn(staged, precision)
    assert len(once) == 1 < len(several)
    assert torch.cat(several).sum() == torch.cat(once).sum()
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
    monkeypatch.setattr(packs_cpu, "LONGEST", 60)
    parts = [(place.start, place.stop, part.segments, part.parents) for place, part in packs_cpu.cut(batch)]
    assert parts == [(0, 60, [30, 5, 5, 20], [-1, 0, 0, -1]), (60, 107, [40, 3, 4], [-1, 0, 0])]


def test_a_pack_of_a_gpu_and_an_answer_to_no_gradient_are_not_cut(toys, monkeypatch):
    monkeypatch.setattr(packs_cpu, "LONGEST", 1)
    batch = toys.staged().batch(ROWS)
    assert packs_cpu.is_long(torch.zeros(1, 9, 2), batch)
    assert not packs_cpu.is_long(torch.zeros(1, 9, 2, device="meta"), batch)
    with torch.no_grad():
        assert not packs_cpu.is_long(torch.zeros(1, 9, 2), batch)


def without_last(batch):
    """Take the last token from a batch, and what it is learned from."""
    length = sum(batch.segments) - 1
    learns = batch.predicting < length - 1
    return replace(
        batch,
        input_ids=batch.input_ids[:, :length],
        position_ids=batch.position_ids[:, :length],
        segments=[*batch.segments[:-1], batch.segments[-1] - 1],
        predicting=batch.predicting[learns],
        targets=batch.targets[learns],
        weights=batch.weights[learns],
    )


class Sizes(TorchDispatchMode):
    """Collects the sizes of all matrix products, forwards and backwards."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default, torch.ops.aten.addmm.default):
            self.seen.add(tuple(tuple(each.shape) for each in args if isinstance(each, torch.Tensor)))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("sizes", [(65, 96), (1025, 1056), (2050, 2112)])
def test_packs_of_like_size_are_rounded_to_one(sizes):
    assert len({packs_cpu._round_up(each) for each in range(sizes[0], sizes[1] + 1)}) == 1


def test_little_is_added():
    assert all(0 <= packs_cpu._round_up(each) - each < max(32, each / 32) for each in range(10_000))


@pytest.mark.parametrize("stage", [*STAGES.values(), None], ids=[*STAGES, "pairs"])
def test_rounding_changes_no_loss_and_no_gradient(toys, tmp_path, monkeypatch, stage):
    staged = toys.staged(*(stage or pair_arguments(toys, tmp_path)))
    loss, wanted, as_it_is = learn(staged)
    monkeypatch.setattr(packs_cpu, "uses_onednn", lambda embeddings: True)
    rounded_loss, found, rounded = learn(staged)
    assert len(rounded[0]) % 32 == 0
    assert len(as_it_is[0]) < len(rounded[0])
    close = {"atol": 1e-6, "rtol": 1e-5}
    torch.testing.assert_close(rounded_loss, loss, **close)
    for name, right in wanted.items():
        torch.testing.assert_close(found[name], right, **close, msg=lambda text, name=name: name + text)


def test_a_pack_of_like_size_meets_no_new_product(toys):
    staged = toys.staged(*STAGES["lora"], "trainer.precision=bf16")
    batch = staged.batch(ROWS)
    with Sizes() as first:
        learn(staged, "bf16", batch)
    with Sizes() as second:
        learn(staged, "bf16", without_last(batch))
    assert first.seen == second.seen


def test_a_share_of_a_pack_and_float32_keep_their_sizes(toys):
    batch = toys.staged().batch(ROWS)
    embeddings = torch.zeros(1, sum(batch.segments), 2)
    assert packs_cpu.rounded_up(embeddings, batch)[1] is batch
    assert packs_cpu.rounded_up(embeddings.bfloat16(), cut(batch, 0, 1))[1].cut
    assert packs_cpu.rounded_up(embeddings.bfloat16(), batch)[0].shape[1] % 32 == 0
