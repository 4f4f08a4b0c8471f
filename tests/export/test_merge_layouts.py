"""`merge` reads each layout that training reads, by the names of its stored weights, and runs no code of any folder."""

import json
import shutil

import pytest
import sentencepiece
import torch
from llava_toys import TEXT, save_llava, write_original
from official_toys import SMALL_LLM, write_official
from safetensors.torch import load_file, save_file
from sentencepiece_toys import SETTINGS, train
from toys import TOKENIZER, save_llm
from transformers import AutoTokenizer

from vlm_tune.config.parse import load_config
from vlm_tune.model.build import build_model
from vlm_tune.model.parts.llm import load_tokenizer

INTERNLM2 = {"model_type": "internlm2", "bias": False}
WORN = {  # layers that wear an adapter, by the names of the layout's own class
    "official": ("language_model.model.layers.0.self_attn.q_proj", "vision_model.encoder.layers.1.attn.qkv", "mlp1.1"),
    "official internlm2": ("language_model.model.layers.0.attention.wqkv", "language_model.output"),
    "internlm2": ("model.layers.1.attention.wo", "model.layers.0.feed_forward.w1"),
    "llava": ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"),
}


def write_base(kind, folder):
    if kind == "official":
        return write_official(folder, {"model_type": "llama"}, dtype=torch.bfloat16)
    if kind == "llava":
        return write_original(folder)[0]
    whole = write_official(folder / "whole", INTERNLM2)
    if kind == "official internlm2":
        return whole
    alone = folder / "alone"
    alone.mkdir()
    weights = load_file(whole / "model.safetensors")
    inner = {name.removeprefix("language_model."): weight for name, weight in weights.items()}
    save_file(
        {name: inner[name] for name in inner if name.startswith(("model.", "output."))}, alone / "model.safetensors"
    )
    config = SMALL_LLM | INTERNLM2 | {"auto_map": {"AutoConfig": "configuration_internlm2.InternLM2Config"}}
    (alone / "config.json").write_text(json.dumps(config))
    return alone


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return {kind: write_base(kind, tmp_path_factory.mktemp("base")) for kind in WORN}


