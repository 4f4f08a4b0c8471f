"""Packing isolates: a sample in a pack has the hidden states and gradients that it has alone."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from vlm_tune.model.kernels import attention, attention_cpu
from vlm_tune.model.kernels.attention import Segments
from vlm_tune.model.kernels.attention_cpu import SHORT, Layout, PackedProducts, attend_all, lay_out

PACKS = {
    "short": [5, 7, 9, 40, 41],
    "one token": [1, 1, 6],
    "alone": [30],
    "long": [SHORT + 8, SHORT + 200],
    "mixed": [3, SHORT + 1, SHORT, 17, SHORT + 48, 1, 18],
}
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernel for packs exists on GPUs only")


@pytest.fixture(autouse=True, params=["sdpa", "products"])
def backend(request, monkeypatch):
    """Run everything on each of the two ways that a CPU has; by itself it takes products for 16 bit alone."""
    if request.param == "products":
        monkeypatch.setattr(attention, "uses_products", lambda tensor: tensor.device.type == "cpu")


@pytest.fixture(scope="module")
def packed(toys):
    return load(toys, attention.NAME)


@pytest.fixture(scope="module")
def reference(toys):
    return load(toys, "eager")  # transformers' own plain formula, which knows nothing of packs


def load(toys, implementation):
    return AutoModelForCausalLM.from_pretrained(toys.llm, attn_implementation=implementation)


def draw(lengths, seed=0):
    """Draw the embeddings of a pack (1, L, D), and a direction (1, L, D) that turns its hidden states into a loss."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(1, sum(lengths), 32, generator=generator) for _ in range(2))


def run(llm, embeddings, **options):
    return llm.get_decoder()(inputs_embeds=embeddings, use_cache=False, **options).last_hidden_state


def run_packed(llm, embeddings, lengths):
    positions = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0).to(embeddings.device)
    return run(llm, embeddings, position_ids=positions, segments=Segments(lengths))


def run_alone(llm, embeddings, lengths):
    return torch.cat([run(llm, sample) for sample in embeddings.split(lengths, dim=1)], dim=1)


def gradients(llm, embeddings, hidden, direction):
    """Gradients of <hidden, direction> by the embeddings and by every weight of the layers."""
    weights = [weight for name, weight in llm.model.named_parameters() if "layers" in name]
    return torch.autograd.grad((hidden * direction).sum(), [embeddings, *weights])


@pytest.mark.parametrize("lengths", PACKS.values(), ids=PACKS)
def test_packed_hidden_states_equal_those_of_each_sample_alone(packed, reference, lengths):
    embeddings, _ = draw(lengths)
    with torch.no_grad():
        torch.testing.assert_close(
            run_packed(packed, embeddings, lengths), run_alone(reference, embeddings, lengths), atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("lengths", PACKS.values(), ids=PACKS)
def test_packed_gradients_equal_the_sum_over_samples(packed, reference, lengths):
    embeddings, direction = draw(lengths)
    ours, theirs = embeddings.clone().requires_grad_(), embeddings.clone().requires_grad_()
    found = gradients(packed, ours, run_packed(packed, ours, lengths), direction)
    wanted = gradients(reference, theirs, run_alone(reference, theirs, lengths), direction)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5 * float(other.abs().max()) + 1e-6, rtol=1e-5)


@pytest.mark.parametrize("lengths", [PACKS["short"], PACKS["mixed"]], ids=["short", "mixed"])
def test_another_sample_changes_nothing(packed, lengths):
    embeddings, _ = draw(lengths)
    changed = embeddings.clone()
    changed[:, : lengths[0]] += 10.0
    with torch.no_grad():
        before, after = run_packed(packed, embeddings, lengths), run_packed(packed, changed, lengths)
    assert not torch.allclose(before[:, : lengths[0]], after[:, : lengths[0]])
    assert torch.equal(before[:, lengths[0] :], after[:, lengths[0] :])


def test_a_later_token_of_the_same_sample_changes_nothing(packed):
    lengths = PACKS["mixed"]
    embeddings, _ = draw(lengths)
    changed = embeddings.clone()
    changed[:, 2] += 10.0  # the last token of the first sample
    with torch.no_grad():
        before, after = run_packed(packed, embeddings, lengths), run_packed(packed, changed, lengths)
    assert torch.equal(before[:, :2], after[:, :2])


def test_without_the_plan_the_samples_would_see_one_another(packed):
    # what the tests above could not tell apart from isolation if it did nothing
    lengths = PACKS["short"]
    embeddings, _ = draw(lengths)
    with torch.no_grad():
        assert not torch.allclose(run(packed, embeddings), run_packed(packed, embeddings, lengths), atol=1e-2)


@pytest.mark.parametrize("lengths", PACKS.values(), ids=PACKS)
def test_each_token_has_one_place_per_head_in_the_layout(lengths):
    layout = lay_out(tuple(lengths), 6, 2)
    for places, rows, heads in ((layout.to_queries, layout.queries, 6), (layout.to_keys, layout.keys, 2)):
        assert len(set(places.tolist())) == len(places) == sum(lengths) * heads
        assert rows[places].tolist() == list(range(sum(lengths) * heads))
    real = torch.ones(len(layout.queries), dtype=torch.bool).index_fill(0, layout.padding, False)
    assert real.nonzero().flatten().tolist() == sorted(layout.to_queries.tolist())


