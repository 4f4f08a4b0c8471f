"""A run that is killed again and again, in the writing of checkpoints too, ends as one that never was: bit by bit."""

import random

import pytest
from kills import ONE, TWO, arguments, compare, kill_and_go_on, note_order, run_to_its_end

from vlm_tune.training.module import VlmModule


@pytest.fixture(autouse=True)
def _order_noted():
    before = note_order()
    yield
    VlmModule.training_step = before


@pytest.mark.parametrize(
    ("ranks", "steps", "kills"),
    [
        pytest.param(1, 12, 3, id="three kills"),
        pytest.param(1, 60, 20, id="many kills", marks=pytest.mark.kill),
        pytest.param(2, 20, 4, id="two ranks", marks=[pytest.mark.kill, pytest.mark.timeout(900)]),
    ],
)
def test_weights_optimizer_metrics_and_the_order_of_rows_are_the_same(toys, tmp_path, ranks, steps, kills):
    folders = tmp_path / "killed", tmp_path / "straight"
    for folder in folders:
        folder.mkdir()
    more = ONE if ranks == 1 else (*TWO, "strategy=ddp")
    straight = run_to_its_end(arguments(toys, folders[1], steps, *more), folders[1], ranks)
    given = arguments(toys, folders[0], steps, *more)
    run, outcome = kill_and_go_on(given, folders[0], random.Random(), kills, ranks)
    assert outcome.kills > 0
    assert compare(run, straight, folders) == []
