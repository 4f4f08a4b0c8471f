"""Files for llama.cpp-based engines hold the model that they come from; what engines read otherwise is refused."""

import json

import gguf
import pytest
import torch
from toys import save_llm
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, Phi3Config, Qwen2Config, Qwen3Config

from vlm_tune.errors import ConfigError
from vlm_tune.model.layouts.gguf import files as gguf_files
from vlm_tune.model.layouts.gguf.text import neighbours, pre_tokenizer_name, write_text_model

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "vocab_size": 2560, "max_position_embeddings": 256, "pad_token_id": 0}
MODELS = {
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=128),
    "phi3": Phi3Config(**SIZES, sliding_window=None),
}


@pytest.fixture(scope="module")
def tokenizer(toys):
    return AutoTokenizer.from_pretrained(toys.llm)


def written(llm, tokenizer, folder, dtype="fp32"):
    """Write a language model and let transformers' own reader read it."""
    write_text_model(llm, tokenizer, [tokenizer.eos_token_id], "{{ messages }}", (folder / "model.gguf", dtype))
    options = {"gguf_file": "model.gguf", "dtype": torch.float32, "quantization_config": GgufConfig(dequantize=True)}
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def difference(one, other):
    ids = torch.randint(0, 2000, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return float((one.eval()(ids).logits - other.eval()(ids).logits).abs().max())


@pytest.mark.parametrize("kind", MODELS)
def test_another_reader_finds_the_same_language_model(tokenizer, tmp_path, kind):
    torch.manual_seed(0)
    llm = AutoModelForCausalLM.from_config(MODELS[kind])
    assert difference(llm, written(llm, tokenizer, tmp_path)) < 1e-5


@pytest.mark.parametrize("tied", [True, False])
def test_llamas_rows_are_put_in_the_engines_order(tokenizer, tmp_path, tied):
    save_llm(tmp_path / "llm", tie_word_embeddings=tied)
    llm = AutoModelForCausalLM.from_pretrained(tmp_path / "llm")
    assert difference(llm, written(llm, tokenizer, tmp_path)) < 1e-5
    names = {tensor.name for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert ("output.weight" in names) != tied


def test_neighbours_are_the_halves_of_a_head():
    rows = torch.arange(8.0).view(8, 1)  # two heads of four rows
    assert neighbours(rows, 2).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@pytest.mark.parametrize(("dtype", "most"), [("fp16", 0.02), ("q8_0", 0.2)])
def test_smaller_files_differ_little(tokenizer, tmp_path, dtype, most):
    torch.manual_seed(0)
    llm = AutoModelForCausalLM.from_config(MODELS["qwen2"])
    assert 0 < difference(llm, written(llm, tokenizer, tmp_path, dtype)) < most
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert kinds["blk.0.attn_q.weight"] == {"fp16": "F16", "q8_0": "Q8_0"}[dtype]
    assert kinds["blk.0.attn_norm.weight"] == "F32"


@pytest.mark.parametrize("dtype", ["f32", "f16", "q8_0"])
def test_a_whole_model_is_exported_and_answers_as_the_trained_one(toys, tmp_path, dtype):
    from vlm_tune.export.export import GGUF_DTYPES

    model = toys.model()
    config = toys.staged("stage=finetune").config
    (tmp_path / "out").mkdir()
    target = (config.model, tmp_path / "out", GGUF_DTYPES[dtype])
    gguf_files.save(model.vlm, model.tokenizer, model.encoder, target)
    back = gguf_files.load_back(tmp_path / "out", model.vlm).eval()
    tiles = torch.randint(0, 255, (2, 56, 56, 3), dtype=torch.uint8)
    with torch.no_grad():
        one, other = (vlm.project(vlm.see(tiles)) for vlm in (model.vlm.eval(), back))
    assert float((one - other).abs().max()) < {"f32": 1e-6, "f16": 1e-2, "q8_0": 0.1}[dtype] * float(one.abs().max())


def test_a_tokenizer_that_engines_do_not_know_is_refused():
    content = {"model": {"type": "Unigram"}, "pre_tokenizer": {"type": "Metaspace"}}
    with pytest.raises(ConfigError, match=r"this one is Unigram after Metaspace\. Convert this model with the engine"):
        pre_tokenizer_name(content)


def test_an_unknown_language_model_is_refused(toys, tokenizer, tmp_path):
    llm = AutoModelForCausalLM.from_pretrained(toys.llm)
    llm.config.model_type = "gpt_neox"
    with pytest.raises(ConfigError, match=r"layout=gguf knows the language models llama, mistral, qwen2, qwen3, phi3;"):
        written(llm, tokenizer, tmp_path)


def test_a_rotary_scaling_that_engines_do_not_know_is_refused(toys, tokenizer, tmp_path):
    llm = AutoModelForCausalLM.from_pretrained(toys.llm)
    llm.config.rope_parameters = {"rope_type": "longrope", "rope_theta": 1e4}
    with pytest.raises(ConfigError, match=r"default, dynamic, linear and llama3; this model has longrope"):
        written(llm, tokenizer, tmp_path)


def test_a_tile_rule_that_engines_do_not_know_is_refused(toys, tmp_path):
    model = toys.model()
    config = toys.staged("stage=finetune", "model.tiles.rule=area").config
    with pytest.raises(
        ConfigError, match=r"model\.tiles\.rule=area, thumbnail=true: the engines cut pictures as Inter"
    ):
        gguf_files.save(model.vlm, model.tokenizer, model.encoder, (config.model, tmp_path, "fp32"))


def test_special_tokens_template_and_ends_are_in_the_file(toys, tmp_path):
    model, config = toys.model(), toys.staged("stage=finetune").config
    gguf_files.save(model.vlm, model.tokenizer, model.encoder, (config.model, tmp_path, "fp32"))
    facts = {name: field.contents() for name, field in gguf.GGUFReader(tmp_path / "model.gguf").fields.items()}
    number = model.tokenizer.convert_tokens_to_ids("<img>")
    assert facts["tokenizer.ggml.tokens"][number] == "<img>"
    assert facts["tokenizer.ggml.token_type"][number] == gguf.TokenType.CONTROL
    assert facts["tokenizer.ggml.eos_token_id"] == model.encoder.stop_ids[0]
    assert "<|im_start|>assistant" in facts["tokenizer.chat_template"]
    vision = {name: field.contents() for name, field in gguf.GGUFReader(tmp_path / "mmproj.gguf").fields.items()}
    assert vision["clip.vision.projector.scale_factor"] == 2
    assert vision["clip.vision.preproc_max_tiles"] == 2
    assert json.dumps(vision["clip.vision.image_mean"])[:6] == "[0.485"
