"""A run that is killed and goes on ends as if it had never been killed: bit for bit, at whatever step."""

import csv
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from compare import assert_same, metrics_of, state_of
from processes import fork_cli

from vlm_tune.config.parse import load_config
from vlm_tune.errors import CheckpointError, ConfigError
from vlm_tune.model.checkpoint import CHECKPOINTS, checkpoints, find_checkpoint, read_checkpoint
from vlm_tune.training.callbacks.checkpoints import SaveCheckpoints
from vlm_tune.training.run import train
from vlm_tune.training.run_folder import make_run_folder

STEPS = 9
KILLED = (1, 2, 3, 4, 7, 8)  # the epoch ends in the fourth step and again in a later one
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
    "trainer.val_every=4",
    "trainer.num_chats=1",
)
WAYS = {
    "packed": [],
    "augmented": ["data.augment={flip: true, crop: 0.6, jpeg: true}"],  # each worker draws, and no features are kept
    "padded": ["stage.packing=false", "trainer.micro_batch=2", "trainer.global_batch=4"],
    "without workers": ["data.workers=0"],
    "without kept features": ["data.feature_cache=off"],
    "16 bit": ["trainer.precision=bf16"],
    "noise, skipped layers, paged 8-bit moments": [
        "stage.train.vision=full",
        "stage.neftune=5",
        "stage.drop_path=0.3",
        "stage.gradient_checkpointing={vision: true, projector: true, llm: true}",
        "stage.optimizer=paged_adamw8bit",
    ],
    "4-bit base": ["stage=qlora", "trainer.precision=bf16"],
}


def arguments(toys, runs, *more):
    return toys.arguments(*{key.partition("=")[0]: key for key in (*ALL, *more)}.values(), runs=runs)


def report_of(run):
    return json.loads((run / "report.json").read_text(encoding="utf-8"))


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


@pytest.fixture(scope="module")
def straight(toys, tmp_path_factory):
    """Give a function that returns the uninterrupted run of a way, made once."""
    made = {}

    def run(way):
        if way not in made:
            made[way] = train(load_config(arguments(toys, tmp_path_factory.mktemp("straight"), *WAYS[way])))
        return made[way]

    return run


@pytest.fixture(scope="module")
def resumed(toys, straight, tmp_path_factory):
    """Give a function that returns the run of a way that was killed at a step and went on, made once."""
    made = {}

    def run(way, step):
        if (way, step) not in made:
            made[way, step] = go_on(toys, straight(way), step, tmp_path_factory.mktemp("resumed"), way)
        return made[way, step]

    return run


def go_on(toys, run, step, runs, way):
    """Kill a run at a step and go on with it."""
    killed = interrupt(run, step, runs)
    torch.manual_seed(step)  # a new process would have another generator state
    assert train(load_config(arguments(toys, runs, *WAYS[way], "resume=last"))) == killed
    return killed


def test_the_steps_below_hold_an_epochs_middle_and_its_end(straight):
    # the cursor says where the next step begins: epoch, window, pack
    cursors = {step: tuple(state_of(straight("packed"), step)["DataModule"]["cursor"]) for step in range(1, STEPS + 1)}
    ends = [step for step in range(2, STEPS + 1) if cursors[step][0] > cursors[step - 1][0]]
    assert ends
    assert set(ends) <= {*KILLED, STEPS}
    assert any(cursors[step][2] > 0 for step in KILLED if step not in ends)


@pytest.mark.parametrize("step", KILLED)
def test_a_resumed_run_equals_the_straight_one(straight, resumed, step):
    run = resumed("packed", step)
    assert_same(state_of(run, STEPS), state_of(straight("packed"), STEPS))
    assert metrics_of(run) == metrics_of(straight("packed"))


@pytest.mark.parametrize("way", [way for way in WAYS if way != "packed"])
def test_it_does_so_in_other_ways_of_training(straight, resumed, way):
    run = resumed(way, 4)
    assert_same(state_of(run, STEPS), state_of(straight(way), STEPS))
    assert metrics_of(run) == metrics_of(straight(way))


def test_a_run_resumed_twice_equals_the_straight_one(toys, straight, resumed, tmp_path):
    twice = go_on(toys, resumed("packed", 2), 6, tmp_path, "packed")
    assert_same(state_of(twice, STEPS), state_of(straight("packed"), STEPS))


@pytest.mark.parametrize("step", [3, 4])
def test_the_best_checkpoint_is_the_straight_runs(straight, resumed, step):
    # step 4 is validated, and a kill may come between its checkpoint and its validation
    one, other = (run / CHECKPOINTS / "best.ckpt" for run in (resumed("packed", step), straight("packed")))
    assert_same(*(torch.load(path, weights_only=True)["state_dict"] for path in (one, other)))


