"""A mixture of experts in training: adapters, router, packs, recomputed layers, estimates, and what is refused."""

from dataclasses import replace

import pytest
import torch
from official_toys import MIXTURE, small_model, write_official
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from vlm_tune.config.parse import load_config
from vlm_tune.config.schema import Quantize
from vlm_tune.data.sets.micro_batches import MicroBatches
from vlm_tune.data.stream import MicroBatch
from vlm_tune.errors import ConfigError
from vlm_tune.export.merge import merge_adapters, take_adapters
from vlm_tune.model.flops import count_flops
from vlm_tune.model.layouts import native
from vlm_tune.model.layouts.internvl import hf as internvl_hf
from vlm_tune.model.layouts.internvl import official as internvl_official
from vlm_tune.model.layouts.internvl.alone import load_language_model
from vlm_tune.model.parts import chunks
from vlm_tune.planning.ledger import Ledger

EXPERTS = ("model.llm.targets=[q_proj,v_proj,gate_up_proj,down_proj]", "stage.lora.dropout=0")
FULL = ("stage.train.llm=full", "stage.train.projector=full")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_official(tmp_path_factory.mktemp("mixture"), MIXTURE)


@pytest.fixture(scope="module")
def whole(folder):
    """How a command line names the model."""
    of_parts = ("model.vision.path=null", "model.llm.path=null", "model.template=internvl2_5", "model.tiles.max=2")
    return (f"model.path={folder}", *of_parts)


def opened(toys, whole, *more):
    """Give a staged model whose adapters, zero at first, do something."""
    staged = toys.staged("stage=finetune", *whole, *more)
    torch.manual_seed(0)
    for name, weight in staged.model.vlm.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    return staged


def loss_and_gradients(staged, batch):
    vlm = staged.model.vlm
    trained = {name: weight for name, weight in vlm.named_parameters() if weight.requires_grad}
    loss = vlm(batch)
    return loss.detach(), dict(zip(trained, torch.autograd.grad(loss, trained.values()), strict=True))


def close(found, wanted):
    torch.testing.assert_close(found[0], wanted[0], atol=1e-5, rtol=1e-5)
    for name, gradient in wanted[1].items():
        torch.testing.assert_close(
            found[1][name], gradient, atol=1e-5, rtol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
        )


# ------------------------------------------------------------------------------------------------------ what is trained


def test_experts_learn_by_adapters_and_the_router_stays(toys, whole):
    staged = opened(toys, whole, *EXPERTS)
    _, gradients = loss_and_gradients(staged, staged.batch([0, 1]))
    of_llm = {name for name in gradients if name.startswith("llm.")}
    assert all("lora_" in name for name in of_llm)
    assert sum("experts" in name for name in of_llm) == 2 * 2 * 2  # layers, weights, halves of an adapter
    assert all(gradients[name].abs().sum() > 0 for name in of_llm)


def test_attention_alone_learns_where_no_expert_is_named(toys, whole):
    staged = opened(toys, whole, "model.llm.targets=[q_proj,v_proj]")
    assert not [name for name, weight in staged.model.vlm.llm.named_parameters() if "experts.lora" in name]


def test_the_router_learns_with_the_whole_language_model(toys, whole):
    staged = opened(toys, whole, *FULL)
    _, gradients = loss_and_gradients(staged, staged.batch([0, 1]))
    assert gradients["llm.model.layers.0.mlp.gate.weight"].abs().sum() > 0


def test_adapters_of_experts_merge_and_are_taken_off(toys, whole):
    staged = opened(toys, whole, *EXPERTS)
    vlm, batch = staged.model.vlm.eval(), staged.batch([0, 1])
    names = set(toys.model(*whole).vlm.state_dict())
    with torch.no_grad():
        before = vlm(batch)
        merge_adapters(vlm)
        torch.testing.assert_close(vlm(batch), before, atol=1e-5, rtol=1e-5)
    assert set(vlm.state_dict()) == names
    other = opened(toys, whole, *EXPERTS).model.vlm
    taken = take_adapters(other)
    assert set(other.state_dict()) == names
    assert "llm.model.layers.1.mlp.experts.base_layer.lora_B.default.weight" in taken


# ------------------------------------------------------------------------------------------------- packs, recomputation


