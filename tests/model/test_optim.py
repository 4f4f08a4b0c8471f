"""The optimizer does what the stage says: rates by part, warmup and cosine by step, no decay of vectors, clipping."""

import io
import math

import lightning as L
import pytest
import torch
from torch import nn
from torch.optim import SGD

from vlm_tune.config.parse import load_config
from vlm_tune.config.schema import Optimizer, StageConfig
from vlm_tune.console import make_console
from vlm_tune.errors import ConfigError, TrainingError
from vlm_tune.model.optim import make_optimizer, make_schedule
from vlm_tune.model.parts.stage import PARTS, trained_parameters
from vlm_tune.training.module import VlmModule
from vlm_tune.training.trainer import check_trainer, make_trainer

FULL = ("stage=finetune", "stage.train={vision: full, projector: full, llm: full}")


def rates(max_steps, **changes):
    """Return the learning rate of each step, as a share of the stage's."""
    optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = make_schedule(optimizer, StageConfig(**changes), max_steps)
    found = []
    for _ in range(max_steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_the_rate_warms_up_in_equal_steps():
    found = rates(100, warmup=0.1)
    assert found[:10] == pytest.approx([(step + 1) / 11 for step in range(10)])
    assert found[10] == max(found) == 1


def test_the_rate_then_follows_a_cosine():
    found = rates(100, warmup=0.1)
    assert found[10:] == pytest.approx([0.5 * (1 + math.cos(math.pi * step / 90)) for step in range(90)])


def test_the_cosine_ends_at_the_share_that_is_left():
    assert rates(1000, warmup=0, min_lr=0.1)[-1] == pytest.approx(0.1, abs=1e-3)


@pytest.mark.parametrize("max_steps", [1, 2, 3])
@pytest.mark.parametrize("warmup", [0.0, 0.5, 1.0])
def test_the_shortest_runs_have_a_rate(max_steps, warmup):
    assert all(0 < rate <= 1 for rate in rates(max_steps, warmup=warmup))


def test_each_part_has_its_own_rate(toys):
    staged = toys.staged(*FULL, "stage.lr={vision: 0.1, projector: 0.2, llm: 0.3}")
    optimizer = make_optimizer(staged.model.vlm, staged.config.stage)
    assert {group["name"]: group["lr"] for group in optimizer.param_groups} == dict(
        zip(PARTS, (0.1, 0.2, 0.3), strict=True)
    )


@pytest.mark.parametrize(("given", "betas"), [((), (0.9, 0.999)), (("stage.beta2=0.98",), (0.9, 0.98))])
def test_the_mean_of_squares_forgets_as_fast_as_the_stage_says(toys, given, betas):
    staged = toys.staged(*FULL, *given)
    assert make_optimizer(staged.model.vlm, staged.config.stage).defaults["betas"] == betas


def test_every_trained_parameter_is_in_the_optimizer_once(toys):
    staged = toys.staged(*FULL)
    held = [
        id(weight)
        for group in make_optimizer(staged.model.vlm, staged.config.stage).param_groups
        for weight in group["params"]
    ]
    assert sorted(held) == sorted(id(weight) for _, weight in trained_parameters(staged.model.vlm))


def test_vectors_do_not_decay_and_matrices_do(toys):
    staged = toys.staged(*FULL, "stage.weight_decay=0.1")
    decays = {}
    for group in make_optimizer(staged.model.vlm, staged.config.stage).param_groups:
        decays |= {id(weight): group["weight_decay"] for weight in group["params"]}
    for name, weight in trained_parameters(staged.model.vlm):
        is_vector = name.endswith(".bias") or "norm" in name or weight.ndim < 2
        assert decays[id(weight)] == (0.0 if is_vector else 0.1), name


def test_a_part_may_have_its_own_decay(toys):
    staged = toys.staged(*FULL, "stage.weight_decay=0.1", "stage.part_weight_decay={vision: 0, llm: 0.3}")
    groups = make_optimizer(staged.model.vlm, staged.config.stage).param_groups
    decays = {group["name"]: group["weight_decay"] for group in groups if group["params"][0].ndim > 1}
    assert decays == {"vision": 0, "projector": 0.1, "llm": 0.3}


def test_earlier_layers_of_the_encoder_learn_more_slowly(toys):
    staged = toys.staged(*FULL, "stage.layer_decay=0.5", "stage.lr={vision: 1, projector: 2, llm: 3}")
    vlm = staged.model.vlm
    rates = {}
    for group in make_optimizer(vlm, staged.config.stage).param_groups:
        rates |= {id(weight): group["lr"] for weight in group["params"]}
    found = {name: rates[id(weight)] for name, weight in trained_parameters(vlm)}
    assert {rate for name, rate in found.items() if name.startswith("vision.tower.embeddings")} == {0.25}
    assert {rate for name, rate in found.items() if ".encoder.layer.0." in name} == {0.5}
    assert {rate for name, rate in found.items() if ".encoder.layer.1." in name} == {1}
    assert {rate for name, rate in found.items() if not name.startswith("vision")} == {2, 3}


@pytest.mark.parametrize("kind", [each.value for each in Optimizer])
def test_every_optimizer_learns_and_goes_on_from_its_state(toys, kind):
    staged = toys.staged(*FULL, f"stage.optimizer={kind}", "stage.lr={vision: 0.01, projector: 0.01, llm: 0.01}")
    vlm, batch = staged.model.vlm, staged.batch([0, 1])
    optimizer = make_optimizer(vlm, staged.config.stage)
    losses = [step(vlm, batch, optimizer) for _ in range(3)]
    assert losses[-1] < losses[0]
    weights = {name: weight.detach().clone() for name, weight in vlm.named_parameters()}
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    straight = [step(vlm, batch, optimizer) for _ in range(2)]

    vlm.load_state_dict(weights, strict=False)
    again = make_optimizer(vlm, staged.config.stage)
    again.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    assert [step(vlm, batch, again) for _ in range(2)] == straight


def step(vlm, batch, optimizer):
    loss = vlm(batch)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss)


