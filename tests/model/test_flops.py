"""The estimate of a step's arithmetic equals what torch counts; it does not count attention on a CPU."""

from dataclasses import replace

import pytest
from torch.utils.flop_counter import FlopCounterMode

from vlm_tune.model.flops import count_flops, peak_tflops


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize(
    "how",
    [
        ("stage=pretrain",),
        ("stage=finetune", "stage.lora.rank=2"),
        ("stage.train.vision=full", "stage.train.llm=full"),
    ],
    ids=["projector", "lora", "all"],
)
def test_it_equals_what_torch_counts(toys, how, packing):
    staged = toys.staged(*how)
    rows = [0, 1, 2, 3] if packing else [0]
    batch = staged.batch(rows, packing=packing)
    counted = replace(count_flops(staged.model.vlm), pair=0.0)
    with FlopCounterMode(display=False) as counter:
        staged.model.vlm(batch).backward()
    assert counted.of(batch) == pytest.approx(
        counter.get_total_flops(), rel=0.09
    )  # it passes over in-place products of adapters


@pytest.mark.parametrize(("parents", "pairs"), [(None, 4 * 8 + 2), ([-1, 0], 4 * 8 + 2 + 2 * 8)])
def test_a_token_attends_to_those_before_it_in_its_sample(toys, parents, pairs):
    staged = toys.staged()
    batch, counted = staged.batch([0]), count_flops(staged.model.vlm)
    batch.segments, batch.parents = [8, 2], parents
    assert counted.of(batch) - replace(counted, pair=0.0).of(batch) == pytest.approx(counted.pair * pairs)


def test_kept_features_spare_the_encoder(toys):
    staged = toys.staged()
    batch, counted = staged.batch([0, 1]), count_flops(staged.model.vlm)
    seen = counted.of(batch)
    batch.features, batch.tiles = batch.tiles, None
    assert counted.of(batch) == pytest.approx(seen - counted.tile * len(batch.features))


@pytest.mark.parametrize(
    ("card", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA L4", 121),
        ("NVIDIA L40", None),
        ("AMD Instinct MI300X", None),
    ],
)
def test_only_a_card_that_is_listed_has_a_peak(card, peak):
    assert peak_tflops(card) == peak
