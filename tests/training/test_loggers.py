"""Each logger by its name, for real, without a network: the numbers of a run, and its sample answers with pictures."""

from importlib.util import find_spec

import numpy as np
import pytest

from vlm_tune.config.parse import load_config
from vlm_tune.pages.recorded import read_metrics
from vlm_tune.training.callbacks.metrics import Curves
from vlm_tune.training.run import train


def needs(package):
    reason = f"{package} is not installed (pip install '.[loggers]')"
    return pytest.mark.skipif(find_spec(package) is None, reason=reason)


@pytest.fixture
def logged(toys, tmp_path, monkeypatch):
    """Give a function that trains two steps with a logger, and with two sample answers."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))

    def run_with(name):
        options = ("stage.init_from=none", "stage.evaluate=false", "stage.max_steps=2", f"logger={name}")
        return train(load_config(toys.arguments(*options, runs=tmp_path / "runs")))

    return run_with


def test_tensorboard(logged):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = logged("default")
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    for name in ("train/loss", "lr/llm", "val/loss"):
        written = [(row["step"], row[name]) for row in read_metrics(run / "metrics.csv") if name in row]
        shown = [(event.step, event.value) for event in events.Scalars(name)]
        assert len(written) >= 2, name
        assert np.array(shown) == pytest.approx(np.array(written)), name
    assert {"train/loss", "val/loss", "grad/llm", "speed/memory_mb"} <= set(events.Tags()["scalars"])
    assert events.Tags()["images"] == ["sample answers/0", "sample answers/1"]
    assert "sample answers/0/text_summary" in events.Tags()["tensors"]


def test_a_logger_that_fails_takes_no_row_from_the_file(logged, tmp_path, monkeypatch):
    def fail(*values):
        raise ConnectionError("the server has gone")

    monkeypatch.setattr(Curves, "log_metrics", fail)
    with pytest.raises(ConnectionError, match="the server has gone"):
        logged("default")
    (metrics,) = (tmp_path / "runs").glob("*/metrics.csv")
    assert [row["step"] for row in read_metrics(metrics)] == [1]


@needs("wandb")
def test_wandb(logged):
    run = logged("wandb")
    (offline,) = run.glob("wandb/offline-run-*")
    assert list(offline.glob("*.wandb"))
    tables = list(offline.glob("files/media/table/**/*.json"))
    assert len(tables) == 2, "before and after training"
    assert list(offline.glob("files/media/images/**/*.png"))


@needs("mlflow")
def test_mlflow(logged):
    run = logged("mlflow")
    assert list(run.glob("mlflow/*/*/metrics/train/loss"))
    assert len(list(run.glob("mlflow/*/*/artifacts/sample_answers/*.png"))) == 2
    assert len(list(run.glob("mlflow/*/*/artifacts/sample_answers/step_*.json"))) == 2


@needs("trackio")
def test_trackio(logged):
    import trackio

    run = logged("trackio")
    (stored,) = trackio.Api().runs("vlm_tune")
    assert stored.name == run.name
    assert list((run.parents[1] / "trackio").rglob("*.png"))


@pytest.mark.parametrize(("name", "package"), [("wandb", "wandb"), ("mlflow", "mlflow-skinny"), ("trackio", "trackio")])
def test_a_missing_package_is_said_before_a_run_folder_is_made(toys, tmp_path, run_cli, monkeypatch, name, package):
    monkeypatch.setattr("vlm_tune.model.ready.find_spec", lambda asked: None if asked == name else find_spec(asked))
    done = run_cli(*toys.arguments(f"logger={name}", runs=tmp_path))
    assert done.code == 2
    assert f"logger.names=['{name}']: not installed. Run `pip install {package}`" in done.err
    assert not list(tmp_path.iterdir())
