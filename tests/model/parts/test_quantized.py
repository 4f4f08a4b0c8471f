"""QLoRA on a CPU: a 4-bit base trains adapters, keeps its own bits, and leaves as an ordinary folder."""

import json

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import nn
from torch.optim import AdamW
from toys import save_llm

from vlm_tune.config.schema import Precision, Quantize
from vlm_tune.model.parts.llm import dequantize, load_llm
from vlm_tune.model.parts.stage import trained_parameters

KINDS = ["nf4", "int8"]


def packed_layers(llm):
    return {name: layer for name, layer in llm.named_modules() if type(layer) in (Linear4bit, Linear8bitLt)}


def stored_bytes(layer):
    """Count what a packed layer keeps: its codes and, of 4 bits, the scales and their own scales."""
    tensors = [layer.weight.data]
    state = getattr(layer.weight, "quant_state", None)
    if state is not None:
        tensors += [state.absmax, state.state2.absmax, state.state2.code, state.code, state.offset]
    else:
        tensors.append(layer.weight.SCB)
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def bits(vlm):
    """Copy every weight that the stage does not train, packed ones as they are stored."""
    trained = {name for name, _ in trained_parameters(vlm)}
    return {name: weight.detach().clone() for name, weight in vlm.named_parameters() if name not in trained}


