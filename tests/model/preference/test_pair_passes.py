"""Pairs in packs, as one prompt with two branches, are trained as two plain forward passes each would be."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from pair_toys import pair_arguments
from torch.nn.functional import logsigmoid

from vlm_tune.model.preference import reference
from vlm_tune.model.preference.reference import fill_reference
from vlm_tune.training.module import VlmModule

CPU = torch.device("cpu")
ROWS = [0, 1, 3, 4, 9]


@pytest.fixture(scope="module")
def staged(toys, tmp_path_factory):
    """Hold pairs with and without pictures, their reference known, and a policy that has moved away from it."""
    folder = tmp_path_factory.mktemp("pairs")
    staged = toys.staged(*pair_arguments(toys, folder, "stage.pack_length=400"))
    staged.data.train.before = deepcopy(staged.model.vlm)
    fill_reference(staged.model.vlm, staged.data, CPU)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in staged.model.vlm.parameters():
            if weight.requires_grad:
                weight += 0.05 * torch.randn(weight.shape, generator=generator)
    return staged


def log_probability(vlm, data, sample):
    """Run one conversation alone, by the language model's own forward pass."""
    example = data.encoder.encode(sample, data.tiling(sample))
    ids = torch.from_numpy(example.input_ids).long()
    tiles = torch.from_numpy(data.make_tiles(sample, example))
    logits = vlm.llm(inputs_embeds=vlm.embed(ids[None], tiles)).logits[0, :-1]
    labels = torch.from_numpy(example.labels).long()[1:]
    is_answer = labels != -100
    chances = logits.log_softmax(-1)[is_answer]
    return chances.gather(1, labels[is_answer, None]).sum(), int(is_answer.sum())


def plain_loss(vlm, before, data, rows, preference, delta):
    total = torch.zeros(())
    for row in rows:
        chosen, rejected = data.sample(row).branches
        (log_c, num_c), (log_r, _) = (log_probability(vlm, data, each) for each in (chosen, rejected))
        with torch.no_grad():
            old_c, old_r = (log_probability(before, data, each)[0] for each in (chosen, rejected))
        r_c, r_r = preference.beta * (log_c - old_c), preference.beta * (log_r - old_r)
        sigmoid, bco = -logsigmoid(r_c - r_r), -logsigmoid(r_c - delta) - logsigmoid(delta - r_r)
        total = total + preference.sigmoid * sigmoid + preference.bco * bco - preference.nll * log_c / num_c
    return total / len(rows)


def test_loss_and_every_gradient_are_those_of_plain_passes(staged):
    vlm, train, preference = staged.model.vlm, staged.data.train, staged.config.stage.preference
    vlm.eval()
    module = VlmModule(staged.model, staged.config, 1)
    module.delta.add(0.3)
    batch = staged.batch(ROWS)
    batch.reference = torch.from_numpy(train.reference[ROWS])
    loss, facts = module.loss_of(batch)
    wanted = plain_loss(vlm, train.before, train.data, ROWS, preference, 0.3)
    torch.testing.assert_close(loss, wanted, atol=1e-5, rtol=1e-5)
    weights = {name: weight for name, weight in vlm.named_parameters() if weight.requires_grad}
    found, right = (torch.autograd.grad(each, list(weights.values())) for each in (loss, wanted))
    for name, one, other in zip(weights, found, right, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5, msg=lambda text, n=name: f"{n}: {text}")
    assert any(float(gradient.abs().max()) > 1e-3 for gradient in right)
    assert len(facts) == 9


def test_what_is_logged_is_not_rounded_to_16_bit(staged):
    module = VlmModule(staged.model, staged.config, 1)
    batch = staged.batch(ROWS)
    batch.reference = torch.from_numpy(staged.data.train.reference[ROWS])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        loss, facts = module.loss_of(batch)
    sigmoid, bco, nll = facts[:3].tolist()
    assert float(loss) == pytest.approx(0.8 * sigmoid + 0.2 * bco + nll, rel=1e-6)


