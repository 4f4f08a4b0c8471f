"""Adapters made with plain peft are merged in float32, strictly, into language models and into native VLMs."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from vlm_tune.model.layouts.internvl import hf as internvl_hf
from vlm_tune.model.layouts.internvl.processor import save_processor

TARGETS = {"llm": ["q_proj", "down_proj"], "vlm": r"model\.language_model\.layers\.\d+\.self_attn\.(q|v)_proj"}
CLASSES = {"llm": AutoModelForCausalLM, "vlm": AutoModelForImageTextToText}


@pytest.fixture(scope="module")
def bases(toys, tmp_path_factory):
    """A language model and a native VLM, with what lies beside their weights."""
    folder = tmp_path_factory.mktemp("vlm")
    run = toys.staged("stage=finetune")
    plain = toys.model()
    internvl_hf.save(plain.vlm, folder)
    save_processor(plain.tokenizer, plain.encoder, run.config.model, folder)
    return {"llm": toys.llm, "vlm": folder}


def make_adapter(kind, base, folder, **settings):
    """Make an adapter with peft alone, its halves filled at random; return the wrapped model."""
    torch.manual_seed(0)
    model = CLASSES[kind].from_pretrained(base, dtype=torch.float32)
    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules=TARGETS[kind], **settings))
    for name, weight in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.1)
    wrapped.save_pretrained(folder)
    return wrapped.eval()


IDS = torch.arange(3, 40).view(1, -1)


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"use_rslora": True}], ids=["lora", "dora", "rslora"])
@pytest.mark.parametrize("kind", ["llm", "vlm"])
def test_a_merged_folder_gives_the_logits_of_base_and_adapter(bases, tmp_path, run_cli, kind, settings):
    wrapped = make_adapter(kind, bases[kind], tmp_path / "adapter", **settings)
    done = run_cli("merge", f"base={bases[kind]}", f"adapter={tmp_path / 'adapter'}", f"out={tmp_path / 'out'}")
    assert done.code == 0, done.err
    merged = CLASSES[kind].from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=IDS).logits, wrapped(input_ids=IDS).logits, atol=1e-4, rtol=0)
    report = json.loads((tmp_path / "out" / "parity.json").read_text(encoding="utf-8"))
    assert report["merged_in_float32"] < 1e-4 < 0.01 < report["adapter_changes"]
    assert AutoTokenizer.from_pretrained(tmp_path / "out").convert_tokens_to_ids("<|im_end|>") > 0
    if kind == "vlm":
        assert AutoProcessor.from_pretrained(tmp_path / "out").image_processor.size["height"] == 56


def test_a_folder_in_16_bits_stays_in_16_bits(bases, tmp_path, run_cli):
    AutoModelForCausalLM.from_pretrained(bases["llm"], dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    make_adapter("llm", tmp_path / "base", tmp_path / "adapter")
    done = run_cli("merge", f"base={tmp_path / 'base'}", f"adapter={tmp_path / 'adapter'}", f"out={tmp_path / 'out'}")
    assert done.code == 0, done.err
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert "as stored in bfloat16" in " ".join(done.out.split())


def renamed(folder):
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({name.replace("layers.1", "layers.7"): weight for name, weight in weights.items()}, *files(folder))


def halved(folder):
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({name: weight for name, weight in weights.items() if "layers.1" not in name}, *files(folder))


def files(folder):
    return (folder / "adapter_model.safetensors",)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (renamed, "layers.7.mlp.down_proj.lora_A.weight: matches nothing in the base"),
        (halved, "layers.1.mlp.down_proj.lora_A.weight: missing in the adapter"),
    ],
)
def test_weights_that_match_nothing_or_are_missing_are_listed(bases, tmp_path, run_cli, spoil, said):
    make_adapter("llm", bases["llm"], tmp_path / "adapter")
    spoil(tmp_path / "adapter")
    done = run_cli("merge", f"base={bases['llm']}", f"adapter={tmp_path / 'adapter'}", f"out={tmp_path / 'out'}")
    assert done.code == 2
    assert said in done.err
    assert "Name the base it was made for" in done.err
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_another_model_is_an_error(bases, tmp_path, run_cli):
    make_adapter("vlm", bases["vlm"], tmp_path / "adapter")
    done = run_cli("merge", f"base={bases['llm']}", f"adapter={tmp_path / 'adapter'}", f"out={tmp_path / 'out'}")
    assert done.code == 2
    assert "it does not fit this base" in done.err


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["base=B", "out=O"], "adapter is not set. Give three folders: base=FOLDER adapter=FOLDER out=FOLDER"),
        (["base=B", "adapter=A", "out=O"], "base=B: there is no config.json in it. Name a local folder: base=FOLDER"),
        (["base=B", "adapter=A", "out=O", "stage.lr.llm=1"], "merge reads no run, so it has no keys of one"),
        (["base=B", "adapter=A", "out=O", "dtype=bf16"], "dtype: no such key. This verb has: base, adapter, out"),
    ],
)
def test_what_is_missing_is_said(tmp_path, monkeypatch, run_cli, given, said):
    monkeypatch.chdir(tmp_path)
    done = run_cli("merge", *given)
    assert done.code == 2
    assert said in done.err


def test_a_packed_base_is_refused(bases, tmp_path, run_cli):
    make_adapter("llm", bases["llm"], tmp_path / "adapter")
    base = tmp_path / "base"
    base.mkdir()
    config = json.loads((bases["llm"] / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (base / "config.json").write_text(json.dumps(config), encoding="utf-8")
    done = run_cli("merge", f"base={base}", f"adapter={tmp_path / 'adapter'}", f"out={tmp_path / 'out'}")
    assert done.code == 2
    assert "its weights are packed, and nothing is merged into those. Name the 16-bit base" in done.err