@pytest.fixture(scope="module", params=KINDS)
def trained(toys, request):
    """Train a toy with packed weights for some steps; keep losses and the base's bits before and after."""
    torch.manual_seed(0)
    given = (f"stage.quantize={request.param}", "stage.lora={rank: 8, alpha: 16, dropout: 0}")
    run = toys.staged("stage=qlora", "trainer.precision=bf16", *given)
    vlm, batch = run.model.vlm, run.batch([0, 1, 2, 6])
    before, losses = bits(vlm), []
    optimizer = AdamW([weight for _, weight in trained_parameters(vlm)], lr=2e-2)
    for _ in range(20):
        loss = vlm(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return run, before, losses


def test_the_loss_falls_on_a_packed_base(trained):
    _, _, losses = trained
    assert losses[-1] < 0.7 * losses[0]


def test_training_leaves_every_bit_of_the_base(trained):
    run, before, _ = trained
    after = bits(run.model.vlm)
    assert packed_layers(run.model.vlm.llm)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


@pytest.mark.parametrize("origin", ["parts", "whole"])
def test_adapters_stand_beside_packed_layers_however_the_model_is_stored(toys, whole, origin):
    folders = () if origin == "parts" else (f"model.path={whole}", "model.vision.path=null", "model.llm.path=null")
    vlm = toys.staged("stage=qlora", "trainer.precision=bf16", *folders).model.vlm
    names = {name for name, _ in trained_parameters(vlm.llm)}
    layers = packed_layers(vlm.llm)
    assert len(layers) == 2 * 7
    assert len(names) == 2 * len(layers)  # two halves of an adapter for each layer


@pytest.fixture(scope="module")
def whole(toys, tmp_path_factory):
    """The toy as one native folder."""
    from vlm_tune.model.layouts.internvl import hf as internvl_hf
    from vlm_tune.model.layouts.internvl.processor import save_processor

    folder = tmp_path_factory.mktemp("whole")
    run = toys.staged("stage=pretrain", "data.path=" + str(toys.data / "train.jsonl"))
    internvl_hf.save(run.model.vlm, folder)
    save_processor(run.model.tokenizer, run.model.encoder, run.config.model, folder)
    return folder


@pytest.mark.parametrize(("quantize", "most"), [("nf4", 0.29), ("int8", 0.52)])
def test_packed_layers_are_small(tmp_path, quantize, most):
    save_llm(tmp_path, hidden_size=512, intermediate_size=1024, num_attention_heads=8)
    layers = packed_layers(load_llm(tmp_path, torch.bfloat16, Quantize(quantize)))
    packed = sum(map(stored_bytes, layers.values()))
    plain = sum(2 * layer.in_features * layer.out_features for layer in layers.values())
    assert packed <= most * plain


@pytest.mark.parametrize("quantize", KINDS)
def test_gradients_of_adapters_are_the_same_after_an_evaluation(toys, quantize):
    run = toys.staged("stage=qlora", "trainer.precision=bf16", f"stage.quantize={quantize}", "stage.lora.dropout=0")
    vlm, batch = run.model.vlm, run.batch([0, 1, 6])
    for name, weight in trained_parameters(vlm):
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.02)
    weights = [weight for _, weight in trained_parameters(vlm)]
    before = torch.autograd.grad(vlm(batch), weights)
    vlm.eval()
    with torch.no_grad():
        vlm(batch)
    vlm.train()
    for one, other in zip(before, torch.autograd.grad(vlm(batch), weights), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("quantize", KINDS)
def test_dequantized_layers_hold_the_values_that_were_computed_with(toys, quantize):
    llm = load_llm(toys.llm, torch.bfloat16, Quantize(quantize))
    llm.train()  # 8-bit layers round their input too when they answer, and only then
    states = torch.randn(1, 9, 32, dtype=torch.bfloat16, requires_grad=True)
    layers = list(packed_layers(llm))
    before = {
        name: llm.get_submodule(name)(states if "down" not in name else torch.cat([states, states], -1))
        for name in layers
    }
    assert dequantize(llm) == len(layers)
    for name in layers:
        layer = llm.get_submodule(name)
        inputs = states if "down" not in name else torch.cat([states, states], -1)
        assert layer.weight.dtype is torch.float32
        torch.testing.assert_close(layer(inputs.float()), before[name].float(), atol=2e-2, rtol=1e-2)
    assert not hasattr(llm.config, "quantization_config")


# ---------------------------------------------------------------------------------------------------------- exports


@pytest.fixture(scope="module")
def quantized_run(toys, tmp_path_factory):
    """Train a quantized stage through the command line."""
    from vlm_tune.cli import main

    runs = tmp_path_factory.mktemp("runs")
    given = ("stage.init_from=none", "trainer.precision=bf16", "stage.lr={projector: 0.01, llm: 0.01}")
    assert main(["stage=qlora", *toys.arguments(*given, "stage.evaluate=false", runs=runs)]) == 0
    return (runs / "latest").resolve()


def report_of(folder):
    return json.loads((folder / "parity.json").read_text(encoding="utf-8"))


def test_a_quantized_run_is_exported_merged_into_the_base_that_it_was_trained_on(quantized_run, tmp_path, run_cli):
    done = run_cli("export", f"ckpt={quantized_run}", f"out={tmp_path / 'model'}")
    assert done.code == 0, done.err
    report = report_of(tmp_path / "model")
    assert report["max_difference"] <= 1e-4
    assert report["base"] == "trained"
    assert report["to_quantized_run"]["mean_difference"] < 0.05  # bf16 arithmetic, the same weights
    assert "beside the quantized run in its own arithmetic" in done.out
    config = json.loads((tmp_path / "model" / "config.json").read_text(encoding="utf-8"))
    assert "quantization_config" not in json.dumps(config)


def test_merging_into_the_original_base_makes_another_model_and_says_how_far_off(quantized_run, tmp_path, run_cli):
    done = run_cli("export", f"ckpt={quantized_run}", f"out={tmp_path / 'model'}", "base=original")
    assert done.code == 0, done.err
    report, trained = report_of(tmp_path / "model"), report_of_trained(quantized_run, tmp_path, run_cli)
    assert report["base"] == "original"
    assert report["max_difference"] <= 1e-4  # merged = adapters on that base
    assert report["to_quantized_run"]["mean_difference"] > 2 * trained["to_quantized_run"]["mean_difference"]
    assert "On the original weights they make another model" in " ".join(done.out.split())


def report_of_trained(quantized_run, tmp_path, run_cli):
    assert run_cli("export", f"ckpt={quantized_run}", f"out={tmp_path / 'trained'}").code == 0
    return report_of(tmp_path / "trained")


def test_a_base_that_is_none_is_an_error(quantized_run, tmp_path, run_cli):
    done = run_cli("export", f"ckpt={quantized_run}", f"out={tmp_path / 'model'}", "base=bf16")
    assert done.code == 2
    assert "base=bf16: no such base. There are: trained, original" in done.err


def test_a_dequantized_run_is_a_model_of_plain_layers(quantized_run):
    from vlm_tune.model.generate import answering
    from vlm_tune.model.trained import open_trained

    model, config = open_trained(str(quantized_run), [], dequantized=True)
    assert config.trainer.precision is Precision.bf16  # the base is packed as the run packed it
    with answering(model):
        assert not torch.is_autocast_enabled("cpu")
    assert not packed_layers(model.vlm.llm)
    assert {weight.dtype for weight in model.vlm.parameters()} == {torch.float32}
