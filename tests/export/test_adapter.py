"""What a stage trained leaves as a folder of peft: plain transformers and plain peft restore the trained model."""

import json
from types import SimpleNamespace

import pytest
import torch
from llava_toys import save_llava
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from toys import save_llm
from transformers import (
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    BitsAndBytesConfig,
)

from vlm_tune.config.schema import Precision
from vlm_tune.evaluation.evaluate import open_test, prompt_of, read_questions
from vlm_tune.export import parity
from vlm_tune.model.generate import answering, embed_prompts
from vlm_tune.model.layouts.internvl import hf as internvl_hf
from vlm_tune.model.layouts.internvl.processor import save_processor
from vlm_tune.model.layouts.native import OTHER_PARTS
from vlm_tune.model.trained import open_trained

pytestmark = pytest.mark.filterwarnings("ignore")

ALL = "stage.train={vision: lora, projector: full, llm: lora}"
LLAVA = ("model.template=v1", "model.vision.normalize=openai_clip", "model.vision.targets=[q_proj, v_proj]")
PAD, ANYRES = "{size: 56, max: 1, thumbnail: false, rule: pad}", "{size: 56, max: 4, rule: anyres}"
KINDS = {  # where the run starts, and what it changes
    "joined": ("joined", ()),
    "joined, vision too": ("joined", (ALL,)),
    "native": ("native", ()),
    "native, vision too, DoRA": ("native", (ALL, "stage.lora.dora=true")),
    "native, rank-stabilised": ("native", ("stage.lora.rslora=true",)),
    "native, frozen projector": ("native", ("stage.train.projector=frozen",)),
    "native, 4 bits": ("native", ("stage.quantize=nf4", "trainer.precision=bf16")),
    "native, other tiles": ("native", ("model.tiles.size=84",)),
    "llava": ("llava", (f"model.tiles={PAD}", *LLAVA, ALL)),
    "llava next": ("llava next", (f"model.tiles={ANYRES}", *LLAVA)),
}
SLOW = {"joined, vision too", "native, rank-stabilised", "native, frozen projector", "native, other tiles"}
HAS_BASE = {"joined", "joined, vision too", "native, other tiles", "llava next"}  # whose newline is in no module


@pytest.fixture(scope="module")
def bases(toys, tmp_path_factory):
    """Folders that plain transformers loads."""
    root = tmp_path_factory.mktemp("bases")
    run, plain = toys.staged("stage=finetune"), toys.model()
    internvl_hf.save(plain.vlm, root / "native")
    save_processor(plain.tokenizer, plain.encoder, run.config.model, root / "native")
    save_llava(root / "llava")
    save_llava(root / "llava next", is_next=True)
    return root


def train(toys, runs, *more):
    """Train some steps at a rate that moves the answers; return the run folder."""
    from vlm_tune.cli import main

    given = ("stage.init_from=none", "stage.evaluate=false", "stage.lr={vision: 0.01, projector: 0.01, llm: 0.01}")
    arguments = toys.arguments("stage.pack_length=1024", "stage.max_steps=3", *given, *more, runs=runs)
    assert main(["stage=finetune", *arguments]) == 0
    return (runs / "latest").resolve()


def export(run, out, *more):
    from vlm_tune.cli import main

    assert main(["export", f"ckpt={run}", f"out={out}", "layout=adapter", *more]) == 0
    return out


@pytest.fixture(
    scope="module", params=[pytest.param(kind, marks=pytest.mark.slow if kind in SLOW else ()) for kind in KINDS]
)
def exported(request, toys, bases, tmp_path_factory):
    start, changes = KINDS[request.param]
    root = tmp_path_factory.mktemp("exported")
    whole = (f"model.path={bases / start}", "model.vision.path=null", "model.llm.path=null")
    run = train(toys, root / "runs", *changes, *(() if start == "joined" else whole))
    out = export(run, root / "adapter")
    base = out / "base" if request.param in HAS_BASE else bases / start
    return SimpleNamespace(kind=request.param, run=run, out=out, base=base)


def settings_of(folder):
    return json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))


def report_of(folder):
    return json.loads((folder / "parity.json").read_text(encoding="utf-8"))


def load(folder, **options):
    """Load as a stranger would: the base that the adapter names, and peft."""
    base = AutoModelForImageTextToText.from_pretrained(settings_of(folder)["base_model_name_or_path"], **options)
    return PeftModel.from_pretrained(base, folder).eval()


