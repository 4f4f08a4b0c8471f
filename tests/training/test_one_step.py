"""One optimizer step of eight rows is the same step, however it is cut: its loss and its gradients, within 1e-6."""

import json
from pathlib import Path

import pytest
import torch
from processes import PATIENCE, fork_cli, keep_figure, run_two
from toys import write_jsonl

from vlm_tune.training.module import VlmModule

ROWS = (0, 1, 2, 3, 4, 5, 6, 7)  # one and two turns, one and three tiles, and one without a picture
CLOSE = 1e-6  # relative, in float32
ALL = (
    "stage=finetune",
    "stage.train.vision=full",
    "stage.init_from=none",
    "stage.lora.dropout=0",
    "stage.max_steps=1",
    "stage.evaluate=false",
    "trainer.num_chats=0",
    "trainer.accelerator=cpu",
    "data.val=none",
    "data.test=none",
)
WAYS = {"packed": "stage.pack_length=1", "padded": "stage.packing=false"}  # a pack a row: micro_batch joins them
SPLITS = {  # processes, rows of a micro-batch; eight rows in all
    "4 micro-batches of 2": (1, 2),
    "2 processes of 4": (2, 4),
}


@pytest.fixture(scope="module")
def step(toys, tmp_path_factory):
    """Give a function that makes one step of the eight rows, and returns its loss and gradients."""
    folder, made = tmp_path_factory.mktemp("eight"), {}
    rows = [json.loads(line) for line in (toys.data / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    write_jsonl(folder / "train.jsonl", [rows[row] for row in ROWS])
    own = [f"data.path={folder}/train.jsonl", f"data.image.root={toys.data}", "trainer.global_batch=8"]

    def run(way, processes, micro_batch):
        if (way, processes, micro_batch) not in made:
            runs = tmp_path_factory.mktemp("step")
            more = [WAYS[way], f"trainer.micro_batch={micro_batch}", f"trainer.devices={processes}"]
            given = toys.arguments(*ALL, *own, *more, runs=runs)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(VlmModule, "on_before_optimizer_step", keep_step(runs / "step.pt"), raising=False)
                run_here(given, runs) if processes == 1 else run_two(given, runs)
            made[way, processes, micro_batch] = torch.load(runs / "step.pt", weights_only=True)
        return made[way, processes, micro_batch]

    return run


def keep_step(path):
    """Write down loss and gradients after they were summed up over the processes, and before they are clipped."""

    def keep(module, optimizer):
        loss = module.trainer.strategy.reduce(module.step_loss.double(), reduce_op="sum")
        if module.global_rank == 0:
            gradients = {name: each.grad for name, each in module.vlm.named_parameters() if each.grad is not None}
            torch.save({"loss": loss, "gradients": gradients}, path)

    return keep


def run_here(arguments, runs):
    """Run one process, in one thread as the two have."""
    process = fork_cli(arguments, Path(f"{runs}.log"))
    process.join(PATIENCE)
    assert process.exitcode == 0, Path(f"{runs}.log").read_text(encoding="utf-8")


def difference(found, wanted):
    """Return the largest relative difference of the loss, and of a weight's gradient by its norm."""
    assert found["gradients"].keys() == wanted["gradients"].keys()
    assert found["gradients"]
    pairs = [(each, wanted["gradients"][name]) for name, each in found["gradients"].items()]
    apart = [float((one - other).norm() / other.norm()) for one, other in pairs if other.any() or one.any()]
    return max(abs(float(found["loss"] / wanted["loss"]) - 1), *apart)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("way", WAYS)
def test_a_step_that_is_cut_is_the_step_at_once(step, way, split):
    worst = difference(step(way, *SPLITS[split]), step(way, 1, 8))
    assert worst < CLOSE
    keep_figure("one_step_split", f"{way}, {split}", worst)


def test_a_packed_step_is_the_padded_one(step):
    worst = difference(step("packed", 1, 8), step("padded", 1, 8))
    assert worst < CLOSE
    keep_figure("one_step_split", "packed beside padded", worst)
