"""InternVL's original layout: every language model, strict weights, little memory, and folders that hold code."""

import json
import shutil
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from official_toys import MIXTURE, SMALL_LLM, small_model, write_official
from safetensors.torch import load_file, save_file
from torch.nn.functional import linear
from transformers import AutoConfig, AutoModelForCausalLM

from vlm_tune.config.parse import load_config
from vlm_tune.config.schema import Quantize, TilesConfig, VisionConfig
from vlm_tune.data.text.templates import load_template
from vlm_tune.errors import CheckpointError, ConfigError
from vlm_tune.model.build import build_model
from vlm_tune.model.encoder import build_encoder
from vlm_tune.model.layouts import native
from vlm_tune.model.layouts.internvl import hf as internvl_hf
from vlm_tune.model.layouts.internvl import official as internvl_official
from vlm_tune.model.layouts.internvl.alone import load_language_model
from vlm_tune.model.layouts.keys import Entry, Heads
from vlm_tune.model.layouts.weights import notes
from vlm_tune.model.parts.llm import load_llm

LONGROPE = {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
KINDS = {
    "qwen2": {"model_type": "qwen2", "rope_theta": 1e6},
    "qwen2_tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 32, "rope_theta": 1e6},
    "qwen3_moe": MIXTURE,
    "qwen2_dynamic": {  # InternVL3: both names of the kind
        "model_type": "qwen2",
        "rope_theta": 1e6,
        "rope_scaling": {"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"},
    },
    "llama": {"model_type": "llama", "rope_theta": 5e5},
    "llama_linear": {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 4.0}},
    "phi3": {
        "model_type": "phi3",
        "max_position_embeddings": 64,
        "original_max_position_embeddings": 16,
        "rope_scaling": LONGROPE,
    },
    "internlm2": {"model_type": "internlm2", "bias": True, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
}
IDS = torch.randint(0, 2509, (1, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {kind: write_official(tmp_path_factory.mktemp(kind), llm) for kind, llm in KINDS.items()}


@pytest.fixture(autouse=True)
def _nobody_is_asked(monkeypatch):
    """transformers asks on the terminal whether code may run: no load of ours may come so far."""

    def asked(*arguments):
        raise AssertionError("the user was asked to trust code")

    monkeypatch.setattr("builtins.input", asked)


def load(folder: Path, dtype=torch.float32, quantize=Quantize.none):
    return internvl_official.load(folder, small_model(), dtype, quantize)


@torch.no_grad()
def logits(llm):
    return llm.eval()(IDS, use_cache=False).logits


# ------------------------------------------------------------------------------------------------- every language model


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("internlm2", "qwen3_moe")])
def test_the_language_model_is_transformers_own(kind, folders):
    # the names of these are transformers' own below "language_model."
    weights = load_file(folders[kind] / "model.safetensors")
    config = AutoConfig.for_model(**SMALL_LLM | deepcopy(KINDS[kind]))  # it writes into some
    reference = AutoModelForCausalLM.from_config(config)
    mine = {
        key.removeprefix("language_model."): value for key, value in weights.items() if key.startswith("language_model")
    }
    found = reference.load_state_dict(mine, strict=False)
    assert not found.unexpected_keys
    assert set(found.missing_keys) <= {"lm_head.weight"}
    reference.tie_weights()
    torch.testing.assert_close(logits(load(folders[kind]).vlm.llm), logits(reference), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_survives_the_original_layout_without_its_first_folder(kind, folders, tmp_path):
    first = load(folders[kind])
    internvl_official.save(first.vlm, load_template("internvl2_5"), small_model(), tmp_path)
    first.tokenizer.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path).vlm.llm), logits(first.vlm.llm))


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_survives_transformers_native_layout(kind, folders, tmp_path):
    first = load(folders[kind])
    internvl_hf.save(first.vlm, tmp_path)
    first.tokenizer.save_pretrained(tmp_path)
    second = native.load(tmp_path, small_model(), torch.float32, Quantize.none)
    torch.testing.assert_close(logits(second.vlm.llm), logits(first.vlm.llm), atol=1e-6, rtol=0)


