"""Adapters as other trainers write them, with new tokens, older names or whole weights beside, merge as in peft."""

import json
import shutil

import pytest
import torch
from llava_toys import save_llava
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from toys import save_llm
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from vlm_tune.model.layouts.internvl import hf as internvl_hf

TARGETS = ["q_proj", "v_proj"]
ROWS = 2507  # as many as the golden tokenizer has tokens
NEW = ["<box>", "</box>"]
TOKENS = {  # how peft is told to train the rows of new tokens
    "modules to save": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "tables saved whole": {},  # peft writes them itself where the vocabulary grew
    "single rows": {"trainable_token_indices": [ROWS, ROWS + 1]},
    "tied by peft": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
}


def random_halves(model):
    """Fill what an adapter begins with as zeros, and move each whole module that it trains."""
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_B" in name or "trainable_tokens_delta" in name:
            nn.init.normal_(weight, std=0.2)
        elif "modules_to_save" in name:
            weight.data += torch.randn_like(weight) * 0.05
    return model


def merge(run_cli, base, adapter, out):
    return run_cli("merge", f"base={base}", f"adapter={adapter}", f"out={out}")


@torch.no_grad()
def logits(model, ids):
    return model.eval()(input_ids=torch.tensor([ids])).logits


@pytest.fixture(scope="module")
def llms(tmp_path_factory):
    root = tmp_path_factory.mktemp("llms")
    for name in ("untied", "tied"):
        save_llm(root / name, vocab_size=ROWS, tie_word_embeddings=name == "tied")
    return root


def grown(folder):
    """Load a base with rows for two new tokens; what stands in them does not matter where the adapter holds them."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.resize_token_embeddings(ROWS + 2, mean_resizing=False)
    return model


def with_new_tokens(folder, out, settings):
    """Make an adapter with two new tokens and its tokenizer; return what peft makes of it on a resized base."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.add_tokens(NEW) == 2
    wrapped = random_halves(get_peft_model(grown(folder), LoraConfig(r=4, target_modules=TARGETS, **settings)))
    wrapped.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return wrapped


@pytest.mark.parametrize(
    ("base", "how"),
    [
        *((base, how) for base in ("untied", "tied") for how in list(TOKENS)[:2]),
        *(("tied", how) for how in list(TOKENS)[2:]),
    ],
)
def test_new_tokens_merge_as_peft_has_them(llms, tmp_path, run_cli, base, how):
    wrapped = with_new_tokens(llms / base, tmp_path / "adapter", TOKENS[how])
    done = merge(run_cli, llms / base, tmp_path / "adapter", tmp_path / "out")
    assert done.code == 0, done.err
    oracle = PeftModel.from_pretrained(grown(llms / base), tmp_path / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = [5, 17, ROWS, 90, ROWS + 1, 7]
    torch.testing.assert_close(logits(merged, ids), logits(wrapped, ids), atol=1e-4, rtol=0)
    torch.testing.assert_close(logits(merged, ids), logits(oracle, ids), atol=1e-4, rtol=0)


@pytest.mark.parametrize("base", ["untied", "tied"])
def test_the_merged_folder_has_the_tokenizer_and_the_vocabulary_of_the_adapter(llms, tmp_path, run_cli, base):
    with_new_tokens(llms / base, tmp_path / "adapter", TOKENS["modules to save"])
    assert merge(run_cli, llms / base, tmp_path / "adapter", tmp_path / "out").code == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.convert_tokens_to_ids(NEW) == [ROWS, ROWS + 1]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == len(tokenizer) == ROWS + 2


@pytest.mark.parametrize("how", ["single rows", "no rows"])
def test_new_tokens_of_which_rows_are_nowhere_are_refused(llms, tmp_path, run_cli, how):
    settings = {"single rows": TOKENS["single rows"], "no rows": {}}[how]  # of an untied head, no row is trained
    with_new_tokens(llms / "untied", tmp_path / "adapter", settings)
    keep_only(tmp_path / "adapter", "lora_", "trainable_tokens")
    done = merge(run_cli, llms / "untied", tmp_path / "adapter", tmp_path / "out")
    assert done.code == 2
    assert f"has {ROWS + 2} tokens, the base {ROWS} rows, and the adapter holds no rows of" in done.err


def test_a_vocabulary_that_was_cut_down_is_the_adapters(llms, tmp_path, run_cli):
    save_llm(tmp_path / "padded", vocab_size=ROWS + 53, tie_word_embeddings=False)
    with_new_tokens(tmp_path / "padded", tmp_path / "adapter", TOKENS["modules to save"])
    assert merge(run_cli, tmp_path / "padded", tmp_path / "adapter", tmp_path / "out").code == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == ROWS + 2


def keep_only(adapter, *parts):
    file = adapter / "adapter_model.safetensors"
    weights = load_file(file)
    save_file({name: weight for name, weight in weights.items() if any(part in name for part in parts)}, file)


# ------------------------------------------------------------------------------------------- older names, whole weights

OLDER = {  # today's names -> those before transformers renamed its vision-language models
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
    "model.vision_tower.": "vision_tower.vision_model.",
    "model.multi_modal_projector.": "multi_modal_projector.",
}
SEEN = r".*(language_model|vision_tower).*\.(q_proj|v_proj)"


@pytest.fixture(scope="module")
def vlms(toys, tmp_path_factory):
    """Vision-language models as plain transformers writes them."""
    root = tmp_path_factory.mktemp("vlms")
    internvl_hf.save(toys.model().vlm, root / "internvl")
    save_llava(root / "llava")
    save_llava(root / "llava_next", is_next=True)
    return root


def older(name):
    return next((theirs + name.removeprefix(ours) for ours, theirs in OLDER.items() if name.startswith(ours)), name)


def rename(adapter, new):
    file = adapter / "adapter_model.safetensors"
    weights = {name.removeprefix("base_model.model."): weight for name, weight in load_file(file).items()}
    save_file({f"base_model.model.{new(name)}": weight for name, weight in weights.items()}, file)


def adapter_of(base, out, **settings):
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    given = {"r": 4, "target_modules": SEEN, "rank_pattern": {"v_proj": 2}} | settings
    wrapped = random_halves(get_peft_model(model, LoraConfig(**given)))
    wrapped.save_pretrained(out)
    return wrapped.eval()


def change_settings(adapter, **changes):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def assert_same_weights(folder, wrapped):
    merged = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).state_dict()
    for name, weight in wrapped.merge_and_unload().state_dict().items():
        torch.testing.assert_close(merged[name], weight, atol=1e-6, rtol=0)


