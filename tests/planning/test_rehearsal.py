"""What is counted on fake tensors equals what a real step of the same model allocates, byte for byte."""

from dataclasses import replace

import pytest
import torch
from official_toys import MIXTURE, write_official
from torch._subclasses.fake_tensor import FakeTensorMode

from vlm_tune.config.schema import Strategy
from vlm_tune.errors import ConfigError
from vlm_tune.model.flops import count_flops
from vlm_tune.model.kernels import attention, kept
from vlm_tune.model.optim import make_optimizer
from vlm_tune.model.parts.stage import trained_parameters
from vlm_tune.planning.ledger import Ledger
from vlm_tune.planning.rehearsal import SHARED, Vocabulary, rehearse

ROWS = [0, 1, 2, 3]
EXPERTS = ["model.path=MIXTURE", "model.vision.path=null", "model.llm.path=null", "model.template=internvl2_5"]
RUNS = {
    "lora": [],
    "lora with dropout in bf16": ["trainer.precision=bf16"],
    "full": ["stage=finetune_full"],
    "full in bf16": ["stage=finetune_full", "trainer.precision=bf16"],
    "recomputed": ["stage=finetune_full", "stage.gradient_checkpointing.llm=true"],
    "chunked": ["stage=finetune_full", "stage.gradient_checkpointing.llm=mlp"],
    "trained encoder": ["stage.train.vision=full"],
    "padded": ["stage.packing=false", "trainer.micro_batch=2", "trainer.global_batch=4"],
    "noise": ["stage.neftune=5"],
    "projector alone": ["stage=pretrain"],
    "adapters of experts": [*EXPERTS, "model.llm.targets=[q_proj,gate_up_proj,down_proj]", "stage.lora.dropout=0"],
    "experts and their routers": [*EXPERTS, "stage.train.llm=full", "stage.router_loss=0.1"],
}


def storages(tensors):
    return sum({each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}.values())


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    return str(write_official(tmp_path_factory.mktemp("mixture"), MIXTURE))


def test_nothing_of_a_rehearsal_is_left_to_a_real_pass(toys):
    """What a pass keeps for the next one would be fake."""
    staged = toys.staged("stage=finetune", "stage.share_prefix=on", "stage.lora.dropout=0")
    batch = staged.batch(ROWS)
    before = float(staged.model.vlm(staged.batch(ROWS)).detach())
    rehearse(staged.config, batch, Vocabulary(len(staged.model.tokenizer), staged.model.vlm.context_id), on_gpu=False)
    assert [
        cached.cache_info().currsize for cached in (attention.kept_mask, attention.segment_offsets, attention.key_rows)
    ] == [0] * 3
    assert float(staged.model.vlm(staged.batch(ROWS)).detach()) == before


@pytest.fixture(scope="module", params=RUNS.values(), ids=RUNS.keys())
def both(request, toys, mixture):
    """Rehearse a step, and run it for real with the same account kept."""
    staged = toys.staged(*(each.replace("MIXTURE", mixture) for each in request.param))
    vlm, config = staged.model.vlm, staged.config
    batch = staged.batch(ROWS, packing=config.stage.packing)
    needs = rehearse(config, batch, Vocabulary(len(staged.model.tokenizer), vlm.context_id), on_gpu=False)
    dtype = {"bf16": torch.bfloat16}.get(config.trainer.precision.value)
    optimizer = make_optimizer(vlm, config.stage)
    for _, weight in trained_parameters(vlm):
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    ledger = Ledger(FakeTensorMode())
    weights = [*vlm.parameters(), *vlm.buffers(), *vlm.vision.unused.values()]
    moments = [each for state in optimizer.state.values() for each in state.values()]
    gradients = [weight.grad for _, weight in trained_parameters(vlm)]
    for tensor in (*weights, *moments, *gradients):
        ledger.hold(tensor, "there")
    start = len(ledger.events)
    with ledger:
        with torch.autocast("cpu", dtype or torch.float32, enabled=dtype is not None):
            loss = vlm(batch)
        loss.backward()
        del loss
        torch.nn.utils.clip_grad_norm_([weight for _, weight in trained_parameters(vlm)], config.stage.clip)
        optimizer.step()
    return needs, {"weights": weights, "optimizer": moments, "gradients": gradients, "dtype": dtype}, ledger.peak(start)


@pytest.mark.parametrize("kind", ["weights", "gradients", "optimizer"])
def test_what_is_there_all_the_time_is_exact(both, kind):
    needs, real, _ = both
    assert needs.sizes[kind] == storages(real[kind])


def test_the_peak_is_that_of_the_real_step(both):
    needs, dtype, real = both[0], both[1]["dtype"], sum(both[2].values())
    found = needs.total - needs.sizes["gaps"] - needs.sizes["checkpoint"]
    assert found == real if dtype is None else abs(found / real - 1) < 0.02  # a CPU's 16-bit kernels choose by values


def test_a_gpu_makes_again_what_a_cpu_keeps_of_a_short_pack(toys, monkeypatch):
    staged = toys.staged("stage=finetune")
    vocabulary = Vocabulary(len(staged.model.tokenizer), staged.model.vlm.context_id)

    def held(on_gpu):
        return rehearse(staged.config, staged.batch(ROWS), vocabulary, on_gpu=on_gpu).sizes["activations"]

    short = held(True), held(False)
    monkeypatch.setattr(kept, "FEW", 0)
    assert held(True) == short[0]
    assert held(False) < short[1]


def test_a_plan_counts_the_products_of_the_experts_that_a_token_takes(toys, mixture):
    staged = toys.staged(*(each.replace("MIXTURE", mixture) for each in EXPERTS), "stage.train.llm=full")
    vlm, batch = staged.model.vlm, staged.batch(ROWS)
    needs = rehearse(staged.config, batch, Vocabulary(len(staged.model.tokenizer), vlm.context_id), on_gpu=False)
    counted = replace(count_flops(vlm), pair=0.0)  # attention on a CPU is not counted
    assert needs.flops / needs.num_micro == pytest.approx(counted.of(batch), rel=0.1)


def test_a_plan_knows_what_each_strategy_spreads_over_devices():
    assert set(SHARED) == set(Strategy) - {Strategy.auto, Strategy.ddp}


@pytest.fixture(scope="module")
def shared(toys):
    """Rehearse a long pack on one device, and on each of two that share it."""
    needs = []
    for size in (1, 2):
        staged = toys.staged("trainer.devices=2", f"trainer.sequence_parallel={size}", "trainer.global_batch=8")
        vocabulary = Vocabulary(len(staged.model.tokenizer), staged.model.vlm.context_id)
        needs.append(rehearse(staged.config, staged.batch(list(range(26)) * 2), vocabulary, on_gpu=True))
    return needs


def test_two_devices_that_share_a_pack_hold_little_more_than_half_of_it_each(shared):
    one, two = (needs.sizes["activations"] for needs in shared)
    assert one / 2 < two < 0.6 * one


def test_devices_that_share_packs_run_each_of_them(shared):
    assert [needs.num_micro for needs in shared] == [4, 8]


def test_heads_that_cannot_be_shared_out_are_refused_by_a_plan(toys):
    staged = toys.staged()
    trainer = replace(staged.config.trainer, devices=3, sequence_parallel=3)
    with pytest.raises(ConfigError, match="this language model has 4"):
        rehearse(replace(staged.config, trainer=trainer), staged.batch(ROWS), Vocabulary(2880, 0), on_gpu=False)