def write_adapter(base, folder, layers, **settings):
    """Write an adapter of rank 2 by hand, and return what each layer's weight becomes with it."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(2)
    stored, halves, merged = load_file(base / "model.safetensors"), {}, {}
    for name in layers:
        rows, columns = stored[f"{name}.weight"].shape
        a, b = torch.randn(2, columns, generator=generator), torch.randn(rows, 2, generator=generator)
        halves |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
        merged[f"{name}.weight"] = stored[f"{name}.weight"].float() + 4 * b @ a
    save_file(halves, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "target_modules": list(layers)}
    (folder / "adapter_config.json").write_text(json.dumps(config | settings))
    return merged


def merge(run_cli, base, adapter, out):
    return run_cli("merge", f"base={base}", f"adapter={adapter}", f"out={out}")


@pytest.mark.parametrize("kind", WORN)
def test_the_layers_that_wear_the_adapter_change_and_no_other(bases, tmp_path, run_cli, kind):
    expected = write_adapter(bases[kind], tmp_path / "adapter", WORN[kind])
    done = merge(run_cli, bases[kind], tmp_path / "adapter", tmp_path / "out")
    assert done.code == 0, done.err
    before, after = (load_file(folder / "model.safetensors") for folder in (bases[kind], tmp_path / "out"))
    assert before.keys() == after.keys()
    for name, weight in after.items():
        assert weight.dtype == before[name].dtype
        if name in expected:
            torch.testing.assert_close(weight.float(), expected[name].to(weight.dtype).float())
        else:
            assert torch.equal(weight, before[name])


@pytest.mark.parametrize("kind", ["official", "official internlm2"])
def test_a_merged_folder_trains_on(bases, toys, tmp_path, run_cli, kind):
    write_adapter(bases[kind], tmp_path / "adapter", WORN[kind])
    assert merge(run_cli, bases[kind], tmp_path / "adapter", tmp_path / "out").code == 0
    paths = [f"model.path={tmp_path / 'out'}", "model.vision.path=null", "model.llm.path=null"]
    model = build_model(load_config(toys.arguments(*paths, "model.template=internvl2_5")))
    assert len(model.tokenizer) == len(AutoTokenizer.from_pretrained(TOKENIZER))


def test_the_encoder_of_a_llava_comes_along(bases, tmp_path, run_cli):
    write_adapter(bases["llava"], tmp_path / "adapter", WORN["llava"])
    assert merge(run_cli, bases["llava"], tmp_path / "adapter", tmp_path / "out").code == 0
    assert (tmp_path / "out" / "clip" / "config.json").is_file()


def test_llava_s_adapter_makes_a_llava_of_its_language_model(bases, tmp_path, run_cli):
    # as LLaVA trains: from Vicuna, the whole model's config.json and the projector beside the adapter
    save_llm(tmp_path / "llm", **TEXT, tie_word_embeddings=False, vocab_size=2507)
    expected = write_adapter(tmp_path / "llm", tmp_path / "adapter", WORN["llava"])
    shutil.copy(bases["llava"] / "config.json", tmp_path / "adapter")
    projector = {f"model.mm_projector.{i}.weight": torch.randn(32, 32) for i in (0, 2)}
    projector |= {f"model.mm_projector.{i}.bias": torch.randn(32) for i in (0, 2)}
    torch.save(
        {f"base_model.model.{name}": weight for name, weight in projector.items()},
        tmp_path / "adapter" / "non_lora_trainables.bin",
    )
    done = merge(run_cli, tmp_path / "llm", tmp_path / "adapter", tmp_path / "out")
    assert done.code == 0, done.err
    merged = load_file(tmp_path / "out" / "model.safetensors")
    for name, weight in (projector | expected).items():
        torch.testing.assert_close(merged[name], weight)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["mm_projector_type"] == "mlp2x_gelu"


def test_new_tokens_of_an_official_model_have_their_rows(bases, tmp_path, run_cli):
    base, tables = bases["official"], ("language_model.model.embed_tokens", "language_model.lm_head")
    write_adapter(base, tmp_path / "adapter", WORN["official"], modules_to_save=["embed_tokens", "lm_head"])
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    rows = {f"base_model.model.{name}.weight": torch.randn(2600, 64) for name in tables}
    save_file(load_file(file) | rows, file)
    done = merge(run_cli, base, tmp_path / "adapter", tmp_path / "out")
    assert done.code == 0, done.err
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert all(len(merged[f"{name}.weight"]) == 2600 for name in tables)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["llm_config"]["vocab_size"] == 2600


def test_an_adapter_of_other_names_is_refused(bases, tmp_path, run_cli):
    write_adapter(bases["llava"], tmp_path / "adapter", WORN["llava"])
    done = merge(run_cli, bases["official internlm2"], tmp_path / "adapter", tmp_path / "out")
    assert done.code == 2
    assert "it does not fit this base" in done.err


# ------------------------------------------------------------------------------------------------- code of a folder

CODE = "from pathlib import Path\nPath({path!r}).write_text('run')\n"


@pytest.fixture(autouse=True)
def _nobody_is_asked(monkeypatch):
    def asked(*arguments):
        raise AssertionError("the user was asked to trust code")

    monkeypatch.setattr("builtins.input", asked)


def with_code(folder, marker, model_type):
    """Let a folder's configuration ask for code that leaves a mark where it is run."""
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "code.Config", "AutoModel": "code.Model", "AutoModelForCausalLM": "code.Model"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": model_type, "auto_map": names}))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(
        json.dumps(settings | {"auto_map": {"AutoTokenizer": ["code.T", None]}})
    )
    (folder / "code.py").write_text(CODE.format(path=str(marker)))