@pytest.mark.parametrize("pattern", [None, r"language_model\.model\.layers\.\d+\.self_attn\.(q|v)_proj"])
@pytest.mark.parametrize("kind", ["internvl", "llava", "llava_next"])
def test_an_adapter_with_older_names_merges(vlms, tmp_path, run_cli, kind, pattern):
    parts = {} if pattern is None else {"target_modules": r".*language_model.*\.(q_proj|v_proj)"}
    wrapped = adapter_of(vlms / kind, tmp_path / "adapter", **parts)
    rename(tmp_path / "adapter", older)
    if pattern is not None:
        change_settings(tmp_path / "adapter", target_modules=pattern)
    done = merge(run_cli, vlms / kind, tmp_path / "adapter", tmp_path / "out")
    assert done.code == 0, done.err
    assert_same_weights(tmp_path / "out", wrapped)


def whole_projector(kind):
    """Make a projector as LLaVA's trainer leaves it beside an adapter."""
    torch.manual_seed(5)
    layers = {"0": (32, 32), "2": (32, 32)}
    named = {f"{kind}mm_projector.{i}.weight": torch.randn(size) for i, size in layers.items()}
    return named | {f"{kind}mm_projector.{i}.bias": torch.randn(size[0]) for i, size in layers.items()}


@pytest.mark.parametrize("prefix", ["base_model.model.model.", "model."])
def test_a_projector_beside_the_adapter_is_in_the_merged_model(vlms, tmp_path, run_cli, prefix):
    adapter_of(vlms / "llava", tmp_path / "adapter")
    trained = whole_projector(prefix)
    torch.save(trained, tmp_path / "adapter" / "non_lora_trainables.bin")
    done = merge(run_cli, vlms / "llava", tmp_path / "adapter", tmp_path / "out")
    assert done.code == 0, done.err
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").model.multi_modal_projector
    assert torch.equal(merged.linear_1.weight, trained[f"{prefix}mm_projector.0.weight"])
    assert torch.equal(merged.linear_2.bias, trained[f"{prefix}mm_projector.2.bias"])


