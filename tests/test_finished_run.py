"""Mistakes beside runs and files that are there: nothing of the user's is overwritten, and errors have a way out."""

import io
import os
import shutil
import sys

import pytest
import torch
from filelock import FileLock
from PIL import Image

from vlm_tune import cli
from vlm_tune.cli import main
from vlm_tune.config.parse import load_config
from vlm_tune.errors import CheckpointError, TrainingError
from vlm_tune.model import ready
from vlm_tune.model.checkpoint import CHECKPOINTS, checkpoints, start_of
from vlm_tune.serve.chat import Chat
from vlm_tune.training.run import train
from vlm_tune.training.run_folder import make_run_folder

pytestmark = pytest.mark.filterwarnings("ignore")
QUIET = ("stage.init_from=none", "stage.max_steps=2", "stage.evaluate=false", "trainer.num_chats=0")


@pytest.fixture(scope="module")
def finished(toys, tmp_path_factory):
    """Pretrain and fine-tune; return the runs folder."""
    runs = tmp_path_factory.mktemp("runs")
    for stage in ("pretrain", "finetune"):
        settings = (*QUIET, "trainer.save_every=1") if stage == "pretrain" else QUIET[1:]
        assert main(toys.arguments(f"stage={stage}", *settings, runs=runs)) == 0
    return runs


@pytest.fixture
def runs(finished, tmp_path):
    """Copy the runs, for a test to change them."""
    shutil.copytree(finished, tmp_path / "runs", symlinks=True)
    return tmp_path / "runs"


def run_of_stage(runs, stage):
    (run,) = runs.glob(f"*_{stage}_*")
    return run


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["evaluate", "out={old}"], "the file is there already. Name a new one: nothing is overwritten"),
        (["evaluate", "out={folder}"], "not a file in a folder that is there"),
        (["evaluate", "out={folder}/none/answers.jsonl"], "not a file in a folder that is there"),
        (["export", "out={old}"], "a file of that name is there. Name a new folder: nothing is overwritten"),
        (["export", "out={folder}/new", "max_shard_size=foo"], "max_shard_size=foo: write a number and KB, MB"),
        (["export", "out={folder}/new", "max_shard_size=0"], "max_shard_size=0: write a number and KB, MB"),
        (["export", "out=/dev/null/new"], "/dev/null/new"),
    ],
)
def test_what_is_there_stays_and_what_cannot_be_is_said(runs, run_cli, given, said):
    old = runs / "mine.jsonl"
    old.write_text("mine", encoding="utf-8")
    verb, *rest = [each.format(old=old, folder=runs) for each in given]
    done = run_cli(verb, f"ckpt={runs}/latest", *rest)
    assert done.code == 2
    assert said in done.err
    assert old.read_text(encoding="utf-8") == "mine"


def test_a_page_overwrites_pages_alone(toys, run_cli, tmp_path):
    mine = tmp_path / "train.jsonl"
    mine.write_text("mine", encoding="utf-8")
    done = run_cli("inspect", *toys.arguments(), "row=0", f"out={mine}")
    assert (done.code, mine.read_text(encoding="utf-8")) == (2, "mine")
    assert "Name it so: out=row.html" in done.err


def test_runs_that_were_moved_together_find_one_another(finished, runs):
    assert (
        start_of(checkpoints(run_of_stage(runs, "finetune"))[-1]) == checkpoints(run_of_stage(finished, "pretrain"))[-1]
    )
    start = run_of_stage(runs, "finetune") / "starts_from.txt"
    start.write_text(start.read_text(encoding="utf-8").replace(str(finished), "/elsewhere"), encoding="utf-8")
    assert start_of(checkpoints(run_of_stage(runs, "finetune"))[-1]) == checkpoints(run_of_stage(runs, "pretrain"))[-1]


def test_a_start_that_is_gone_is_said(runs, run_cli):
    start = run_of_stage(runs, "finetune") / "starts_from.txt"
    start.write_text("/elsewhere/pretrained/checkpoints/step_00000002.ckpt", encoding="utf-8")
    done = run_cli("evaluate", f"ckpt={runs}/latest")
    assert done.code == 2
    assert "was started from /elsewhere/pretrained/checkpoints/step_00000002.ckpt, which is gone" in done.err
    assert "Put the folder pretrained back" in done.err


def test_a_stopped_run_is_not_taken_for_the_finished_one_before_it(toys, runs):
    given = toys.arguments("stage=pretrain", *QUIET, "trainer.save_every=1", runs=runs)
    stopped = make_run_folder(load_config(given), None)
    with pytest.raises(CheckpointError, match=rf"{stopped.name} was stopped before its first checkpoint .* Start anew"):
        train(load_config([*given, "resume=last"]))
    shutil.rmtree(stopped)
    assert train(load_config([*given, "resume=last"])) == run_of_stage(runs, "pretrain")


