"""What goes wrong in the middle of a run is named, and the steps that were done are saved: it goes on bit by bit."""

import multiprocessing
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from compare import assert_same, metrics_of, state_of
from processes import fork_cli
from toys import turns, write_jsonl

from vlm_tune.config.parse import load_config
from vlm_tune.data.sets import index
from vlm_tune.data.sets.micro_batches import MicroBatches
from vlm_tune.errors import CheckpointError, DataError, TrainingError
from vlm_tune.model.checkpoint import checkpoints
from vlm_tune.training.module import VlmModule
from vlm_tune.training.run import train

STEPS = 6
ALL = (
    "stage=finetune",
    "stage.init_from=none",
    f"stage.max_steps={STEPS}",
    "stage.lora.dropout=0.1",
    "stage.evaluate=false",
    "trainer.num_chats=0",
    "trainer.save_every=100",
    "trainer.val_every=4",
    "data.feature_cache=off",
)


@pytest.fixture
def data(toys, tmp_path):
    """Copy the toy rows and pictures, for a test to change them."""
    shutil.copytree(toys.data, tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def settings(toys, data, tmp_path):
    """Give a function that returns a run's settings over the copied rows."""

    def make(*more, runs="runs"):
        chosen = {key.partition("=")[0]: key for key in (*ALL, f"data.path={data}/train.jsonl", *more)}
        return load_config(toys.arguments(*chosen.values(), runs=tmp_path / runs))

    return make


def only_run(settings):
    (run,) = {path.resolve() for path in Path(settings().runs).iterdir()}
    return run


def at_step(monkeypatch, step, act):
    """Do something in the second micro-batch of a step."""
    begin, done = VlmModule.training_step, []

    def training_step(self, batch, batch_idx):
        if self.global_step == step and batch_idx % 2 and not done:
            done.append(act())
        return begin(self, batch, batch_idx)

    monkeypatch.setattr(VlmModule, "training_step", training_step)


def goes_on(settings, restore):
    """Go on with the run, and with one that nothing happened to: the same in every bit."""
    run = only_run(settings)
    done = [path.name for path in checkpoints(run)]
    restore()
    assert train(settings("resume=last")) == run
    straight = train(settings(runs="straight"))
    assert_same(state_of(run, STEPS)["state_dict"], state_of(straight, STEPS)["state_dict"])
    assert_same(state_of(run, STEPS)["optimizer_states"], state_of(straight, STEPS)["optimizer_states"])
    assert metrics_of(run) == metrics_of(straight)
    return done


def test_full_memory_names_the_batch_and_what_to_lower(settings, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        at_step(patch, 3, lambda: torch.empty(2**50))  # which no machine has
        with pytest.raises(
            TrainingError, match=r"memory is full in step 4, at a batch of \d+ rows, \d+ tokens"
        ) as caught:
            train(settings())
    said = str(caught.value)
    assert "and 3 tiles: train_" in said or " tiles: train_" in said
    assert "Lower one of stage.pack_length=160, stage.pack_tiles=48, model.tiles.max=2, data.max_length=8192" in said
    assert "stage.gradient_checkpointing.vision, stage.gradient_checkpointing.llm=true" in said
    assert "the state after step 3 is saved" in capsys.readouterr().out
    assert goes_on(settings, lambda: None) == ["step_00000003.ckpt"]


def test_a_killed_data_worker_loses_no_step(settings, monkeypatch):
    make = MicroBatches.__getitem__

    def killed(self, item):
        worker = torch.utils.data.get_worker_info()
        if worker is not None and self.is_training:
            self.made = getattr(self, "made", 0) + 1
            if self.made == 5:
                metrics = only_run(settings) / "metrics.csv"
                while len(metrics.read_text(encoding="utf-8").splitlines()) < 2:
                    time.sleep(0.05)  # the batches before this one are trained on meanwhile
                os.kill(os.getpid(), signal.SIGKILL)
        return make(self, item)

    with monkeypatch.context() as patch:
        patch.setattr(MicroBatches, "__getitem__", killed)
        with pytest.raises(
            TrainingError, match=r"a process that reads data was ended from outside \(DataLoader worker"
        ):
            train(settings("data.workers=1", "data.val=none"))
    run = only_run(settings)
    assert [path.name for path in checkpoints(run)] == ["step_00000001.ckpt"]
    assert train(settings("resume=last", "data.workers=0", "data.val=none")) == run


def test_a_worker_that_ends_with_batches_in_hand_is_named(toys, monkeypatch):
    handlers = torch.utils.data._utils.signal_handling
    monkeypatch.setattr(handlers, "_set_SIGCHLD_handler", lambda: None)
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler speaks at once, or a moment too late
    try:
        batches = iter(toys.staged("data.workers=1").data.train_dataloader())
        next(batches)
        time.sleep(1)  # the next ones are ready
        (worker,) = multiprocessing.active_children()
        worker.kill()
        worker.join()
        monkeypatch.setattr(worker, "is_alive", lambda: True)  # as long as the system clears up
        with pytest.raises(RuntimeError, match="DataLoader worker"):
            list(batches)
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_our_own_error_is_told_where_one_of_a_library_replaces_it(settings, monkeypatch):
    def replaced(*_):
        try:
            raise TrainingError("this is what happened")
        finally:
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

    monkeypatch.setattr(VlmModule, "training_step", replaced)
    with pytest.raises(TrainingError, match="this is what happened"):
        train(settings())


def test_an_error_of_the_program_in_a_worker_is_not_taken_for_its_end(settings, monkeypatch):
    def broken(self, item):
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr(MicroBatches, "__getitem__", broken)
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        train(settings("data.workers=1"))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_that_vanishes_is_named(settings, data, monkeypatch, workers):
    aside = data.with_name("aside")
    with monkeypatch.context() as patch:
        at_step(patch, 2, lambda: (data / "pictures").rename(aside))
        with pytest.raises(DataError, match=r"train\.jsonl:\d+ \(id \"train_\d+\"\): .*pictures/train_\d+\.png"):
            train(settings(*(["data.workers=1", "stage.max_steps=30", "data.val=none"] if workers else [])))
    if not workers:
        assert goes_on(settings, lambda: aside.rename(data / "pictures")) == [
            "step_00000003.ckpt"
        ]  # one batch is read ahead


def test_a_data_file_that_is_written_anew_is_refused_at_its_first_changed_row(settings, data, monkeypatch):
    rows = data / "train.jsonl"
    before = rows.read_bytes()

    def change():
        rows.write_bytes(
            before.replace(b'"value": "red"', b'"value": "odd"').replace(b'"value": "a red', b'"value": "a bad')
        )
        rows.write_bytes(rows.read_bytes().replace(b"What", b"Thut"))  # in place, at equal lengths

    with monkeypatch.context() as patch:
        at_step(patch, 2, change)
        with pytest.raises(DataError, match=r"train\.jsonl:\d+ .*says something else than when it was measured"):
            train(settings())
    assert goes_on(settings, lambda: rows.write_bytes(before)) == ["step_00000003.ckpt"]  # one batch is read ahead


def test_a_data_file_that_becomes_shorter_is_named(settings, data, monkeypatch):
    rows = data / "train.jsonl"
    before = rows.read_bytes()
    with monkeypatch.context() as patch:
        at_step(patch, 2, lambda: rows.write_bytes(before[:100]))
        with pytest.raises(DataError, match=r"train\.jsonl: became shorter while it was read"):
            train(settings())
    assert goes_on(settings, lambda: rows.write_bytes(before)) == ["step_00000003.ckpt"]  # one batch is read ahead


def test_validation_rows_that_were_changed_are_refused(settings, data):
    run = train(settings("stage.max_steps=3"))
    val = data / "val.jsonl"
    val.write_bytes(val.read_bytes().replace(b"red", b"odd").replace(b"green", b"groan").replace(b"blue", b"blow"))
    given = ("stage.max_steps=5", f"resume='{run}'")
    with pytest.raises(CheckpointError, match=r"val\.jsonl: rows were changed .* resume_allow=\[data\.val\]"):
        train(settings(*given))
    assert train(settings(*given, "resume_allow=[data.val]")) == run


# ---------------------------------------------------------------------------------------------- while rows are measured


@pytest.fixture
def many(toys, tmp_path):
    """Write so many rows that processes measure them."""
    rows = [{"id": f"{i}", "conversations": turns((f"Say {i}.", f"{i}"))} for i in range(index.MANY + 10)]
    write_jsonl(tmp_path / "many.jsonl", rows)
    return toys.arguments(*ALL, f"data.path={tmp_path}/many.jsonl", "data.val=none", runs=tmp_path / "runs")


def test_a_measuring_process_that_is_killed_is_named(many, monkeypatch):
    monkeypatch.setattr(index.Chunks, "__getitem__", lambda self, number: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(
        DataError, match=r"many\.jsonl: a process that measures rows was ended from outside \(DataLoader"
    ):
        train(load_config(many))


def test_a_stop_while_rows_are_measured_shows_no_traceback(many, monkeypatch, tmp_path):
    monkeypatch.setattr(index.Chunks, "__getitem__", lambda self, number: time.sleep(60))
    process = fork_cli(many, tmp_path / "log")
    os.setpgid(process.pid, process.pid)
    children = f"/proc/{process.pid}/task/{process.pid}/children"
    while len(subprocess.run(["cat", children], capture_output=True, text=True, check=False).stdout.split()) < 2:
        assert process.is_alive(), (tmp_path / "log").read_text(encoding="utf-8")
        time.sleep(0.05)
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    process.join(30)
    said = (tmp_path / "log").read_text(encoding="utf-8")
    assert process.exitcode == 130, said
    assert "Traceback" not in said
