"""Two runs side by side: their checkpoints bit by bit, and their metrics."""

import csv

import torch

from vlm_tune.model.checkpoint import CHECKPOINTS

PASSING = ("seconds", "epoch_loop.val_loop.batch_progress")  # time, and how often validation was shown again


def state_of(run, step):
    path = run / CHECKPOINTS / f"step_{step:08d}.ckpt"
    return torch.load(path, weights_only=True)


def metrics_of(run):
    """Read metrics.csv as text, the times left out."""
    with (run / "metrics.csv").open(newline="", encoding="utf-8") as file:
        return [{name: value for name, value in row.items() if "speed" not in name} for row in csv.DictReader(file)]


def assert_same(one, other, place="checkpoint"):
    """Compare what two checkpoints hold, tensors bit by bit."""
    assert type(one) is type(other), place
    if isinstance(one, dict):
        assert one.keys() == other.keys(), place
        for key in one:
            if key not in PASSING:
                assert_same(one[key], other[key], f"{place}[{key!r}]")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), place
        for number, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{place}[{number}]")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), f"{place} differs by {float((one - other).abs().max())}"
    else:
        assert one == other, place
