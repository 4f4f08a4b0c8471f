"""Two ranks are one run: the same loss, gradients and weights, whatever each rank happens to get, and no waiting."""

import json
import shutil

import pytest
import torch
from processes import run_two
from toys import turns, write_jsonl

from vlm_tune.cli import main
from vlm_tune.model.checkpoint import CHECKPOINTS, checkpoints, find_runs
from vlm_tune.training.callbacks.metrics import read_metrics

STEPS = 6
ALL = (
    "stage=finetune",
    "stage.init_from=none",
    f"stage.max_steps={STEPS}",
    "stage.lora.dropout=0",
    "stage.evaluate=false",
    "stage.weight_decay=0.1",
    "stage.clip=0",  # clipping would hide a gradient that is too large or too small by a factor
    "stage.pack_length=60",  # one or two rows a pack, so that ranks often get a pack without pictures
    "trainer.val_every=3",
    "trainer.save_every=1",
    "trainer.keep=100",
    "trainer.num_chats=0",
)
TWO = ("trainer.devices=2", "trainer.accelerator=cpu", "strategy=ddp")


@pytest.fixture(scope="module")
def arguments(toys, tmp_path_factory):
    """Name rows that give steps without a picture and steps with one on one rank, and an odd number to validate."""
    folder = tmp_path_factory.mktemp("mixed")
    rows = [json.loads(line) for line in (toys.data / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    seen = [row for row in rows if "image" in row][:4]
    text = [
        {"id": f"text_{i}", "conversations": turns((f"Say {i} and {i + 1} again.", f"{i} {i + 1}"))} for i in range(8)
    ]
    write_jsonl(folder / "train.jsonl", [*seen, *text])
    write_jsonl(folder / "val.jsonl", [*seen[:2], text[0]])
    own = [f"data.path={folder}/train.jsonl", f"data.image.root={toys.data}"]
    return lambda runs, *more: toys.arguments(*ALL, *own, *more, runs=runs)


@pytest.fixture(scope="module")
def one(arguments, tmp_path_factory):
    runs = tmp_path_factory.mktemp("one")
    assert main(arguments(runs)) == 0
    return find_runs(runs)[0]


@pytest.fixture(scope="module")
def two(arguments, tmp_path_factory):
    runs = tmp_path_factory.mktemp("two")
    return run_two(arguments(runs, *TWO), runs)


def state_of(run, step=STEPS):
    return torch.load(run / CHECKPOINTS / f"step_{step:08d}.ckpt", weights_only=True)


def test_two_ranks_have_the_losses_of_one(one, two):
    ours, theirs = (read_metrics(run / "metrics.csv") for run in (two, one))
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    for name in ("train/loss", "val/loss", "lr/llm"):
        pairs = [(row[name], other[name]) for row, other in zip(ours, theirs, strict=True) if name in other]
        assert pairs
        assert all(mine == pytest.approx(other, rel=1e-5) for mine, other in pairs), name


def test_two_ranks_have_the_gradients_of_one(one, two):
    # the first moments are sums of gradients: unlike Adam's steps they show a wrong factor
    ours, theirs = (state_of(run)["optimizer_states"][0]["state"] for run in (two, one))
    assert ours.keys() == theirs.keys()
    for number in ours:
        one_moment, other = ours[number]["exp_avg"], theirs[number]["exp_avg"]
        torch.testing.assert_close(one_moment, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()))


def test_two_ranks_end_with_the_weights_of_one(one, two):
    ours, theirs = (state_of(run)["state_dict"] for run in (two, one))
    for name, weight in theirs.items():
        torch.testing.assert_close(
            ours[name], weight, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_the_data_hold_steps_with_and_without_pictures(toys, arguments, tmp_path):
    # what the tests above would not show otherwise: a rank without a picture, and a step without any
    staged = toys.staged(*arguments(tmp_path))
    tiles = staged.data.train.index.tiles
    stream = iter(staged.data.stream())
    steps = [[int(tiles[list(next(stream).rows)].sum()) for _ in range(2)] for _ in range(STEPS)]
    kinds = {sum(count > 0 for count in step) for step in steps}
    assert kinds >= {0, 1}


def test_one_folder_is_made(two):
    assert sorted(path.name for path in two.parent.iterdir()) == sorted([two.name, "latest"])


def test_a_resumed_run_of_two_ranks_equals_the_straight_one(arguments, two, tmp_path):
    killed = tmp_path / "runs" / two.name
    shutil.copytree(two, killed)
    for path in checkpoints(killed)[2:]:
        path.unlink()
    run = run_two(arguments(tmp_path / "runs", *TWO, "resume=last"), tmp_path / "runs", is_new=False)
    assert run == killed
    ours, theirs = state_of(run)["state_dict"], state_of(two)["state_dict"]
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
def test_the_command_line_starts_both_ranks_itself(arguments, start_cli, two, tmp_path):
    process = start_cli(*arguments(tmp_path / "runs", *TWO))
    _, errors = process.communicate(timeout=280)
    assert process.returncode == 0, errors
    (run,) = find_runs(tmp_path / "runs")
    ours, theirs = state_of(run)["state_dict"], state_of(two)["state_dict"]
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=1e-4, atol=1e-5)
