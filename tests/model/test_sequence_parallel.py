"""Devices that share a pack compute the loss and the gradients of one that has it alone, and keep less for it."""

import multiprocessing
import os
from contextlib import contextmanager
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from processes import PATIENCE, free_port
from torch.autograd.graph import saved_tensors_hooks

from vlm_tune.config.parse import load_config
from vlm_tune.data.batch import cut
from vlm_tune.errors import ConfigError
from vlm_tune.model.kernels import kept
from vlm_tune.model.kernels.exchange import own_group

CLOSE = 1e-5
LORA = ("stage=finetune", "stage.lora.dropout=0")
FULL = ("stage=finetune_full", "stage.train.vision=full", "data.feature_cache=off")
CASES = {  # settings, rows of the pack (each seventh is text alone); the toy has 4 heads, and 2 of keys and values
    "lora": (LORA, (0, 1, 2, 6)),
    "full": (FULL, (0, 1, 2, 6)),
    "recomputed": ((*FULL, "stage.gradient_checkpointing={vision: true, projector: true, llm: true}"), (3, 4, 5)),
    "without pictures": (("stage=pretrain",), (6, 13)),
    "shared prefixes": ((*LORA, "stage.share_prefix=on"), (0, 0, 1, 1, 2)),
    "fewer tiles than devices": (FULL, (7,)),
    "rows that end": ((*FULL, "model.tiles.rule=anyres", "model.projector.newline=true"), (0, 1, 2)),
    "long": (FULL, tuple(range(26)) * 2),
}


def compute(staged, rows, group, number):
    """Return the loss, its gradients by name, and the bytes that this device keeps for the backward pass."""
    vlm, batch = staged.model.vlm.train(), staged.batch(list(rows))
    vlm.group = group
    batch = batch if group is None else cut(batch, number, group.size())
    with noted(vlm) as sizes:
        loss = vlm(batch)
    trained = {name: weight for name, weight in vlm.named_parameters() if weight.requires_grad}
    made = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    found = dict(zip(trained, made, strict=True))
    return {
        "loss": loss.detach(),
        "gradients": {name: each.clone() for name, each in found.items() if each is not None},
        "missing": [name for name, gradient in found.items() if gradient is None],
        "kept": sum(sizes.values()),
    }


@contextmanager
def noted(vlm):
    """Note the memory that holds what is kept for a backward pass, by its address, but the weights."""
    weights = {each.untyped_storage().data_ptr() for each in (*vlm.parameters(), *vlm.buffers())}
    sizes, save = {}, kept._save

    def note(tensor):
        memory = tensor.untyped_storage()
        if memory.data_ptr() not in weights:
            sizes[memory.data_ptr()] = memory.nbytes()
        return tensor

    with pytest.MonkeyPatch.context() as patch, saved_tensors_hooks(note, lambda tensor: tensor):
        patch.setattr(kept, "_save", lambda tensor: save(note(tensor)))  # hooks of layers lie over these
        yield sizes


def run_device(number, count, port, staged, out):
    """Compute all cases as one of several devices, and write down the sums; the first writes the largest `kept` too."""
    torch.set_num_threads(1)
    where = {"init_method": f"tcp://127.0.0.1:{port}", "timeout": timedelta(seconds=PATIENCE)}
    dist.init_process_group("gloo", rank=number, world_size=count, **where)
    group, found = own_group(count), {}
    for name, (_, rows) in CASES.items():
        made = found[name] = compute(staged[name], rows, group, number)
        for tensor in (made["loss"], *made["gradients"].values()):
            dist.all_reduce(tensor)
        most = torch.tensor(made["kept"])
        dist.all_reduce(most, dist.ReduceOp.MAX)
        made["kept"] = int(most)
    torch.save(found, out / f"{number}.pt")
    os._exit(0)


@pytest.fixture(scope="module")
def staged(toys):
    made = {settings: toys.staged(*settings) for settings, _ in CASES.values()}
    return {name: made[settings] for name, (settings, _) in CASES.items()}


@pytest.fixture(scope="module")
def devices(staged, tmp_path_factory):
    """Give a function that computes all cases on as many devices: name -> what `compute` returns."""
    made = {}

    def run(count):
        if count not in made:
            out, port = tmp_path_factory.mktemp("devices"), free_port()
            fork = multiprocessing.get_context("fork").Process
            started = [fork(target=run_device, args=(each, count, port, staged, out)) for each in range(count)]
            for process in started:
                process.start()
            for process in started:
                process.join(PATIENCE)
            codes = [process.exitcode for process in started]
            for process in started:
                process.kill()
            assert codes == [0] * count
            made[count] = torch.load(out / "0.pt", weights_only=True)
        return made[count]

    return run


@pytest.fixture(scope="module")
def alone(staged):
    """What one device computes that has each pack alone."""
    return {name: compute(staged[name], rows, None, 0) for name, (_, rows) in CASES.items()}


@pytest.fixture(params=[2, pytest.param(4, marks=pytest.mark.strategies)], ids=["2", "4"])
def several(request, devices):
    return devices(request.param)


@pytest.mark.parametrize("case", CASES)
def test_devices_have_the_loss_of_one(several, alone, case):
    torch.testing.assert_close(several[case]["loss"], alone[case]["loss"], rtol=1e-6, atol=0)


@pytest.mark.parametrize("case", CASES)
def test_devices_have_the_gradients_of_one(several, alone, case):
    found, wanted = (each[case]["gradients"] for each in (several, alone))
    assert found.keys() == wanted.keys()
    apart = {name: float((found[name] - each).norm() / each.norm()) for name, each in wanted.items() if each.any()}
    assert max(apart.values(), default=0) < CLOSE, apart
    assert not any(found[name].any() for name in wanted.keys() - apart.keys())


@pytest.mark.parametrize("case", CASES)
def test_each_device_has_a_gradient_for_each_trained_weight(several, case):
    # or the others would wait for it for ever
    assert several[case]["missing"] == []


@pytest.mark.parametrize(
    ("setting", "said"),
    {
        "trainer.devices=3": "3 does not divide by it: choose a multiple of 2",
        "stage.packing=false": "stage.packing=false pads each row",
        "stage=dpo": "stage.preference trains on pairs",
        "stage.neftune=5": "stage.neftune=5.0 draws noise",
        "strategy=zero2": "strategy=zero2 was never tried with it: use ddp or fsdp",
        "trainer.find_batch=true": "trainer.find_batch=true tries packs on one device",
    }.items(),
)
def test_what_does_not_go_with_it_is_refused(toys, setting, said):
    shared = ("trainer.devices=2", "trainer.sequence_parallel=2", "trainer.global_batch=12")
    with pytest.raises(ConfigError, match=f"trainer.sequence_parallel=2 cuts packs, but .*{said}"):
        load_config(toys.arguments(*shared, setting))


def test_a_step_that_the_groups_do_not_fill_is_refused(toys):
    with pytest.raises(ConfigError, match=r"devices\*nodes/sequence_parallel\*micro_batch=2: choose a multiple of 2"):
        load_config(toys.arguments("trainer.devices=4", "trainer.sequence_parallel=2", "trainer.global_batch=3"))


def test_heads_that_cannot_be_shared_out_are_refused_and_the_numbers_named(toys):
    with pytest.raises(ConfigError, match="and this language model has 4: set it to 1, 2 or 4"):
        toys.model("trainer.devices=3", "trainer.sequence_parallel=3", "trainer.global_batch=3")


def test_two_devices_keep_little_more_than_half_each(devices, alone):
    assert devices(2)["long"]["kept"] < 0.6 * alone["long"]["kept"]