def test_a_pair_reads_its_prompt_and_its_pictures_once(staged):
    data = staged.data.train.data
    batch = staged.batch(ROWS)
    chosen = [data.encoder.encode_all(sample, data.tiling(sample))[0] for sample in map(data.sample, ROWS)]
    assert batch.num_tiles == sum(sum(example.num_tiles) for example in chosen)
    assert batch.num_tokens == staged.data.train.index.tokens[ROWS].sum()
    assert batch.num_tokens < 1.4 * sum(len(example.input_ids) for example in chosen)
    assert len(batch.segments) == 3 * len(ROWS)
    assert batch.sample_ids == [data.sample(row).id for row in ROWS]


def test_log_probabilities_in_a_pack_are_those_of_each_answer_alone(staged):
    vlm, data = staged.model.vlm.eval(), staged.data.train.data
    with torch.no_grad():
        found = vlm(staged.batch(ROWS))
        alone = [[log_probability(vlm, data, each)[0] for each in data.sample(row).branches] for row in ROWS]
    torch.testing.assert_close(found, torch.tensor(alone), atol=1e-4, rtol=1e-5)


def test_packs_hold_whole_pairs_each_once(staged):
    stream = staged.data.stream()
    rows = []
    for item in stream:
        if item.epoch:
            break
        rows += item.rows
    assert sorted(rows) == list(range(len(staged.data.train.index)))


# --------------------------------------------------------------------------------------------------------- reference


def test_the_reference_is_the_model_before_training(staged):
    train = staged.data.train
    with torch.no_grad():
        wanted = [
            [float(log_probability(train.before, train.data, each)[0]) for each in train.data.sample(row).branches]
            for row in ROWS
        ]
    np.testing.assert_allclose(train.reference[ROWS], wanted, atol=1e-4)
    assert np.isfinite(train.reference).all()
    assert len(staged.data.val.reference) == len(staged.data.val.index)


@pytest.fixture
def again(toys, tmp_path, monkeypatch):
    """Give the same rows and model anew, and a count of the pairs that the reference reads."""
    read = []
    real = reference.compute_missing

    def counted(table, *given):
        read.append(int(np.isnan(table[:, 0]).sum()))
        real(table, *given)

    monkeypatch.setenv("VLM_TUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(reference, "compute_missing", counted)
    staged = toys.staged(*pair_arguments(toys, tmp_path, "data.val=none"))
    fill_reference(staged.model.vlm, staged.data, CPU)
    return staged, read


def test_the_reference_is_read_back(again):
    staged, read = again
    first = staged.data.train.reference
    fill_reference(staged.model.vlm, staged.data, CPU)
    assert read == [len(first), 0]
    assert np.array_equal(staged.data.train.reference, first)


def test_an_interrupted_pass_goes_on_where_it_was(again, monkeypatch):
    staged, read = again
    (path,) = reference.cache_folder().glob(f"reference/*/*/{reference.NAME}")
    whole = np.load(path)
    np.save(path, np.where(np.arange(len(whole))[:, None] < 5, whole, np.float32(np.nan)))
    fill_reference(staged.model.vlm, staged.data, CPU)
    assert read[1] == len(whole) - 5
    np.testing.assert_allclose(staged.data.train.reference, whole, atol=1e-4)


def test_other_weights_have_a_reference_of_their_own(again):
    staged, read = again
    with torch.no_grad():
        next(staged.model.vlm.projector.parameters()).mul_(1.5)
    fill_reference(staged.model.vlm, staged.data, CPU)
    assert read[1] == read[0] > 0


def test_modes_are_as_before(again):
    staged, _ = again
    modes = [module.training for module in staged.model.vlm.modules()]
    assert True in modes
    fill_reference(staged.model.vlm, staged.data, CPU)
    assert [module.training for module in staged.model.vlm.modules()] == modes
