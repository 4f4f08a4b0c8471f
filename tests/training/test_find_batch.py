"""trainer.find_batch divides a step into the largest packs that fit, and leaves nothing behind by trying."""

import gc
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest
import torch
from compare import assert_same, state_of
from processes import run_two

from vlm_tune.config.parse import load_config, read_config
from vlm_tune.data.sizes import Index
from vlm_tune.errors import ConfigError
from vlm_tune.model.checkpoint import CONFIG
from vlm_tune.model.find_batch import (
    USED,
    Memory,
    fill,
    find_passes,
    largest_batches,
    most_passes,
    regroup,
    run_twice,
    undisturbed,
)
from vlm_tune.training import run as training
from vlm_tune.training.resume import with_packs_of
from vlm_tune.training.run import train

CPU = torch.device("cpu")
MB = 2**20
SETTINGS = (
    "stage=finetune_full",
    "stage.init_from=none",
    "stage.pack_length=400",
    "stage.pack_tiles=12",
    "trainer.global_batch=8",
    "trainer.find_batch=true",
    "data.feature_cache=off",
)
RUN = (
    *SETTINGS,
    "model.tiles.max=1",
    "stage.max_steps=4",
    "trainer.save_every=2",
    "stage.evaluate=false",
    "trainer.num_chats=0",
)


def index_of(tokens, tiles):
    columns = [
        np.array(each, np.int64) for each in (range(len(tokens)), tokens, tokens, tiles, tokens, tokens, tokens, tokens)
    ]
    return Index(*columns)


def packs_of(config):
    return config.trainer.global_batch, config.stage.pack_length, config.stage.pack_tiles


def needed(staged, passes):
    """Measure a pass, as the search does."""
    batch = next(largest_batches(staged.data, regroup(staged.config, passes)))
    with undisturbed(staged.model.vlm, staged.config.stage, CPU):
        return Memory(CPU).peak(lambda: run_twice(staged.model.vlm, batch, staged.config))


@pytest.mark.parametrize(("passes", "packs"), [(8, (16, 4096, 48)), (2, (4, 16384, 192)), (1, (2, 32768, 384))])
def test_a_step_keeps_its_tokens_and_tiles(passes, packs):
    config = load_config(["model=tiny", "stage.pack_length=4096", "stage.pack_tiles=48", "trainer.devices=2"])
    assert packs_of(regroup(config, passes)) == packs


def test_the_smallest_packs_hold_the_longest_row_and_the_one_of_most_tiles(toys):
    config = load_config(toys.arguments(*SETTINGS))  # 3,200 tokens and 96 tiles a step
    assert most_passes(config, index_of([100, 320], [0, 1])) == 10
    assert most_passes(config, index_of([100, 320], [40, 1])) == 2
    assert most_passes(config, index_of([99_999], [1])) == 1


def test_a_budget_is_filled_with_the_rows_of_most_tiles_first():
    index = index_of([10, 50, 30], [0, 3, 1])
    assert fill(index, (170, 7)) == (1, 1, 2, 0, 0, 0, 0)  # 170 tokens, 7 tiles
    assert fill(index, (40, 7)) == (1,), "a row that is larger than the budget has a pack of its own"


