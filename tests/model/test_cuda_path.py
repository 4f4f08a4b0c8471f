"""A training step on a GPU, followed without one: fake tensors have a device, a type and a shape, and no numbers.

A tensor that was made on the wrong device, an argument that a GPU's kernel does not take, and a number that the CPU
would have to wait for end such a step with an error. Autograd's own engine asks for a real GPU: forward passes only.
"""

import multiprocessing
import os
import traceback
from collections import Counter
from contextlib import contextmanager
from dataclasses import fields, replace
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vlm_tune.config.schema import Precision
from vlm_tune.model.build import resolve_precision
from vlm_tune.model.kernels.attention import key_rows, segment_offsets

PICTURE, TEXT = 0, 6  # training rows: three tiles, no picture (a projector that learns then sees one blank tile)
KERNEL = "torch_attn._varlen_attn.default"
COPIES = ("aten.copy_.default",)


@pytest.fixture(autouse=True)
def _fake_gpu(monkeypatch):
    """Say that the GPU is an A100; its fake tensors are of one test alone."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    yield
    segment_offsets.cache_clear()
    key_rows.cache_clear()


class Called(TorchDispatchMode):
    """Count the operations that are called; each has its tensors on one device, but for copies and single numbers."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.counts[str(function)] += 1
        given = [each for each in tree_leaves((arguments, options)) if isinstance(each, torch.Tensor) and each.dim()]
        assert str(function) in COPIES or len({each.device for each in given}) <= 1, f"{function} on two devices"
        made = function(*arguments, **(options or {}))
        devices = {each.device.type for each in given}
        assert devices != {"cuda"} or made_on(made) != {"cpu"}, f"{function}: the CPU waits for the GPU"
        return made


def made_on(made):
    return {each.device.type for each in tree_leaves(made) if isinstance(each, torch.Tensor)}


@contextmanager
def autocast_on_gpu(dtype):
    """Round as under Lightning's mixed precision; torch.autocast itself does nothing where there is no GPU."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", dtype is not torch.float32)
    torch.set_autocast_dtype("cuda", torch.bfloat16 if dtype is torch.float32 else dtype)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])


class Loss(NamedTuple):
    """What there is to know of a fake loss."""

    device: str
    dtype: torch.dtype
    requires_grad: bool


def step_on_gpu(staged, rows, dtype):
    """Run the forward pass of a step with every weight and the batch on a fake GPU; return the loss and what ran.

    In a process of its own: autograd starts threads for the GPU, and no later process could be forked from this one.
    """
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)
    process = fork.Process(target=send_step, args=(sender, staged, rows, dtype))
    process.start()
    sender.close()
    try:
        made = receiver.recv()
    except EOFError:
        made = "the process ended"
    process.join()
    assert not isinstance(made, str), made
    return made


def send_step(sender, staged, rows, dtype):
    torch.set_num_threads(1)
    try:
        loss, counts = run_step(staged, rows, dtype)
        sender.send((Loss(loss.device.type, loss.dtype, loss.requires_grad), counts))
    except BaseException:
        sender.send(traceback.format_exc())
    os._exit(0)


def run_step(staged, rows, dtype):
    vlm, batch = staged.model.vlm, staged.batch(rows)
    assert torch.get_default_device().type == "cpu"
    with FakeTensorMode() as mode:

        def move(tensor):
            with torch.no_grad():
                made = mode.from_tensor(tensor).to("cuda")
            return made.detach().requires_grad_(tensor.requires_grad)

        weights = {name: move(tensor) for name, tensor in [*vlm.named_parameters(), *vlm.named_buffers()]}
        tensors = [each.name for each in fields(batch) if isinstance(getattr(batch, each.name), torch.Tensor)]
        on_gpu = replace(batch, **{name: move(getattr(batch, name)) for name in tensors})
        vlm.train()
        with autocast_on_gpu(dtype), Called() as called:
            loss = functional_call(vlm, weights, (on_gpu,))
    return loss, called.counts


STAGES = {
    "lora": ("stage=finetune", "stage.lora.dropout=0.1"),
    "dora": ("stage=finetune", "stage.lora.dora=true"),
    "full": ("stage=finetune_full",),
    "projector": ("stage=pretrain",),
    "text": ("stage=sft",),
    "neftune": ("stage=finetune", "stage.neftune=5"),
}


@pytest.mark.parametrize("rows", [[TEXT, TEXT], [PICTURE, TEXT]], ids=["text", "tiles"])
@pytest.mark.parametrize("settings", STAGES.values(), ids=STAGES)
def test_a_pack_in_16_bit_takes_one_kernel_a_layer_and_waits_for_nothing(toys, settings, rows):
    staged = toys.staged(*settings, "trainer.precision=bf16")
    loss, counts = step_on_gpu(staged, rows, torch.bfloat16)
    assert loss == ("cuda", torch.float32, True)
    assert counts[KERNEL] == len(staged.model.vlm.llm.get_decoder().layers)


def test_a_pack_of_trees_takes_one_kernel_a_layer_too(toys):
    staged = toys.staged("stage=finetune", "stage.share_prefix=on", "trainer.precision=bf16")
    rows = [PICTURE, PICTURE, TEXT]
    assert max(staged.batch(rows).parents) >= 0
    loss, counts = step_on_gpu(staged, rows, torch.bfloat16)
    assert loss.device == "cuda"
    assert counts[KERNEL] == len(staged.model.vlm.llm.get_decoder().layers)


def test_an_older_gpu_attends_sample_by_sample(toys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    loss, counts = step_on_gpu(toys.staged("stage=finetune", "trainer.precision=fp32"), [TEXT, TEXT], torch.float16)
    assert loss.device == "cuda"
    assert counts[KERNEL] == 0


@pytest.mark.parametrize(("generation", "precision"), [(7, Precision.fp16), (8, Precision.bf16)])
def test_precision_follows_what_the_gpu_computes_itself(monkeypatch, generation, precision):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=generation))
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda device: True)  # by emulation
    assert resolve_precision(Precision.auto) is precision


def test_a_pack_in_float32_takes_no_16_bit_kernel(toys):
    loss, counts = step_on_gpu(toys.staged("stage=finetune", "trainer.precision=fp32"), [TEXT, TEXT], torch.float32)
    assert loss.device == "cuda"
    assert counts[KERNEL] == 0


def test_segments_are_counted_once_for_all_layers():
    cpu = torch.device("cpu")
    offsets = segment_offsets((3, 1, 5), cpu)
    assert offsets.tolist() == [0, 3, 4, 9]
    assert offsets.dtype is torch.int32
    assert segment_offsets((3, 1, 5), cpu) is offsets
