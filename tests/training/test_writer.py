"""Checkpoints are written beside the training, in parts too: what is on the disk is the state when it was saved."""

import errno
import multiprocessing
import os
import signal
import threading
import time
import traceback

import pytest
import torch
import torch.distributed as dist
from compare import assert_same, state_of
from processes import free_port
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from vlm_tune.config.parse import load_config
from vlm_tune.config.schema import TrainerConfig
from vlm_tune.errors import CheckpointError, DataError, Stopped
from vlm_tune.model.checkpoint import CHECKPOINTS, checkpoint_name, checkpoints, damage_of, part_name, read_checkpoint
from vlm_tune.model.parts.shards import copies, whole
from vlm_tune.training.callbacks import writer
from vlm_tune.training.callbacks.writer import CheckpointWriter, count_parts
from vlm_tune.training.module import VlmModule
from vlm_tune.training.run import train

ALL = (
    "stage=finetune",
    "stage.init_from=none",
    "stage.lora.dropout=0.1",
    "stage.lr={projector: 0.01, llm: 0.01}",
    "stage.max_steps=4",
    "stage.evaluate=false",
    "trainer.num_chats=0",
    "trainer.save_every=2",
    "data.val=none",
)
SIZES = (40, 3, 17, 1, 30, 24, 9)


def run_toy(toys, runs, *more):
    return train(
        load_config(toys.arguments(*{key.partition("=")[0]: key for key in (*ALL, *more)}.values(), runs=runs))
    )


def before_a_write(monkeypatch, act):
    write = writer.write_sealed
    monkeypatch.setattr(writer, "write_sealed", lambda *given: (act(), write(*given)))


def at_step(monkeypatch, step, act):
    begin = VlmModule.training_step

    def training_step(self, batch, batch_idx):
        if self.global_step == step:
            act()
        return begin(self, batch, batch_idx)

    monkeypatch.setattr(VlmModule, "training_step", training_step)


def test_training_goes_on_and_does_not_change_what_is_written(toys, tmp_path, monkeypatch):
    straight = run_toy(toys, tmp_path / "straight")
    waited, is_later = [], threading.Event()
    before_a_write(monkeypatch, lambda: waited.append(is_later.wait(30)))
    at_step(monkeypatch, 3, is_later.set)  # the optimizer has changed every trained weight since step 2
    run = run_toy(toys, tmp_path / "beside")
    assert waited == [True, True]
    for step in (2, 4):
        assert_same(state_of(run, step), state_of(straight, step))


def fail():
    raise DataError("was replaced", "train.jsonl:3", "train_2")


@pytest.mark.parametrize(
    ("act", "error", "steps"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGTERM), Stopped, [2, 3]),
        (fail, DataError, [2]),
        (lambda: None, None, [2, 4]),
    ],
    ids=["stop", "error", "end"],
)
def test_what_was_saved_is_on_the_disk_when_a_run_ends(toys, tmp_path, monkeypatch, act, error, steps):
    before_a_write(monkeypatch, lambda: time.sleep(0.5))
    asked = iter([act])
    at_step(monkeypatch, 2, lambda: next(asked, lambda: None)())
    if error:
        with pytest.raises(error):
            run_toy(toys, tmp_path)
    else:
        run_toy(toys, tmp_path)
    (folder,) = {path.resolve() for path in tmp_path.glob(f"*/{CHECKPOINTS}")}
    assert [path.name for path in checkpoints(folder.parent)] == [checkpoint_name(step) for step in steps]
    assert not list(folder.glob(".*"))


def full_disk(path):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def test_one_is_written_after_the_other(tmp_path, monkeypatch):
    order = []
    before_a_write(monkeypatch, lambda: (order.append("begins"), time.sleep(0.1)))
    writes = CheckpointWriter(None)
    writes.then = lambda: order.append("ends")
    for name in "abc":
        writes.save_checkpoint({}, tmp_path / f"{name}.ckpt")
    writes.finish()
    assert order == ["begins", "ends"] * 3


def test_an_error_of_the_thread_is_raised_at_the_next_look(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "seal", full_disk)
    writes = CheckpointWriter(None)
    writes.save_checkpoint({}, tmp_path / "a.ckpt")
    writes.give_time(30)
    with pytest.raises(CheckpointError, match=r"a\.ckpt: could not be written"):
        writes.look()
    writes.look()  # it is said once


@pytest.mark.parametrize(
    ("asked", "devices", "billions", "parts"),
    [(None, 4, 1.4, None), (None, 4, 1.5, 4), (None, 1, 1.5, None), (True, 1, 0.1, 1), (False, 4, 7, None)],
)
def test_parts_are_written_by_several_processes_of_a_large_state_or_where_they_are_asked_for(
    asked, devices, billions, parts
):
    assert count_parts(TrainerConfig(sharded_checkpoints=asked, devices=devices), int(billions * 1e9)) == parts


# ---------------------------------------------------------------------------------------------- parts of two processes


def full_state(step):
    """Make the same state in each process: weights, and moments by number."""
    torch.manual_seed(step)
    weights = {f"vlm.{number}": torch.randn(size, 4) for number, size in enumerate(SIZES)}
    state = {number: {"step": torch.tensor(3.0), "exp_avg": torch.randn(size, 4)} for number, size in enumerate(SIZES)}
    groups = [{"lr": 0.1, "params": list(range(len(SIZES)))}]
    return {
        "state_dict": weights,
        "optimizer_states": [{"state": state, "param_groups": groups}],
        "global_step": step,
        "loops": [step],
    }


