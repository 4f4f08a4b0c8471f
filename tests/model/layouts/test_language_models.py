"""Any language model packs: its packed logits are those that plain transformers gives each sample alone."""

import json

import pytest
import torch
from toys import TOKENIZER
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from vlm_tune.config.parse import load_config
from vlm_tune.errors import ConfigError
from vlm_tune.model.kernels import attention
from vlm_tune.model.kernels.attention import Segments
from vlm_tune.model.kernels.attention_cpu import SHORT
from vlm_tune.model.kernels.isolation import TESTED, check_language_model, check_rope, is_isolating
from vlm_tune.model.parts.llm import add_tokens, load_llm

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "vocab_size": 2500, "head_dim": 8}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.1, "max_position_embeddings": 4096}
WINDOW = {"sliding_window": 7}
QWEN_WINDOW = {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 7}
KINDS = {
    "llama": {},
    "internlm3": {},
    "qwen2": {},
    "qwen2 sliding": QWEN_WINDOW,
    "qwen3": {},
    "qwen3 sliding": QWEN_WINDOW,
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "mlp_only_layers": [1]},
    "phi3": {"pad_token_id": 0},
    "phi3 sliding": {"pad_token_id": 0, **WINDOW},
    "mistral": {"sliding_window": None},
    "mistral sliding": WINDOW,
    "gemma": {},
    "gemma3_text": {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"], **WINDOW},
    "smollm3": {"pad_token_id": 0},
    "olmo2": {},  # not of the tested kinds: it proves itself when it loads
}
LENGTHS = [3, 30, SHORT + 20, 9, 1, SHORT + 90]
TOKENS = ["<img>", "</img>"]


def save(folder, kind, **changes):
    config = AutoConfig.for_model(kind.split()[0], **SIZES | HEADS | KINDS.get(kind, {}) | changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        llm = AutoModelForCausalLM.from_config(config)
        for weight in llm.parameters():  # biases and norms too, or a lost one would not be seen
            weight.data += torch.randn_like(weight) * 0.05
        llm.save_pretrained(folder)


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("llm")
    save(folder, request.param)
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    return load_llm(folder, torch.float32).eval(), plain


@pytest.fixture(scope="module")
def samples():
    torch.manual_seed(1)
    return [torch.randint(10, 2000, (1, length)) for length in LENGTHS]


def logits_of_pack(llm, samples):
    """As training does: embeddings in, packed attention, the head alone."""
    ids = torch.cat(samples, dim=1)
    lengths = [sample.shape[1] for sample in samples]
    positions = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)
    embeddings = llm.get_input_embeddings()(ids)
    segments = Segments(lengths)
    hidden = llm.get_decoder()(inputs_embeds=embeddings, position_ids=positions, segments=segments, use_cache=False)
    return llm.get_output_embeddings()(hidden.last_hidden_state)


@torch.no_grad()
def test_packed_logits_equal_those_of_each_sample_alone(pair, samples):
    llm, plain = pair
    wanted = torch.cat([plain(input_ids=sample, use_cache=False).logits for sample in samples], dim=1)
    torch.testing.assert_close(logits_of_pack(llm, samples), wanted, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_padded_logits_equal_those_of_each_sample_alone(pair, samples):
    llm, plain = pair
    rows = torch.zeros(2, SHORT + 20, dtype=torch.long)
    rows[0], rows[1, :30] = samples[2], samples[1]
    hidden = llm.get_decoder()(inputs_embeds=llm.get_input_embeddings()(rows), use_cache=False).last_hidden_state
    for row, sample in zip(hidden, (samples[2], samples[1]), strict=True):
        found = llm.get_output_embeddings()(row[: sample.shape[1]])
        torch.testing.assert_close(found, plain(input_ids=sample).logits[0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_generation_gives_the_words_of_plain_transformers(pair, samples):
    llm, plain = pair
    prompt = samples[1]
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": -1}
    mask = torch.ones_like(prompt)
    ours = llm.generate(
        inputs_embeds=llm.get_input_embeddings()(prompt), attention_mask=mask, use_cache=True, **options
    )
    theirs = plain.generate(input_ids=prompt, attention_mask=mask, use_cache=False, **options)
    assert ours[0].tolist() == theirs[0, prompt.shape[1] :].tolist()


@torch.no_grad()
def test_growing_the_table_changes_no_old_word(pair, samples):
    llm, plain = pair
    sample = samples[1]
    add_tokens(AutoTokenizer.from_pretrained(TOKENIZER), llm, TOKENS)
    found = logits_of_pack(llm, [sample])[..., :2500]
    torch.testing.assert_close(found, plain(input_ids=sample).logits, atol=1e-5, rtol=1e-5)


def test_every_kind_that_needs_no_proof_is_tested_here():
    assert set(TESTED) <= set(KINDS)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("gemma2", "gemma2 caps its attention scores"),
        ("granite", "granite scales its logits"),
        ("mamba", "mamba does not keep packed samples apart"),
        ("gpt_oss", "gpt_oss attends to sinks"),
    ],
)
def test_a_model_that_would_be_wrong_in_silence_is_refused(tmp_path, kind, reason):
    save(tmp_path, kind, **({"logits_scaling": 4.0} if kind == "granite" else {}))
    with pytest.raises(ConfigError, match=reason):
        load_llm(tmp_path, torch.float32)


@pytest.mark.parametrize("kind", ["llama", "olmo2"])
def test_the_proof_tells_apart(tmp_path, kind, monkeypatch):
    save(tmp_path, kind)
    llm = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=attention.NAME)
    assert is_isolating(llm)
    llm.set_attn_implementation("eager")  # ignores the plan; and nothing else would be noticed
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda positions: None)
    assert not is_isolating(llm)


LONG = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "rope_theta": 1e4}
PHI = ("phi3", {"pad_token_id": 0, "rope_parameters": LONG, "original_max_position_embeddings": 512})
DYNAMIC = ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}})


@pytest.mark.parametrize(
    ("kind", "overrides", "remedy"),
    [
        (PHI, [], r"set stage\.pack_length=512 or"),
        (PHI, ["data.max_length=512"], None),
        (PHI, ["stage.packing=false", "trainer.micro_batch=2"], r"set trainer\.micro_batch=1 or"),
        (PHI, ["stage.packing=false"], None),
        (DYNAMIC, [], None),
        (DYNAMIC, ["stage.pack_length=8192"], r"set stage\.pack_length=4096 or"),
        (("llama", {}), ["stage.pack_length=8192"], None),
    ],
)
def test_frequencies_that_follow_the_longest_sample_are_refused_in_a_shared_batch(tmp_path, kind, overrides, remedy):
    save(tmp_path, kind[0], **kind[1])
    llm = load_llm(tmp_path, torch.float32)
    check_language_model(llm)
    config = load_config(["model=tiny", "data.path=x.jsonl", "trainer.global_batch=4", *overrides])
    if remedy is None:
        check_rope(llm, config)
    else:
        with pytest.raises(ConfigError, match=remedy):
            check_rope(llm, config)


def test_a_folder_that_brings_its_own_code_is_refused_without_a_question(tmp_path):
    config = {"model_type": "my_llm", "auto_map": {"AutoModelForCausalLM": "code.Mine"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"model\.llm\.path=.*: a model of type my_llm, which transformers does not"):
        load_llm(tmp_path, torch.float32)
