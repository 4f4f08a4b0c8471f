"""Rows of one picture that share the tokens with which they begin are trained as if each stood alone."""

import json
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.toys import Staged
from vlm_tune.data.sets.micro_batches import MicroBatches
from vlm_tune.data.stream import MicroBatch
from vlm_tune.errors import ConfigError
from vlm_tune.model.find_batch import largest_batches
from vlm_tune.model.kernels import attention
from vlm_tune.planning.batches import Picture, real_work

WORDS = ("What is it?", "What", "Is it red?", "Is it blue? It is.", "And this?", "It is a cat.", "It is", "Yes.", "no")


@pytest.fixture(scope="module")
def staged(toys, tmp_path_factory):
    """Hold 120 rows about 4 sets of pictures: questions of one or more turns that begin alike, or not."""
    folder = tmp_path_factory.mktemp("trees")
    rng = np.random.default_rng(0)
    for number, size in enumerate([(60, 50), (120, 56), (56, 170)]):
        Image.fromarray(rng.integers(0, 255, (*size[::-1], 3), dtype=np.uint8)).save(folder / f"{number}.png")
    pictures = [["0.png"], ["1.png"], ["0.png", "2.png"], []]
    rows = []
    for number in range(120):
        shown = pictures[number % 4]
        turns = rng.choice(WORDS, (int(rng.integers(1, 4)), 2)).tolist()
        turns[0][0] = "<image>\n" * len(shown) + turns[0][0]
        conversation = [
            {"from": who, "value": text} for turn in turns for who, text in zip(("human", "gpt"), turn, strict=True)
        ]
        rows.append({"id": str(number), "images": shown, "conversations": conversation})
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = ("stage.share_prefix=on", "stage.lora.dropout=0")
    return toys.staged("stage=finetune", *shared, f"data.path={folder}", "data.val=none", "data.max_length=400")


def batch(staged: Staged, rows: list[int], share_prefix: bool):
    chosen = replace(staged.data.settings(1), share_prefix=share_prefix)
    weight = float(staged.data.stream().row_weights(rows).sum())
    train = staged.data.train
    return MicroBatches(train.data, train.index, chosen, True)[MicroBatch(tuple(rows), 0, weight, (0, 0, 0))]


def loss_and_gradients(staged: Staged, given):
    vlm = staged.model.vlm.train()
    trained = {name: each for name, each in vlm.named_parameters() if each.requires_grad}
    loss = vlm(given)
    return loss, dict(zip(trained, torch.autograd.grad(loss, trained.values(), allow_unused=True), strict=True))


@pytest.mark.parametrize("backend", ["sdpa", "products"])
@given(st.lists(st.integers(0, 119), min_size=1, max_size=14))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_loss_and_gradients_are_those_of_rows_alone(staged, monkeypatch, backend, rows):
    monkeypatch.setattr(attention, "uses_products", lambda tensor: backend == "products")
    index = staged.data.train.index
    rows = sorted(rows, key=lambda row: int(index.head[row]))
    shared, apart = (batch(staged, rows, each) for each in (True, False))
    assert shared.num_tokens <= apart.num_tokens
    (loss, found), (right_loss, right) = (loss_and_gradients(staged, each) for each in (shared, apart))
    torch.testing.assert_close(loss, right_loss, atol=1e-5, rtol=1e-5)
    for name, gradient in right.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


def test_what_rows_share_stands_once(staged):
    index = staged.data.train.index
    head = index.head[0]
    rows = np.flatnonzero(index.head == head)[:5].tolist()
    assert head
    shared, apart = (batch(staged, rows, each) for each in (True, False))
    assert len(shared.tiles) == len(apart.tiles) / 5
    assert shared.num_tokens <= apart.num_tokens - 4 * index.head_tokens[0]
    assert shared.sample_ids == apart.sample_ids


def test_rows_of_equal_heads_begin_with_the_same_tokens_and_pictures(staged):
    train = staged.data.train
    seen = {}
    columns = zip(train.index.rows, train.index.head, train.index.head_tokens, strict=True)
    for entry, (row, head, length) in enumerate(columns):
        example = train.data.encode(int(row))
        pictures = train.data.sample(int(row)).pictures
        assert (head == 0) == (not pictures)
        assert entry < 4 or int(head) in seen
        begin = (example.input_ids[:length].tolist(), pictures, example.num_tiles)
        assert seen.setdefault(int(head), begin) == begin
        assert staged.model.encoder.context_id not in example.input_ids[length:].tolist()
    assert len(seen) == 4


def test_an_epoch_shares_and_forgets_no_row(staged):
    stream = staged.data.stream()
    assert stream.settings.share_prefix
    batches = []
    for each in stream:
        if each.epoch:
            break
        batches.append(each)
    assert sorted(row for each in batches for row in each.rows) == list(range(120))
    alone = sum(staged.data.train.index.tokens)
    made = sum(batch(staged, list(each.rows), True).num_tokens for each in batches)
    assert made < 0.9 * alone


def test_a_plan_counts_what_is_shared_once(staged):
    work = real_work(staged.config, staged.data, Picture(size=56, tokens=4))
    groups = list(islice(staged.data.stream(), staged.data.stream().groups_per_epoch()))
    made = [batch(staged, list(group.rows), True) for group in groups]

    def size(each):
        return each.num_tokens, 0 if each.tiles is None else len(each.tiles)

    sizes = set(map(size, made))
    assert {*map(size, work.largest), size(work.usual)} <= sizes
    assert max(size(each)[1] for each in work.largest) == max(tiles for _, tiles in sizes)
    mean = np.mean([each.num_tokens for each in made]) * staged.config.trainer.global_batch
    assert work.tokens_per_step == pytest.approx(mean, rel=0.03)  # rows may share more than what they show
    assert any(each.parents is not None for each in made)


def test_the_search_for_packs_tries_the_one_whose_rows_see_most_of_their_heads(staged):
    def seen_again(made):
        return sum(made.segments[parent] for parent in made.parents or () if parent >= 0)

    _, tried = largest_batches(staged.data, staged.config)
    groups = islice(staged.data.stream(), staged.data.stream().groups_per_epoch())
    assert seen_again(tried) == max(seen_again(batch(staged, list(group.rows), True)) for group in groups) > 0


@pytest.mark.parametrize("setting", ["stage.packing=false", "stage.neftune=5", "data.augment.flip=true"])
def test_sharing_where_each_row_is_its_own_is_refused_when_asked_for_and_off_by_itself(toys, setting):
    with pytest.raises(ConfigError, match="share_prefix=on"):
        toys.staged("stage=finetune", "stage.share_prefix=on", setting)
    assert not toys.staged("stage=finetune", "stage.share_prefix=auto", setting).data.settings(1).share_prefix
