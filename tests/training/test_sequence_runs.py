"""A run whose packs are shared by a group of processes is that of one process: step by step, and in what it leaves."""

import json
import shutil

import pytest
import torch
from processes import keep_figure, run_two
from safetensors.torch import load_file

from vlm_tune.cli import main
from vlm_tune.model.checkpoint import checkpoints
from vlm_tune.training.callbacks.metrics import read_metrics
from vlm_tune.training.module import VlmModule

CLOSE = 1e-5
STEPS = 6
ALL = (
    "stage.init_from=none",
    "stage.lora.dropout=0",
    "stage.lr={vision: 1e-3, projector: 1e-3, llm: 1e-3}",
    "stage.pack_length=157",  # of an odd length, and with pictures in both halves
    "trainer.global_batch=4",
    "trainer.val_every=3",
    "trainer.num_chats=1",
    "trainer.max_test_rows=2",
)
WAYS = {
    "lora": ("stage=finetune",),
    "full": ("stage=finetune_full", "stage.train.vision=full"),
    "recomputed": ("stage=finetune", "stage.gradient_checkpointing={llm: true, projector: true}"),
}
MANY = [(2, 2, "ddp"), (2, 2, "fsdp"), (4, 4, "ddp"), (4, 2, "ddp"), (4, 2, "fsdp")]  # processes, those of a group
QUICK = (2, 2, "ddp", "lora", STEPS)


@pytest.fixture(scope="module")
def run(toys, tmp_path_factory):
    """Give a function that returns the folder of a run and the gradients of its steps, made once."""
    made = {}

    def make(processes, size, strategy, way, steps):
        case = processes, size, strategy, way, steps
        if case not in made:
            runs = tmp_path_factory.mktemp("runs")
            arguments = toys.arguments(*given(way, steps), *among(processes, size, strategy), runs=runs)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(VlmModule, "on_before_optimizer_step", keep_step(runs), raising=False)
                folder = run_two(arguments, runs, count=processes)
            made[case] = folder, [torch.load(runs / f"{step}.pt", weights_only=True) for step in range(steps)]
        return made[case]

    return make


def given(way, steps):
    return (*WAYS[way], *ALL, f"stage.max_steps={steps}", f"trainer.save_every={steps // 2}")


def among(processes, size, strategy):
    named = [f"strategy={strategy}"] if processes > 1 else []
    shared = (f"trainer.devices={processes}", f"trainer.sequence_parallel={size}")
    return (*shared, "trainer.accelerator=cpu", *named)


def keep_step(folder):
    """Write down the gradients of a step after they were summed up over the processes, and before they are clipped."""

    def keep(module, optimizer):
        trained = [(name, each.grad) for name, each in module.vlm.named_parameters() if each.grad is not None]
        found = {name: each.full_tensor() if hasattr(each, "full_tensor") else each for name, each in trained}
        if module.global_rank == 0:
            torch.save(found, folder / f"{module.global_step}.pt")

    return keep


@pytest.fixture(scope="module")
def one(run):
    return run(1, 1, "auto", "lora", STEPS)


@pytest.fixture(scope="module")
def two(run):
    return run(*QUICK)


def loss_apart(folder, other):
    """Return the largest relative difference of the losses of two runs."""
    ours, theirs = (read_metrics(each / "metrics.csv") for each in (folder, other))
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    names = ("train/loss", "val/loss")
    pairs = [(row[name], with_[name]) for row, with_ in zip(ours, theirs, strict=True) for name in names if name in row]
    return max(abs(mine / other - 1) for mine, other in pairs)


def gradients_apart(steps, others):
    """Return the largest difference of a weight's gradient in any step, relative to its norm."""
    apart = []
    for found, wanted in zip(steps, others, strict=True):
        assert found.keys() == wanted.keys()
        apart += [float((found[name] - each).norm() / each.norm()) for name, each in wanted.items() if each.any()]
    return max(apart)


def weights_apart(folder, other):
    """Return the largest difference of a weight in two runs' last checkpoints."""
    ours, theirs = (torch.load(checkpoints(each)[-1], weights_only=True)["state_dict"] for each in (folder, other))
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - each).abs().max()) for name, each in theirs.items())


def test_losses_are_those_of_one_process(one, two):
    assert loss_apart(two[0], one[0]) < CLOSE


def test_gradients_of_all_steps_are_those_of_one_process(one, two):
    assert gradients_apart(two[1], one[1]) < CLOSE


def test_its_checkpoint_is_that_of_one_process(one, two):
    assert weights_apart(two[0], one[0]) < CLOSE


def test_it_counts_and_answers_as_one_process(one, two):
    reports = [json.loads((folder / "report.json").read_text("utf-8")) for folder, _ in (one, two)]
    assert reports[0]["evaluation"] == reports[1]["evaluation"]
    assert [reports[0]["run"][name] for name in ("samples", "tokens")] == [
        reports[1]["run"][name] for name in ("samples", "tokens")
    ]


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.strategies)])
def test_it_goes_on_from_its_middle(toys, one, two, tmp_path, capfd, processes):
    back = tmp_path / two[0].name
    shutil.copytree(two[0], back)
    checkpoints(back)[-1].unlink()
    (back / "report.json").unlink()
    more = among(processes, processes, "ddp")
    arguments = toys.arguments(*given("lora", STEPS), "resume=last", *more, runs=tmp_path)
    if processes == 2:
        run_two(arguments, tmp_path, is_new=False)
        assert weights_apart(back, two[0]) == 0
    else:
        assert main(arguments) == 0
        assert "2x1 ddp (sequence_parallel=2) then, 1x1 auto now" in capfd.readouterr().out
        assert weights_apart(back, one[0]) < CLOSE


@pytest.mark.strategies
def test_its_exported_folder_is_that_of_one_process(one, two, tmp_path):
    exported = []
    for name, (folder, _) in (("one", one), ("two", two)):
        assert main(["export", f"ckpt={folder}", f"out={tmp_path / name}", "dtype=fp32"]) == 0
        exported.append(load_file(tmp_path / name / "model.safetensors"))
    assert exported[0].keys() == exported[1].keys()
    assert max(float((exported[1][name] - each).abs().max()) for name, each in exported[0].items()) < CLOSE


@pytest.mark.strategies
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("processes", "size", "strategy"), MANY)
def test_twenty_steps_are_those_of_one_process(run, processes, size, strategy, way):
    (folder, steps), (other, others) = run(processes, size, strategy, way, 20), run(1, 1, "auto", way, 20)
    apart = loss_apart(folder, other), gradients_apart(steps, others), weights_apart(folder, other)
    for name, each in zip(("loss", "gradient", "weight"), apart, strict=True):
        keep_figure("sequence_parallel", f"{processes} processes in groups of {size}, {strategy}, {way}: {name}", each)
    assert apart[0] < CLOSE
    assert apart[1] < CLOSE
    assert apart[2] < CLOSE
