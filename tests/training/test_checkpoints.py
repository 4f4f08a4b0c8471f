"""A run that goes back to an older checkpoint loses none, and is found again by its newest one."""

import shutil

import pytest

from vlm_tune.config.parse import load_config
from vlm_tune.model.checkpoint import CHECKPOINTS, checkpoint_name, checkpoints, find_checkpoint
from vlm_tune.training.callbacks.checkpoints import put_newer_aside
from vlm_tune.training.run import train

ALL = (
    "stage=finetune",
    "stage.init_from=none",
    "stage.max_steps=6",
    "stage.evaluate=false",
    "trainer.global_batch=1",
    "trainer.save_every=1",
    "trainer.keep=100",
    "trainer.val_every=4",
    "trainer.chat_every=2",
    "trainer.num_chats=1",
)


@pytest.fixture(scope="module")
def straight(toys, tmp_path_factory):
    return train(load_config(arguments(toys, tmp_path_factory.mktemp("straight"))))


@pytest.fixture
def run(straight, tmp_path):
    """Copy the run, for a test to go on with."""
    shutil.copytree(straight, tmp_path / "run")
    return tmp_path / "run"


def arguments(toys, runs, *more):
    return toys.arguments(*{key.partition("=")[0]: key for key in (*ALL, *more)}.values(), runs=runs)


def best_of(run):
    return run / CHECKPOINTS / "best.ckpt"


def test_newer_checkpoints_are_put_aside(toys, run, capsys):
    # else they would be its newest ones: `keep` would remove the steps made anew, and resume=last leave them out
    newer = [path.read_bytes() for path in checkpoints(run)[2:]]
    settings = (f"resume='{checkpoints(run)[1]}'", "resume_allow=[trainer.save_every]")
    train(load_config(arguments(toys, run.parent, *settings, "trainer.save_every=3", "trainer.keep=2")))
    assert checkpoints(run) == [run / CHECKPOINTS / checkpoint_name(step) for step in (3, 6)]
    assert [path.read_bytes() for path in sorted((run / CHECKPOINTS).glob("step_*.replaced"))] == newer
    assert best_of(run).with_name("best.ckpt.replaced").exists()
    assert "5 newer checkpoints" in capsys.readouterr().out


def test_sample_answers_of_steps_that_are_made_anew_stand_once(toys, run, straight):
    train(load_config(arguments(toys, run.parent, f"resume='{checkpoints(run)[2]}'")))
    ours, theirs = ((each / "sample_answers.jsonl").read_text(encoding="utf-8") for each in (run, straight))
    assert ours == theirs


def test_a_second_way_back_overwrites_nothing_that_the_first_put_aside(run):
    last = checkpoints(run)[-1]
    first = last.read_bytes()
    put_newer_aside(run, 3)
    last.write_bytes(b"made anew")
    put_newer_aside(run, 3)
    assert last.with_name(f"{last.name}.replaced").read_bytes() == first
    assert last.with_name(f"{last.name}.replaced.replaced").read_bytes() == b"made anew"


def test_a_run_that_goes_back_to_its_best_and_is_killed_is_found_again(run):
    step = 4
    shutil.copy(checkpoints(run)[step - 1], best_of(run))
    for path in checkpoints(run)[:step]:
        path.unlink()  # as a small `keep` does
    put_newer_aside(run, step)
    assert [path.name for path in checkpoints(run)] == [checkpoint_name(step)]
    assert find_checkpoint(str(run)).read_bytes() == best_of(run).read_bytes()


def test_a_damaged_best_checkpoint_hinders_no_way_back(run):
    best = best_of(run)
    best.write_bytes(best.read_bytes()[:1000])
    put_newer_aside(run, 3)
    assert best.with_name("best.ckpt.replaced").exists()
    assert len(checkpoints(run)) == 3


def test_a_run_that_goes_on_from_its_newest_checkpoint_puts_none_aside(run):
    before = {path: path.read_bytes() for path in (run / CHECKPOINTS).iterdir()}
    put_newer_aside(run, 6)
    assert {path: path.read_bytes() for path in (run / CHECKPOINTS).iterdir()} == before
