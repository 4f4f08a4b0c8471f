"""A stage trains what it names and nothing else."""

import pytest
import torch

from vlm_tune.config.parse import load_config
from vlm_tune.config.schema import Train
from vlm_tune.errors import ConfigError
from vlm_tune.model.optim import make_optimizer
from vlm_tune.model.parts.stage import PARTS, add_lora, apply_stage, trained_parameters

STAGES = {  # what each shipped stage trains; qlora's base is quantised and has a test of its own
    "pretrain": ("frozen", "full", "frozen"),
    "finetune": ("frozen", "full", "lora"),
    "finetune_full": ("frozen", "full", "full"),
    "sft": ("frozen", "frozen", "lora"),
}
WAYS = [*STAGES.values(), ("full", "full", "full"), ("lora", "full", "frozen"), ("lora", "frozen", "lora")]
ROWS = [0, 1, 6]


def staged(toys, ways, *more):
    keys = [f"stage.train.{part}={how}" for part, how in zip(PARTS, ways, strict=True)]
    targets = "model.vision.targets=[q_proj,v_proj,fc1]"
    return toys.staged("stage=finetune", targets, *keys, *more)


def snapshot(vlm):
    return {name: weight.detach().clone() for name, weight in vlm.state_dict().items()}


def is_trained_name(name, ways):
    how = dict(zip(PARTS, ways, strict=True))[name.partition(".")[0]]
    return how == "full" or (how == "lora" and "lora_" in name)


@pytest.mark.parametrize("stage", STAGES)
def test_a_shipped_stage_trains_what_its_file_says(stage):
    train = load_config([f"stage={stage}", "model=tiny"]).stage.train
    assert tuple(getattr(train, part).value for part in PARTS) == STAGES[stage]


@pytest.mark.parametrize("ways", WAYS, ids="-".join)
def test_trained_parts_move_and_frozen_parts_do_not(toys, ways):
    run = staged(toys, ways, "stage.lora.dropout=0", "stage.weight_decay=0.1")
    vlm = run.model.vlm
    before = snapshot(vlm)
    optimizer = make_optimizer(vlm, run.config.stage)
    for _ in range(2):  # an adapter's first half moves from the second step on, when the other half is no longer zero
        vlm(run.batch(ROWS)).backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {name for name, weight in vlm.state_dict().items() if not torch.equal(weight, before[name])}
    trained = {name for name, _ in trained_parameters(vlm)}
    assert trained == {name for name, _ in vlm.named_parameters() if is_trained_name(name, ways)}
    still = trained - moved
    assert not {name for name in still if "mask_token" not in name and "llm.lm_head" not in name}
    assert {name for name in moved if name != "llm.lm_head.weight"} <= trained


def test_a_frozen_parameter_has_no_gradient(toys):
    run = staged(toys, STAGES["finetune"])
    run.model.vlm(run.batch(ROWS)).backward()
    assert all((weight.grad is not None) == weight.requires_grad for weight in run.model.vlm.parameters())


@pytest.mark.parametrize("ways", WAYS, ids="-".join)
def test_trained_parts_are_in_train_mode_and_frozen_ones_are_not(toys, ways):
    vlm = staged(toys, ways).model.vlm
    assert [getattr(vlm, part).training for part in PARTS] == [how != "frozen" for how in ways]


def test_the_table_counts_what_is_trained(toys):
    run = staged(toys, STAGES["finetune"], "stage.lr.llm=0.5", "stage.lr.vision=9")
    for row in run.parts:
        part = getattr(run.model.vlm, row.name)
        assert row.num_total == sum(weight.numel() for weight in part.parameters())
        assert row.num_trained == sum(weight.numel() for weight in part.parameters() if weight.requires_grad)
    assert [(row.how, row.learning_rate) for row in run.parts][::2] == [(Train.frozen, 0.0), (Train.lora, 0.5)]


# ------------------------------------------------------------------------------------------------------------ adapters


def test_a_new_adapter_changes_no_answer(toys):
    plain = staged(toys, STAGES["pretrain"])
    adapted = staged(toys, STAGES["finetune"], "stage.lora.dropout=0")
    with torch.no_grad():
        assert torch.equal(plain.model.vlm(plain.batch(ROWS)), adapted.model.vlm(adapted.batch(ROWS)))


def test_an_adapters_first_weights_do_not_depend_on_the_seed(toys):
    first, second = {}, {}
    for found, seed in ((first, 1), (second, 2)):
        torch.manual_seed(seed)
        found |= dict(trained_parameters(staged(toys, STAGES["finetune"]).model.vlm))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_adapters_draw_nothing_from_the_runs_generator(toys):
    vlm = toys.model().vlm
    state = torch.get_rng_state()
    apply_stage(vlm, load_config(toys.arguments("stage=finetune")))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("target", ["q_proj", "down_proj"])
def test_adapters_stand_where_the_targets_say(toys, target):
    vlm = staged(toys, STAGES["sft"], f"model.llm.targets=[{target}]", "stage.lora.rank=3").model.vlm
    adapters = dict(trained_parameters(vlm))
    assert len(adapters) == 2 * 2  # two layers, two halves
    assert all(f".{target}." in name and 3 in weight.shape for name, weight in adapters.items())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_trained_weights_are_kept_in_32_bits(toys, precision):
    vlm = staged(toys, STAGES["finetune"], f"trainer.precision={precision}").model.vlm
    assert {weight.dtype for _, weight in trained_parameters(vlm)} == {torch.float32}


def test_frozen_weights_are_stored_in_the_runs_precision(toys):
    vlm = staged(toys, STAGES["finetune"], "trainer.precision=bf16").model.vlm
    frozen = [weight for weight in vlm.parameters() if not weight.requires_grad]
    assert {weight.dtype for weight in frozen} == {torch.bfloat16}


# -------------------------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        ("[wqkv]", r"model\.llm\.targets=\['wqkv'\] matches no linear layer\. There are: down_proj, gate_proj, k_proj"),
        ("[q_proj,wqkv]", r"model\.llm\.targets=\['wqkv'\] matches no linear layer"),
        ("[proj]", r"model\.llm\.targets=\['proj'\] matches no linear layer"),
        ("[]", r"model\.llm\.targets=\[\] matches no linear layer"),
    ],
)
def test_a_target_that_matches_nothing_is_an_error_that_lists_the_layers(toys, targets, said):
    with pytest.raises(ConfigError, match=said):
        staged(toys, STAGES["finetune"], f"model.llm.targets={targets}")


def test_a_vision_target_that_matches_nothing_names_its_own_key(toys):
    with pytest.raises(ConfigError, match=r"model\.vision\.targets=\['qkv'\] matches no linear layer"):
        staged(toys, ("lora", "full", "frozen"), "model.vision.targets=[qkv]")


def test_a_stage_that_trains_no_parameter_is_an_error(toys):
    config = load_config(toys.arguments("stage=finetune"))
    for part in PARTS:  # what a configuration file cannot say, but a program can
        setattr(config.stage.train, part, Train.frozen)
    with pytest.raises(
        ConfigError, match=r"stage\.train: stage finetune trains no parameter of this model: set a part"
    ):
        apply_stage(toys.model().vlm, config)


def test_a_failed_target_leaves_no_adapter_behind(toys):
    config = load_config(toys.arguments("stage=finetune"))
    vlm = toys.model().vlm
    with pytest.raises(ConfigError):
        add_lora(vlm.llm, config.stage.lora, ["q_proj", "wqkv"], "model.llm.targets")
    assert not [name for name, _ in vlm.named_parameters() if "lora_" in name]