def test_the_best_loss_so_far_is_remembered(toys, straight, tmp_path):
    run = interrupt(straight("packed"), 7, tmp_path)
    state = state_of(run, 7)
    state["callbacks"]["SaveCheckpoints"]["best"] = 0.0  # which no later validation can beat
    torch.save(state, checkpoints(run)[-1])
    train(load_config(arguments(toys, tmp_path, "resume=last")))
    assert not (run / CHECKPOINTS / "best.ckpt").exists()


def test_a_run_can_go_on_from_its_best_checkpoint(toys, straight, tmp_path, monkeypatch):
    # it is written while the validation goes on, another point of Lightning's loop than the others
    with monkeypatch.context() as patch:
        patch.setattr(SaveCheckpoints, "on_train_end", lambda *_: None)  # else the best one is the last
        run = train(load_config(arguments(toys, tmp_path)))
    best = run / CHECKPOINTS / "best.ckpt"
    assert torch.load(best, weights_only=True)["global_step"] < STEPS
    train(load_config(arguments(toys, tmp_path, f"resume='{best}'")))
    assert_same(state_of(run, STEPS), state_of(straight("packed"), STEPS))


def test_the_number_of_workers_plays_no_part(straight):
    packed, alone = straight("packed"), straight("without workers")
    assert_same(state_of(packed, STEPS)["optimizer_states"], state_of(alone, STEPS)["optimizer_states"])


def test_dropout_is_on_and_differs_from_step_to_step(toys, straight, tmp_path):
    # or the tests above would not show that its generator goes on where it stopped
    run = train(load_config(arguments(toys, tmp_path, "stage.lora.dropout=0")))
    assert metrics_of(run)[3] != metrics_of(straight("packed"))[3]


def test_a_finished_run_goes_nowhere(straight, resumed):
    run = resumed("packed", STEPS)
    assert_same(state_of(run, STEPS), state_of(straight("packed"), STEPS))
    assert report_of(run)["answers"] == report_of(straight("packed"))["answers"]


def test_the_report_is_the_straight_runs(straight, resumed):
    ours, theirs = report_of(resumed("packed", 4)), report_of(straight("packed"))
    for name in ("answers", "loss_curve", "val_curve", "best", "parts", "data"):
        assert ours[name] == theirs[name], name
    assert ours["run"]["samples"] == theirs["run"]["samples"]


# --------------------------------------------------------------------------------------------- what may not be resumed


def refusal(toys, run, tmp_path, *more, kind=ConfigError):
    killed = interrupt(run, 2, tmp_path)
    before = {path: path.read_bytes() for path in killed.rglob("*") if path.is_file()}
    with pytest.raises(kind) as caught:
        train(load_config(arguments(toys, tmp_path, "resume=last", *more)))
    assert {path: path.read_bytes() for path in killed.rglob("*") if path.is_file()} == before, (
        "a refusal changed the run"
    )
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("stage.lora.dropout=0.2", "stage.lora.dropout: 0.1 then, 0.2 now"),
        ("stage.lr.llm=0.02", "stage.lr.llm: 0.01 then, 0.02 now"),
        ("trainer.global_batch=4", "trainer.global_batch: 2 then, 4 now"),
        ("stage.max_steps=7", "stage.max_steps: 9 then, 7 now"),
        ("trainer.precision=bf16", "trainer.precision: fp32 then, bf16 now"),
        ("seed=1", "seed: 0 then, 1 now"),
    ],
)
def test_other_settings_are_refused(toys, straight, tmp_path, change, said):
    message = refusal(toys, straight("packed"), tmp_path, change)
    assert message.startswith(f"resume=last: 1 setting differs from those of {tmp_path}/")
    assert f"\n  {said}\n" in message
    assert "allow a change by its key: resume_allow=[KEY]" in message


def test_all_other_settings_are_listed(toys, straight, tmp_path):
    message = refusal(toys, straight("packed"), tmp_path, "seed=1", "stage.lora.rank=3")
    assert message.startswith("resume=last: 2 settings differ")


def test_settings_that_change_no_number_are_free(toys, straight, tmp_path):
    run = interrupt(straight("packed"), 8, tmp_path)
    free = ["data.workers=0", "trainer.keep=3", "trainer.log_every=2", "trainer.chat_every=5", "logger=csv"]
    train(load_config(arguments(toys, tmp_path, "resume=last", *free)))
    assert_same(state_of(run, STEPS)["state_dict"], state_of(straight("packed"), STEPS)["state_dict"])


