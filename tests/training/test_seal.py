"""A checkpoint that was cut off or altered is known by its seal: no reader takes it, a resumed run the one before."""

import random
import shutil
import zipfile

import pytest
import torch

from vlm_tune.config.parse import load_config
from vlm_tune.errors import CheckpointError
from vlm_tune.model.checkpoint import CHECKPOINTS, checkpoints, read_checkpoint, trained_weights
from vlm_tune.model.seal import NOTE_BYTES, find_damage, is_sealed, seal
from vlm_tune.training.resume import find_resume
from vlm_tune.training.run import train

SHORT = ("stage=finetune", "stage.init_from=none", "stage.max_steps=3", "stage.evaluate=false", "trainer.num_chats=0")
EVERY = ("trainer.save_every=1", "trainer.keep=9", "data.val=none")


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)


def cut(path, length):
    path.write_bytes(path.read_bytes()[:length])


@pytest.fixture(scope="module")
def sealed(tmp_path_factory):
    path = tmp_path_factory.mktemp("sealed") / "a.ckpt"
    torch.save({"state_dict": {"vlm.weight": torch.arange(500.0)}, "global_step": 3}, path)
    seal(path)
    return path


def test_a_sealed_file_is_read_as_before(sealed):
    assert is_sealed(sealed)
    assert find_damage(sealed) is None
    assert torch.equal(torch.load(sealed, weights_only=True)["state_dict"]["vlm.weight"], torch.arange(500.0))
    assert zipfile.ZipFile(sealed).testzip() is None


@pytest.mark.parametrize("seed", range(3))
def test_a_bit_that_is_flipped_anywhere_is_found(sealed, tmp_path, seed):
    chance, whole = random.Random(seed), sealed.read_bytes()
    for number in range(100):
        path = tmp_path / f"{number}.ckpt"
        path.write_bytes(whole)
        flip(path, chance.randrange(len(whole)))
        assert find_damage(path)


def test_a_file_that_is_cut_off_anywhere_is_found(sealed, tmp_path):
    whole = sealed.read_bytes()
    for length in (0, 1, 100, len(whole) // 2, len(whole) - NOTE_BYTES, len(whole) - NOTE_BYTES - 22, len(whole) - 1):
        path = tmp_path / f"{length}.ckpt"
        path.write_bytes(whole[:length])
        assert find_damage(path), length


def test_a_file_whose_pages_were_never_written_is_found(sealed, tmp_path):
    path = tmp_path / "a.ckpt"  # as a power cut leaves it: the size is right, a block of it is zeros
    whole = sealed.read_bytes()
    path.write_bytes(whole[:1024] + bytes(512) + whole[1536:])
    assert "its bytes are not those that were written, by their SHA-256" in find_damage(path)


def test_a_file_of_an_older_version_has_no_seal_and_no_damage(tmp_path):
    path = tmp_path / "a.ckpt"
    torch.save({"global_step": 3}, path)
    assert (is_sealed(path), find_damage(path)) == (False, None)
    assert read_checkpoint(path) == {"global_step": 3}


# -------------------------------------------------------------------------------------------------- going on from it


@pytest.fixture(scope="module")
def straight(toys, tmp_path_factory):
    return train(load_config(toys.arguments(*SHORT, *EVERY, runs=tmp_path_factory.mktemp("runs"))))


@pytest.fixture
def run(straight, tmp_path):
    shutil.copytree(straight, tmp_path / straight.name)
    return tmp_path / straight.name


def test_the_checkpoints_of_a_run_are_sealed(straight):
    assert all(is_sealed(path) for path in checkpoints(straight))


def resumed(toys, run, given):
    return load_config(toys.arguments(*SHORT, *EVERY, f"resume='{given}'", runs=run.parent))


@pytest.mark.parametrize("named", ["last", "run"])
@pytest.mark.parametrize("damage", [lambda path: flip(path, 3000), lambda path: cut(path, 3000)], ids=["flip", "cut"])
def test_a_resumed_run_takes_the_whole_one_before(toys, run, named, damage):
    damage(checkpoints(run)[-1])
    damage(checkpoints(run)[-2])
    assert find_resume(resumed(toys, run, run if named == "run" else named)) == checkpoints(run)[0]


def test_it_says_so_ends_with_the_same_weights_and_keeps_the_damaged_one(toys, run, straight, capsys):
    last = checkpoints(run)[-1]
    flip(last, 3000)
    assert train(resumed(toys, run, "last")) == run
    assert "step_00000003.ckpt is damaged (its bytes are not those that were written" in capsys.readouterr().out
    ours, theirs = (torch.load(checkpoints(each)[-1], weights_only=True)["state_dict"] for each in (run, straight))
    assert all(torch.equal(ours[name], weight) for name, weight in theirs.items())
    assert last.with_name(f"{last.name}.replaced").exists()


def test_a_damaged_one_that_is_named_is_an_error_with_the_one_before(toys, run):
    last = checkpoints(run)[-1]
    flip(last, 3000)
    with pytest.raises(CheckpointError, match=r"step_00000003\.ckpt: not a readable checkpoint .* SHA-256") as caught:
        find_resume(resumed(toys, run, last))
    assert str(caught.value).endswith(f"Take an older one of the run: {checkpoints(run)[1]}")


def test_no_reader_takes_a_damaged_one(run):
    flip(checkpoints(run)[-1], 3000)
    with pytest.raises(CheckpointError, match="by their SHA-256"):
        trained_weights(checkpoints(run)[-1])


def test_where_none_is_whole_the_error_says_what_is_left(toys, run):
    for path in checkpoints(run):
        cut(path, 2000)
    with pytest.raises(CheckpointError, match=r"nor is any other of its run whole: start anew without resume"):
        find_resume(resumed(toys, run, "last"))
    best = run / CHECKPOINTS / "best.ckpt"
    torch.save({}, best)
    with pytest.raises(CheckpointError, match=rf"whole: resume='{best}'"):
        find_resume(resumed(toys, run, "last"))


def test_one_of_an_older_version_is_taken_with_a_remark(toys, run, capsys):
    path = checkpoints(run)[1]
    torch.save(torch.load(path, weights_only=True), path)
    train(resumed(toys, run, path))
    assert "step_00000002.ckpt bears no checksum" in capsys.readouterr().out
