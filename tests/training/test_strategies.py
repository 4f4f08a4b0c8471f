"""Every strategy trains two processes as one process trains alone, and writes the checkpoints that all others read.

`make test-strategies` runs all of them over 20 steps, and keeps the differences in the file that VLM_TUNE_TRUST names.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from processes import run_two
from safetensors.torch import load_file

from vlm_tune.cli import main
from vlm_tune.model.checkpoint import CHECKPOINTS, checkpoints, find_runs
from vlm_tune.model.parts.shards import held
from vlm_tune.training.callbacks.metrics import read_metrics
from vlm_tune.training.module import VlmModule

STRATEGIES = ("ddp", "fsdp", "zero1", "zero2", "zero3", "zero3_offload")
QUICK = [("fsdp", "full"), ("zero2", "lora")]
CLOSE = 1e-5  # relative, a loss; absolute, a weight
TWO = ("trainer.devices=2", "trainer.accelerator=cpu")
ALL = (
    "stage.init_from=none",
    "stage.lr={vision: 1e-3, projector: 1e-3, llm: 1e-3}",
    "stage.weight_decay=0.1",
    "stage.pack_length=60",  # one or two rows a pack: ranks often get one without pictures
    "trainer.global_batch=4",
    "trainer.keep=100",
    "trainer.num_chats=1",
    "trainer.max_test_rows=2",
)
WAYS = {
    # pictures come as kept features; clipping would hide a gradient that is too large or too small by a factor
    "lora": ("stage=finetune", "stage.lora.dropout=0", "stage.clip=0"),
    "full": ("stage=finetune_full", "stage.train.vision=full"),
}


def given(way, steps):
    return (*WAYS[way], *ALL, f"stage.max_steps={steps}", f"trainer.save_every={steps // 2}", "trainer.val_every=3")


@pytest.fixture(scope="module")
def one(toys, tmp_path_factory):
    """Give a function that returns the run of one process, made once."""
    made = {}

    def run(way, steps):
        if (way, steps) not in made:
            runs = tmp_path_factory.mktemp("one")
            threads = torch.get_num_threads()
            torch.set_num_threads(1)  # as in the processes that it is compared with
            assert main(toys.arguments(*given(way, steps), runs=runs)) == 0
            torch.set_num_threads(threads)
            made[way, steps] = find_runs(runs)[0]
        return made[way, steps]

    return run


@pytest.fixture(scope="module")
def two(toys, tmp_path_factory):
    """Give a function that returns the run of two processes under a strategy, made once."""
    made = {}

    def run(strategy, way, steps):
        if (strategy, way, steps) not in made:
            runs = tmp_path_factory.mktemp(strategy)
            arguments = toys.arguments(*given(way, steps), *TWO, f"strategy={strategy}", runs=runs)
            made[strategy, way, steps] = run_two(arguments, runs)
        return made[strategy, way, steps]

    return run


def state_of(run):
    return torch.load(checkpoints(run)[-1], weights_only=True)


def compare(run, other):
    """Return the largest relative difference of a loss, and the largest difference of a weight."""
    ours, theirs = (read_metrics(each / "metrics.csv") for each in (run, other))
    shown = [[[name for name in row if not name.startswith("grad/")] for row in rows] for rows in (ours, theirs)]
    assert shown[0] == shown[1]  # DeepSpeed keeps gradients to itself
    names = ("train/loss", "val/loss")
    pairs = [(row[name], with_[name]) for row, with_ in zip(ours, theirs, strict=True) for name in names if name in row]
    loss = max(abs(mine - other) / other for mine, other in pairs)
    mine, its = state_of(run)["state_dict"], state_of(other)["state_dict"]
    assert mine.keys() == its.keys()
    assert {weight.dtype for weight in mine.values()} == {torch.float32}
    return loss, max(float((mine[name] - its[name]).abs().max()) for name in its)


def assert_close(run, other):
    loss, weight = compare(run, other)
    assert loss < CLOSE
    assert weight < CLOSE
    ours, theirs = (state_of(each)["optimizer_states"][0] for each in (run, other))
    assert ours["param_groups"] == theirs["param_groups"]
    for number, values in theirs["state"].items():
        assert ours["state"][number]["step"] == values["step"]
        for key in ("exp_avg", "exp_avg_sq"):
            bound = 1e-3 * float(values[key].abs().max())
            torch.testing.assert_close(ours["state"][number][key], values[key], rtol=1e-3, atol=bound)


def go_on(toys, run, way, steps, runs, *more):
    """Take a run back to its middle, and go on with it otherwise."""
    back = runs / run.name
    shutil.copytree(run, back)
    checkpoints(back)[-1].unlink()
    (back / CHECKPOINTS / "best.ckpt").unlink()
    (back / "report.json").unlink()
    arguments = toys.arguments(*given(way, steps), "resume=last", *more, runs=runs)
    if "trainer.devices=2" in more:
        return run_two(arguments, runs, is_new=False)
    assert main(arguments) == 0
    return back


def answers_of(run):
    return [json.loads(line)["answer"] for line in (run / "sample_answers.jsonl").read_text("utf-8").splitlines()]


@pytest.mark.parametrize(("strategy", "way"), QUICK)
def test_two_processes_train_as_one(one, two, strategy, way):
    assert_close(two(strategy, way, 6), one(way, 6))


@pytest.mark.parametrize(("strategy", "way"), QUICK)
def test_two_processes_answer_as_one(one, two, strategy, way):
    run, other = two(strategy, way, 6), one(way, 6)
    assert answers_of(run) == answers_of(other)
    ours, theirs = (json.loads((each / "report.json").read_text("utf-8")) for each in (run, other))
    assert ours["evaluation"] == theirs["evaluation"]
    assert ours["run"]["samples"] == theirs["run"]["samples"]


def test_a_run_goes_on_with_another_number_of_processes(toys, one, two, tmp_path, capfd):
    run = go_on(toys, two("fsdp", "full", 6), "full", 6, tmp_path)
    assert "2x1 fsdp then, 1x1 auto now. The optimizer's state moves along" in capfd.readouterr().out
    assert_close(run, one("full", 6))


@pytest.mark.strategies
def test_a_run_goes_on_under_another_strategy(toys, one, two, tmp_path):
    run = go_on(toys, one("lora", 6), "lora", 6, tmp_path, *TWO, "strategy=zero2")
    assert_close(run, one("lora", 6))


@pytest.mark.parametrize("strategy", ["fsdp", "zero1", "zero3"])
def test_packed_moments_are_not_split(run_cli, strategy):
    done = run_cli("model=tiny", f"strategy={strategy}", "stage.optimizer=adamw8bit")
    assert done.code == 2
    assert f"strategy={strategy} splits the optimizer's state, stage.optimizer=adamw8bit packs it" in done.err


# ------------------------------------------------------------------------------------------------- make test-strategies


@pytest.mark.strategies
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_twenty_steps_are_those_of_one_process(one, two, strategy, way):
    run = two(strategy, way, 20)
    assert_close(run, one(way, 20))
    assert answers_of(run) == answers_of(one(way, 20))
    if path := os.environ.get("VLM_TUNE_TRUST"):
        loss, weight = compare(run, one(way, 20))
        keep(Path(path), strategy, way, {"loss": loss, "weight": weight})


@pytest.mark.strategies
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_its_exported_folder_is_that_of_one_process(one, two, tmp_path, strategy, way):
    exported = []
    for name, run in (("one", one(way, 20)), ("two", two(strategy, way, 20))):
        assert main(["export", f"ckpt={run}", f"out={tmp_path / name}", "dtype=fp32"]) == 0
        exported.append(load_file(tmp_path / name / "model.safetensors"))
    assert exported[0].keys() == exported[1].keys()
    differences = [float((exported[1][name] - weight).abs().max()) for name, weight in exported[0].items()]
    if path := os.environ.get("VLM_TUNE_TRUST"):
        keep(Path(path), strategy, way, {"exported": max(differences)})
    assert max(differences) < 2e-6  # AdamW turns the last bit of a gradient near zero into a share of its step of 1e-3


@pytest.mark.strategies
@pytest.mark.parametrize("processes", [TWO, ()], ids=["two", "one"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_its_runs_go_on(toys, one, two, tmp_path, strategy, processes):
    more = (*processes, f"strategy={strategy}") if processes else ()
    run = go_on(toys, two(strategy, "full", 20), "full", 20, tmp_path, *more)
    assert_close(run, one("full", 20))
    if processes:
        ours, theirs = (state_of(each)["state_dict"] for each in (run, two(strategy, "full", 20)))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.strategies
@pytest.mark.parametrize("strategy", ["fsdp", "zero3", "zero3_offload"])
def test_a_process_holds_half_of_the_weights_between_two_steps(toys, tmp_path, monkeypatch, strategy):
    def look(module, *_):
        bytes_held = sum(held(weight).nbytes for weight in module.vlm.parameters())
        gathered = sum(weight.nbytes for weight in module.vlm.parameters() if hasattr(weight, "ds_tensor"))
        (tmp_path / f"held_{module.global_rank}").write_text(str(bytes_held + gathered))

    monkeypatch.setattr(VlmModule, "on_train_batch_end", look, raising=False)
    steps = [*given("full", 2), *TWO, f"strategy={strategy}", "trainer.num_chats=0", "stage.evaluate=false"]
    run_two(
        toys.arguments(*{step.partition("=")[0]: step for step in steps}.values(), runs=tmp_path / "runs"),
        tmp_path / "runs",
    )
    whole = sum(weight.nbytes for weight in toys.model().vlm.parameters())
    shares = [int((tmp_path / f"held_{rank}").read_text()) / whole for rank in range(2)]
    assert all(0.3 < share < 0.6 for share in shares), shares
    if path := os.environ.get("VLM_TUNE_TRUST"):
        keep(Path(path), strategy, "full", {"weights_held": max(shares)})


def keep(path, strategy, way, figures):
    """Write figures into the file of those that show what a run survives."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    known.setdefault("strategies", {}).setdefault(strategy, {}).setdefault(way, {}).update(figures)
    path.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
