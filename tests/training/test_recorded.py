"""metrics.csv also says how large the gradient of each part was, what memory was held, and how much was computed."""

import math

import lightning as L
import pytest
import torch

from vlm_tune.config.parse import load_config
from vlm_tune.model.optim import make_optimizer
from vlm_tune.pages.recorded import read_metrics
from vlm_tune.training.callbacks.watch import gradient_squares, is_every_gradient_finite
from vlm_tune.training.module import VlmModule
from vlm_tune.training.run import train

TRAINER = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)


@pytest.fixture(scope="module")
def run(toys, tmp_path_factory):
    """Train four steps, every second of them logged."""
    runs = tmp_path_factory.mktemp("recorded")
    options = (
        "stage.init_from=none",
        "stage.evaluate=false",
        "trainer.num_chats=0",
        "stage.max_steps=4",
        "trainer.log_every=2",
    )
    return train(load_config(toys.arguments(*options, runs=runs)))


@pytest.fixture
def after_backward(toys):
    """Hold a module and its optimizer after a backward pass."""
    staged = toys.staged("stage.train.vision=full")
    module = VlmModule(staged.model, staged.config, 1)
    optimizer = make_optimizer(staged.model.vlm, staged.config.stage)
    module.vlm(staged.batch([0, 1])).backward()
    return module, optimizer


def test_a_logged_step_has_all_columns_that_hold_for_it(run):
    logged = [row for row in read_metrics(run / "metrics.csv") if "train/loss" in row]
    assert [row["step"] for row in logged] == [2, 4]
    for row in logged:
        assert row["grad/projector"] > 0
        assert row["grad/llm"] > 0
        assert "grad/vision" not in row, "it is frozen"
        assert "speed/mfu" not in row, "nobody publishes the peak of this CPU"
        assert row["speed/memory_mb"] > 50
        assert row["speed/tflops"] > 0
        assert row["max_steps"] == 4
    assert 0 < logged[0]["speed/seconds"] <= logged[1]["speed/seconds"]


def test_a_file_of_before_these_columns_is_read(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,train/loss,val/loss,skipped\n1,2.5,,0.0\n1,,2.25,\n", encoding="utf-8")
    rows = read_metrics(tmp_path / "metrics.csv")
    assert rows == [{"step": 1, "train/loss": 2.5, "skipped": 0.0}, {"step": 1, "val/loss": 2.25}]


def test_norms_are_those_of_each_part(after_backward):
    module, optimizer = after_backward
    squares = gradient_squares(TRAINER, module, optimizer).tolist()
    for part, found in zip((module.vlm.vision, module.vlm.projector, module.vlm.llm), squares, strict=True):
        weights = [weight for weight in part.parameters() if weight.grad is not None]
        assert found == pytest.approx(sum(float(weight.grad.square().sum()) for weight in weights), rel=1e-4)


@pytest.mark.parametrize(("value", "is_fine"), [(1e25, True), (math.inf, False), (math.nan, False)])
def test_a_large_gradient_is_a_number_though_its_square_is_none(after_backward, value, is_fine):
    module, optimizer = after_backward
    optimizer.param_groups[0]["params"][0].grad.view(-1)[0] = value
    assert not torch.isfinite(gradient_squares(TRAINER, module, optimizer)).all()
    assert is_every_gradient_finite(TRAINER, module, optimizer) is is_fine
