"""A run that is killed and goes on ends as if it had never been killed: bit for bit, at whatever step."""

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch

from vlm_tune.config.parse import load_config
from vlm_tune.model.checkpoint import CHECKPOINTS, checkpoints
from vlm_tune.training.run import train

STEPS = 9
ALL = (
    "stage=finetune",
    "stage.init_from=none",
    f"stage.max_steps={STEPS}",
    "stage.lora.dropout=0.1",
    "stage.lr={projector: 0.01, llm: 0.01}",  # so large that the smallest difference would grow
    "stage.evaluate=false",
    "data.workers=2",
    "trainer.global_batch=2",
    "trainer.micro_batch=1",
    "trainer.save_every=1",
    "trainer.keep=100",
    "trainer.val_every=3",
    "trainer.num_chats=1",
)
WAYS = {
    "packed": [],
    "augmented": ["data.augment={flip: true, crop: 0.6, jpeg: true}"],  # each worker draws, and no features are kept
    "padded": ["stage.packing=false", "trainer.micro_batch=2", "trainer.global_batch=4"],
    "without workers": ["data.workers=0", "data.feature_cache=off"],
    "16 bit": ["trainer.precision=bf16"],
}


def arguments(toys, runs, *more):
    return toys.arguments(*{key.partition("=")[0]: key for key in (*ALL, *more)}.values(), runs=runs)


def state_of(run, step):
    path = run / CHECKPOINTS / f"step={step:08d}.ckpt"
    return torch.load(path, weights_only=True)


def metrics_of(run):
    """Read metrics.csv as text, the times left out."""
    with (run / "metrics.csv").open(newline="", encoding="utf-8") as file:
        return [{name: value for name, value in row.items() if "speed" not in name} for row in csv.DictReader(file)]


def interrupt(run: Path, step: int, runs: Path) -> Path:
    """Copy a run as a kill leaves it that comes when checkpoint `step` is whole, and before its validation.

    Lines that the run had written after that checkpoint stay where a real kill may leave them: in metrics.csv.
    """
    killed = runs / run.name
    shutil.copytree(run, killed)
    for path in checkpoints(killed)[step:]:
        path.unlink()
    for name in ("report.json", "report.html", "loss.svg"):
        (killed / name).unlink()
    best = killed / CHECKPOINTS / "best.ckpt"
    if torch.load(best, weights_only=True)["global_step"] >= step:
        best.unlink()
    with (run / "metrics.csv").open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    kept = [row for row in rows if int(row[0]) < step or (int(row[0]) == step and row[1]) or int(row[0]) == step + 1]
    with (killed / "metrics.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *kept])
    return killed


def assert_same(one, other, place="checkpoint"):
    """Compare what two checkpoints hold, tensors bit by bit."""
    assert type(one) is type(other), place
    if isinstance(one, dict):
        assert one.keys() == other.keys(), place
        for key in one:
            if key != "seconds":
                assert_same(one[key], other[key], f"{place}[{key!r}]")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), place
        for number, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{place}[{number}]")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), f"{place} differs by {float((one - other).abs().max())}"
    else:
        assert one == other, place


@pytest.fixture(scope="module")
def straight(toys, tmp_path_factory):
    """Give a function that returns the uninterrupted run of a way, made once."""
    made = {}

    def run(way):
        if way not in made:
            made[way] = train(load_config(arguments(toys, tmp_path_factory.mktemp("straight"), *WAYS[way])))
        return made[way]

    return run


def resumed(toys, run, step, runs, way):
    """Go on with a run that was killed at a step."""
    killed = interrupt(run, step, runs)
    torch.manual_seed(step)  # a new process would have another generator state
    assert train(load_config(arguments(toys, runs, *WAYS[way], "resume=last"))) == killed
    return killed


def cursor_of(run, step):
    return tuple(state_of(run, step)["DataModule"]["cursor"])


def test_the_steps_below_hold_an_epochs_middle_its_end_and_a_step_across_the_end(straight):
    cursors = {step: cursor_of(straight("packed"), step) for step in range(1, STEPS + 1)}
    assert cursors[1][0] == cursors[3][0] == 0
    assert cursors[4][0] == 1
    assert cursors[4] != (1, 0, 0), "the fourth step takes its second pack from the next epoch"
    assert cursors[7] == (2, 0, 0), "the seventh ends with the epoch"


@pytest.mark.parametrize("step", [1, 2, 3, 4, 7, 8])
def test_a_resumed_run_equals_the_straight_one(toys, straight, tmp_path, step):
    run = resumed(toys, straight("packed"), step, tmp_path, "packed")
    assert_same(state_of(run, STEPS), state_of(straight("packed"), STEPS))
    assert metrics_of(run) == metrics_of(straight("packed"))


@pytest.mark.parametrize("way", [way for way in WAYS if way != "packed"])
def test_it_does_so_in_other_ways_of_training(toys, straight, tmp_path, way):
    run = resumed(toys, straight(way), 4, tmp_path, way)
    assert_same(state_of(run, STEPS), state_of(straight(way), STEPS))
    assert metrics_of(run) == metrics_of(straight(way))


@pytest.mark.parametrize("step", [3, 4])
def test_the_best_checkpoint_is_the_straight_runs(toys, straight, tmp_path, step):
    # step 3 is validated, and a kill may come between its checkpoint and its validation
    run = resumed(toys, straight("packed"), step, tmp_path, "packed")
    one, other = (torch.load(each / CHECKPOINTS / "best.ckpt", weights_only=True) for each in (run, straight("packed")))
    assert_same(one["state_dict"], other["state_dict"])


def test_a_run_resumed_twice_equals_the_straight_one(toys, straight, tmp_path):
    once = resumed(toys, straight("packed"), 2, tmp_path / "once", "packed")
    twice = resumed(toys, once, 6, tmp_path / "twice", "packed")
    assert_same(state_of(twice, STEPS), state_of(straight("packed"), STEPS))


def test_the_number_of_workers_plays_no_part(straight):
    packed, alone = straight("packed"), straight("without workers")
    assert_same(state_of(packed, STEPS)["optimizer_states"], state_of(alone, STEPS)["optimizer_states"])


def test_dropout_is_on_and_differs_from_step_to_step(toys, straight, tmp_path):
    # or the tests above would not show that its generator goes on where it stopped
    run = train(load_config(arguments(toys, tmp_path, "stage.lora.dropout=0")))
    assert metrics_of(run)[3] != metrics_of(straight("packed"))[3]


def test_a_finished_run_goes_nowhere(toys, straight, tmp_path):
    run = resumed(toys, straight("packed"), STEPS, tmp_path, "packed")
    assert_same(state_of(run, STEPS), state_of(straight("packed"), STEPS))
    assert (run / "report.json").is_file()


def test_answers_before_training_are_those_of_the_first_start(toys, straight, tmp_path):
    run = resumed(toys, straight("packed"), 4, tmp_path, "packed")
    ours, theirs = (
        json.loads((each / "report.json").read_text(encoding="utf-8")) for each in (run, straight("packed"))
    )
    assert ours["answers"] == theirs["answers"]
    assert ours["loss_curve"] == theirs["loss_curve"]
