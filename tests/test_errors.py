"""What a user does wrong gets an answer: what, where and what to do, no traceback, exit code 2, and nothing is lost."""

import json
import os
import shutil
import subprocess

import pytest
from toys import turns, write_jsonl

from vlm_tune.model.checkpoint import checkpoints, read_checkpoint

PAIR = turns(("<image>\nWhat colour?", "red"))
SHORT = ("stage=finetune", "stage.init_from=none", "stage.max_steps=2", "stage.evaluate=false", "trainer.num_chats=0")


@pytest.fixture
def folder(toys, tmp_path):
    """Give a data file of one good row, and its picture."""
    shutil.copy(toys.data / "pictures" / "train_1.png", tmp_path / "red.png")
    write_jsonl(tmp_path / "train.jsonl", [{"id": "good", "image": "red.png", "conversations": PAIR}])
    return tmp_path


@pytest.fixture
def fail(toys, run_cli, folder):
    """Give a function that trains on the folder's file, sees it fail as it should, and returns the one message."""

    def run(*more):
        kept = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        done = run_cli(*toys.arguments(*SHORT, f"data.path={folder}/train.jsonl", *more, runs=folder / "runs"))
        assert done.code == 2
        assert "Traceback" not in done.out + done.err
        assert all(path.read_bytes() == content for path, content in kept.items()), "an error lost what was there"
        return done.err[done.err.index(next(line for line in done.err.splitlines() if "Error: " in line)) :]

    return run


