"""A data worker that is frozen ends the run with its state saved; one that is slow does not."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch

from vlm_tune.config.parse import load_config
from vlm_tune.data import progress
from vlm_tune.data.sets.micro_batches import MicroBatches
from vlm_tune.errors import TrainingError
from vlm_tune.model.checkpoint import checkpoints, find_runs
from vlm_tune.training.run import train

ALL = (
    "stage=finetune",
    "stage.init_from=none",
    "stage.max_steps=6",
    "stage.evaluate=false",
    "trainer.num_chats=0",
    "trainer.save_every=100",
    "data.feature_cache=off",
    "data.val=none",
    "data.workers=1",
)


@pytest.fixture
def impatient(monkeypatch):
    """Look often, and lose patience after two seconds."""
    monkeypatch.setattr(progress, "LOOK", 0.5)
    monkeypatch.setattr(progress, "STILL", 2.0)


def at_batch(monkeypatch, number, act):
    """Do something in each data worker before its batch of a number."""
    make = MicroBatches.__getitem__

    def acting(self, item):
        self.made = getattr(self, "made", 0) + 1
        if torch.utils.data.get_worker_info() is not None and self.made == number:
            act()
        return make(self, item)

    monkeypatch.setattr(MicroBatches, "__getitem__", acting)


def stop():
    os.kill(os.getpid(), signal.SIGSTOP)


def wait_for_ever():
    signal.sigwait([signal.SIGUSR1])


def compute():
    end = time.monotonic() + 5
    while time.monotonic() < end:
        pass


def read_slowly():
    with Path("/dev/zero").open("rb", buffering=0) as file:
        for _ in range(10):
            time.sleep(0.5)
            file.read(1)


@pytest.mark.parametrize(("act", "said"), [(stop, r"process \d+ \(stopped\)"), (wait_for_ever, r"process \d+")])
def test_a_frozen_worker_is_named_and_the_steps_are_saved(toys, tmp_path, monkeypatch, impatient, act, said):
    with monkeypatch.context() as patch:
        at_batch(patch, 9, act)  # four are loaded ahead: some steps are done by then
        with pytest.raises(TrainingError, match=said + " should read data, and has neither computed nor read"):
            train(load_config(toys.arguments(*ALL, runs=tmp_path)))
    run = find_runs(tmp_path)[0]
    assert len(checkpoints(run)) == 1
    assert train(load_config(toys.arguments(*ALL, "resume=last", runs=tmp_path))) == run


@pytest.mark.parametrize("act", [compute, read_slowly])
def test_a_slow_worker_is_waited_for(toys, tmp_path, monkeypatch, impatient, act):
    at_batch(monkeypatch, 3, act)
    train(load_config(toys.arguments(*ALL, runs=tmp_path)))