@torch.no_grad()
def logits_of_both(run, out, plain, overrides=()):
    """Yield the logits of pictures and questions: the trained model's, and those of plain libraries throughout."""
    model, config = open_trained(str(run), list(overrides), Precision.fp32)
    test = open_test(config, model)
    processor = AutoProcessor.from_pretrained(out)
    processor.image_processor = AutoImageProcessor.from_pretrained(out, backend="pil")
    for question in read_questions(test):
        if not question.sample.pictures or len(question.sample.messages) > 2:
            continue
        prompt = prompt_of(test, question.sample)
        with answering(model):
            embeddings, mask = embed_prompts(model, [prompt])
            ours = model.vlm.llm(inputs_embeds=embeddings, attention_mask=mask).logits
        picture = test.reader.open_picture(question.sample.pictures[0])
        content = [{"type": "image", "image": picture}, {"type": "text", "text": question.text}]
        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        inputs = processor.apply_chat_template([{"role": "user", "content": content}], **options)
        assert inputs["input_ids"][0].tolist() == prompt.example.input_ids.tolist()
        yield ours, plain(**inputs).logits


def test_plain_libraries_give_the_trained_logits(exported):
    plain = load(exported.out, dtype=torch.float32)
    overrides = ("stage.quantize=none",) if "4 bits" in exported.kind else ()
    pairs = list(logits_of_both(exported.run, exported.out, plain, overrides))
    assert len(pairs) >= 3
    for ours, theirs in pairs:
        torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=0)


def test_the_adapter_matters(exported):
    plain = load(exported.out, dtype=torch.float32)
    with plain.disable_adapter():
        pairs = list(logits_of_both(exported.run, exported.out, plain))
    assert all(float((ours - theirs).abs().max()) > 1e-2 for ours, theirs in pairs)


def test_the_weights_are_those_that_peft_asks_for(exported):
    plain = load(exported.out, dtype=torch.float32)
    stored = load_file(exported.out / "adapter_model.safetensors")
    assert stored.keys() == get_peft_model_state_dict(plain).keys()
    prefixes = {name.removeprefix("base_model.model.").rpartition(".layer")[0].split(".layer")[0] for name in stored}
    wanted = {"model.language_model"} | ({"model.vision_tower.encoder"} if "lora" in str(trained(exported)) else set())
    assert {prefix for prefix in prefixes if "language" in prefix or "vision" in prefix} == wanted
    carries = any(name.startswith("base_model.model.model.multi_modal_projector.") for name in stored)
    assert carries == ("frozen projector" not in exported.kind)


def trained(exported):
    from vlm_tune.model.checkpoint import find_checkpoint, run_config

    return run_config(find_checkpoint(str(exported.run))).stage.train.vision


def test_the_base_is_the_folder_that_training_started_from_or_is_written(exported):
    assert settings_of(exported.out)["base_model_name_or_path"] == str(exported.base.resolve())
    assert (exported.out / "base").exists() == (exported.kind in HAS_BASE)


def test_the_report_is_that_of_the_adapter(exported):
    report = report_of(exported.out)
    assert report["layout"] == "adapter"
    assert report["num_prompts"] == 4
    assert report["max_difference"] <= 1e-4
    assert report["greedy_agreement"] == 1
    assert ("to_quantized_run" in report) == ("4 bits" in exported.kind)


def test_a_4_bit_base_and_the_adapter_are_the_quantized_run(toys, bases, tmp_path):
    whole = (f"model.path={bases / 'native'}", "model.vision.path=null", "model.llm.path=null")
    run = train(toys, tmp_path / "runs", "stage.quantize=nf4", "trainer.precision=bf16", *whole)
    out = export(run, tmp_path / "adapter")
    packing = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=OTHER_PARTS,
    )
    plain = load(out, dtype=torch.bfloat16, quantization_config=packing).float()
    model, _ = open_trained(str(run), [], dequantized=True)
    plain_layer = plain.get_base_model().model.language_model.layers[0].mlp.down_proj
    ours = model.vlm.llm.model.layers[0].mlp.down_proj
    states = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(plain_layer(states), ours(states), atol=2e-2, rtol=1e-2)


