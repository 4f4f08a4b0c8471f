"""A kill after the last checkpoint loses neither the validation nor the answers that come after it."""

import json
import shutil

import pytest
from compare import metrics_of

from vlm_tune.config.parse import load_config
from vlm_tune.model.checkpoint import CHECKPOINTS
from vlm_tune.training.run import train

ALL = (
    "stage=finetune",
    "stage.init_from=none",
    "stage.max_steps=3",
    "stage.evaluate=false",
    "trainer.num_chats=1",
    "trainer.save_every=1",
)


@pytest.fixture(scope="module")
def straight(toys, tmp_path_factory):
    return train(load_config(toys.arguments(*ALL, runs=tmp_path_factory.mktemp("runs"))))


def test_the_validation_and_the_answers_are_made_up_for(toys, straight, tmp_path):
    run = tmp_path / straight.name
    shutil.copytree(straight, run)
    (run / CHECKPOINTS / "best.ckpt").unlink()
    (run / "report.json").unlink()
    lines = (run / "metrics.csv").read_text(encoding="utf-8").splitlines(keepends=True)
    (run / "metrics.csv").write_text("".join(lines[:-1]), encoding="utf-8")
    answers = (run / "sample_answers.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (run / "sample_answers.jsonl").write_text("".join(answers[:-1]), encoding="utf-8")
    train(load_config(toys.arguments(*ALL, "resume=last", runs=tmp_path)))
    assert metrics_of(run) == metrics_of(straight)
    assert (run / "sample_answers.jsonl").read_text(encoding="utf-8") == "".join(answers)
    assert (run / CHECKPOINTS / "best.ckpt").exists()
    ours, theirs = (json.loads((each / "report.json").read_text(encoding="utf-8")) for each in (run, straight))
    for name in ("answers", "val_curve", "best", "loss_curve"):
        assert ours[name] == theirs[name], name
