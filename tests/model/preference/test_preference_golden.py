"""The losses of pairs are those that ms-swift 4.6 computes (recordings: tests/golden or VLM_TUNE_GOLDEN)."""

import json
import os
from pathlib import Path

import pytest
import torch

from vlm_tune.config.schema import PreferenceConfig
from vlm_tune.model.preference.facts import FACTS
from vlm_tune.model.preference.loss import RunningMean, bco, dpo, judge

GOLDEN = Path(os.environ.get("VLM_TUNE_GOLDEN") or Path(__file__).parents[2] / "golden")
CASES = json.loads((GOLDEN / "preference.json").read_text(encoding="utf-8"))["cases"]
CLOSE = {"atol": 1e-6, "rtol": 0}


def pairs(batch, prefix=""):
    columns = [batch[f"{prefix}{name}_logps"] for name in ("chosen", "rejected")]
    return torch.tensor(columns, dtype=torch.float64).T  # (P, 2)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['beta']}_{case['label_smoothing']}")
def test_golden_losses_and_delta(case):
    delta = RunningMean()
    for batch in case["batches"]:
        rewards = case["beta"] * (pairs(batch) - pairs(batch, "ref_"))
        delta.add(float(rewards.mean()))
        for name, found in (
            ("sigmoid", dpo(rewards, case["label_smoothing"])),
            ("bco_pair", bco(rewards, delta.value)),
        ):
            torch.testing.assert_close(found, torch.tensor(batch[name], dtype=torch.float64), **CLOSE)
        assert delta.value == pytest.approx(batch["delta"], abs=1e-6)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['beta']}_{case['label_smoothing']}")
def test_golden_sums_of_the_losses(case):
    config = PreferenceConfig(0.8, 0.2, 1.0, case["beta"], case["label_smoothing"])
    for batch in case["batches"]:
        logps, golden = pairs(batch), {name: torch.tensor(batch[name]) for name in ("sigmoid", "bco_pair")}
        num_tokens = torch.full_like(logps, 7)
        loss, facts = judge(logps, num_tokens, pairs(batch, "ref_"), config, batch["delta"])
        wanted = 0.8 * golden["sigmoid"] + 0.2 * golden["bco_pair"] - logps[:, 0] / 7
        torch.testing.assert_close(loss, wanted.double(), **CLOSE)
        known = dict(zip(FACTS, facts, strict=True))
        assert known["accuracy"].tolist() == (known["margin"] > 0).double().tolist()
        torch.testing.assert_close(known["margin"], known["reward_chosen"] - known["reward_rejected"])
        torch.testing.assert_close(known["logp_chosen"], logps[:, 0])