@pytest.mark.parametrize("has_room", [False, True], ids=["table that grows", "table with room"])
def test_parts_without_a_class_leave_the_language_model_s_adapter(toys, tmp_path, has_room):
    llm = toys.llm
    if has_room:
        llm = tmp_path / "llm"
        save_llm(llm, vocab_size=3000)
    run = train(toys, tmp_path / "runs", "model.projector={kind: mlp, shuffle_version: v1}", f"model.llm.path={llm}")
    out = export(run, tmp_path / "adapter")
    assert settings_of(out)["base_model_name_or_path"] == str(llm if has_room else out / "base")
    model, _ = open_trained(str(run), [], Precision.fp32)
    plain = AutoPeftModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    stored = load_file(out / "adapter_model.safetensors")
    assert stored.keys() == get_peft_model_state_dict(plain).keys()
    assert all(name.startswith("base_model.model.model.layers.") for name in stored)
    ids = torch.arange(3, 40).view(1, -1)
    with torch.no_grad():
        ours = model.vlm.llm(input_ids=ids).logits
        theirs = plain(input_ids=ids).logits
    torch.testing.assert_close(theirs, ours[..., : theirs.shape[-1]], atol=1e-4, rtol=0)
    for name, weight in load_file(out / "projector.safetensors").items():
        assert torch.equal(weight, model.vlm.projector.state_dict()[name])
    assert AutoTokenizer.from_pretrained(out).convert_tokens_to_ids("<IMG_CONTEXT>") > 0
    assert report_of(out)["max_difference"] <= 1e-4


def test_an_earlier_stage_is_in_the_base_that_is_written(toys, bases, tmp_path):
    from vlm_tune.cli import main

    whole = (f"model.path={bases / 'native'}", "model.vision.path=null", "model.llm.path=null")
    first = train(toys, tmp_path / "runs", *whole, "stage.train={vision: full, projector: full, llm: frozen}")
    second = toys.arguments(*whole, f"stage.init_from={first}", "stage.max_steps=2", runs=tmp_path / "runs")
    assert main(["stage=finetune", *second, "stage.evaluate=false"]) == 0
    out = export((tmp_path / "runs" / "latest").resolve(), tmp_path / "adapter")
    assert settings_of(out)["base_model_name_or_path"] == str(out / "base")
    assert report_of(out)["max_difference"] <= 1e-4


def test_an_adapter_of_16_bits_is_one_throughout(toys, tmp_path):
    out = export(train(toys, tmp_path / "runs"), tmp_path / "adapter", "dtype=bf16")
    for file in (out / "adapter_model.safetensors", out / "base" / "model.safetensors"):
        assert {weight.dtype for weight in load_file(file).values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            ["stage.train={vision: frozen, projector: full, llm: full}"],
            "layout=adapter: stage finetune trains every weight of llm (vision=frozen, projector=full, llm=full)",
        ),
        (
            ["stage.train={vision: full, projector: full, llm: lora}"],
            "layout=adapter: stage finetune trains every weight of vision",
        ),
        (
            ["stage.train={vision: frozen, projector: full, llm: frozen}"],
            "layout=adapter: stage finetune trains no adapter",
        ),
        (
            [ALL, "model.projector={kind: mlp, shuffle_version: v1}"],
            "the folder is the language model's alone, but stage finetune trains vision=lora. Use layout=parts",
        ),
    ],
    ids=["full llm", "full vision", "no adapter", "vision of parts"],
)
def test_a_stage_that_no_adapter_holds_is_refused(toys, tmp_path, run_cli, changes, said):
    run = train(toys, tmp_path / "runs", *changes)
    done = run_cli("export", f"ckpt={run}", f"out={tmp_path / 'adapter'}", "layout=adapter")
    assert done.code == 2
    assert said in done.err
    assert not (tmp_path / "adapter").exists()


def test_an_adapter_that_answers_otherwise_does_not_get_its_name(toys, tmp_path, run_cli, monkeypatch):
    run = train(toys, tmp_path / "runs")
    monkeypatch.setattr(parity, "FLOAT32_BOUND", -1.0)  # no difference is small enough
    done = run_cli("export", f"ckpt={run}", f"out={tmp_path / 'adapter'}", "layout=adapter")
    assert done.code == 2
    assert "adapter.failed: the exported model differs from the trained one" in done.err
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    ("first", "second", "share"),
    [([1, 2, 3, 4], [1, 2, 9, 4], 0.5), ([1, 2], [1, 2, 3, 4], 0.5), ([1, 2], [1, 2], 1.0), ([], [], 1.0)],
)
def test_agreement_counts_the_tokens_before_the_first_other_one(first, second, share):
    one, other = parity.Parity([], [first]), parity.Parity([], [second])
    assert parity.compare(one, other, "bf16").greedy_agreement == share
