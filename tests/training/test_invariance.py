"""A sample's loss and gradient depend on the sample alone: not on padding, packing, order or the split of a step."""

import json
from functools import cache

import lightning as L
import pytest
import torch
from torch.nn.functional import cross_entropy
from toys import write_jsonl

from vlm_tune.console import make_console
from vlm_tune.data.example import NO_LOSS
from vlm_tune.training.module import VlmModule
from vlm_tune.training.trainer import make_trainer

ROWS = (0, 1, 6, 2)  # one and two turns, one and three tiles, and one without a picture
ALONE, TOGETHER = 1, 1000  # tokens of a pack: each sample in its own, or all in one
SPLITS = {  # ways to make one optimizer step of the four samples: packing, global batch, micro batch
    "padded, 1 x 4": ("stage.packing=false", 4, 4),
    "padded, 2 x 2": ("stage.packing=false", 4, 2),
    "padded, 4 x 1": ("stage.packing=false", 4, 1),
    "packed, 1 pack": (f"stage.pack_length={TOGETHER}", 1, 1),
    "packed, 1 x 4": (f"stage.pack_length={ALONE}", 4, 4),
    "packed, 2 x 2": (f"stage.pack_length={ALONE}", 4, 2),
    "packed, 4 x 1": (f"stage.pack_length={ALONE}", 4, 1),
}
POWERS = {"token": 0.0, "sample": -1.0, "square": -0.5}


class Gradients(L.Callback):
    """Keep the gradients of the first optimizer step, before they are clipped."""

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.found = {
            name: weight.grad.clone() for name, weight in module.vlm.named_parameters() if weight.grad is not None
        }


@pytest.fixture(scope="module")
def arguments(toys, tmp_path_factory):
    """Four rows whose answers differ in length, so that the three weightings differ."""
    folder = tmp_path_factory.mktemp("four")
    rows = [json.loads(line) for line in (toys.data / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    write_jsonl(folder / "train.jsonl", [rows[row] for row in ROWS])
    own = [f"data.path={folder}/train.jsonl", f"data.image.root={toys.data}", "data.val=none", "data.test=none"]
    stage = [
        "stage=finetune",
        "stage.init_from=none",
        "stage.lora.dropout=0",
        "stage.max_steps=1",
        "stage.evaluate=false",
    ]
    return lambda *more: toys.arguments(*own, *stage, *more)


@pytest.fixture(scope="module")
def trained(toys, arguments, tmp_path_factory):
    """Give a function that trains one step and returns its loss and gradients."""

    @cache
    def run(split, weighting="token", *more):
        packing, global_batch, micro_batch = SPLITS[split]
        size = [f"trainer.global_batch={global_batch}", f"trainer.micro_batch={micro_batch}"]
        staged = toys.staged(*arguments(packing, *size, f"stage.loss={weighting}", *more))
        folder, gradients = tmp_path_factory.mktemp("run"), Gradients()
        (folder / "checkpoints").mkdir()
        trainer = make_trainer(staged.config, 1, folder, [gradients], make_console())
        module = VlmModule(staged.model, staged.config, 1)
        trainer.fit(module, datamodule=staged.data)
        return module.numbers["train/loss"], gradients.found

    return run


@pytest.fixture(scope="module")
def reference(toys, arguments):
    """Give a function that computes loss and gradients by the plain formula: one sample at a time, all logits."""

    @cache
    def run(weighting):
        staged = toys.staged(*arguments())
        vlm, data = staged.model.vlm.eval(), staged.data.train.data
        losses, weights = [], []
        for row in range(len(ROWS)):
            sample = data.sample(row)
            example = data.encoder.encode(sample, data.tiling(sample))
            ids = torch.from_numpy(example.input_ids.copy()).long().unsqueeze(0)
            tiles = torch.from_numpy(data.make_tiles(sample, example))
            logits = vlm.llm(inputs_embeds=vlm.embed(ids, tiles), use_cache=False).logits[0, :-1]
            labels = torch.from_numpy(example.labels[1:].copy()).long()
            each = cross_entropy(logits, labels, ignore_index=NO_LOSS, reduction="none")[labels != NO_LOSS]
            losses.append(each)
            weights.append(torch.full_like(each, len(each) ** POWERS[weighting]))
        loss = (torch.cat(losses) * torch.cat(weights)).sum() / torch.cat(weights).sum()
        loss.backward()
        return loss.item(), {name: weight.grad for name, weight in vlm.named_parameters() if weight.grad is not None}

    return run


def assert_equal(found, wanted):
    assert found[0] == pytest.approx(wanted[0], rel=1e-5)
    assert found[1].keys() == wanted[1].keys()
    for name, gradient in wanted[1].items():
        torch.testing.assert_close(
            found[1][name],
            gradient,
            rtol=1e-4,
            atol=1e-5 * float(gradient.abs().max()) + 1e-9,
            msg=lambda text, name=name: f"{name}: {text}",
        )


@pytest.mark.parametrize("split", SPLITS)
def test_a_step_has_the_loss_and_gradients_of_the_plain_formula(trained, reference, split):
    assert_equal(trained(split), reference("token"))


@pytest.mark.parametrize("split", ["padded, 2 x 2", "packed, 1 pack", "packed, 4 x 1"])
@pytest.mark.parametrize("weighting", ["sample", "square"])
def test_a_weighting_is_normalised_over_the_whole_step(trained, reference, weighting, split):
    assert_equal(trained(split, weighting), reference(weighting))


def test_the_weightings_differ(reference):
    # or the test above would not tell them apart
    losses = {round(reference(weighting)[0], 4) for weighting in POWERS}
    assert len(losses) == 3


def test_features_kept_on_disk_change_nothing(trained):
    on, off = (trained("packed, 2 x 2", "token", f"data.feature_cache={switch}") for switch in ("on", "off"))
    assert_equal(on, off)


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
def test_the_order_in_a_batch_plays_no_part(toys, arguments, packing):
    staged = toys.staged(*arguments())
    vlm = staged.model.vlm.eval()
    with torch.no_grad():
        losses = [float(vlm(staged.batch(rows, packing))) for rows in ([0, 1, 2, 3], [3, 1, 2, 0])]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_batchs_loss_is_the_mean_over_its_tokens(toys, arguments):
    staged = toys.staged(*arguments())
    vlm = staged.model.vlm.eval()
    tokens = staged.data.train.index.supervised
    with torch.no_grad():
        alone = [float(vlm(staged.batch([row]))) for row in range(len(ROWS))]
        together = float(vlm(staged.batch(list(range(len(ROWS))))))
    assert together == pytest.approx(
        sum(loss * int(n) for loss, n in zip(alone, tokens, strict=True)) / tokens.sum(), rel=1e-5
    )
