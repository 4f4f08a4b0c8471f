"""Where one of two ranks is gone, hangs or fails, the other one ends, with its number and its last step."""

import os
import signal
import time

import pytest
from compare import assert_same, metrics_of, state_of
from processes import two_ranks

from vlm_tune.errors import DataError
from vlm_tune.model.checkpoint import checkpoints, find_runs
from vlm_tune.training.callbacks import ranks
from vlm_tune.training.callbacks.ranks import BACKWARD, COMPUTES, ENDS, READS, Sign, WatchRanks
from vlm_tune.training.module import VlmModule

ALL = (
    "stage=finetune",
    "stage.init_from=none",
    "stage.max_steps=8",
    "stage.evaluate=false",
    "trainer.num_chats=0",
    "trainer.save_every=100",
    "trainer.val_every=100",
    "data.val=none",
    "trainer.devices=2",
    "trainer.accelerator=cpu",
    "strategy=ddp",
)


KILL = pytest.mark.kill  # two processes start in seconds


def strike(monkeypatch, act, step=3, rank="1"):
    """Let something happen to one rank in a step."""
    begin = VlmModule.training_step

    def struck(self, batch, batch_idx):
        if self.global_step == step and os.environ.get("LOCAL_RANK") == rank:
            act()
        return begin(self, batch, batch_idx)

    monkeypatch.setattr(VlmModule, "training_step", struck)


def hasten(monkeypatch):
    for name, seconds in {"SILENCE": 2.0, "HANG": 2.0, "MANNERS": 1.0, "BEAT": 0.2}.items():
        monkeypatch.setattr(ranks, name, seconds)
    monkeypatch.setattr(ranks, "SLOWER", 2.0)


def fail():
    raise DataError("was replaced", "train.jsonl:3", "train_2")


@pytest.mark.parametrize(
    ("act", "said"),
    [
        pytest.param(lambda: os.kill(os.getpid(), signal.SIGKILL), "rank 1 has given no sign of life for", id="killed"),
        pytest.param(
            lambda: os.kill(os.getpid(), signal.SIGSTOP),
            "rank 1 has given no sign of life for",
            id="stopped",
            marks=KILL,
        ),
        pytest.param(lambda: time.sleep(100), "rank 1 has not moved for", id="hangs", marks=KILL),
        pytest.param(
            fail, 'rank 1 ended with DataError: train.jsonl:3 (id "train_2"): was replaced;', id="fails", marks=KILL
        ),
    ],
)
def test_the_other_rank_names_it_and_its_last_step(toys, tmp_path, monkeypatch, act, said):
    hasten(monkeypatch)
    strike(monkeypatch, act)
    start = time.monotonic()
    with two_ranks(toys.arguments(*ALL, runs=tmp_path / "runs"), tmp_path / "runs") as (processes, read):
        processes[0].join(60)
        assert time.monotonic() - start < 60
        assert processes[0].exitcode == 2, read(0)
        assert said in read(0)
        assert "3 steps were done" in read(0)
        assert "Start all" in read(0) or "start all" in read(0)
        assert "Traceback" not in read(0)


@pytest.mark.kill
def test_the_first_rank_saves_what_was_done_when_the_other_is_killed(toys, tmp_path, monkeypatch):
    hasten(monkeypatch)
    given = toys.arguments(*ALL, runs=tmp_path / "runs")
    with monkeypatch.context() as patch:
        strike(patch, lambda: os.kill(os.getpid(), signal.SIGKILL))
        with two_ranks(given, tmp_path / "runs") as (processes, _):
            processes[0].join(60)
    (run,) = find_runs(tmp_path / "runs")
    assert [path.name for path in checkpoints(run)] == ["step_00000003.ckpt"]
    with two_ranks([*given, "resume=last"], tmp_path / "runs", is_new=False) as (processes, read):
        for process in processes:
            process.join(60)
        assert [process.exitcode for process in processes] == [0, 0], read(0)
    with two_ranks(toys.arguments(*ALL, runs=tmp_path / "straight"), tmp_path / "straight") as (processes, read):
        for process in processes:
            process.join(60)
    (straight,) = find_runs(tmp_path / "straight")
    assert_same(state_of(run, 8)["state_dict"], state_of(straight, 8)["state_dict"])
    assert metrics_of(run) == metrics_of(straight)


