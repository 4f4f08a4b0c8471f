"""A bad step of one rank is skipped by all of them, under DeepSpeed's strategies too."""

import json
import math

import pytest
import torch
from compare import assert_same, metrics_of, state_of
from processes import run_two
from test_bad_steps import ALL, Spoiled

from vlm_tune.training.module import VlmModule

SLOW = pytest.mark.strategies
STRATEGIES = ["zero2", *(pytest.param(name, marks=SLOW) for name in ("ddp", "fsdp", "zero1", "zero3", "zero3_offload"))]


def spoil(monkeypatch):
    """Spoil the gradients of the third step of the second rank."""
    begin = VlmModule.training_step

    def step(self, batch, batch_idx):
        loss = begin(self, batch, batch_idx)
        return Spoiled.apply(loss, math.nan) if (self.global_step, self.global_rank) == (2, 1) else loss

    monkeypatch.setattr(VlmModule, "training_step", step)


def moments(run, step):
    return {number: values["exp_avg"] for number, values in state_of(run, step)["optimizer_states"][0]["state"].items()}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_gradient_that_is_no_number_skips_the_step_on_all_ranks(toys, tmp_path, monkeypatch, strategy):
    spoil(monkeypatch)
    given = {key.partition("=")[0]: key for key in (*ALL, "stage.max_steps=4", "trainer.global_batch=4")}
    more = ("trainer.devices=2", "trainer.accelerator=cpu", f"strategy={strategy}")
    run = run_two(toys.arguments(*given.values(), *more, runs=tmp_path / "runs"), tmp_path / "runs")
    weights = [state_of(run, step)["state_dict"] for step in (2, 3, 4)]
    assert_same(weights[0], weights[1])
    assert_same(moments(run, 2), moments(run, 3))
    assert not torch.equal(*(next(iter(each.values())) for each in weights[1:]))
    assert [float(row["skipped"]) for row in metrics_of(run) if row["lr/llm"]] == [0, 0, 1, 1]
    (entry,) = [json.loads(line) for line in (run / "unusual_steps.jsonl").read_text(encoding="utf-8").splitlines()]
    assert (entry["step"], entry["kind"]) == (3, "skipped")