def test_dynamic_frequencies_follow_the_length(tmp_path):
    """Beyond the trained length the base grows; source: modeling_internlm2.py, InternLM2DynamicNTKScaling."""
    limit, factor, theta, size = 16, 2.0, 1e6, 16
    folder = write_official(tmp_path, KINDS["internlm2"] | {"max_position_embeddings": limit, "rope_theta": theta})
    llm = load(folder).vlm.llm
    logits(llm)
    length = IDS.shape[1]
    base = theta * (factor * length / limit - (factor - 1)) ** (size / (size - 2))
    wanted = 1 / base ** (torch.arange(0, size, 2) / size)
    torch.testing.assert_close(llm.get_decoder().rotary_emb.inv_freq, wanted)


def test_fused_rows_stand_by_key_head():
    """InternLM2 reads its fused output as "(heads, queries + 2, size)"; source: modeling_internlm2.py."""
    kv, groups, size, width = 2, 3, 4, 5
    weight, bias = torch.randn(kv * (groups + 2) * size, width), torch.randn(kv * (groups + 2) * size)
    hidden = torch.randn(7, width)
    fused = linear(hidden, weight, bias).view(7, kv, groups + 2, size)
    entry = Entry("language_model.x", ("q", "k", "v"), (), Heads(kv, groups))
    wanted = fused[:, :, :groups].flatten(1), fused[:, :, groups].flatten(1), fused[:, :, groups + 1].flatten(1)
    for part, part_bias, want in zip(entry.split(weight), entry.split(bias), wanted, strict=True):
        torch.testing.assert_close(linear(hidden, part, part_bias), want)
    assert torch.equal(entry.join(entry.split(weight)), weight)
    assert torch.equal(entry.join(entry.split(bias)), bias)


