"""A run has a folder of its own, made once by its first process, and runs/latest points at one."""

import datetime
import json
import multiprocessing
import os
from pathlib import Path

import pytest

from vlm_tune.config.parse import load_config, read_config
from vlm_tune.errors import ConfigError
from vlm_tune.training import run_folder
from vlm_tune.training.run_folder import FOLDER_VARIABLE, link_latest, make_run_folder


@pytest.fixture(autouse=True)
def _environment_restored(monkeypatch):
    monkeypatch.setenv(FOLDER_VARIABLE, "")  # so that monkeypatch puts back what was there


@pytest.fixture
def config(tmp_path):
    return load_config(["stage=pretrain", "model=tiny", f"runs={tmp_path}/runs"])


class StoppedClock:
    """Show the same second for ever."""

    @staticmethod
    def now():
        return datetime.datetime(2026, 11, 21, 23, 59, 59)


@pytest.fixture
def _one_second(monkeypatch):
    monkeypatch.setattr(run_folder, "datetime", StoppedClock)


@pytest.mark.usefixtures("_one_second")
def test_three_runs_of_one_second_have_three_folders(config):
    names = [make_run_folder(config, None).name for _ in range(3)]
    assert names == [f"2026-11-21_23-59-59_pretrain_tiny{counter}" for counter in ("", "_2", "_3")]


def test_processes_of_one_moment_have_folders_of_their_own(config):
    context = multiprocessing.get_context("fork")  # forked, since importing torch anew takes seconds each
    barrier, folders = context.Barrier(8), context.SimpleQueue()

    def start():
        barrier.wait()
        folders.put(make_run_folder(config, None).name)

    processes = [context.Process(target=start) for _ in range(8)]
    for process in processes:
        process.start()
    names = {folders.get() for _ in processes}
    for process in processes:
        process.join()
    assert len(names) == 8
    assert {path.name for path in Path(config.runs).iterdir()} == names


@pytest.mark.usefixtures("_one_second")
def test_latest_points_at_the_newest(config):
    for _ in range(3):
        newest = make_run_folder(config, None)
        link_latest(newest)
        assert (Path(config.runs) / "latest").resolve() == newest


def test_latest_is_a_relative_link(config):
    # so that a folder of runs can be moved or mounted elsewhere
    link_latest(make_run_folder(config, None))
    assert not os.path.isabs(os.readlink(Path(config.runs) / "latest"))


def test_a_process_of_a_later_rank_takes_the_folder_of_the_first(config, monkeypatch):
    first = make_run_folder(config, None)
    monkeypatch.setenv("LOCAL_RANK", "1")  # as Lightning starts the others, with the first one's environment
    assert make_run_folder(config, None) == first


def test_a_folder_can_be_read_without_the_run(config, tmp_path):
    folder = make_run_folder(config, tmp_path / "start.ckpt")
    assert read_config(folder / "config.yaml") == config
    assert (folder / "starts_from.txt").read_text(encoding="utf-8") == str(tmp_path / "start.ckpt")
    environment = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    assert {"python", "platform", "command", "git", "torch", "transformers"} <= environment.keys()


def test_a_folder_that_cannot_be_written_names_its_key(tmp_path):
    (tmp_path / "file").touch()
    config = load_config(["model=tiny", f"runs={tmp_path}/file/runs"])
    with pytest.raises(
        ConfigError, match=r"runs=.*/file/runs: cannot be written \(Not a directory\)\. Set runs=FOLDER"
    ):
        make_run_folder(config, None)