@pytest.mark.parametrize("how", [EXPERTS, FULL], ids=["adapters", "all"])
def test_a_pack_is_its_rows_alone(toys, whole, how):
    staged = opened(toys, whole, *how)
    rows = [0, 1, 2, 6]
    weight = float(staged.data.stream().row_weights(rows).sum())
    alone = [loss_and_gradients(staged, staged.batch([row], step_weight=weight)) for row in rows]
    wanted = sum(loss for loss, _ in alone), {name: sum(each[name] for _, each in alone) for name in alone[0][1]}
    close(loss_and_gradients(staged, staged.batch(rows)), wanted)


def test_rows_that_share_their_prefix_are_as_rows_alone(toys, whole, tmp_path):
    rows = "".join(
        f'{{"id": "{number}", "image": "pictures/train_0.png", "conversations": [{{"from": "human", '
        f'"value": "<image>\\nWhat?"}}, {{"from": "gpt", "value": "{answer}"}}]}}\n'
        for number, answer in enumerate(("red", "a red circle", "blue"))
    )
    (tmp_path / "train.jsonl").write_text(rows)
    rows_of = (
        f"data.path={tmp_path / 'train.jsonl'}",
        f"data.image.root={toys.data}",
        "data.val=none",
        "data.test=none",
    )
    shared = ("stage.share_prefix=on", *rows_of)
    staged = opened(toys, whole, *EXPERTS, *shared)
    weight, train = float(staged.data.stream().row_weights([0, 1, 2]).sum()), staged.data.train
    tree, apart = (
        MicroBatches(train.data, train.index, replace(staged.data.settings(1), share_prefix=share), True)[
            MicroBatch((0, 1, 2), 0, weight, (0, 0, 0))
        ]
        for share in (True, False)
    )
    assert tree.num_tokens < apart.num_tokens
    close(loss_and_gradients(staged, tree), loss_and_gradients(staged, apart))


@pytest.mark.parametrize("way", ["mlp", "true"])
@pytest.mark.parametrize("how", [EXPERTS, FULL], ids=["adapters", "all"])
def test_recomputed_layers_change_nothing(toys, whole, how, way, monkeypatch):
    monkeypatch.setattr(chunks, "TOKENS", 20)
    ways = ("false", way)
    aux = "stage.router_loss=0.1"
    plain, again = (opened(toys, whole, *how, aux, f"stage.gradient_checkpointing.llm={each}") for each in ways)
    close(loss_and_gradients(again, again.batch([0, 1])), loss_and_gradients(plain, plain.batch([0, 1])))


# --------------------------------------------------------------------------------------------- the loss of uneven use


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
def test_the_loss_of_uneven_use_is_transformers_own(toys, whole, packing):
    plain, staged = (opened(toys, whole, *FULL, f"stage.router_loss={weight}") for weight in (0, 0.5))
    rows = [0, 1, 6]
    batch = staged.batch(rows, packing=packing)
    seen = []
    plain.model.vlm.llm.model.layers[-1].reads_rows = False  # or its router would see supervised tokens alone
    for layer in plain.model.vlm.llm.model.layers:
        layer.mlp.gate.register_forward_hook(lambda module, given, made: seen.append(made[0]))
    loss = plain.model.vlm(batch)
    is_token = torch.ones_like(batch.input_ids)
    for row, length in enumerate([] if packing else (batch.position_ids.amax(1) + 1).tolist()):
        is_token[row, length:] = 0
    wanted = loss + 0.5 * load_balancing_loss_func(tuple(seen), 6, 2, is_token)
    trained = {name: weight for name, weight in plain.model.vlm.named_parameters() if weight.requires_grad}
    gradients = torch.autograd.grad(wanted, trained.values())
    close(loss_and_gradients(staged, batch), (wanted.detach(), dict(zip(trained, gradients, strict=True))))


def test_each_micro_batch_has_its_share_of_the_loss_of_uneven_use(toys, whole):
    plain, staged = (opened(toys, whole, *FULL, f"stage.router_loss={weight}") for weight in (0, 0.5))
    weight = float(staged.data.stream().row_weights([0, 1]).sum())

    def added(step_weight):
        batch = staged.batch([0], step_weight=step_weight)
        return (staged.model.vlm(batch) - plain.model.vlm(batch)).item(), float(batch.weights.sum())

    (all_of_it, _), (part_of_it, share) = added(None), added(weight)
    assert 0 < share < 1
    assert part_of_it == pytest.approx(share * all_of_it, rel=1e-3)


