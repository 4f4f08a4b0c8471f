"""Run one optimizer step of a configuration on fake tensors, and account for it."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import layer_norm, softmax
from torch.overrides import TorchFunctionMode

from vlm_tune.config.checks import SPLITS_WEIGHTS
from vlm_tune.config.schema import Config, Optimizer, Precision, Strategy
from vlm_tune.data.batch import Batch, cut
from vlm_tune.model.build import DTYPES, resolve_precision
from vlm_tune.model.kernels import attention, exchange, kept, loss, packs_cpu
from vlm_tune.model.optim import make_optimizer
from vlm_tune.model.parts import layers
from vlm_tune.model.parts.stage import PartSummary, apply_stage, trained_parameters
from vlm_tune.model.vlm import VisionLanguageModel
from vlm_tune.planning.batches import fake_pictures
from vlm_tune.planning.ledger import Ledger, Operation
from vlm_tune.planning.skeleton import fake_like, give_fakes, make_skeleton

KINDS = ("weights", "gradients", "optimizer", "activations", "logits", "workspace", "gaps", "checkpoint")
GAPS = 0.5  # of the activations: free blocks between them, whose sizes change from step to step (measured, glibc)
UNPAGED = {
    Optimizer.paged_adamw32bit: Optimizer.adamw,  # the same numbers, but in memory that may leave the GPU
    Optimizer.paged_adamw8bit: Optimizer.adamw8bit,
}
SHARED = {  # what each device keeps a share of
    Strategy.zero1: ("optimizer",),
    Strategy.zero2: ("optimizer", "gradients"),
    **dict.fromkeys(SPLITS_WEIGHTS, ("optimizer", "gradients", "weights")),
}


@dataclass(frozen=True)
class Vocabulary:
    """What the tokenizer decides about a model: the rows of its table, and the id of the token for pictures."""

    num_tokens: int
    context_id: int


@dataclass(frozen=True)
class Needs:
    """What one device needs.

    sizes       bytes by kind, at the moment of a step when their sum is largest
    micro       the operations of one forward and backward pass
    update      the operations of clipping and of the optimizer, once a step
    num_micro   forward passes in an optimizer step of one device
    """

    sizes: dict[str, int]
    micro: Counter[Operation]
    update: Counter[Operation]
    num_micro: int
    parts: list[PartSummary]

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return sum(self.sizes.values())

    @property
    def flops(self) -> int:
        """Floating-point operations of one optimizer step of one device, recomputed ones counted."""
        return self.num_micro * _flops(self.micro) + _flops(self.update)


def _flops(operations: Counter[Operation]) -> int:
    return sum(each.flops * count for each, count in operations.items())


def rehearse(config: Config, batch: Batch, vocabulary: Vocabulary, on_gpu: bool) -> Needs:
    """Run the second optimizer step of a run on one batch: weights, gradients and moments are there already."""
    attention.forget()
    batch = replace(batch)
    precision = planned_precision(config, on_gpu)
    fakes = FakeTensorMode(allow_non_fake_inputs=True)
    stage = config.stage
    with torch.random.fork_rng(devices=[]), as_on_gpu() if on_gpu else nullcontext(), nothing_sent():
        vlm = make_skeleton(config.model, vocabulary.num_tokens, DTYPES[precision], stage.quantize)
        vlm.context_id = vocabulary.context_id
        parts = apply_stage(vlm, config)
        batch = first_share(batch, vlm, config)
        give_fakes(vlm, fakes)
        fake_pictures(batch, fakes, vlm.vision.dtype)
        ledger = Ledger(fakes, vlm.llm.get_input_embeddings().weight.shape[0])
        hold_weights(ledger, vlm, on_gpu)
        optimizer = make_state(ledger, vlm, replace(stage, optimizer=UNPAGED.get(stage.optimizer, stage.optimizer)))
        trainer = config.trainer
        num_micro = trainer.global_batch // (trainer.groups * trainer.micro_batch)
        start = len(ledger.events)
        micro, update = run_step(ledger, vlm, optimizer, batch, Step(precision, num_micro > 1, stage.clip))
    attention.forget()
    sizes = ledger.peak(start)
    if not on_gpu:
        sizes["gaps"] = round(GAPS * sizes.get("activations", 0))
        trained = sum(weight.nbytes for _, weight in trained_parameters(vlm))
        sizes["checkpoint"] = trained + sizes.get("optimizer", 0)  # that of a GPU goes into the host's memory
    num_devices = trainer.devices * trainer.nodes
    for kind in SHARED.get(config.strategy.name, ()):
        sizes[kind] = sizes.get(kind, 0) // num_devices
    if stage.optimizer in UNPAGED:
        sizes["optimizer"] = 0
    return Needs({kind: sizes.get(kind, 0) for kind in KINDS}, micro, update, num_micro, parts)


def first_share(batch: Batch, vlm: VisionLanguageModel, config: Config) -> Batch:
    """Cut a batch for the first of the devices that share its pack; raise ConfigError where they cannot."""
    size = config.trainer.sequence_parallel
    if size == 1:
        return batch
    exchange.check_heads(vlm.llm, config)
    vlm.group = SimpleNamespace(size=lambda: size)  # type: ignore[assignment]
    places = (batch.input_ids.flatten() == vlm.context_id).nonzero()[:, 0]
    return cut(replace(batch, image_places=places), 0, size)


@contextmanager
def nothing_sent() -> Iterator[None]:
    """Let devices receive tensors of no numbers."""
    with patch.object(torch.distributed, "all_to_all_single", lambda received, sent, group: None):
        yield


def planned_precision(config: Config, on_gpu: bool) -> Precision:
    """Choose the arithmetic of the planned device: a GPU of these days computes in bf16."""
    wanted = config.trainer.precision
    return Precision.bf16 if on_gpu and wanted is Precision.auto else resolve_precision(wanted)


def hold_weights(ledger: Ledger, vlm: VisionLanguageModel, on_gpu: bool) -> None:
    """Note the weights, with what packed ones keep beside them; layers that never run stay in main memory."""
    for weight in (*vlm.parameters(), *vlm.buffers()):
        ledger.hold(weight, "weights")
        for tensor in beside(weight):
            ledger.hold(tensor, "weights")
    if not on_gpu:
        vlm.vision.unused = {name: fake_like(weight, ledger.fakes) for name, weight in vlm.vision.unused.items()}
        for weight in vlm.vision.unused.values():
            ledger.hold(weight, "weights")


def beside(weight: Any) -> list[Tensor]:
    """List the scales of a packed weight."""
    state = getattr(weight, "quant_state", None)
    scales = [] if state is None else [state.absmax, state.offset, state.state2 and state.state2.absmax]
    return [each for each in (*scales, getattr(weight, "SCB", None)) if isinstance(each, Tensor)]


def make_state(ledger: Ledger, vlm: VisionLanguageModel, stage: Any) -> torch.optim.Optimizer:
    """Make the optimizer as it is after the first step, with the gradients of that step still there."""
    optimizer = make_optimizer(vlm, stage)
    for _, weight in trained_parameters(vlm):
        weight.grad = torch.zeros_like(weight)
        ledger.hold(weight.grad, "gradients")
        weight.register_post_accumulate_grad_hook(lambda each: ledger.hold(each.grad, "gradients"))
    if stage.optimizer is Optimizer.adamw:
        optimizer.step()
    else:
        library: Any = optimizer
        for number, group in enumerate(library.param_groups):
            for place, weight in enumerate(group["params"]):
                library.init_state(group, weight, number, place)
    for state in optimizer.state.values():
        for tensor in state.values():
            if isinstance(tensor, Tensor):
                ledger.hold(tensor, "optimizer")
    return optimizer


@dataclass(frozen=True)
class Step:
    """How a step is run."""

    precision: Precision
    accumulates: bool
    clip: float


def run_step(
    ledger: Ledger, vlm: VisionLanguageModel, optimizer: torch.optim.Optimizer, batch: Batch, how: Step
) -> tuple[Counter[Operation], Counter[Operation]]:
    """Run the last forward and backward pass of a step and its update, as Lightning orders them.

    The gradients of the step before are there during the forward pass, and go before the backward pass; where
    gradients are summed over several passes, those of this step are there throughout.
    """
    trained = [weight for _, weight in trained_parameters(vlm)]
    arithmetic = torch.autocast("cpu", DTYPES[how.precision], enabled=how.precision is not Precision.fp32)
    with ledger:
        with arithmetic:
            total = vlm(batch).sum()  # of pairs, their log-probabilities
        ledger.hold_all("activations")
        if not how.accumulates:
            optimizer.zero_grad()
        total.backward()
        del total
        micro = Counter(ledger.operations)
        ledger.operations.clear()
        if how.clip:
            torch.nn.utils.clip_grad_norm_(trained, how.clip)
        if isinstance(optimizer, torch.optim.AdamW):
            optimizer.step()
    return micro, ledger.operations


@contextmanager
def as_on_gpu() -> Iterator[None]:
    """Let fake tensors of the CPU take the ways of a GPU: its kernel for packs, its autocast, its chunks of logits."""
    with (
        patch.object(attention, "uses_products", lambda tensor: False),
        patch.object(attention, "has_kernel", lambda tensor: tensor.dtype in (torch.bfloat16, torch.float16)),
        patch.object(loss, "CACHE", 2**40),
        patch.object(kept, "FEW", 0),
        patch.object(packs_cpu, "LONGEST", 2**40),
        patch.object(packs_cpu, "uses_onednn", lambda tensor: False),
        patch.object(layers, "put_away", lambda tensor: (tensor.shape, tensor.dtype)),  # no memory of the GPU
        patch.object(layers, "bring_back", lambda kept: torch.empty(kept[0], dtype=kept[1])),
        WideNorms(),
    ):
        yield


class WideNorms(TorchFunctionMode):
    """Compute norms and softmaxes in float32 under autocast, as CUDA's does and the CPU's does not."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (layer_norm, softmax) and torch.is_autocast_enabled("cpu"):
            args = [each.float() if isinstance(each, Tensor) else each for each in args]
        return func(*args, **(kwargs or {}))