def test_a_finished_run_says_that_it_is(toys, runs, capsys):
    train(load_config(toys.arguments("stage=finetune", *QUIET[1:], "resume=last", runs=runs)))
    assert "this run is finished" in capsys.readouterr().out


def test_one_process_trains_in_a_run_folder(toys, runs):
    run = run_of_stage(runs, "pretrain")
    given = toys.arguments(
        "stage=pretrain", *QUIET, "trainer.save_every=1", f"resume='{checkpoints(run)[0]}'", runs=runs
    )
    before = [path.read_bytes() for path in checkpoints(run)]
    with FileLock(run / ".lock"), pytest.raises(TrainingError, match="another process trains in this run folder"):
        train(load_config(given))
    assert [path.read_bytes() for path in checkpoints(run)] == before
    train(load_config(given))


def test_weights_that_are_no_numbers_are_not_saved(toys, tmp_path, run_cli):
    given = ("stage=pretrain", *QUIET, "stage.lr.projector=1e38", "stage.warmup=0", "trainer.save_every=1")
    done = run_cli(*toys.arguments(*given, runs=tmp_path))
    assert done.code == 2
    assert "trained weights are no numbers any more after step 1" in done.err
    assert "no weight was changed by it" not in done.err
    (run,) = tmp_path.glob("*_pretrain_*")
    assert not list((run / CHECKPOINTS).iterdir())


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("data.test=nope.jsonl", "Give an existing file: data.test=FILE"),
        ("data.val=nope.jsonl", "Give an existing file: data.val=FILE"),
        ("strategy=zero2", "strategy=zero2 needs the package deepspeed, which is not installed"),
        ("trainer.precision=fp16", "trainer.precision=fp16 needs a GPU"),
        ("logger.names=[wandb]", "logger.names=['wandb']: not installed. Run `pip install wandb`"),
    ],
)
def test_what_is_not_there_is_said_before_a_run_folder_is_made(toys, tmp_path, run_cli, monkeypatch, argument, said):
    monkeypatch.setattr(ready, "find_spec", lambda name: None)  # wandb may be installed where the tests run
    done = run_cli(*toys.arguments("stage=pretrain", *QUIET, argument, runs=tmp_path))
    assert done.code == 2
    assert said in done.err
    assert not list(tmp_path.iterdir())


def test_a_relative_path_names_the_folder_that_it_was_sought_in(toys, tmp_path, run_cli, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run_cli(*toys.arguments("stage=pretrain", *QUIET, "data.path=mine.jsonl", runs=tmp_path))
    assert f"mine.jsonl: no such file in {tmp_path}. Give an existing file: data.path=FILE" in done.err


def test_chat_turns_pictures_as_the_run_did(toys, tmp_path):
    picture = Image.new("RGB", (40, 20))
    exif = picture.getexif()
    exif[0x0112] = 6  # to be turned by a quarter
    picture.save(tmp_path / "turned.jpg", exif=exif)
    staged = toys.staged("stage=pretrain", "data.image.exif=true")
    talk = Chat(staged.model, staged.config)
    talk.show(str(tmp_path / "turned.jpg"))
    (shown,) = talk.pending
    assert talk._reader(shown).open_picture(shown, "chat", None).size == (20, 40)


def test_chat_goes_on_after_a_line_that_is_not_utf8(finished, run_cli, monkeypatch):
    text = io.TextIOWrapper(io.BytesIO(b"\xe9\n/image\nHello\n/exit\n"), encoding="utf-8", errors="surrogateescape")
    monkeypatch.setattr(sys, "stdin", text)
    done = run_cli("chat", f"ckpt={finished}/latest")
    assert done.code == 0
    assert "this line is not UTF-8" in done.out
    assert "name a picture: /image PATH" in done.out


@pytest.mark.parametrize(("verb", "way_on"), [("train", " Go on with resume=last"), ("configs", "\n")])
def test_only_training_goes_on(run_cli, monkeypatch, verb, way_on):
    def stop(arguments):
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.VERBS, verb, stop)
    done = run_cli(verb)
    assert done.code == 130
    assert f"stopped.{way_on}" in done.err


def test_a_path_that_cannot_be_used_is_no_traceback(toys, run_cli, monkeypatch):
    monkeypatch.setenv("VLM_TUNE_CACHE", os.devnull + "/cache")
    done = run_cli("check", *toys.arguments())
    assert done.code == 2
    assert f"VlmTuneError: {os.devnull}" in done.err


def test_finite_weights_are_all_that_a_checkpoint_holds(finished):
    weights = torch.load(checkpoints(run_of_stage(finished, "finetune"))[-1], weights_only=True)["state_dict"]
    assert all(torch.isfinite(weight).all() for weight in weights.values())