def test_validation_is_without_the_loss_of_uneven_use(toys, whole):
    plain, staged = (opened(toys, whole, *FULL, f"stage.router_loss={weight}") for weight in (0, 0.5))
    batch = staged.batch([0])
    with torch.no_grad():
        assert torch.equal(staged.model.vlm.eval()(batch), plain.model.vlm.eval()(batch))


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize("layout", ["official", "hf", "alone"])
def test_no_mixture_is_left_in_16_bit_in_silence(folder, layout, tmp_path):
    loaded = internvl_official.load(folder, small_model(), torch.float32, Quantize.none)
    internvl_hf.save(loaded.vlm, tmp_path / "hf")
    loaded.vlm.llm.save_pretrained(tmp_path / "alone")
    loaders = {
        "official": lambda: internvl_official.load(folder, small_model(), torch.bfloat16, Quantize.nf4),
        "hf": lambda: native.load(tmp_path / "hf", small_model(), torch.bfloat16, Quantize.nf4),
        "alone": lambda: load_language_model(tmp_path / "alone", torch.bfloat16, Quantize.int8),
    }
    with pytest.raises(ConfigError, match=r"packs linear layers, but the experts of a qwen3_moe, .*quantize=none"):
        loaders[layout]()


@pytest.mark.parametrize("more", ["stage.lora.dropout=0.05", "stage.lora.dora=true"])
def test_adapters_of_experts_refuse_what_they_cannot_do(toys, whole, more):
    with pytest.raises(
        ConfigError, match=r"model\.llm\.targets: experts\.down_proj, experts\.gate_up_proj are weights"
    ):
        toys.staged("stage=finetune", *whole, *EXPERTS, more)


def test_adapters_of_experts_refuse_a_strategy_that_empties_weights(toys, whole):
    with pytest.raises(ConfigError, match=r"strategy=zero3 gathers the weights of experts .*: use strategy=fsdp"):
        toys.staged("stage=finetune", *whole, *EXPERTS, "strategy=zero3")


def test_the_names_of_experts_are_offered(toys, whole):
    with pytest.raises(ConfigError, match=r"\['gate_proj'\] matches no linear layer\. There are: down_proj, gate_up_"):
        toys.staged("stage=finetune", *whole, "model.llm.targets=[gate_proj]")


def test_a_loss_of_uneven_use_without_experts_is_refused(toys):
    with pytest.raises(ConfigError, match=r"stage\.router_loss=0\.1 is about a mixture of experts, and .* is a llama"):
        toys.staged("stage=finetune", "stage.router_loss=0.1")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("stage=pretrain",), r"router_loss=0\.1 concerns a trained language model but stage\.train\.llm=frozen"),
        (("stage=mpo",), r"stage\.router_loss=0\.1 is about tokens: set it to 0"),
        (("trainer.devices=2", "trainer.sequence_parallel=2"), r"cuts packs, but stage\.router_loss=0\.1 is about the"),
    ],
)
def test_a_loss_of_uneven_use_that_would_do_nothing_is_refused(more, said):
    with pytest.raises(ConfigError, match=said):
        load_config(["model=internvl3_5_30b_a3b", "data.path=x.jsonl", "stage.router_loss=0.1", *more])


# ------------------------------------------------------------------------------------------------------------ estimates


@pytest.mark.parametrize("how", [EXPERTS, FULL], ids=["adapters", "all"])
def test_only_experts_that_a_token_takes_are_counted(toys, whole, how):
    staged = opened(toys, whole, *how, "stage.lora.rank=4")
    vlm, batch = staged.model.vlm, staged.batch([0, 1, 2, 3])
    if how is FULL:  # with adapters products are grouped, which torch counts by the ledger's formula alone
        vlm.llm.config._experts_implementation = "eager"
    counted = replace(count_flops(vlm), pair=0.0)
    assert Ledger
    with FlopCounterMode(display=False) as counter:
        vlm(batch).backward()
    assert counted.of(batch) == pytest.approx(counter.get_total_flops(), rel=0.1)