@pytest.mark.parametrize("quantize", [Quantize.none, Quantize.nf4])
def test_an_internlm2_alone_is_the_same_llama(quantize, folders, tmp_path):
    # a language model's own folder: the names below "language_model.", and a configuration that asks for code
    weights = load_file(folders["internlm2"] / "model.safetensors")
    mine = {
        key.removeprefix("language_model."): value for key, value in weights.items() if key.startswith("language_model")
    }
    save_file(mine, tmp_path / "model.safetensors")
    config = SMALL_LLM | KINDS["internlm2"] | {"auto_map": {"AutoConfig": "configuration_internlm2.InternLM2Config"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    alone = load_language_model(tmp_path, torch.bfloat16, quantize)
    inside = load(folders["internlm2"], torch.bfloat16, quantize).vlm.llm
    assert torch.equal(logits(alone), logits(inside))


def test_a_tied_head_is_the_embedding(folders):
    llm = load(folders["qwen2_tied"]).vlm.llm
    assert llm.get_output_embeddings().weight is llm.get_input_embeddings().weight


def test_a_missing_version_of_the_pixel_shuffle_is_the_first(tmp_path):
    folder = write_official(tmp_path, KINDS["llama"])
    config = json.loads((folder / "config.json").read_text())
    del config["ps_version"]
    (folder / "config.json").write_text(json.dumps(config))
    assert load(folder).vlm.projector.config.shuffle_version == "v1"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_have_the_dtype_asked_for_and_rotary_frequencies_32_bits(kind, dtype, folders):
    vlm = load(folders[kind], dtype).vlm
    assert {weight.dtype for weight in vlm.parameters()} == {dtype}
    rotary = vlm.llm.get_decoder().rotary_emb
    fresh = type(rotary)(config=vlm.llm.config)
    assert rotary.inv_freq.dtype == torch.float32
    assert torch.equal(rotary.inv_freq, fresh.inv_freq)


def test_tiles_of_another_size_resize_the_table_of_positions(folders):
    model = replace(small_model(), tiles=TilesConfig(size=84, max=2))
    vlm = internvl_official.load(folders["llama"], model, torch.float32, Quantize.none).vlm
    assert vlm.vision(torch.zeros(1, 3, 84, 84)).shape == (1, 36, 64)


# ------------------------------------------------------------------------------------------------------------ quantized


@pytest.mark.parametrize("quantize", [Quantize.nf4, Quantize.int8])
@pytest.mark.parametrize("kind", ["qwen2", "phi3"])
def test_quantized_weights_are_those_that_transformers_makes(quantize, kind, folders, tmp_path):
    load(folders[kind]).vlm.llm.save_pretrained(tmp_path)
    wanted = dict(load_llm(tmp_path, torch.bfloat16, quantize).named_parameters())
    llm = load(folders[kind], torch.bfloat16, quantize).vlm.llm
    found = dict(llm.named_parameters())
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in found)
    stored = torch.uint8 if quantize is Quantize.nf4 else torch.int8
    assert {weight.dtype for name, weight in found.items() if "_proj.weight" in name} == {stored}
    assert torch.isfinite(logits(llm)).all()


def test_a_quantized_model_takes_adapters_and_learns(toys, folders):
    run = toys.staged("stage=qlora", *over(folders["qwen2"]), "stage.quantize=nf4")
    loss = run.model.vlm(run.batch([0, 1, 6]))
    loss.backward()
    adapters = {name: weight.grad for name, weight in run.model.vlm.llm.named_parameters() if "lora_B" in name}
    assert adapters
    assert all(gradient.abs().sum() > 0 for gradient in adapters.values())


def over(folder: Path) -> list[str]:
    return [
        f"model.path={folder}",
        "model.vision.path=null",
        "model.llm.path=null",
        "model.template=internvl2_5",
        "model.tiles.max=2",
    ]


# -------------------------------------------------------------------------------------------- folders as they are found


def test_the_encoder_needs_no_weights(toys, folders):
    config = load_config(toys.arguments(*over(folders["internlm2"])))
    whole = build_model(config).encoder
    assert build_encoder(load_config(toys.arguments(*over(folders["internlm2"]))))[0].fingerprint() == (
        whole.fingerprint()
    )


@pytest.mark.parametrize("part", ["vision", "llm"])
def test_adapters_find_their_layers_in_either_part(part, toys, folders):
    other = {"vision": "llm", "llm": "vision"}[part]
    run = toys.staged(
        "stage=finetune", f"stage.train.{part}=lora", f"stage.train.{other}=frozen", *over(folders["llama"])
    )
    assert {row.name for row in run.parts if row.num_trained} == {part, "projector"}


def test_bin_files_are_read_with_a_notice(folders, tmp_path):
    folder = copied(folders["llama"], tmp_path)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    found = load(folder).vlm
    assert "from .bin files" in " ".join(notes(folder))
    assert torch.equal(logits(found.llm), logits(load(folders["llama"]).vlm.llm))


def test_a_bin_file_that_holds_code_is_refused(folders, tmp_path):
    folder = copied(folders["llama"], tmp_path)
    (folder / "model.safetensors").unlink()
    torch.save({"weight": subprocess.Popen}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: not read"):
        load(folder)


@pytest.mark.slow
def test_little_memory_is_needed_beside_the_weights(tmp_path):
    # 80 million parameters, float32 on disk, bfloat16 in memory; imports are not counted
    llm = {"model_type": "internlm2", "bias": False, "num_hidden_layers": 10}
    sizes = {"hidden_size": 768, "intermediate_size": 2560, "num_attention_heads": 12, "num_key_value_heads": 4}
    folder = write_official(tmp_path, llm | sizes)
    code = f"""
import sys; sys.path[:0] = {sys.path!r}
import torch
from official_toys import small_model
from vlm_tune.config.schema import Quantize, TilesConfig, VisionConfig
from vlm_tune.model.layouts.internvl import official as internvl_official
from pathlib import Path
def status(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) * 1024
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
vlm = internvl_official.load(Path({str(folder)!r}), small_model(), torch.bfloat16, Quantize.none).vlm
print(status("VmHWM") - before, sum(weight.nbytes for weight in vlm.parameters()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    grown, weights = map(int, done.stdout.split()[-2:])
    assert grown < 1.2 * weights + 64 * 2**20, f"{grown / weights:.2f} times the weights"


# --------------------------------------------------------------------------------------------------------------- faults


def copied(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target / "copy"))


def change_weights(folder: Path, change) -> Path:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: w.pop("mlp1.3.bias"), r"1 weights do not fit its config\.json\n  mlp1\.3\.bias: missing"),
        (lambda w: w.update(extra=torch.zeros(1)), r"extra: unexpected"),
        (
            lambda w: w.update({"mlp1.1.bias": torch.zeros(3)}),
            r"mlp1\.1\.bias: \(3,\) in the file, \(64,\) by config\.json",
        ),
        (lambda w: [w.pop(key) for key in list(w)[:30]], r"\.\.\. and 20 more"),
    ],
    ids=["missing", "unexpected", "misshapen", "many"],
)
def test_weights_that_do_not_fit_are_listed(change, said, folders, tmp_path):
    folder = change_weights(copied(folders["llama"], tmp_path), change)
    with pytest.raises(CheckpointError, match=said):
        load(folder)


def test_a_tied_head_of_its_own_is_an_error(folders, tmp_path):
    head = {"language_model.lm_head.weight": torch.zeros(2509, 64)}
    folder = change_weights(copied(folders["qwen2_tied"], tmp_path), lambda w: w.update(head))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from the embedding"):
        load(folder)


def test_a_broken_file_is_named(folders, tmp_path):
    folder = copied(folders["llama"], tmp_path)
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a readable safetensors file"):
        load(folder)


def test_a_missing_shard_is_named(folders, tmp_path):
    folder = copied(folders["llama"], tmp_path)
    keys = load_file(folder / "model.safetensors")
    index = {"weight_map": dict.fromkeys(keys, "model-00002-of-00002.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors: not a readable"):
        load(folder)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"llm_config": {"model_type": "mamba"}}, r"llm_config\.model_type=mamba is not read\. There are: internlm2"),
        ({"use_llm_lora": 16}, r"use_llm_lora=16, its weights hold adapters"),
        ({"vision_config": None}, r"vision_config is missing"),
    ],
)
def test_a_configuration_that_is_not_read_says_why(changes, said, folders, tmp_path):
    folder = copied(folders["llama"], tmp_path)
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=said):
        load(folder)


def test_a_tokenizer_of_another_model_is_an_error(tmp_path):
    folder = write_official(tmp_path, KINDS["llama"] | {"vocab_size": 2500})
    with pytest.raises(CheckpointError, match="its tokenizer has 2509 tokens, the language model's table 2500 rows"):
        load(folder)


@pytest.mark.parametrize(
    ("template", "changes", "said"),
    [
        ("v1", {}, "InternVL has no template like model.template=v1"),
        ("internvl2_5", {"normalize": "siglip"}, "InternVL shows pictures as model.vision.normalize=imagenet"),
    ],
)
def test_what_internvl_cannot_do_is_refused(template, changes, said, folders, tmp_path):
    model = replace(small_model(), vision=VisionConfig(**changes))
    with pytest.raises(ConfigError, match=said):
        internvl_official.save(load(folders["llama"]).vlm, load_template(template), model, tmp_path)


def test_a_template_that_writes_the_same_text_has_internvls_name(folders, tmp_path):
    internvl_official.save(load(folders["llama"]).vlm, load_template("chatml"), small_model(), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["template"] == "internvl2_5"


def test_a_difference_of_template_is_said(folders):
    model = replace(small_model(), template="Hermes-2")
    loaded = internvl_official.load(folders["llama"], model, torch.float32, Quantize.none)
    assert "names internvl2_5" in " ".join(loaded.notes)
