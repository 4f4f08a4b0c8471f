"""Arithmetic that this processor is slow in is named, with how slow it is."""

import re

import pytest

from vlm_tune.config.parse import load_config
from vlm_tune.model import build


@pytest.mark.parametrize(
    ("flags", "precision", "is_told"), [("avx2", "bf16", True), ("avx2", "fp32", False), ("avx512_bf16", "bf16", False)]
)
def test_bf16_without_units_for_it_is_told_with_its_measured_price(monkeypatch, toys, flags, precision, is_told):
    monkeypatch.setattr(build, "_cpu_flags", lambda: flags)
    monkeypatch.setattr(build.torch.cuda, "is_available", lambda: False)
    notes = build.slow_arithmetic(load_config(toys.arguments(f"trainer.precision={precision}")))
    assert [
        bool(re.search(r"no bf16 units: a matrix product takes \d+\.\d times as long", each)) for each in notes
    ] == ([True] if is_told else [])
