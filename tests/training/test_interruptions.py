"""What stops a run from outside or from within a worker is said in one line, never by a stranger's traceback."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from vlm_tune.config.parse import load_config
from vlm_tune.data.sets.micro_batches import MicroBatches
from vlm_tune.errors import CheckpointError, DataError, TrainingError
from vlm_tune.model.checkpoint import checkpoints, trained_weights
from vlm_tune.training.run import train

SHORT = ("stage=finetune", "stage.init_from=none", "stage.max_steps=4", "stage.evaluate=false", "trainer.num_chats=0")
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_fault_of_a_row_in_a_worker_is_the_rows_own(toys, tmp_path, monkeypatch, workers):
    def broken(self, item):
        raise DataError("was replaced", "train.jsonl:3", "train_2")

    monkeypatch.setattr(MicroBatches, "__getitem__", broken)
    with pytest.raises(DataError) as caught:
        train(load_config(toys.arguments(*SHORT, f"data.workers={workers}", "data.val=none", runs=tmp_path)))
    assert str(caught.value) == 'train.jsonl:3 (id "train_2"): was replaced'


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "ended"])
def test_a_data_worker_that_is_killed_is_named(toys, tmp_path, monkeypatch, stop):
    make = MicroBatches.__getitem__

    def killed(self, item):
        if torch.utils.data.get_worker_info() is not None:
            os.kill(os.getpid(), stop)
            time.sleep(60)
        return make(self, item)

    monkeypatch.setattr(MicroBatches, "__getitem__", killed)
    with pytest.raises(TrainingError, match=r"a process that reads data was ended from outside \(DataLoader worker"):
        train(load_config(toys.arguments(*SHORT, "data.workers=1", "data.val=none", runs=tmp_path)))


@pytest.mark.parametrize("seconds", [0.05, 0.3, 1.0])
def test_a_stop_during_the_start_shows_no_traceback(seconds):
    command = [sys.executable, "-m", "vlm_tune", "stage=pretrain", "resume=last", "runs=/nowhere"]
    default = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.default_int_handler)}
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **default)
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    if seconds > 0.1:  # before, the interpreter itself may still be starting; on a busy machine later too
        assert "Traceback" not in said
        # The signal ends an interpreter that is not up yet or goes down. Python also ends by it, which is 130 to a
        # shell, where Ctrl-C came while it ran code from a string, as named tuples and data classes are made.
        assert process.returncode in (2, 130, -signal.SIGINT)
        assert not said or "CheckpointError" in said or said.startswith("\nstopped.")


WRAPPED = """
import runpy, sys
class Finder:
    def find_spec(self, name, *given):
        if name == "vlm_tune.cli":
            {raised}
sys.meta_path.insert(0, Finder())
runpy.run_module("vlm_tune", run_name="__main__")
"""


@pytest.mark.parametrize(
    "raised",
    [
        'raise RuntimeError("Error calling __set_name__") from {}',  # Python 3.11, while a class names its fields
        "try: raise {}\n            finally: None.missing",  # a library that cleans up what is half made
    ],
    ids=["wrapped", "led to another"],
)
@pytest.mark.parametrize(("error", "code", "is_said"), [("KeyboardInterrupt()", 130, False), ("ValueError()", 1, True)])
def test_a_stop_is_one_too_where_another_error_came_of_it(raised, error, code, is_said):
    script = WRAPPED.format(raised=raised.format(error))
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert (ended.returncode, "Traceback" in ended.stderr) == (code, is_said)


# ------------------------------------------------------------------------------------- a checkpoint that lies


@pytest.fixture(scope="module")
def short(toys, tmp_path_factory):
    return train(load_config(toys.arguments(*SHORT, "trainer.save_every=2", runs=tmp_path_factory.mktemp("runs"))))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: [1, 2], "it holds a list. Name a checkpoint of a vlm_tune run"),
        (lambda state: state | {"state_dict": [1]}, "its state_dict holds no weights by name"),
        (lambda state: state | {"state_dict": {"a": 3}}, "its state_dict holds no weights by name"),
        (lambda state: {"state_dict": state["state_dict"]}, "it lacks global_step, loops, optimizer_states"),
        (lambda state: {key: state[key] for key in state if key != "counts"}, "it lacks counts, so a run cannot go on"),
        (lambda state: state | {"global_step": 2}, "by its name it is of another step than by what it holds, 2. Give"),
        (
            lambda state: (
                state | {"state_dict": {name: each * float("nan") for name, each in state["state_dict"].items()}}
            ),
            "of its weights are no numbers",
        ),
    ],
    ids=["a list", "a list of weights", "numbers", "weights alone", "no counts", "another step", "no numbers"],
)
def test_a_checkpoint_that_is_not_what_it_says_is_refused(toys, short, tmp_path, change, said):
    shutil.copytree(short, tmp_path / short.name)
    path = checkpoints(tmp_path / short.name)[-1]
    torch.save(change(torch.load(path, weights_only=True)), path)
    with pytest.raises(CheckpointError, match=said) as caught:
        train(load_config(toys.arguments(*SHORT, "trainer.save_every=2", f"resume='{path}'", runs=tmp_path)))
    assert str(caught.value).startswith(str(path))


def test_weights_that_are_no_numbers_are_not_opened(short, tmp_path):
    shutil.copytree(short, tmp_path / short.name)
    path = checkpoints(tmp_path / short.name)[-1]
    state = torch.load(path, weights_only=True)
    next(iter(state["state_dict"].values())).view(-1)[0] = float("inf")
    torch.save(state, path)
    with pytest.raises(CheckpointError, match=r"1 of its weights are no numbers"):
        trained_weights(path)