def share(state, split=lambda value: value, gather=None):
    weights = {name: split(weight) for name, weight in state["state_dict"].items()}
    (optimizer,) = state["optimizer_states"]
    moments = {number: {key: split(each) for key, each in of.items()} for number, of in optimizer["state"].items()}
    return state | {
        "state_dict": copies(weights, 2, gather),
        "optimizer_states": [optimizer | {"state": copies(moments, 2, gather)}],
    }


def sharded(value):
    return distribute_tensor(value, init_device_mesh("cpu", (2,)), [Shard(0)]) if value.dim() else value


def write_all(rank, folder):
    """Write a checkpoint as ddp and as fsdp do, onto a full disk of one process, and onto two disks."""
    writes = CheckpointWriter(2)
    writes.save_checkpoint(share(full_state(1)), folder / "step_1.ckpt")
    stray = folder / ".step_2.ckpt.parts.partial" / part_name(0, 3)
    stray.parent.mkdir(exist_ok=True)
    stray.touch()
    writes.save_checkpoint(share(full_state(2), sharded, whole), folder / "step_2.ckpt")
    writes.save_checkpoint(share(full_state(3)), folder / f"machine_{rank}" / "step_3.ckpt")
    writes.save_checkpoint(share(full_state(4)), folder / "step_2_again.ckpt")
    writes.save_checkpoint(share(full_state(5)), folder / "step_2_again.ckpt")
    writes.finish()
    if rank:
        writer.seal = full_disk
    writes.save_checkpoint(share(full_state(6)), folder / "step_6.ckpt")
    try:
        writes.finish()
    except CheckpointError as error:
        (folder / f"error_{rank}").write_text(str(error))
    if rank:
        return
    writes.save_checkpoint(share(full_state(7)), folder / "step_7.ckpt")
    try:
        writes.finish()
    except CheckpointError as error:
        (folder / "alone").write_text(str(error))


def _as_rank(rank, port, folder):
    code = 1
    try:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
        write_all(rank, folder)
        code = 0
    except BaseException:
        traceback.print_exc()
    os._exit(code)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder, port, context = tmp_path_factory.mktemp("parts"), free_port(), multiprocessing.get_context("fork")
    ranks = [context.Process(target=_as_rank, args=(rank, port, folder)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(100)
    assert [rank.exitcode for rank in ranks] == [0, 0]
    return folder


@pytest.mark.parametrize(
    ("name", "step"), [("step_1", 1), ("step_2", 2), ("step_2_again", 5)], ids=["ddp", "fsdp", "over"]
)
def test_parts_joined_are_the_state_bit_by_bit(written, name, step):
    assert damage_of(written / f"{name}.ckpt") is None
    assert_same(read_checkpoint(written / f"{name}.ckpt"), full_state(step))


def test_each_process_keeps_its_half(written):
    parts = [torch.load(written / "step_1.ckpt" / part_name(number, 2), weights_only=True) for number in range(2)]
    sizes = [sum(weight.numel() for weight in part["state_dict"].values()) for part in parts]
    assert sum(sizes) == 4 * sum(SIZES)
    assert min(sizes) > 0.45 * sum(sizes)
    assert not parts[0]["state_dict"].keys() & parts[1]["state_dict"].keys()


def test_a_full_disk_of_one_process_is_said_by_both_and_leaves_nothing(written):
    for rank in range(2):
        said = (written / f"error_{rank}").read_text()
        assert "part_01_of_02.ckpt: could not be written ([Errno 28] No space left on device" in said
    assert not list(written.glob("*step_6*"))
    assert not list(written.glob(".*"))


def test_a_process_that_is_gone_is_named_as_the_reason(written):
    assert "another process is gone, and its part of a checkpoint is missing (" in (written / "alone").read_text()
    assert not list(written.glob("*step_7*"))


def test_machines_without_a_shared_disk_keep_their_own_parts_and_a_reader_says_so(written, tmp_path):
    here, there = (written / f"machine_{rank}" / "step_3.ckpt" for rank in range(2))
    assert [path.name for path in here.iterdir()] == [part_name(0, 2)]
    with pytest.raises(CheckpointError, match=r"part_01_of_02\.ckpt missing: machines that share no disk each keep"):
        read_checkpoint(here)
    (tmp_path / "step_3.ckpt").mkdir()
    for part in (*here.iterdir(), *there.iterdir()):
        (tmp_path / "step_3.ckpt" / part.name).write_bytes(part.read_bytes())
    assert_same(read_checkpoint(tmp_path / "step_3.ckpt"), full_state(3))


def test_parts_of_two_steps_are_not_joined(written, tmp_path):
    for number, step in enumerate((1, 2)):
        part = written / f"step_{step}.ckpt" / part_name(number, 2)
        (tmp_path / "step_1.ckpt").mkdir(exist_ok=True)
        (tmp_path / "step_1.ckpt" / part.name).write_bytes(part.read_bytes())
    with pytest.raises(CheckpointError, match="its parts do not belong together"):
        read_checkpoint(tmp_path / "step_1.ckpt")