def test_a_change_may_be_allowed_by_its_key(toys, straight, tmp_path):
    run = interrupt(straight("packed"), 8, tmp_path)
    changes = ["stage.lr.llm=0.02", "resume_allow=[stage.lr.llm]"]
    train(load_config(arguments(toys, tmp_path, "resume=last", *changes)))
    assert checkpoints(run)[-1].name == "step_00000009.ckpt"
    before, after = (read_checkpoint(each)["optimizer_states"][0]["param_groups"] for each in checkpoints(run)[-2:])
    rates = {group["name"]: (group["lr"], group["initial_lr"]) for group in after}
    unchanged = {group["name"]: group["initial_lr"] for group in before}
    assert rates["llm"][1] == 0.02 != unchanged["llm"]
    assert rates["llm"][0] / 0.02 == pytest.approx(rates["projector"][0] / unchanged["projector"])


def test_an_allowed_change_of_what_is_trained_is_refused_all_the_same(toys, straight, tmp_path):
    changes = ["stage.train.vision=full", "resume_allow=[stage.train.vision]"]
    message = refusal(toys, straight("packed"), tmp_path, *changes, kind=CheckpointError)
    assert "vision.tower" in message
    assert "missing in the checkpoint" in message


def test_other_data_are_refused(toys, straight, tmp_path):
    shutil.copytree(toys.data, tmp_path / "data")
    rows = (tmp_path / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "data" / "train.jsonl").write_text("".join(rows[:-1]), encoding="utf-8")
    changes = [f"data.path={tmp_path}/data/train.jsonl", "resume_allow=[data.path]"]
    message = refusal(toys, straight("packed"), tmp_path / "runs", *changes, kind=CheckpointError)
    assert message.startswith("the interrupted run had 26 training rows, data.path now has 25")


def test_no_run_to_resume_is_an_error(toys, tmp_path):
    with pytest.raises(
        CheckpointError, match=r"resume=last: .* holds no run of stage=finetune model=tiny with a checkp"
    ):
        train(load_config(arguments(toys, tmp_path, "resume=last")))


def test_resume_last_passes_over_an_empty_run(toys, straight, tmp_path):
    run = interrupt(straight("packed"), 8, tmp_path)
    make_run_folder(load_config(arguments(toys, tmp_path)), None)  # a run that was killed before its first checkpoint
    assert train(load_config(arguments(toys, tmp_path, "resume=last"))) == run


@pytest.mark.parametrize("name", ["", f"{CHECKPOINTS}/step_00000007.ckpt"], ids=["run", "checkpoint"])
def test_resume_takes_a_run_or_a_checkpoint(toys, straight, tmp_path, name):
    run = interrupt(straight("packed"), 8, tmp_path)
    assert train(load_config(arguments(toys, tmp_path / "elsewhere", f"resume='{run / name}'"))) == run
    assert_same(state_of(run, STEPS), state_of(straight("packed"), STEPS))


# ------------------------------------------------------------------------------------------------------- a real kill


@pytest.fixture
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the process that is killed: sums of several threads round otherwise
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("_one_thread")
def test_a_process_killed_at_any_moment_goes_on(toys, tmp_path):
    steps, moment = 60, random.Random()
    given = [f"stage.max_steps={steps}", "trainer.save_every=2", "trainer.val_every=25"]
    process = fork_cli(arguments(toys, tmp_path / "killed", *given), tmp_path / "log")
    awaited = f"*/{CHECKPOINTS}/step_{2 * moment.randint(1, 15):08d}.ckpt"
    while not list((tmp_path / "killed").glob(awaited)):
        assert process.is_alive(), (tmp_path / "log").read_text(encoding="utf-8")
        time.sleep(0.005)
    time.sleep(moment.uniform(0, 0.05))
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, "it had come to its end: give it more steps"
    run = train(load_config(arguments(toys, tmp_path / "killed", *given, "resume=last")))
    straight = train(load_config(arguments(toys, tmp_path / "straight", *given)))
    assert_same(state_of(run, steps), state_of(straight, steps))
    assert metrics_of(run) == metrics_of(straight)


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_a_run_that_is_asked_to_stop_says_how_to_go_on(toys, run_cli, tmp_path, monkeypatch, stop):
    # Lightning leaves Ctrl-C ignored, and so does a shell that starts the tests in the background
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)

    def begin(self, trainer, module, batch, batch_idx):
        if trainer.global_step == 4:
            os.kill(os.getpid(), stop)

    monkeypatch.setattr(SaveCheckpoints, "on_train_batch_start", begin)
    try:
        done = run_cli(*arguments(toys, tmp_path))
    finally:
        signal.signal(signal.SIGINT, handler)
    assert done.code == 130
    assert done.err.endswith("stopped. Go on with resume=last, once a checkpoint was saved\n")
    assert find_checkpoint(str(tmp_path / "latest")).name == "step_00000004.ckpt"