def spoil_shape(weights):
    weights["model.mm_projector.0.weight"] = torch.zeros(3, 3)


def spoil_name(weights):
    weights["model.vision_resampler.weight"] = torch.zeros(3)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (spoil_shape, "model.multi_modal_projector.linear_1.weight: (3, 3) there, (32, 32) in the base"),
        (spoil_name, "model.vision_resampler.weight: the base has no such weight"),
    ],
)
def test_whole_weights_that_fit_nothing_are_refused(vlms, tmp_path, run_cli, spoil, said):
    adapter_of(vlms / "llava", tmp_path / "adapter")
    weights = whole_projector("model.")
    spoil(weights)
    torch.save(weights, tmp_path / "adapter" / "non_lora_trainables.bin")
    done = merge(run_cli, vlms / "llava", tmp_path / "adapter", tmp_path / "out")
    assert done.code == 2
    assert said in done.err


class Trap:
    """Unpickling it would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("file", ["non_lora_trainables.bin", "adapter_model.bin"])
def test_code_in_a_bin_file_is_not_run(vlms, tmp_path, run_cli, file):
    adapter_of(vlms / "llava", tmp_path / "adapter")
    if file == "adapter_model.bin":
        (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    torch.save({"x": Trap(tmp_path / "was_run")}, tmp_path / "adapter" / file)
    done = merge(run_cli, vlms / "llava", tmp_path / "adapter", tmp_path / "out")
    assert done.code == 2
    assert f"{file}: not read" in done.err
    assert not (tmp_path / "was_run").exists()


def test_an_adapter_in_a_bin_file_merges(vlms, tmp_path, run_cli):
    wrapped = adapter_of(vlms / "llava", tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    assert merge(run_cli, vlms / "llava", tmp_path / "adapter", tmp_path / "out").code == 0
    assert_same_weights(tmp_path / "out", wrapped)


@pytest.mark.parametrize("name", ["mm_projector.bin", "projector.safetensors", "vit.pth"])
def test_weights_of_another_name_beside_an_adapter_are_refused(vlms, tmp_path, run_cli, name):
    adapter_of(vlms / "llava", tmp_path / "adapter")
    (tmp_path / "adapter" / name).write_bytes(b"weights")
    done = merge(run_cli, vlms / "llava", tmp_path / "adapter", tmp_path / "out")
    assert done.code == 2
    assert f"{name} beside the adapter: weights that are not read, and would be lost" in done.err


@pytest.mark.parametrize(
    "name", ["README.md", "training_args.bin", "optimizer.pt", "rng_state_0.pth", "trainer_state.json"]
)
def test_what_a_trainer_leaves_beside_does_not_matter(vlms, tmp_path, run_cli, name):
    adapter_of(vlms / "llava", tmp_path / "adapter")
    (tmp_path / "adapter" / name).write_bytes(b"anything")
    assert merge(run_cli, vlms / "llava", tmp_path / "adapter", tmp_path / "out").code == 0
    assert not (tmp_path / "out" / name).exists()


@pytest.mark.parametrize("name", ["non_lora_trainables.bin", "mm_projector.bin"])
def test_weights_that_belong_over_a_base_are_refused(vlms, tmp_path, run_cli, name):
    adapter_of(vlms / "llava", tmp_path / "adapter")
    shutil.copytree(vlms / "llava", tmp_path / "base")
    torch.save({}, tmp_path / "base" / name)
    done = merge(run_cli, tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert done.code == 2
    assert f"{name} beside its weights, which would have to be put in first" in done.err


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"new_kind_of_scale": 3}, "new_kind_of_scale=3: settings that the installed peft does not know"),
        ({"peft_type": "NOT_YET"}, "peft_type=NOT_YET, which the installed peft does not know"),
        ({"megatron_config": {"a": 1}}, "an adapter of Megatron's layers, whose module is not imported"),
        ({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4}, "is a prompt, which no weight can take in"),
        ({"peft_type": []}, "peft_type=[], which the installed peft does not know"),
        ({"modules_to_save": "(["}, "missing ), unterminated subpattern"),
        ({"trainable_token_indices": "x"}, "adapter: its files cannot be read as a model's"),
        ({"r": 8}, "size mismatch for base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A"),
        ({"target_modules": ["nowhere"]}, "Target modules {'nowhere'} not found in the base model"),
    ],
)
def test_settings_that_do_not_fit_are_said_in_peft_s_own_words(vlms, tmp_path, run_cli, changes, said):
    adapter_of(vlms / "llava", tmp_path / "adapter")
    keep = ("peft_type", "base_model_name_or_path") if "num_virtual_tokens" in changes else None
    path = tmp_path / "adapter" / "adapter_config.json"
    settings = {key: value for key, value in json.loads(path.read_text()).items() if keep is None or key in keep}
    path.write_text(json.dumps(settings | changes))
    done = merge(run_cli, vlms / "llava", tmp_path / "adapter", tmp_path / "out")
    assert done.code == 2
    assert said in done.err


@pytest.mark.parametrize("layout", ["adapter", pytest.param("adapter_and_base", marks=pytest.mark.slow)])
def test_our_own_adapters_merge_into_what_the_run_exports(toys, tmp_path, run_cli, layout):
    runs = toys.arguments("stage.init_from=none", "stage.evaluate=false", "stage.max_steps=2", runs=tmp_path / "runs")
    assert run_cli("stage=finetune", *runs).code == 0
    run = f"ckpt={tmp_path / 'runs' / 'latest'}"
    for name, given in (("hf", "hf"), ("adapter", layout)):
        assert run_cli("export", run, f"out={tmp_path / name}", f"layout={given}").code == 0
    done = merge(run_cli, tmp_path / "adapter" / "base", tmp_path / "adapter", tmp_path / "out")
    assert done.code == 0, done.err
    merged, whole = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "hf"))
    assert merged.keys() == whole.keys()
    for name, weight in merged.items():
        torch.testing.assert_close(weight, whole[name], atol=1e-6, rtol=0)


def test_answers_end_at_the_adapter_s_end_token_too(llms, tmp_path, run_cli):
    with_new_tokens(llms / "untied", tmp_path / "adapter", TOKENS["modules to save"])
    change = json.loads((tmp_path / "adapter" / "tokenizer_config.json").read_text()) | {"eos_token": "</box>"}
    (tmp_path / "adapter" / "tokenizer_config.json").write_text(json.dumps(change))
    assert merge(run_cli, llms / "untied", tmp_path / "adapter", tmp_path / "out").code == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert merged.generation_config.eos_token_id == [ROWS + 1, 5]


@pytest.mark.parametrize("text", ["{", "[]", '{"a": 1, "a": 2}'])
@pytest.mark.parametrize("place", ["adapter/adapter_config.json", "base/generation_config.json", "base/config.json"])
def test_small_files_that_are_damaged_are_named(llms, tmp_path, run_cli, place, text):
    shutil.copytree(llms / "untied", tmp_path / "base")
    with_new_tokens(llms / "untied", tmp_path / "adapter", TOKENS["modules to save"])
    (tmp_path / place).write_text(text)
    done = merge(run_cli, tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert done.code == 2
    assert f"{tmp_path / place}: " in done.err


@pytest.mark.parametrize("kind", ["internvl", "llava"])  # the toy InternVL's head is tied, LLaVA's is not
def test_new_tokens_of_a_vision_language_model_merge_as_peft_has_them(vlms, tmp_path, run_cli, kind):
    def grown_vlm():
        model = AutoModelForImageTextToText.from_pretrained(vlms / kind, dtype=torch.float32)
        model.resize_token_embeddings(3000, mean_resizing=False)
        return model

    settings = LoraConfig(r=4, target_modules=SEEN, modules_to_save=["embed_tokens", "lm_head"])
    random_halves(get_peft_model(grown_vlm(), settings)).save_pretrained(tmp_path / "adapter")
    done = merge(run_cli, vlms / kind, tmp_path / "adapter", tmp_path / "out")
    assert done.code == 0, done.err
    oracle = PeftModel.from_pretrained(grown_vlm(), tmp_path / "adapter")
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = [5, 17, 2990, 90, 2999, 7]
    torch.testing.assert_close(logits(merged, ids), logits(oracle, ids), atol=1e-4, rtol=0)
    assert merged.config.get_text_config().vocab_size == 3000


def test_nothing_is_left_of_a_merge_that_was_refused(llms, tmp_path, run_cli):
    with_new_tokens(llms / "untied", tmp_path / "adapter", {})
    keep_only(tmp_path / "adapter", "lora_")
    assert merge(run_cli, llms / "untied", tmp_path / "adapter", tmp_path / "out").code == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]
