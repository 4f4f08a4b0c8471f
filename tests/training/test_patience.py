"""trainer.patience ends a run whose validation loss falls no more; a resumed one judges as an uninterrupted one."""

import json

import pytest
from compare import metrics_of

from vlm_tune.config.parse import load_config
from vlm_tune.errors import ConfigError
from vlm_tune.model.checkpoint import CHECKPOINTS, checkpoints
from vlm_tune.training.module import VlmModule
from vlm_tune.training.run import train

LOSSES = {2: 5.0, 4: 3.0, 6: 4.0, 8: 3.5, 10: 6.0}  # the best one at step 4


@pytest.fixture
def measured(monkeypatch):
    """Let validations find these losses: training itself would not do so on demand."""
    end = VlmModule.on_validation_epoch_end

    def found(self):
        self.val_sums[0] = self.val_sums[1] * LOSSES[self.global_step]
        end(self)

    monkeypatch.setattr(VlmModule, "on_validation_epoch_end", found)


def settings(toys, runs, *more):
    ours = ("stage.init_from=none", "stage.max_steps=10", "trainer.val_every=2", "trainer.save_every=5")
    return load_config(toys.arguments(*ours, "trainer.keep=9", "trainer.num_chats=1", *more, runs=runs))


def steps_of(run):
    return [int(path.stem.removeprefix("step_")) for path in checkpoints(run)]


def validated(run):
    return [int(row["step"]) for row in metrics_of(run) if row["val/loss"]]


@pytest.mark.parametrize(("patience", "last"), [(1, 6), (2, 8), (3, 10)])
def test_it_ends_after_so_many_validations_without_a_better_one(toys, tmp_path, measured, capsys, patience, last):
    run = train(settings(toys, tmp_path, f"trainer.patience={patience}"))
    assert validated(run)[-1] == last
    assert steps_of(run)[-1] == last, "its last step is saved"
    said = capsys.readouterr().out
    line = f"stopped early after step {last}: {patience} validation"
    assert (line in said) == (last < 10)
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    assert report["run"]["steps"] == last
    assert report["best"]["step"] == 4
    if last < 10:
        assert f"The best, 3.0000 at step 4, is {run / CHECKPOINTS / 'best.ckpt'}" in said


def test_without_it_a_run_goes_to_its_end(toys, tmp_path, measured):
    assert validated(train(settings(toys, tmp_path))) == [2, 4, 6, 8, 10]


@pytest.mark.parametrize("left", [5, 8], ids=["before", "at the stop itself"])
def test_a_resumed_run_stops_where_an_uninterrupted_one_does(toys, tmp_path, measured, left):
    run = train(settings(toys, tmp_path, "trainer.patience=2"))
    straight, answers = metrics_of(run), (run / "sample_answers.jsonl").read_text(encoding="utf-8")
    for step, path in zip(steps_of(run), checkpoints(run), strict=True):
        if step > left:
            path.unlink()
    assert train(settings(toys, tmp_path, "trainer.patience=2", "resume=last")) == run
    assert metrics_of(run) == straight
    assert (run / "sample_answers.jsonl").read_text(encoding="utf-8") == answers
    assert steps_of(run) == [5, 8]


def test_more_patience_lets_a_stopped_run_go_on(toys, tmp_path, measured):
    run = train(settings(toys, tmp_path, "trainer.patience=2"))
    train(settings(toys, tmp_path, "trainer.patience=9", "resume=last"))
    assert validated(run) == [2, 4, 6, 8, 10]


def test_patience_without_validation_rows_is_an_error(toys, tmp_path):
    with pytest.raises(ConfigError, match=r"trainer.patience=2, but there are no validation rows. Name them with"):
        train(settings(toys, tmp_path, "trainer.patience=2", "data.val=none"))