@pytest.mark.parametrize("kind", ["adamw8bit", "paged_adamw8bit"])
def test_moments_of_large_matrices_are_in_8_bits(toys, kind):
    staged = toys.staged(*FULL, f"stage.optimizer={kind}")
    optimizer = make_optimizer(staged.model.vlm, staged.config.stage)
    step(staged.model.vlm, staged.batch([0, 1]), optimizer)
    kinds = {weight.numel() >= 4096: optimizer.state[weight]["state1"].dtype for weight in optimizer.state}
    assert kinds == {True: torch.uint8, False: torch.float32}  # bitsandbytes leaves small ones as they are


def test_the_plain_optimizer_is_one_kernel_where_torch_has_it(toys):
    staged = toys.staged("stage=finetune")
    assert make_optimizer(staged.model.vlm, staged.config.stage).defaults["fused"]
    assert not make_optimizer(staged.model.vlm, staged.config.stage, may_fuse=False).defaults["fused"]


def test_gradients_of_the_fused_kernel_are_clipped_in_16_bits_too(toys, tmp_path):
    trainer = fit(stage(toys, "stage.clip=0.05", "trainer.precision=bf16"), tmp_path)
    moment = torch.cat([state["exp_avg"].flatten() for state in trainer.optimizers[0].state.values()])
    assert float(moment.norm()) / 0.1 == pytest.approx(0.05, rel=1e-2)


class Norm(L.Callback):
    """Keep the norm of the gradient."""

    def on_before_optimizer_step(self, trainer, module, optimizer):
        gradients = [weight.grad.flatten() for weight in module.parameters() if weight.grad is not None]
        self.before_clipping = float(torch.cat(gradients).norm())


def fit(staged, folder, *callbacks):
    """Train one step."""
    (folder / "checkpoints").mkdir()
    trainer = make_trainer(staged.config, 1, folder, list(callbacks), make_console())
    trainer.fit(VlmModule(staged.model, staged.config, 1), datamodule=staged.data)
    return trainer


def stage(toys, *more):
    return toys.staged("stage=finetune", "data.val=none", *more)


@pytest.mark.parametrize(("clip", "is_cut"), [(0.05, True), (1e6, False), (0, False)])
def test_the_gradient_is_clipped_to_its_norm(toys, tmp_path, clip, is_cut):
    norm = Norm()
    trainer = fit(stage(toys, f"stage.clip={clip}"), tmp_path, norm)
    moment = torch.cat([state["exp_avg"].flatten() for state in trainer.optimizers[0].state.values()])
    seen = float(moment.norm()) / 0.1  # Adam's first moment is a tenth of the first gradient
    assert norm.before_clipping > 0.05
    assert seen == pytest.approx(clip if is_cut else norm.before_clipping, rel=1e-3)


def test_a_loss_that_is_not_a_number_stops_before_it_reaches_the_weights(toys, tmp_path):
    staged = stage(toys)
    staged.model.vlm.llm.model.norm.weight.data.fill_(float("inf"))  # frozen: what is trained stays finite
    before = {name: weight.clone() for name, weight in trained_parameters(staged.model.vlm)}
    with pytest.raises(TrainingError, match=r"the loss is nan at step 0, rows train_\d+"):
        fit(staged, tmp_path)
    assert all(torch.equal(weight, before[name]) for name, weight in trained_parameters(staged.model.vlm))


def test_fp16_needs_a_gpu(toys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = load_config(toys.arguments("stage=finetune", "trainer.precision=fp16"))
    with pytest.raises(
        ConfigError, match=r"trainer\.precision=fp16 needs a GPU: set trainer\.precision=bf16 or fp32 on a"
    ):
        check_trainer(config)