@pytest.mark.parametrize("rank", [pytest.param("0", marks=KILL), "1"])
def test_both_ranks_stop_at_the_same_step_whichever_is_asked(toys, tmp_path, monkeypatch, rank):
    strike(monkeypatch, lambda: os.kill(os.getpid(), signal.SIGTERM), rank=rank)
    monkeypatch.setattr("vlm_tune.training.callbacks.stop.StopWhenAsked._note", once)
    with two_ranks(toys.arguments(*ALL, runs=tmp_path / "runs"), tmp_path / "runs") as (processes, read):
        for process in processes:
            process.join(60)
        assert processes[0].exitcode == 75, read(0) + read(1)
        assert "stopped after step 4" in read(0)
        assert "stopped after step 4" in read(1)
    (run,) = find_runs(tmp_path / "runs")
    assert [path.name for path in checkpoints(run)] == ["step_00000004.ckpt"]


def once(self, number, frame):
    """Note a signal, as often as it comes: each micro-batch of the step sends one."""
    self.asked = signal.Signals(number).name


# ------------------------------------------------------------------------------------------------- who is it that hangs


def judged(signs, silent=0.0, still=1000.0):
    watch = WatchRanks()
    watch.has_raised.set()
    everyone = dict(enumerate(signs))
    watch._judge(everyone, dict.fromkeys(everyone, silent), dict.fromkeys(everyone, still))
    return watch.lost


def sign(batch, place, **more):
    return Sign(number=9, step=3, batch=batch, place=place, longest=1.0, **more)


@pytest.mark.parametrize(
    ("signs", "said"),
    [
        ([sign(6, BACKWARD), sign(6, COMPUTES)], "rank 1 has not moved for 1000 s: 3 steps were done, and it computes"),
        ([sign(6, COMPUTES), sign(7, READS)], "rank 0 has not moved"),
        ([sign(6, BACKWARD), sign(6, BACKWARD)], "rank 0 and 1 has not moved"),
        ([sign(7, READS), sign(7, COMPUTES)], "rank 0 has not moved for 1000 s: 3 steps were done, and it reads data"),
    ],
)
def test_the_last_one_is_the_one_that_hangs(signs, said):
    assert said in judged(signs)


def test_who_answers_questions_saves_or_has_done_its_last_step_does_not_hang():
    assert judged([sign(6, ENDS), sign(7, COMPUTES)]) == ""
    assert judged([sign(6, BACKWARD, ended="has done its last step"), sign(7, COMPUTES)]) == ""


def test_a_step_that_takes_long_takes_longer_to_hang():
    slow = Sign(number=9, step=3, batch=6, place=COMPUTES, longest=200.0)
    assert judged([slow, sign(6, BACKWARD)]) == ""
    first = Sign(number=9, batch=0, place=COMPUTES)  # nothing is known of a step yet
    assert judged([first, Sign(number=9, batch=0, place=BACKWARD)], still=600.0) == ""


@pytest.mark.kill
def test_a_finished_run_of_two_ranks_ends_though_one_is_done_before_the_other(toys, tmp_path, monkeypatch):
    hasten(monkeypatch)
    chosen = {key.partition("=")[0]: key for key in (*ALL, "trainer.num_chats=1")}
    given = toys.arguments(*chosen.values(), runs=tmp_path / "runs")
    for more, is_new in ((), True), (("resume=last",), False):
        with two_ranks([*given, *more], tmp_path / "runs", is_new) as (processes, read):
            for process in processes:
                process.join(100)
            assert [process.exitcode for process in processes] == [0, 0], read(0) + read(1)
