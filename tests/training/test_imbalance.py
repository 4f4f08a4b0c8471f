"""metrics.csv says how evenly a step's tokens and tiles are dealt to the ranks."""

import csv
from itertools import islice

import pytest
from processes import run_two

from vlm_tune.config.parse import load_config
from vlm_tune.training.run import train

ALL = ("stage=finetune", "stage.init_from=none", "stage.evaluate=false", "trainer.num_chats=0", "stage.pack_length=60")
STEPS = ("stage.max_steps=3", "trainer.global_batch=4", "data.val=none")


def logged(run):
    with (run / "metrics.csv").open(newline="", encoding="utf-8") as file:
        return [[float(row[f"imbalance/{of}"]) for of in ("tokens", "tiles")] for row in csv.DictReader(file)]


def test_it_is_the_largest_rank_s_share_over_the_mean(toys, tmp_path):
    given = (*ALL, *STEPS, "trainer.devices=2", "trainer.accelerator=cpu", "strategy=ddp")
    run = run_two(toys.arguments(*given, runs=tmp_path / "runs"), tmp_path / "runs")
    data = toys.staged(*ALL, *STEPS).data
    expected = []
    steps = [list(islice(data.stream(rank, 2), 6)) for rank in range(2)]
    for start in range(0, 6, 2):
        rows = [[row for batch in rank[start : start + 2] for row in batch.rows] for rank in steps]
        sums = [
            [int(column[each].sum()) for each in rows] for column in (data.train.index.tokens, data.train.index.tiles)
        ]
        expected.append([2 * max(each) / sum(each) for each in sums])
    for found, wanted in zip(logged(run), expected, strict=True):
        assert found == pytest.approx(wanted, abs=1e-6)
    assert any(tiles > 1 for _, tiles in expected)


def test_it_is_one_for_a_rank_alone_and_for_a_step_without_pictures(toys, tmp_path):
    assert logged(train(load_config(toys.arguments(*ALL, *STEPS, runs=tmp_path)))) == [[1, 1]] * 3