def test_memory_is_that_of_the_moment(toys):
    memory = Memory(CPU)
    gc.collect()  # as a peak does, of what earlier tests left
    before = memory.used()
    assert 290 * MB < memory.peak(lambda: torch.ones(300 * MB // 4)) - before < 330 * MB
    assert memory.peak(lambda: None) - before < 30 * MB
    assert memory.peak(lambda: torch.empty(2**50)) == float("inf")


def test_the_largest_packs_that_fit_are_found(toys):
    """In a process of its own: packs of the toys differ by 20 MB, and what earlier tests left may move by as much."""
    with ProcessPoolExecutor(1, get_context("spawn")) as processes:
        passes, most = processes.submit(find_between, toys).result()
    assert 1 < passes < most


def find_between(toys):
    """Search with half of what the smallest and the largest packs need; return the passes found, and the most."""
    staged = toys.staged(*SETTINGS)
    most = most_passes(staged.config, staged.data.train.index)
    needed(staged, 2)  # what libraries keep for themselves is there from then on
    smallest, largest = needed(staged, most), needed(staged, 1)
    moments = 8 * sum(weight.numel() for weight in staged.model.vlm.parameters() if weight.requires_grad)
    limit = ((smallest + largest) / 2 + moments) / USED
    return find_passes(staged.model.vlm, staged.data, staged.config, CPU, limit), most


def test_a_device_that_holds_all_of_a_step_runs_it_at_once(toys):
    staged = toys.staged(*SETTINGS)
    assert find_passes(staged.model.vlm, staged.data, staged.config, CPU) == 1


def test_a_device_too_small_for_the_largest_row_is_named(toys):
    staged = toys.staged(*SETTINGS)
    said = r"packs of \d+ tokens and \d+ tiles, about the largest row, need \d+\.\d+ GiB"
    with pytest.raises(ConfigError, match=said):
        find_passes(staged.model.vlm, staged.data, staged.config, CPU, 10 * MB)


def test_trying_changes_nothing(toys):
    staged = toys.staged(*SETTINGS, "stage.lora.dropout=0.1", "model=tiny")
    vlm = staged.model.vlm
    vlm.register_buffer("counted", torch.zeros(1))
    vlm.register_forward_pre_hook(lambda *_: vlm.counted.add_(1) and None)  # as a batch norm does
    before = {name: value.clone() for name, value in vlm.state_dict().items()}
    modes, generator = [layer.training for layer in vlm.modules()], torch.random.get_rng_state()
    find_passes(vlm, staged.data, staged.config, CPU)
    assert_same(dict(vlm.state_dict()), before)
    assert [layer.training for layer in vlm.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), generator)
    assert all(weight.grad is None for weight in vlm.parameters())


def test_a_run_is_the_one_with_these_settings(toys, tmp_path, capsys):
    run = train(load_config(toys.arguments(*RUN, runs=tmp_path / "found")))
    kept = read_config(run / CONFIG)
    said = "a step is 1 packs of 3,200 tokens and 96 tiles, the largest that fit (given: 8 packs of 400 tokens"
    assert said in capsys.readouterr().out
    assert packs_of(kept) == (1, 3200, 96)
    plain = ("stage.pack_length=3200", "stage.pack_tiles=96", "trainer.global_batch=1", "trainer.find_batch=false")
    chosen = {key.partition("=")[0]: key for key in (*RUN, *plain)}
    other = train(load_config(toys.arguments(*chosen.values(), runs=tmp_path / "plain")))
    assert_same(state_of(run, 4), state_of(other, 4))


def test_a_resumed_run_does_not_search_again(toys, tmp_path, monkeypatch):
    short = toys.arguments(*RUN[:-4], "stage.max_steps=2", *RUN[-3:], runs=tmp_path)
    run = train(load_config(short))
    monkeypatch.setattr(training, "find_passes", None)
    given = [each.replace("stage.max_steps=2", "stage.max_steps=4") for each in short]
    assert train(load_config([*given, "resume=last"])) == run
    assert packs_of(read_config(run / CONFIG)) == (1, 3200, 96)


def test_packs_that_the_devices_now_cannot_share_are_refused(toys, tmp_path, run_cli):
    run = train(load_config(toys.arguments(*RUN, runs=tmp_path)))
    done = run_cli(*toys.arguments(*RUN, "trainer.devices=2", "trainer.accelerator=cpu", f"resume='{run}'"))
    assert done.code == 2
    assert "trainer.global_batch=1 does not divide by devices*nodes*micro_batch=2" in done.err


def test_all_ranks_take_the_same_packs(toys, tmp_path):
    more = ("trainer.devices=2", "trainer.accelerator=cpu", "strategy=ddp")
    run = run_two(toys.arguments(*RUN, *more, runs=tmp_path / "runs"), tmp_path / "runs")
    assert packs_of(read_config(run / CONFIG)) == (2, 1600, 48)


def test_packs_found_for_another_run_are_not_taken():
    found, asked = (
        load_config(["model=tiny", *more]) for more in (["stage.pack_length=9"], ["trainer.find_batch=true"])
    )
    assert with_packs_of(found, asked) == asked


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("stage.packing=false", "finds the size of packs, but stage.packing=false"),
        ("strategy=fsdp", "tries a device that holds the whole model, strategy=fsdp splits it"),
        ("strategy=zero3", "tries a device that holds the whole model, strategy=zero3 splits it"),
    ],
)
def test_what_it_cannot_try_is_refused(given, said):
    with pytest.raises(ConfigError, match=said):
        load_config(["model=tiny", "trainer.find_batch=true", given])
