"""Runs on pairs: what is logged, that a killed one goes on, and that a step does not depend on how it is divided."""

import json

import numpy as np
import pytest
from compare import assert_same, metrics_of, state_of
from pair_toys import pair_arguments
from processes import run_two
from test_resume import interrupt

from vlm_tune.config.parse import load_config
from vlm_tune.errors import ConfigError, DataError
from vlm_tune.model.preference.facts import FACTS
from vlm_tune.pages.recorded import describe
from vlm_tune.training.callbacks.metrics import read_metrics
from vlm_tune.training.run import train

STEPS = 6
ALL = (
    f"stage.max_steps={STEPS}",
    "stage.clip=0",  # clipping would hide a gradient that is too large or too small by a factor
    "stage.warmup=0",
    "stage.pack_length=1",  # each of the 18 pairs in a pack of its own, so that steps end with the epoch
    "trainer.global_batch=6",
    "trainer.save_every=1",
    "trainer.keep=100",
    "trainer.val_every=3",
)


@pytest.fixture(scope="module")
def run(toys, tmp_path_factory):
    """Give a function that trains on pairs, once with each settings."""
    made, folder = {}, tmp_path_factory.mktemp("pairs")

    def run(*more):
        if more not in made:
            runs = tmp_path_factory.mktemp("runs")
            made[more] = train(load_config(pair_arguments(toys, folder, *ALL, *more, runs=runs)))
        return made[more]

    run.folder = folder
    return run


def test_the_parts_of_the_loss_and_the_rewards_are_logged(run):
    rows = read_metrics(run() / "metrics.csv")
    trained, validated = ([row for row in rows if name in row] for name in ("train/loss", "val/loss"))
    assert len(trained) == STEPS
    assert len(validated) == 2
    for row, part, loss in [
        *((row, "pairs", "train/loss") for row in trained),
        *((row, "val", "val/loss") for row in validated),
    ]:
        assert {f"{part}/{name}" for name in FACTS} <= row.keys()
        sigmoid, bco, nll = (row[f"{part}/{name}"] for name in FACTS[:3])
        assert row[loss] == pytest.approx(0.8 * sigmoid + 0.2 * bco + nll, rel=1e-5)
        assert row[f"{part}/margin"] == pytest.approx(
            row[f"{part}/reward_chosen"] - row[f"{part}/reward_rejected"], abs=1e-5
        )


def test_it_learns_to_prefer(run):
    trained = [row for row in read_metrics(run() / "metrics.csv") if "train/loss" in row]
    assert trained[0]["pairs/margin"] == pytest.approx(0, abs=1e-4)
    assert trained[0]["pairs/sigmoid"] == pytest.approx(np.log(2), abs=1e-4)
    assert trained[-1]["pairs/margin"] > 0.05
    assert trained[-1]["train/loss"] < trained[0]["train/loss"]


def test_delta_is_the_mean_reward_of_the_steps_before(run):
    trained = [row for row in read_metrics(run() / "metrics.csv") if "train/loss" in row]
    means = [(row["pairs/reward_chosen"] + row["pairs/reward_rejected"]) / 2 for row in trained]
    for number, row in enumerate(trained):
        assert row["pairs/delta"] == pytest.approx(np.mean(means[:number]) if number else 0, abs=1e-5)
    assert state_of(run(), STEPS)["delta"]["value"] == pytest.approx(np.mean(means), abs=1e-5)


def test_pages_draw_them(run):
    curves = describe(run())["curves"]
    assert {f"{part}/{name}" for part in ("pairs", "val") for name in FACTS} <= curves.keys()
    report = json.loads((run() / "report.json").read_text(encoding="utf-8"))
    assert len(report["pairs"]["pairs/accuracy"]) == STEPS
    page = (run() / "report.html").read_text(encoding="utf-8")
    assert ">chosen above rejected</text>" in page
    assert ">reward</text>" in page