def add_row(folder, **fields):
    row = {"id": "dish_0042", "image": "red.png", "conversations": PAIR} | fields
    with (folder / "train.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


# ------------------------------------------------------------------------------------------------------------ one row


def test_a_missing_picture(folder, fail):
    add_row(folder, image="rde.png")
    assert fail() == (
        'DataError: train.jsonl:2 (id "dish_0042"): picture "rde.png" is not there; did you mean "red.png" of the same '
        f"folder? Paths are relative to data.image.root={folder}\n"
    )


def test_a_picture_that_is_not_one(folder, fail):
    (folder / "notes.png").write_text("not a picture", encoding="utf-8")
    add_row(folder, image="notes.png")
    assert fail() == (
        'DataError: train.jsonl:2 (id "dish_0042"): picture "notes.png" is not an image of a known format (it starts '
        "with b'not a picture'). Readable are JPEG, PNG, WEBP, GIF, BMP, TIFF, PPM, AVIF\n"
    )


def test_a_picture_that_is_cut_off(folder, fail):
    whole = (folder / "red.png").read_bytes()
    (folder / "half.png").write_bytes(whole[: len(whole) // 2])
    add_row(folder, image="half.png")
    message = fail()
    assert message.startswith('DataError: train.jsonl:2 (id "dish_0042"): picture "half.png" is a truncated or damaged')
    assert message.endswith("Copy or export it again\n")


def test_two_marks_and_one_path(folder, fail):
    add_row(folder, conversations=turns(("<image>\n<image>\nWhat colours?", "red")))
    message = fail()
    assert message.startswith('DataError: train.jsonl:2 (id "dish_0042"): 2 "<image>" marks but 1 image')
    assert "Give each mark" in message


def test_a_line_that_is_not_json(folder, fail):
    with (folder / "train.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"id": "dish_0042", "image": \n')
    message = fail()
    assert message.startswith("DataError: train.jsonl:2: not JSON: ")
    assert message.endswith("Write one JSON object per line.\n")


def test_a_row_that_is_too_long(folder, fail):
    add_row(folder)
    message = fail("data.max_length=15")
    assert "train.jsonl:1" in message
    assert "but data.max_length=15: raise it" in message


def test_several_bad_rows_are_listed_together(folder, fail):
    add_row(folder, image="lost.png")
    add_row(folder, conversations=[])
    lines = fail().splitlines()
    assert lines[0] == f"DataError: {folder}/train.jsonl: 2 bad rows"
    assert [line.split(" (id")[0].strip() for line in lines[1:3]] == ["train.jsonl:2", "train.jsonl:3"]
    assert "data.on_bad_sample=skip" in lines[3]


# ---------------------------------------------------------------------------------------------------------- the files


def test_an_empty_file(folder, fail):
    (folder / "train.jsonl").write_bytes(b"")
    assert fail().startswith("DataError: train.jsonl: holds no rows: the file is empty")


def test_a_missing_file(folder, fail):
    message = fail(f"data.path={folder}/trian.jsonl")
    assert message.startswith(f"DataError: {folder}/trian.jsonl: no such file. Did you mean {folder}/train.jsonl?")


def test_all_rows_bad_and_skipped(folder, fail):
    add_row(folder)
    (folder / "red.png").unlink()
    assert "no usable rows are left" in fail("data.on_bad_sample=skip")


def test_all_validation_rows_bad_and_skipped(folder, fail):
    shutil.copy(folder / "train.jsonl", folder / "val.jsonl")
    rows = (folder / "val.jsonl").read_text(encoding="utf-8").replace("red.png", "lost.png")
    (folder / "val.jsonl").write_text(rows, encoding="utf-8")
    message = fail("data.on_bad_sample=skip", f"data.val={folder}/val.jsonl")
    assert "val.jsonl: no usable rows are left. Run `python -m vlm_tune check` on it, or set data.val=none" in message


def test_runs_that_cannot_be_written(folder, fail):
    assert fail(f"runs={folder}/red.png/runs").startswith(
        f"ConfigError: runs={folder}/red.png/runs: cannot be written ("
    )


# -------------------------------------------------------------------------------------------------- the configuration


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("stage.lora.rnak=8", "ConfigError: stage.lora.rnak: no such key. Did you mean stage.lora.rank?\n"),
        (
            "model.llm.targets=[wqkv]",
            "ConfigError: model.llm.targets=['wqkv'] matches no linear layer. There are: down_",
        ),
        (
            "model.projector.kind=resampler",
            "ConfigError: model.projector.kind=resampler: no such projector. There are: mlp",
        ),
        (
            "model.projector.shuffle=3",
            "ConfigError: model.projector.shuffle=3 does not divide the 16 patches of a tile",
        ),
        ("model.template=chatlm", "ConfigError: model.template=chatlm"),
        (
            "logger.names=[comet]",
            "ConfigError: logger.names=['comet']: no such logger. There are: tensorboard, wandb, mlflow, trackio",
        ),
        ("data.format=llama", "data.format=llama"),
        ("stage.lr.projector=nan", "ConfigError: stage.lr.projector=nan: not a number to compute with"),
        ("stage.epochs=inf", "ConfigError: stage.epochs=inf: not a number to compute with"),
        ("stage.max_steps=0", "ConfigError: stage.max_steps=0: set 1 or more, or -1 to train stage.epochs"),
        ("seed=-1", "ConfigError: seed=-1: set 0 to 4294967295"),
        ("trainer.accelerator=tpu", "ConfigError: trainer.accelerator=tpu: there are auto, cpu, gpu, cuda"),
        ("trainer.num_chats=-1", "ConfigError: trainer.num_chats=-1: set 0 or more"),
        ("data.image.max_pixels=0", "ConfigError: data.image.max_pixels=0: set it to 1 or more"),
        ("stage.init_from=nowhere", "CheckpointError: nowhere: no such run folder or checkpoint. `ls runs` shows the"),
        ("resume=last", "runs holds no run of stage=finetune model=tiny with a checkpoint. Start it without resume"),
    ],
)
def test_a_setting_that_cannot_be(fail, argument, said):
    assert said in fail(argument)


def test_several_faults_of_the_configuration_are_listed_at_once(fail):
    message = fail("stage.lora.rank=0", "trainer.keep=0")
    assert message.startswith("ConfigError: 2 problems\n  stage.train.llm=lora but stage.lora.rank=0: set a rank of 1")


@pytest.mark.parametrize("key", ["model.vision.path", "model.llm.path"])
def test_a_part_that_is_not_there(fail, folder, key):
    assert fail(f"{key}={folder}/nowhere").startswith(
        f"ConfigError: {key}={folder}/nowhere: no such folder. Name a fold"
    )


@pytest.mark.parametrize("key", ["model.vision.path", "model.llm.path"])
def test_a_folder_without_a_model(fail, folder, key):
    assert fail(f"{key}={folder}").startswith(
        f"ConfigError: {key}={folder}: the folder has no config.json. Name the fold"
    )


def test_a_hub_model_without_a_network(run_cli, toys, tmp_path):
    own = [f"data.path={toys.data}/train.jsonl", f"runs={tmp_path}"]
    done = run_cli("stage=finetune", "model=internvl2_2b", "stage.init_from=none", *own)
    assert done.code == 2
    assert "ConfigError: model.path=OpenGVLab/InternVL2-2B: the hub cannot be reached" in done.err
    assert "`hf download OpenGVLab/InternVL2-2B`" in done.err
    assert "set model.path=FOLDER" in done.err


# ---------------------------------------------------------------------------------------------------------- the verbs


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("trian", "ConfigError: trian: no such verb. There are: train, chat, web, server, evaluate, answer, export"),
        ("export ckpt=nowhere", "ConfigError: out is not set. Give a folder for the exported model: out=FOLDER"),
        ("evaluate ckpt=nowhere", "CheckpointError: nowhere: no such run folder or checkpoint"),
        ("chat nowhere", "ConfigError: nowhere: keys are written key=value. This verb has: ckpt, image"),
        ("chat kcpt=nowhere", "ConfigError: kcpt: no such key. This verb has: ckpt, image"),
        ("export out=x dtype=int4", "ConfigError: dtype=int4: no such dtype. There are: fp32, bf16, fp16"),
    ],
)
def test_a_verb_that_cannot_be(run_cli, command, said):
    done = run_cli(*command.split())
    assert done.code == 2
    assert done.err.startswith(said)