@pytest.mark.parametrize("model_type", ["strange_model", "llama"])
def test_code_of_a_base_is_not_run(tmp_path, run_cli, model_type):
    save_llm(tmp_path / "base", tie_word_embeddings=False)
    write_adapter(tmp_path / "base", tmp_path / "adapter", ["model.layers.0.self_attn.q_proj"])
    with_code(tmp_path / "base", tmp_path / "marker", model_type)
    done = merge(run_cli, tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert done.code == (0 if model_type == "llama" else 2)  # transformers' own Llama reads the one, nothing the other
    assert model_type == "llama" or "a model of type strange_model, which transformers does not know" in done.err
    assert model_type == "llama" or "no code out of a folder is run" in done.err
    assert not (tmp_path / "marker").exists()


def test_code_of_an_official_base_is_not_run(tmp_path, run_cli):
    base = write_official(tmp_path / "base", {"model_type": "llama"})
    write_adapter(base, tmp_path / "adapter", WORN["official"])
    with_code(base, tmp_path / "marker", "internvl_chat")
    assert merge(run_cli, base, tmp_path / "adapter", tmp_path / "out").code == 0
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("key", ["model.path", "model.llm.path", "model.vision.path"])
def test_an_adapter_is_no_model_to_train(toys, tmp_path, run_cli, key):
    # transformers would load another model, the one that the adapter names, from wherever that is
    save_llava(tmp_path / "whole")
    (tmp_path / "whole" / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "x/y"}')
    more = ["model.vision.path=null", "model.llm.path=null"] if key == "model.path" else []
    done = run_cli("stage=pretrain", *toys.arguments(*more, f"{key}={tmp_path / 'whole'}", runs=tmp_path / "runs"))
    assert done.code == 2
    assert "an adapter (adapter_config.json), not a model" in done.err


def test_a_base_of_parts_names_the_part(tmp_path, run_cli):
    save_llm(tmp_path / "base" / "llm")
    (tmp_path / "base" / "vlm_tune.json").write_text("{}")
    write_adapter(tmp_path / "base" / "llm", tmp_path / "adapter", ["model.layers.0.self_attn.q_proj"])
    done = merge(run_cli, tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert done.code == 2
    assert f"base={tmp_path / 'base'}/llm" in done.err


# ----------------------------------------------------------------------------------------- sentencepiece models alone


def with_sentencepiece_alone(folder, legacy):
    """Put a sentencepiece model in the place of a folder's tokenizer."""
    for file in folder.glob("*token*"):
        file.unlink()
    train(folder, SETTINGS["llama"])
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": legacy, "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | named))


def assert_splits_as(tokenizer, folder, legacy):
    reference = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    for text in ("dog", " a  dog", "two  spaces ", "\n", "红 dog"):
        assert tokenizer(text)["input_ids"] == [1, *reference.encode(text)]
    after = ["▁dog"] if legacy else reference.encode("<unk>dog", out_type=str)[-2:]  # Llama's newer rule
    ids = tokenizer("a</s>dog")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids[ids.index(2) + 1 :]) == after


@pytest.mark.parametrize("legacy", [True, False])
def test_an_export_s_tokenizer_splits_as_the_sentencepiece_model_of_its_base(toys, tmp_path, run_cli, legacy):
    save_llm(tmp_path / "llm", tie_word_embeddings=False)
    with_sentencepiece_alone(tmp_path / "llm", legacy)
    given = ("stage.max_steps=1", f"model.llm.path={tmp_path / 'llm'}", "model.template=v1", "stage.evaluate=false")
    assert run_cli("stage=pretrain", *toys.arguments(*given, "stage.pack_length=512", runs=tmp_path / "runs")).code == 0
    done = run_cli("export", f"ckpt={tmp_path / 'runs' / 'latest'}", f"out={tmp_path / 'out'}")
    assert done.code == 0, done.err
    assert_splits_as(AutoTokenizer.from_pretrained(tmp_path / "out"), tmp_path / "llm", legacy)


@pytest.mark.parametrize("legacy", [True, False])
def test_a_sentencepiece_model_alone_leaves_a_tokenizer_that_splits_as_it_does(tmp_path, run_cli, legacy):
    save_llm(tmp_path / "base", tie_word_embeddings=False)
    with_sentencepiece_alone(tmp_path / "base", legacy)
    write_adapter(tmp_path / "base", tmp_path / "adapter", ["model.layers.0.self_attn.q_proj"])
    assert merge(run_cli, tmp_path / "base", tmp_path / "adapter", tmp_path / "out").code == 0
    for tokenizer in (load_tokenizer(tmp_path / "base"), AutoTokenizer.from_pretrained(tmp_path / "out")):
        assert_splits_as(tokenizer, tmp_path / "base", legacy)