def test_six_micro_batches_are_one(run):
    one, six = run("trainer.micro_batch=6"), run()
    compare(one, six)
    ours, theirs = (state_of(each, STEPS)["delta"]["value"] for each in (one, six))
    assert ours == pytest.approx(theirs, abs=1e-5)


def compare(run, other):
    rows, others = (read_metrics(each / "metrics.csv") for each in (run, other))
    for row, with_ in zip(rows, others, strict=True):
        # at the first step rewards are 0, and which is higher is a matter of rounding
        names = [name for name in row if name.startswith(("train/", "val/", "pairs/")) and "accuracy" not in name]
        assert len(names) >= len(FACTS)
        for name in names:
            assert row[name] == pytest.approx(with_[name], rel=1e-5, abs=1e-5), name
    assert rows[-1]["val/accuracy"] == others[-1]["val/accuracy"]


def test_what_comes_out_is_evaluated_and_exported(run, run_cli, tmp_path):
    asked = [f"data.test={run.folder}/val.jsonl", "metric=perplexity"]
    finished = run_cli("evaluate", f"ckpt={run()}", *asked, f"out={tmp_path}/answers.jsonl")
    assert finished.code == 0, finished.err
    assert run_cli("export", f"ckpt={run()}", f"out={tmp_path}/hf").code == 0


@pytest.mark.parametrize("keeps_cache", [True, False], ids=["cache", "no cache"])
def test_a_killed_run_goes_on_bit_by_bit(toys, run, tmp_path, monkeypatch, keeps_cache):
    if not keeps_cache:  # the reference is that of the weights that the run began with, not of those it goes on with
        monkeypatch.setenv("VLM_TUNE_CACHE", str(tmp_path / "cache"))
    killed = interrupt(run(), 2, tmp_path)
    again = train(load_config(pair_arguments(toys, run.folder, *ALL, "resume=last", runs=tmp_path)))
    assert again == killed
    ours, theirs = (state_of(each, STEPS) for each in (again, run()))
    assert_same(ours, theirs)
    assert metrics_of(again) == metrics_of(run())


@pytest.mark.strategies
@pytest.mark.parametrize("strategy", ["ddp", "zero2"])
def test_two_processes_are_one(toys, run, tmp_path, strategy):
    more = ("trainer.devices=2", "trainer.accelerator=cpu", f"strategy={strategy}")
    two = run_two(pair_arguments(toys, run.folder, *ALL, *more, runs=tmp_path), tmp_path)
    compare(two, run())


# ---------------------------------------------------------------------------------------------------- what cannot be


@pytest.mark.parametrize(
    "setting",
    [
        "stage.packing=false",
        "stage.loss=square",
        "stage.share_prefix=on",
        "stage.neftune=5",
        "data.augment.flip=true",
        "strategy=fsdp",
        "strategy=zero3",
    ],
)
def test_what_a_pair_cannot_be_trained_with_is_refused(toys, tmp_path, setting):
    key = setting.partition("=")[0].removesuffix(".flip")
    with pytest.raises(ConfigError, match=f"stage.preference trains on pairs, but .*{key}"):
        load_config(pair_arguments(toys, tmp_path, setting))


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("stage.preference.nll=-1", "set a weight of 0 or more"),
        ("stage.preference.beta=0", "set it above 0"),
        ("stage.preference.label_smoothing=0.5", "below 0.5"),
    ],
)
def test_a_weight_out_of_range_is_refused(toys, tmp_path, setting, said):
    with pytest.raises(ConfigError, match=f"{setting.partition('=')[0]}=.*{said}"):
        load_config(pair_arguments(toys, tmp_path, setting))


def test_conversations_are_refused_where_pairs_are_trained_on(toys):
    with pytest.raises(DataError, match=r"one answer, but this stage trains on pairs \(stage.preference\)"):
        toys.staged("stage=dpo", "stage.init_from=none")


def test_pairs_are_refused_where_conversations_are_trained_on(toys, tmp_path):
    with pytest.raises(DataError, match="a pair of answers, but this stage trains on conversations: take stage=dpo or"):
        toys.staged(*pair_arguments(toys, tmp_path, "stage=finetune"))