def test_the_traceback_is_there_for_whoever_asks(run_cli, monkeypatch):
    monkeypatch.setenv("VLM_TUNE_DEBUG", "1")
    with pytest.raises(Exception, match="no such verb"):
        run_cli("trian")


def test_help_names_every_verb(run_cli):
    from vlm_tune.cli import VERBS

    done = run_cli("help")
    assert done.code == 0
    assert all(f"\n  {verb} " in done.out for verb in VERBS)


# --------------------------------------------------------------------------------------------------------- a full disk


@pytest.fixture
def small_disk(tmp_path):
    """Give a disk of 900 KiB, and a function that makes it larger."""
    disk = tmp_path / "disk"
    disk.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=900k", "tmpfs", disk], capture_output=True, check=False)
    if made.returncode:
        pytest.skip("mounting a small disk needs root; test_checkpoint.py fills a file instead")
    yield disk, lambda: subprocess.run(["mount", "-o", "remount,size=9m", disk], check=True)
    subprocess.run(["umount", disk], check=True)


def test_a_disk_that_is_full_when_a_checkpoint_is_written(toys, run_cli, small_disk):
    disk, enlarge = small_disk
    steps = ("stage.max_steps=9", "trainer.save_every=1", "trainer.val_every=100", "trainer.keep=100")
    given = toys.arguments(*SHORT, *steps, runs=disk)
    done = run_cli(*given)
    assert done.code == 2
    (run,) = (path for path in disk.iterdir() if not path.is_symlink())
    kept = checkpoints(run)
    assert 1 <= len(kept) < 9
    missing = f"step_{len(kept) + 1:08d}.ckpt"
    assert f"CheckpointError: {run}/checkpoints/{missing}: could not be written (" in done.err
    assert "0.0 MiB are free there" in done.err
    assert "Older checkpoints are untouched: free some space or set runs=FOLDER on another disk" in done.err
    assert "Traceback" not in done.out + done.err
    assert not [path for path in run.rglob("*") if "partial" in path.name], (
        "half a checkpoint takes space and is no use"
    )
    assert [read_checkpoint(path)["global_step"] for path in kept] == list(range(1, len(kept) + 1))
    enlarge()
    assert run_cli(*given, "resume=last").code == 0
    assert len(checkpoints(run)) == 9


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the device that is always full is Linux's")
def test_a_disk_that_is_full_at_any_other_moment(toys, run_cli, tmp_path):
    assert run_cli(*toys.arguments(*SHORT, "trainer.save_every=1", runs=tmp_path)).code == 0
    done = run_cli("evaluate", f"ckpt={tmp_path}/latest", "out=/dev/full")
    assert done.code == 2
    assert done.err.splitlines()[-1].startswith("VlmTuneError: a file: No space left on device. Free some space; ")
    assert "Traceback" not in done.err
