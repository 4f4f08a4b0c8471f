"""A checkpoint in parts is one for every reader: resume, export, and what looks for the newest whole one."""

import shutil

import pytest
import torch
from compare import assert_same
from processes import run_two

from vlm_tune.cli import main
from vlm_tune.config.parse import load_config
from vlm_tune.errors import CheckpointError
from vlm_tune.model.checkpoint import (
    CHECKPOINTS,
    checkpoint_name,
    checkpoints,
    find_checkpoint,
    part_name,
    read_checkpoint,
    trained_weights,
)
from vlm_tune.training.callbacks.checkpoints import put_newer_aside
from vlm_tune.training.resume import find_resume
from vlm_tune.training.run import train

ALL = (
    "stage=finetune",
    "stage.init_from=none",
    "stage.max_steps=4",
    "stage.evaluate=false",
    "trainer.num_chats=0",
    "trainer.save_every=1",
    "trainer.val_every=3",
    "trainer.keep=9",
)
PARTS = "trainer.sharded_checkpoints=true"


def arguments(toys, runs, *more):
    return toys.arguments(*{key.partition("=")[0]: key for key in (*ALL, *more)}.values(), runs=runs)


@pytest.fixture(scope="module")
def as_files(toys, tmp_path_factory):
    return train(load_config(arguments(toys, tmp_path_factory.mktemp("files"))))


@pytest.fixture(scope="module")
def in_parts(toys, tmp_path_factory):
    return train(load_config(arguments(toys, tmp_path_factory.mktemp("parts"), PARTS)))


@pytest.fixture
def run(in_parts, tmp_path):
    """Copy the run, for a test to go on with."""
    shutil.copytree(in_parts, tmp_path / in_parts.name)
    return tmp_path / in_parts.name


def part_of(checkpoint):
    return checkpoint / part_name(0, 1)


def flip(path):
    content = bytearray(path.read_bytes())
    content[3000] ^= 4
    path.write_bytes(content)


def test_each_checkpoint_of_the_run_is_a_folder_that_holds_what_a_file_holds(in_parts, as_files):
    for name in (*(checkpoint_name(step) for step in range(1, 5)), "best.ckpt"):
        assert part_of(in_parts / CHECKPOINTS / name).is_file()
        assert_same(read_checkpoint(in_parts / CHECKPOINTS / name), read_checkpoint(as_files / CHECKPOINTS / name))


@pytest.mark.parametrize("source", ["files", "parts"])
def test_a_run_goes_on_from_the_other_kind_bit_by_bit(toys, as_files, in_parts, tmp_path, source):
    before = as_files if source == "files" else in_parts
    run = tmp_path / before.name
    shutil.copytree(before, run)
    put_newer_aside(run, 2)
    train(load_config(arguments(toys, tmp_path, "resume=last", *([PARTS] if source == "files" else []))))
    assert checkpoints(run)[-1].is_dir() == (source == "files")
    assert_same(read_checkpoint(checkpoints(run)[-1]), read_checkpoint(checkpoints(as_files)[-1]))
    assert (run / CHECKPOINTS / "best.ckpt").is_dir() == (source == "files")


@pytest.mark.parametrize("damage", [flip, lambda path: path.unlink()], ids=["flipped", "gone"])
@pytest.mark.parametrize("given", ["last", "{run}"])
def test_a_damaged_one_is_passed_over(toys, run, damage, given):
    damage(part_of(checkpoints(run)[-1]))
    config = load_config(arguments(toys, run.parent, f"resume='{given.format(run=run)}'"))
    assert find_resume(config) == checkpoints(run)[-2]


def test_a_damaged_one_that_is_named_is_an_error_with_the_part(toys, run):
    last = checkpoints(run)[-1]
    flip(part_of(last))
    with pytest.raises(
        CheckpointError, match=r"step_00000004\.ckpt: not a readable checkpoint \(part_00_of_01\.ckpt: it"
    ):
        find_resume(load_config(arguments(toys, run.parent, f"resume='{last}'")))
    with pytest.raises(CheckpointError, match=r"Take an older one of the run: .*/step_00000003\.ckpt"):
        trained_weights(last)


def test_a_folder_of_parts_is_named_as_a_file_is(run):
    assert find_checkpoint(str(checkpoints(run)[1])) == checkpoints(run)[1]
    assert find_checkpoint(str(run)) == checkpoints(run)[-1]


def test_a_run_that_goes_back_to_its_best_is_found_again(run):
    for path in checkpoints(run)[:3]:
        shutil.rmtree(path)
    best = read_checkpoint(run / CHECKPOINTS / "best.ckpt")["global_step"]
    put_newer_aside(run, best)
    assert checkpoints(run)[0].name == checkpoint_name(best)
    assert read_checkpoint(checkpoints(run)[0])["global_step"] == best


def test_old_ones_are_removed_whole(toys, tmp_path):
    run = train(load_config(arguments(toys, tmp_path, PARTS, "trainer.keep=1", "data.val=none")))
    assert [path.name for path in (run / CHECKPOINTS).iterdir()] == [checkpoint_name(4)]


def test_a_next_stage_starts_from_it_and_export_writes_the_same(toys, run_cli, as_files, run, tmp_path):
    for source, name in ((as_files, "files"), (run, "parts")):
        assert run_cli("export", f"ckpt={source}", f"out={tmp_path}/{name}").code == 0
    ours, theirs = (sorted((tmp_path / name).glob("*.safetensors")) for name in ("parts", "files"))
    assert ours
    assert [path.read_bytes() for path in ours] == [path.read_bytes() for path in theirs]
    next_one = arguments(toys, tmp_path / "next", f"stage.init_from='{checkpoints(run)[-1]}'", "stage.max_steps=1")
    shutil.move(checkpoints(train(load_config(next_one)))[-1].parent.parent, run.parent / "next_one")
    assert run_cli("evaluate", f"ckpt={run.parent / 'next_one'}").code == 0


# ------------------------------------------------------------------------------------------------- make test-strategies


@pytest.mark.strategies
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "zero2", "zero3"])
def test_two_processes_write_what_one_file_would_hold_and_go_on_from_the_other_kind(toys, tmp_path, strategy):
    two = (f"strategy={strategy}", "trainer.devices=2", "trainer.accelerator=cpu")
    kinds = {"files": (), "parts": (PARTS,)}
    runs = {kind: run_two(arguments(toys, tmp_path / kind, *two, *kinds[kind]), tmp_path / kind) for kind in kinds}
    whole = read_checkpoint(checkpoints(runs["files"])[-1])
    last = checkpoints(runs["parts"])[-1]
    assert sorted(path.name for path in last.iterdir()) == [part_name(0, 2), part_name(1, 2)]
    assert_same(read_checkpoint(last), whole)
    for kind, other in (("files", "parts"), ("parts", "files")):
        put_newer_aside(runs[kind], 2)
        given = arguments(toys, tmp_path / kind, *two, *kinds[other], "resume=last")
        last = checkpoints(run_two(given, tmp_path / kind, is_new=False))[-1]
        assert last.is_dir() == (other == "parts")
        assert_same(read_checkpoint(last), whole)
    put_newer_aside(runs["files"], 3)
    assert main(arguments(toys, tmp_path / "files", "resume=last")) == 0
    ours = read_checkpoint(checkpoints(runs["files"])[-1])["state_dict"]
    assert all(torch.allclose(ours[name], weight, atol=1e-5) for name, weight in whole["state_dict"].items())
