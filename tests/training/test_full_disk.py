"""A disk that is full ends a run with the name of the file and nothing lost, or is got over where that is right."""

import contextlib
import errno
import os
import subprocess

import pytest
from compare import assert_same, metrics_of, state_of

from vlm_tune.config.parse import load_config
from vlm_tune.errors import CheckpointError, DataError, TrainingError
from vlm_tune.model.checkpoint import CHECKPOINTS, checkpoints
from vlm_tune.training.callbacks import chats, metrics
from vlm_tune.training.callbacks.checkpoints import SaveCheckpoints
from vlm_tune.training.report import RunReport
from vlm_tune.training.run import train
from vlm_tune.training.run_folder import append

STEPS = 6
ALL = (
    "stage=finetune",
    "stage.init_from=none",
    f"stage.max_steps={STEPS}",
    "stage.evaluate=false",
    "trainer.num_chats=0",
    "trainer.save_every=1",
    "trainer.keep=99",
    "trainer.val_every=3",
)


@pytest.fixture(scope="session")
def _may_mount(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mount")
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], capture_output=True, check=False).returncode:
        pytest.skip("a small disk needs the right to mount one")
    subprocess.run(["umount", folder], check=True)


@pytest.fixture
def disk(tmp_path, _may_mount):
    """Mount a disk of 8 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], check=True)
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill(disk):
    with (disk / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(512))


def at(monkeypatch, step, act, kind=SaveCheckpoints, hook="on_train_batch_start"):
    """Do something once, when a step begins."""
    before, done = getattr(kind, hook), []

    def acting(self, trainer, *rest):
        if trainer.global_step == step and not done:
            done.append(act())
        return before(self, trainer, *rest)

    monkeypatch.setattr(kind, hook, acting)


def settings(toys, runs, *more):
    return load_config(toys.arguments(*{key.partition("=")[0]: key for key in (*ALL, *more)}.values(), runs=runs))


@pytest.fixture(scope="module")
def straight(toys, tmp_path_factory):
    return train(settings(toys, tmp_path_factory.mktemp("straight")))


def only_run(runs):
    (run,) = {path.resolve() for path in runs.iterdir() if path.is_dir() and not path.is_symlink()}
    return run


def test_a_checkpoint_that_does_not_fit_is_an_error_and_the_one_before_it_stands(toys, disk, monkeypatch, straight):
    at(monkeypatch, 3, lambda: fill(disk))
    with pytest.raises(CheckpointError, match=r"step_00000004\.ckpt: could not be written .*; 0\.0 MiB are free there"):
        train(settings(toys, disk / "runs"))
    run = only_run(disk / "runs")
    assert [path.name for path in checkpoints(run)][-1] == "step_00000003.ckpt"
    assert sorted(path.name for path in (run / CHECKPOINTS).iterdir())[0] == "best.ckpt", "no half of a checkpoint"
    (disk / "filler").unlink()
    train(settings(toys, disk / "runs", "resume=last"))
    assert_same(state_of(run, STEPS), state_of(straight, STEPS))
    assert metrics_of(run) == metrics_of(straight)


def full(path, text):
    """Be a disk that is full for the one file: a small disk always has room in the last block of a file."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def test_a_text_that_does_not_fit_leaves_no_half_of_it(disk):
    append(disk / "lines", "whole\n")
    fill(disk)
    with pytest.raises(OSError, match="No space left on device") as caught:
        append(disk / "lines", "a line that needs a second block" * 1000 + "\n")
    assert caught.value.filename == str(disk / "lines")
    assert (disk / "lines").read_text(encoding="utf-8") == "whole\n"


def test_metrics_that_do_not_fit_wait_until_there_is_room(toys, tmp_path, monkeypatch, straight, capsys):
    at(monkeypatch, 1, lambda: monkeypatch.setattr(metrics, "append", full))
    at(monkeypatch, 4, lambda: monkeypatch.setattr(metrics, "append", append))
    run = train(settings(toys, tmp_path))
    assert metrics_of(run) == metrics_of(straight)
    assert capsys.readouterr().out.count("metrics.csv: No space left on device: its rows are kept until there is") == 1


def test_metrics_that_were_never_written_are_in_the_checkpoint(toys, tmp_path, monkeypatch, straight):
    with monkeypatch.context() as patch:
        at(patch, 2, lambda: patch.setattr(metrics, "append", full))
        train(settings(toys, tmp_path, "trainer.save_every=5"))
    run = only_run(tmp_path)
    assert len(metrics_of(run)) < len(metrics_of(straight))
    for path in checkpoints(run)[1:]:
        path.unlink()
    train(settings(toys, tmp_path, "resume=last", "trainer.save_every=5"))
    assert metrics_of(run) == metrics_of(straight)


def test_a_run_goes_on_without_tensorboard(disk, capsys):
    curves = metrics.Curves(disk, name="", version="tensorboard")
    curves.log_metrics({"train/loss": 1.0}, 1)
    curves.save()
    fill(disk)
    for step in range(500):
        curves.log_metrics({"train/loss": 1.0}, step)
        curves.save()
    curves.finalize("success")
    assert capsys.readouterr().out.count("No space left on device: the run goes on without TensorBoard") == 1


def test_a_report_that_does_not_fit_is_written_by_a_resumed_run(toys, disk, monkeypatch):
    with monkeypatch.context() as patch:
        write = RunReport.write
        patch.setattr(RunReport, "write", lambda *given: (fill(disk), write(*given)))
        with pytest.raises(TrainingError, match=r"its report could not be written \(No space left on device\)\. All"):
            train(settings(toys, disk / "runs"))
    run = only_run(disk / "runs")
    assert not (run / "report.json").exists()
    (disk / "filler").unlink()
    train(settings(toys, disk / "runs", "resume=last"))
    assert (run / "report.html").exists()


def test_features_that_do_not_fit_name_their_folder(toys, disk, monkeypatch, tmp_path):
    monkeypatch.setenv("VLM_TUNE_CACHE", str(disk))
    train(settings(toys, tmp_path / "first", "data.feature_cache=off", "stage.max_steps=1"))  # the rows' sizes are kept
    from vlm_tune.model import fill_cache

    cut = fill_cache.FeatureCache.write
    monkeypatch.setattr(fill_cache.FeatureCache, "write", lambda *given: (fill(disk), cut(*given)))
    with pytest.raises(DataError, match=r"the features of a picture could not be kept .*data\.feature_cache=off"):
        train(settings(toys, tmp_path / "second"))
    assert not list(disk.rglob("*.safetensors"))


def test_sample_answers_that_do_not_fit_end_the_run_with_the_files_name(toys, tmp_path, monkeypatch, run_cli):
    at(monkeypatch, 2, lambda: monkeypatch.setattr(chats, "append", full))
    given = [*ALL, "trainer.num_chats=1", "trainer.chat_every=3", "trainer.save_every=2"]
    done = run_cli(*toys.arguments(*{key.partition("=")[0]: key for key in given}.values(), runs=tmp_path))
    assert done.code == 2
    assert "sample_answers.jsonl: No space left on device. Free some space; an interrupted run then goes on" in done.err
