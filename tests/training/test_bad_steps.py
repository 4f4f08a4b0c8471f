"""A step whose loss or gradient is no number is left out, counted and named; a leap of the loss is marked."""

import json
import math

import pytest
import torch
from compare import assert_same, metrics_of, state_of

from vlm_tune.config.parse import load_config
from vlm_tune.errors import TrainingError
from vlm_tune.model.checkpoint import checkpoints
from vlm_tune.training.callbacks.watch import LEAST, WatchSteps
from vlm_tune.training.module import VlmModule
from vlm_tune.training.run import train

STEPS = 6
ALL = (
    "stage=finetune",
    "stage.init_from=none",
    f"stage.max_steps={STEPS}",
    "stage.evaluate=false",
    "trainer.num_chats=0",
    "trainer.save_every=1",
    "trainer.keep=99",
    "trainer.val_every=100",
    "trainer.micro_batch=1",
    "trainer.global_batch=2",
    "data.feature_cache=off",
)


def settings(toys, runs, *more):
    return load_config(toys.arguments(*{key.partition("=")[0]: key for key in (*ALL, *more)}.values(), runs=runs))


def spoil(monkeypatch, steps, batch=1, value=math.nan):
    """Let the output of one layer be no number in some steps, in one micro-batch of two."""
    begin = VlmModule.training_step

    def step(self, batch_of, batch_idx):
        spoiled = self.vlm.llm.model.layers[1].mlp.down_proj
        is_due = self.global_step in steps and batch_idx % 2 == batch
        self.is_due = is_due
        if not getattr(self, "is_hooked", False):
            spoiled.register_forward_hook(lambda layer, given, made: made * value if self.is_due else made)
            self.is_hooked = True
        return begin(self, batch_of, batch_idx)

    monkeypatch.setattr(VlmModule, "training_step", step)
    seed = VlmModule.seed_micro_batch

    def seeded(self, number):
        self.is_due = self.global_step in steps and number % 2 == batch
        seed(self, number)

    monkeypatch.setattr(VlmModule, "seed_micro_batch", seeded)


def noted(run):
    return [json.loads(line) for line in (run / "unusual_steps.jsonl").read_text(encoding="utf-8").splitlines()]


def weights(run, step):
    return state_of(run, step)["state_dict"], state_of(run, step)["optimizer_states"][0]["state"]


@pytest.fixture
def skipping(toys, tmp_path, monkeypatch):
    """Train with a bad third and fourth step; return the run."""
    spoil(monkeypatch, (2, 3))
    return train(settings(toys, tmp_path / "straight"))


def test_a_bad_step_changes_neither_weights_nor_moments(skipping):
    for before, after in ((2, 3), (3, 4)):
        assert_same(*(weights(skipping, step) for step in (before, after)))
    assert not torch.equal(*(next(iter(weights(skipping, step)[0].values())) for step in (4, 5)))


def test_it_is_counted_and_the_run_goes_on(skipping):
    assert [float(row["skipped"]) for row in metrics_of(skipping) if row["train/loss"] or row["lr/llm"]] == [
        0,
        0,
        1,
        2,
        2,
        2,
    ]
    assert [row["train/loss"] == "" for row in metrics_of(skipping) if row["lr/llm"]] == [
        False,
        False,
        True,
        True,
        False,
        False,
    ]


def test_its_rows_and_the_first_module_are_named(toys, skipping, capsys):
    first, second = noted(skipping)
    assert (first["step"], second["step"]) == (3, 4)
    assert first["kind"] == "skipped"
    assert first["module"].endswith("layers.1.mlp.down_proj")
    assert 0 < len(first["rows"]) < 5, "the rows of the micro-batch that failed, not of the other"
    assert all(row.startswith("train_") for row in first["rows"])


def test_a_run_with_bad_steps_goes_on_bit_by_bit(toys, skipping, tmp_path):
    killed = tmp_path / "straight" / skipping.name
    before = state_of(skipping, STEPS), metrics_of(skipping), noted(skipping)
    for path in checkpoints(killed)[3:]:
        path.unlink()
    train(settings(toys, tmp_path / "straight", "resume=last"))
    assert_same(state_of(skipping, STEPS), before[0])
    assert metrics_of(skipping) == before[1]
    assert noted(skipping) == before[2]


def test_so_many_in_a_row_end_the_run_with_its_state_saved(toys, tmp_path, monkeypatch):
    spoil(monkeypatch, (1, 2, 3, 4))
    with pytest.raises(TrainingError, match=r"the loss is nan at step 3, rows train_.*; 3 steps in a row") as caught:
        train(settings(toys, tmp_path, "trainer.max_bad_steps=3", "trainer.save_every=100"))
    assert "It is first seen in llm." in str(caught.value)
    (run,) = {path.resolve() for path in tmp_path.iterdir()}
    assert [path.name for path in checkpoints(run)] == ["step_00000004.ckpt"]


class Spoiled(torch.autograd.Function):
    """Hand a value on, with a gradient that is multiplied by a factor."""

    @staticmethod
    def forward(ctx, given, factor):
        ctx.factor = factor
        return given.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.factor, None


def test_a_gradient_alone_is_seen(toys, tmp_path, monkeypatch):
    def step(self, batch, batch_idx):
        if self.global_step == 1 and not getattr(self, "handle", None):
            norm = self.vlm.llm.model.layers[1].input_layernorm
            self.handle = norm.register_forward_hook(lambda layer, given, made: Spoiled.apply(made, math.inf))
        elif self.global_step == 2 and self.handle:
            self.handle.remove()
        return begin(self, batch, batch_idx)

    begin = VlmModule.training_step
    monkeypatch.setattr(VlmModule, "training_step", step)
    run = train(settings(toys, tmp_path, "stage.max_steps=4"))
    (entry,) = noted(run)
    assert (entry["step"], entry["kind"]) == (2, "skipped")
    assert math.isfinite(float(entry["loss"]))
    assert entry["module"].startswith("the gradient of llm.")
    assert_same(weights(run, 1), weights(run, 2))


def test_a_leap_of_the_loss_is_marked_and_trained(toys, tmp_path, monkeypatch):
    compare = WatchSteps._compare

    def seen(self, trainer, module, loss):
        self.losses = self.losses or [1.0 + number % 7 / 100 for number in range(LEAST)]
        compare(self, trainer, module, 9.0 if trainer.global_step == 2 else 1.02)

    monkeypatch.setattr(WatchSteps, "_compare", seen)
    run = train(settings(toys, tmp_path, "stage.max_steps=4"))
    (entry,) = noted(run)
    assert (entry["step"], entry["kind"], entry["loss"]) == (3, "spike", "9.0")
    assert entry["rows"]
    assert not torch.equal(*(next(iter(weights(run, step)[0].values())) for step in (2, 3)))


@pytest.mark.parametrize(
    "losses", [[5.0 / (1 + number) for number in range(200)], [1.0 + number % 5 / 10 for number in range(200)]]
)
def test_a_falling_or_a_noisy_loss_is_no_leap(losses, tmp_path, monkeypatch):
    watch, marked = WatchSteps(tmp_path, 5, None, None, None), []
    monkeypatch.setattr(WatchSteps, "_note", lambda self, *_: marked.append(_))
    for loss in losses:
        watch._compare(None, None, loss)
    assert marked == []