@pytest.fixture(params=[True, False], ids=["AMX", "no AMX"])
def amx(request, monkeypatch):
    """Take the ways of a processor with and without AMX; each computes them all."""
    monkeypatch.setattr(attention_cpu, "has_amx", lambda: request.param)
    return request.param


def test_shares_that_are_computed_again_give_the_same_gradients(monkeypatch, amx):
    lengths = (SHORT + 70, SHORT + 300, 20)

    def gradients_of(layout):
        generator = torch.Generator().manual_seed(0)
        inputs = [torch.randn(sum(lengths), heads, 16, generator=generator).requires_grad_() for heads in (4, 2, 2)]
        output = PackedProducts.apply(*inputs, layout, 0.25)
        return output, *torch.autograd.grad(output.square().sum(), inputs)

    kept = Layout(lengths, 4, 2)
    monkeypatch.setattr(attention_cpu, "KEPT", SHORT)
    again = Layout(lengths, 4, 2)
    assert [sum(block.is_kept for block in each.blocks) for each in (kept, again)] == [len(kept.blocks), 1]
    long = [slice(0, SHORT + 70), slice(SHORT + 70, 2 * SHORT + 370)]
    assert (kept.whole, again.whole) == ([], long if amx else [])
    for one, other in zip(gradients_of(kept), gradients_of(again), strict=True):
        if amx:
            torch.testing.assert_close(one, other)
        else:
            assert torch.equal(one, other)


TREES = {  # prefix and branches of each
    "one": [(7, 3, 5)],
    "unlike, multiplied together": [(7, 3, 5), (9, 2, 2, 2), (4, 9), (12,)],
    "longer than a block": [(SHORT + 40, 30, 50, 1)],
    "branches longer than a block": [(20, SHORT, SHORT + 9)],
    "its prefix keeps no shares": [(2 * SHORT + 1, 60, 30), (5,), (3, 2, 1)],
}


@pytest.mark.usefixtures("amx")
@pytest.mark.parametrize("trees", TREES.values(), ids=TREES)
def test_a_branch_attends_as_the_row_of_its_prefix_and_itself(trees, monkeypatch):
    monkeypatch.setattr(attention_cpu, "KEPT", SHORT)
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(sum(map(sum, trees)), heads, 16, generator=generator, dtype=torch.float64).requires_grad_()
        for heads in (4, 2, 2)
    ]
    rows, start, lengths, parents = [], 0, [], []
    for prefix, *branches in trees:
        places = torch.arange(start, start + sum((prefix, *branches))).split((prefix, *branches))
        rows += [(places[0], prefix), *((torch.cat([places[0], own]), len(own)) for own in places[1:])]
        parents += [-1, *[len(lengths)] * len(branches)]
        lengths += [prefix, *branches]
        start = int(places[-1][-1]) + 1
    found = PackedProducts.apply(*inputs, Layout(lengths, 4, 2, parents), 0.25)
    wanted = []
    for row, asking in rows:
        q, k, v = (tensor[row].transpose(0, 1) for tensor in inputs)
        whole = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.25, enable_gqa=True)
        wanted.append(whole.transpose(0, 1)[-asking:])
    direction = torch.randn(found.shape, generator=generator, dtype=torch.float64)
    sides = [[made, *torch.autograd.grad((made * direction).sum(), inputs)] for made in (found, torch.cat(wanted))]
    for one, other in zip(*sides, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)  # sums of blocks are in float32


