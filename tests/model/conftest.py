"""Packs of these tests are short; their layers keep what those of a long pack would."""

import pytest

from vlm_tune.model.kernels import kept


@pytest.fixture(autouse=True)
def _short_packs_are_spared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "FEW", 0)
