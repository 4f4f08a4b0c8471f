"""A run that is asked to stop ends its step, saves its state, says so by its exit code, and goes on as before."""

import os
import signal
import time

import pytest
from compare import assert_same, metrics_of, state_of
from processes import fork_cli

from vlm_tune.config.parse import load_config
from vlm_tune.model.checkpoint import checkpoints
from vlm_tune.training.callbacks.checkpoints import SaveCheckpoints
from vlm_tune.training.callbacks.stop import SIGNALS
from vlm_tune.training.run import train

STEPS = 6
ALL = (
    "stage=finetune",
    "stage.init_from=none",
    f"stage.max_steps={STEPS}",
    "stage.lora.dropout=0.1",
    "stage.lr={projector: 0.01, llm: 0.01}",
    "stage.evaluate=false",
    "trainer.save_every=100",
    "trainer.val_every=4",
    "trainer.chat_every=2",
    "trainer.num_chats=1",
    "data.workers=2",
)


def arguments(toys, runs, *more):
    return toys.arguments(*{key.partition("=")[0]: key for key in (*ALL, *more)}.values(), runs=runs)


@pytest.fixture(scope="module")
def straight(toys, tmp_path_factory):
    return train(load_config(arguments(toys, tmp_path_factory.mktemp("straight"))))


def send(number, hook, when):
    """Make a callback's hook that sends this process a signal."""

    def act(self, trainer, *rest):
        if trainer.global_step == when and not self.watch.stop.asked:
            os.kill(os.getpid(), number)
        return hook(self, trainer, *rest)

    return act


def only_run(runs):
    (run,) = {path.resolve() for path in runs.iterdir() if not path.is_symlink()}
    return run


def end_of(run, straight):
    assert_same(state_of(run, STEPS), state_of(straight, STEPS))
    assert metrics_of(run) == metrics_of(straight)
    ours, theirs = ((each / "sample_answers.jsonl").read_text(encoding="utf-8") for each in (run, straight))
    assert ours == theirs


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_the_step_is_ended_and_saved_and_the_run_goes_on_bit_by_bit(
    toys, run_cli, straight, tmp_path, monkeypatch, number
):
    given = arguments(toys, tmp_path)
    with monkeypatch.context() as patch:
        hook = SaveCheckpoints.on_train_batch_start
        patch.setattr(SaveCheckpoints, "on_train_batch_start", send(number, hook, 3))  # its first micro-batch of two
        done = run_cli(*given)
    assert done.code == 75
    assert f"{number.name}: stopped after step 4, and its state is saved. Go on with resume=last" in done.err
    run = only_run(tmp_path)
    assert [path.name for path in checkpoints(run)] == ["step_00000004.ckpt"]
    assert run_cli(*given, "resume=last").code == 0
    end_of(run, straight)


def test_a_stop_in_a_validation_waits_for_no_further_step(toys, run_cli, straight, tmp_path, monkeypatch):
    given = arguments(toys, tmp_path)
    with monkeypatch.context() as patch:
        hook = SaveCheckpoints.on_validation_batch_end
        patch.setattr(SaveCheckpoints, "on_validation_batch_end", send(signal.SIGTERM, hook, 4))
        done = run_cli(*given)
    assert done.code == 75
    run = only_run(tmp_path)
    assert [path.name for path in checkpoints(run)] == ["step_00000004.ckpt"]
    assert run_cli(*given, "resume=last").code == 0
    end_of(run, straight)


def test_the_signals_are_given_back(toys, straight, run_cli, tmp_path):
    before = [signal.getsignal(each) for each in SIGNALS]
    run_cli(*arguments(toys, tmp_path, "stage.max_steps=1"))
    assert [signal.getsignal(each) for each in SIGNALS] == before


def test_a_stop_that_reaches_the_data_workers_too_is_a_stop(toys, straight, tmp_path):
    # as a terminal sends Ctrl-C, and SLURM its signal: to the whole group
    process = fork_cli(arguments(toys, tmp_path, "stage.max_steps=2000"), tmp_path / "log")
    os.setpgid(process.pid, process.pid)
    while sum(len(path.read_text().splitlines()) for path in tmp_path.glob("*/metrics.csv")) < 4:  # some steps
        assert process.is_alive(), (tmp_path / "log").read_text(encoding="utf-8")
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    process.join(60)
    said = (tmp_path / "log").read_text(encoding="utf-8")
    assert process.exitcode == 75, said
    assert "Traceback" not in said


def test_a_run_saves_by_minutes(toys, run_cli, tmp_path):
    given = arguments(toys, tmp_path, "trainer.save_minutes=0.001", "trainer.keep=9")
    assert run_cli(*given).code == 0
    assert len(checkpoints(only_run(tmp_path))) > 1


@pytest.mark.parametrize("minutes", ["0", "-1"])
def test_minutes_that_never_end_are_refused(toys, run_cli, tmp_path, minutes):
    done = run_cli(*arguments(toys, tmp_path, f"trainer.save_minutes={minutes}"))
    assert done.code == 2
    assert f"trainer.save_minutes={minutes}" in done.err