@pytest.mark.usefixtures("amx")
def test_vision_attention_equals_sdpa():
    query, key, value = (torch.randn(3, 4, 50, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
    whole = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(attend_all(query, key, value, 16**-0.5), whole.transpose(1, 2))


def test_sixteen_bit_products_stay_near_the_float32_result(toys):
    lengths = PACKS["mixed"]
    embeddings, direction = draw(lengths)
    llm = AutoModelForCausalLM.from_pretrained(toys.llm, attn_implementation=attention.NAME, dtype=torch.bfloat16)
    plain = load(toys, "eager")
    ours, theirs = embeddings.bfloat16().requires_grad_(), embeddings.clone().requires_grad_()
    hidden, wanted = run_packed(llm, ours, lengths), run_alone(plain, theirs, lengths)
    assert (hidden.float() - wanted).norm() < 0.02 * wanted.norm()
    found, right = (
        torch.autograd.grad((made.float() * direction).sum(), start)[0].float()
        for made, start in ((hidden, ours), (wanted, theirs))
    )
    assert (found - right).norm() < 0.03 * right.norm()


def test_float32_queries_are_rounded_to_autocasts_type(packed):
    # float32 weights (all parameters trained) leave rotated queries and keys in float32, values in 16 bit
    query, key, value = (torch.randn(1, 2, 12, 8) for _ in range(3))
    module, segments = packed.model.layers[0].self_attn, Segments([5, 7])
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = attention.packed_attention(module, query, key, value.bfloat16(), None, segments=segments)
    right, _ = attention.packed_attention(
        module, query.bfloat16(), key.bfloat16(), value.bfloat16(), None, segments=segments
    )
    assert found.dtype is torch.bfloat16
    assert torch.equal(found, right)


def test_a_plan_that_does_not_fill_the_row_is_refused(packed):
    embeddings, _ = draw([5, 7])
    with pytest.raises(AssertionError, match="must fill the packed row"):
        run(packed, embeddings, segments=Segments([5, 6]))


def test_right_padding_changes_nothing(packed, reference):
    # padded training builds no mask: what stands to the right is hidden by causality alone
    embeddings, _ = draw([20])
    padded = torch.cat([embeddings, torch.randn(1, 9, 32)], dim=1)
    with torch.no_grad():
        torch.testing.assert_close(run(packed, padded)[:, :20], run(reference, embeddings), atol=1e-5, rtol=1e-5)


@needs_gpu
@pytest.mark.parametrize("lengths", PACKS.values(), ids=PACKS)
def test_the_gpu_kernel_for_packs_equals_each_sample_alone(toys, lengths):
    # the kernel wants 16 bit and heads of 8 numbers or more, which the toy's are
    llm, plain = (load(toys, name).to("cuda", torch.bfloat16) for name in (attention.NAME, "eager"))
    embeddings, _ = (tensor.to("cuda", torch.bfloat16) for tensor in draw(lengths))
    with torch.no_grad():
        torch.testing.assert_close(
            run_packed(llm, embeddings, lengths), run_alone(plain, embeddings, lengths), atol=0.05, rtol=0.05
        )


# --------------------------------------------------------------------------------------------------------- prefixes

TREES = {  # lengths, parents
    "one branch": ([20, 5], [-1, 0]),
    "branches of many lengths": ([12, 1, 7, 9, 30, 2], [-1, 0, 0, 0, 0, 0]),
    "two trees and a sample": ([8, 4, 5, 6, 15, 3, 3, 8], [-1, 0, 0, -1, -1, 4, 4, -1]),
    "long branches": ([40, SHORT + 60, SHORT + 61, 10], [-1, 0, 0, 0]),
    "a long prefix": ([SHORT + 90, 3, 200, 5], [-1, 0, 0, 0]),
}


def unfolded(tree, lengths, parents):
    """Write each leaf of a tree as a sample of its own: its prefix, then its own part."""
    parts = tree.split(lengths, dim=1)
    leaves = [number for number in range(len(parts)) if number not in parents]
    return [torch.cat([*([parts[parents[n]]] if parents[n] >= 0 else []), parts[n]], dim=1) for n in leaves]


def run_tree(llm, embeddings, lengths, parents):
    before = [0 if parent < 0 else lengths[parent] for parent in parents]
    positions = torch.cat([torch.arange(start, start + length) for start, length in zip(before, lengths, strict=True)])
    return run(llm, embeddings, position_ids=positions.unsqueeze(0), segments=Segments(lengths, parents))


@pytest.mark.parametrize(("lengths", "parents"), TREES.values(), ids=TREES)
def test_samples_that_share_their_prefix_equal_samples_alone(packed, reference, lengths, parents):
    embeddings, direction = draw(lengths)
    tree, apart = embeddings.clone().requires_grad_(), embeddings.clone().requires_grad_()
    found = unfolded(run_tree(packed, tree, lengths, parents), lengths, parents)
    right = [run(reference, sample) for sample in unfolded(apart, lengths, parents)]
    for ours, theirs in zip(found, right, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    weights = unfolded(direction, lengths, parents)
    ours, theirs = (
        torch.autograd.grad(sum((each * weight).sum() for each, weight in zip(made, weights, strict=True)), start)[0]
        for made, start in ((found, tree), (right, apart))
    )
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("window", [None, 3])
def test_masks_are_right_and_large_ones_are_not_kept(window):
    """64 masks of samples of 8,000 tokens would be 4 GiB for as long as the process lives."""
    attention.forget()
    for num_queries, num_keys in ((3, 5), (600, 700)):
        mask = attention.seen(num_queries, num_keys, window, torch.device("cpu"))
        query, key = torch.arange(num_keys - num_queries, num_keys)[:, None], torch.arange(num_keys)
        wanted = (key <= query) & (key > query - (window or num_keys))
        assert torch.equal(mask, wanted)
    assert attention.kept_mask.cache_info().currsize == 1


def test_branches_do_not_see_one_another(packed):
    lengths, parents = TREES["branches of many lengths"]
    embeddings, _ = draw(lengths)
    changed = embeddings.clone()
    changed[:, 12:13] += 10.0  # the first branch
    with torch.no_grad():
        before, after = (run_tree(packed, each, lengths, parents) for each in (embeddings, changed))
    assert torch.equal(before[:, :12], after[:, :12])
    assert torch.equal(before[:, 13:], after[:, 13:])
    assert not torch.allclose(before[:, 12], after[:, 12])
