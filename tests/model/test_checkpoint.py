"""Checkpoints are written whole or not at all, read without running code, and found where the newest one is."""

import os
import resource
import shutil

import pytest
import torch
from torch import nn

from vlm_tune.config.parse import load_config, write_config
from vlm_tune.errors import CheckpointError, ConfigError
from vlm_tune.model.checkpoint import (
    CHECKPOINTS,
    CONFIG,
    checkpoints,
    find_checkpoint,
    find_run,
    find_runs,
    load_weights,
    read_checkpoint,
    run_config,
    run_of,
    start_of,
    trained_weights,
    write_atomically,
)

LIMIT = 64 * 1024


@pytest.fixture
def small_files():
    """Let no file grow beyond LIMIT: what a full disk does to a writer, without a disk to fill."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def save(size):
    return lambda path: torch.save({"state_dict": {"weight": torch.zeros(size)}}, path)


def make_run(folder, *steps, stage="finetune"):
    (folder / CHECKPOINTS).mkdir(parents=True)
    write_config(load_config(["model=tiny", f"stage={stage}"]), folder / CONFIG)
    for step in steps:
        path = folder / CHECKPOINTS / f"step_{step:08d}.ckpt"
        torch.save({"state_dict": {"vlm.weight": torch.full((2,), float(step))}}, path)
        os.utime(path, (1000 + step, 1000 + step))
    return folder


# ------------------------------------------------------------------------------------------------------------- writing


def test_a_written_file_is_whole_and_alone(tmp_path):
    write_atomically(tmp_path / "a.ckpt", save(10))
    assert [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]
    assert read_checkpoint(tmp_path / "a.ckpt")["state_dict"]["weight"].shape == (10,)


def test_a_failed_write_says_what_where_and_what_to_do(tmp_path, small_files):
    with pytest.raises(CheckpointError) as caught:
        write_atomically(tmp_path / "a.ckpt", save(LIMIT))
    assert str(caught.value).startswith(f"{tmp_path}/a.ckpt: could not be written (")
    assert "free some space or set runs=FOLDER on another disk, then go on with resume=last" in str(caught.value)


def test_a_failed_write_leaves_what_was_there(tmp_path, small_files):
    save(10)(tmp_path / "best.ckpt")
    save(20)(tmp_path / "step_1.ckpt")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(CheckpointError):
        write_atomically(tmp_path / "best.ckpt", save(LIMIT))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_nothing_stands_under_the_name_before_it_is_whole(tmp_path):
    target = tmp_path / "a.ckpt"

    def write(partial):
        save(10)(partial)
        assert not target.exists()
        assert not list(tmp_path.glob("*.ckpt")), "a half-written file must not look like a checkpoint"

    write_atomically(target, write)


# ------------------------------------------------------------------------------------------------------------- reading


def test_objects_other_than_weights_are_not_loaded(tmp_path):
    class Trap:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "sprung"),))

    torch.save({"state_dict": {}, "trap": Trap()}, tmp_path / "a.ckpt")
    with pytest.raises(
        CheckpointError, match=r"a\.ckpt: it holds objects other than weights and is not loaded, for safe"
    ):
        read_checkpoint(tmp_path / "a.ckpt")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", "half"], ids=["empty", "text", "cut off"])
def test_a_damaged_file_is_an_error_with_a_way_out(tmp_path, content):
    path = tmp_path / "a.ckpt"
    save(5000)(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if content == "half" else content)
    with pytest.raises(CheckpointError, match=r"a\.ckpt: "):
        read_checkpoint(path)


def test_a_file_without_weights_is_refused(tmp_path):
    torch.save({"epoch": 1}, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match=r"holds no state_dict\. Name a checkpoint of a vlm_tune run"):
        trained_weights(tmp_path / "a.ckpt")


# ------------------------------------------------------------------------------------------------------------- finding


def test_checkpoints_are_ordered_by_step(tmp_path):
    run = make_run(tmp_path / "run", 900, 1000, 20)
    (run / CHECKPOINTS / "best.ckpt").touch()
    (run / CHECKPOINTS / ".step_00009999.ckpt.partial").touch()
    assert [path.name for path in checkpoints(run)] == [f"step_{step:08d}.ckpt" for step in (20, 900, 1000)]


def test_a_run_folder_means_its_newest_checkpoint(tmp_path):
    run = make_run(tmp_path / "run", 2, 4)
    assert find_checkpoint(str(run)).name == "step_00000004.ckpt"


def test_a_link_to_a_run_is_followed(tmp_path):
    run = make_run(tmp_path / "run", 2)
    (tmp_path / "latest").symlink_to("run")
    assert run_of(find_checkpoint(str(tmp_path / "latest"))) == run.resolve()


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("nowhere", r"nowhere: no such run folder or checkpoint\. `ls runs` shows the runs"),
        ("empty", r"empty: the folder holds no checkpoint\. Name a run folder or a \.ckpt file"),
    ],
)
def test_a_path_without_checkpoint_is_an_error(tmp_path, path, said):
    make_run(tmp_path / "empty")
    with pytest.raises(CheckpointError, match=said):
        find_checkpoint(str(tmp_path / path))


def test_a_checkpoint_away_from_its_run_is_an_error(tmp_path):
    save(1)(tmp_path / "step_00000001.ckpt")
    with pytest.raises(
        CheckpointError, match=r"there is no config\.yaml two folders above it\. Keep a checkpoint in its"
    ):
        run_config(tmp_path / "step_00000001.ckpt")


def test_a_run_without_checkpoint_is_not_found(tmp_path):
    make_run(tmp_path / "1_old", 2)
    make_run(tmp_path / "2_new")
    assert find_run(tmp_path, "finetune", "tiny") == tmp_path / "1_old"


def test_the_run_with_the_newest_checkpoint_is_found(tmp_path):
    make_run(tmp_path / "2_started_later", 3)
    make_run(tmp_path / "1_still_running", 5)
    assert find_run(tmp_path, "finetune", "tiny") == tmp_path / "1_still_running"


@pytest.mark.parametrize(("stage", "model"), [("pretrain", "tiny"), ("finetune", "demo")])
def test_a_run_of_another_stage_or_model_is_not_found(tmp_path, stage, model):
    make_run(tmp_path / "run", 2)
    assert find_run(tmp_path, stage, model) is None


def test_a_link_is_not_counted_as_a_run(tmp_path):
    make_run(tmp_path / "run", 2)
    (tmp_path / "latest").symlink_to("run")
    assert find_runs(tmp_path) == [tmp_path / "run"]


def test_a_run_that_can_no_longer_be_read_does_not_hide_the_others(tmp_path):
    make_run(tmp_path / "good", 2)
    other = make_run(tmp_path / "of_another_version", 9)
    (other / CONFIG).write_text("stage: {name: finetune, gone: 1}\n", encoding="utf-8")
    assert find_run(tmp_path, "finetune", "tiny") == tmp_path / "good"


def test_the_start_of_a_run_is_followed(tmp_path):
    start = find_checkpoint(str(make_run(tmp_path / "pretrain", 2, stage="pretrain")))
    run = make_run(tmp_path / "finetune", 4)
    assert start_of(find_checkpoint(str(run))) is None
    (run / "starts_from.txt").write_text(str(start), encoding="utf-8")
    assert start_of(find_checkpoint(str(run))) == start


def test_a_start_that_is_gone_is_an_error(tmp_path):
    start = make_run(tmp_path / "pretrain", 2, stage="pretrain")
    run = make_run(tmp_path / "finetune", 4)
    (run / "starts_from.txt").write_text(str(find_checkpoint(str(start))), encoding="utf-8")
    shutil.rmtree(start)
    with pytest.raises(CheckpointError, match=r"which is gone, and parts that it kept frozen"):
        start_of(find_checkpoint(str(run)))


def test_a_broken_configuration_names_its_file(tmp_path):
    run = make_run(tmp_path / "run", 2)
    (run / CONFIG).write_text("stage: {gone: 1}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"config\.yaml: stage\.gone: no such key"):
        run_config(find_checkpoint(str(run)))


# ------------------------------------------------------------------------------------------------------------- loading


@pytest.fixture
def layers():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].requires_grad_(False)
    return model


def weights_of(model):
    return {name: weight + 1 for name, weight in model.state_dict().items() if name.startswith("0.")}


def test_weights_are_copied_in(tmp_path, layers):
    weights = weights_of(layers)
    load_weights(layers, weights, tmp_path, complete=True)
    assert all(torch.equal(layers.state_dict()[name], weight) for name, weight in weights.items())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda weights: weights.pop("0.bias"), r"0\.bias: missing in the checkpoint"),
        (lambda weights: weights.update({"2.weight": torch.zeros(1)}), r"2\.weight: the model has no such weight"),
        (
            lambda weights: weights.update({"0.bias": torch.zeros(3)}),
            r"0\.bias: \(3,\) in the checkpoint, \(2,\) in the",
        ),
    ],
    ids=["missing", "unknown", "misshapen"],
)
def test_weights_that_do_not_fit_are_an_error_and_change_nothing(tmp_path, layers, change, said):
    weights = weights_of(layers)
    change(weights)
    before = {name: weight.clone() for name, weight in layers.state_dict().items()}
    with pytest.raises(CheckpointError, match=said):
        load_weights(layers, weights, tmp_path, complete=True)
    assert all(torch.equal(weight, before[name]) for name, weight in layers.state_dict().items())


def test_a_new_stage_may_lack_weights(tmp_path, layers):
    weights = weights_of(layers)
    del weights["0.bias"]
    load_weights(layers, weights, tmp_path, complete=False)
    assert torch.equal(layers[0].weight, weights["0.weight"])
