"""An exported folder ends its answers where training did, in every layout, with nothing handed over."""

import json
import shutil
from pathlib import Path

import gguf
import pytest
import torch
import yaml
from llava_toys import save_llava
from toys import save_llm
from transformers import (
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationConfig,
)

from vlm_tune.config.parse import load_config
from vlm_tune.config.schema import Precision
from vlm_tune.data.text import templates
from vlm_tune.export.parity import Parity, compare
from vlm_tune.export.plain import read
from vlm_tune.export.stranger import Questions, plain_agreement
from vlm_tune.model.build import Model
from vlm_tune.model.encoder import build_encoder
from vlm_tune.model.generate import answer_ids
from vlm_tune.model.layouts.internvl.processor import save_processor
from vlm_tune.model.trained import open_trained

END, OWN = 9, 5  # <|end|> of the template, and the end token of the toy tokenizer
SAMPLED = {
    "do_sample": True,
    "temperature": 0.3,
    "top_k": 5,
    "repetition_penalty": 1.7,
    "num_beams": 2,
    "eos_token_id": 3,
}
FORGOTTEN = {"temperature": 0.9, "top_p": 0.6}  # Vicuna's, without do_sample: transformers refuses to save it
BASES = {"sampled": SAMPLED, "forgotten": FORGOTTEN, "least length": {"min_new_tokens": 7, "max_length": 30}}


def train(toys, runs, *more):
    from vlm_tune.cli import main

    given = ("stage.init_from=none", "stage.evaluate=false", "stage.lr={projector: 0.01, llm: 0.02}")
    assert main(["stage=finetune", *toys.arguments(*given, "stage.max_steps=12", *more, runs=runs)]) == 0
    return (runs / "latest").resolve()


def export(run, out, *more):
    from vlm_tune.cli import main

    assert main(["export", f"ckpt={run}", f"out={out}", *more]) == 0
    return out


@pytest.fixture(scope="module")
def run(toys, tmp_path_factory):
    """A language model that is taught a template whose end token is not its own."""
    root = tmp_path_factory.mktemp("phi")
    save_llm(root / "llm", vocab_size=2520)
    return train(toys, root / "runs", "model.template=phi3_chat", f"model.llm.path={root / 'llm'}")


@pytest.mark.parametrize(
    ("layout", "place"),
    [
        ("hf", "."),
        ("parts", "llm"),
        ("adapter", "."),
        ("adapter", "base"),
        ("adapter_and_base", "base"),
    ],
)
def test_generation_config_names_the_stop_tokens_of_training(run, tmp_path, layout, place):
    out = export(run, tmp_path / "out", f"layout={layout}")
    settings = json.loads((out / place / "generation_config.json").read_text())
    assert settings["eos_token_id"] == [END, OWN]
    assert settings["do_sample"] is False


def test_the_official_layout_names_them_too(toys, tmp_path):
    run = train(toys, tmp_path / "runs", "model.template=phi3-chat", "model.projector.shuffle_version=v1")
    out = export(run, tmp_path / "out", "layout=official")
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [END, OWN]


def test_a_llava_names_them_too(toys, tmp_path):
    save_llava(tmp_path / "base")
    whole = (f"model.path={tmp_path / 'base'}", "model.vision.path=null", "model.llm.path=null")
    tiles = ("model.tiles={size: 56, max: 1, thumbnail: false, rule: pad}", "model.vision.normalize=openai_clip")
    run = train(toys, tmp_path / "runs", "model.template=phi3_chat", "stage.pack_length=1024", *whole, *tiles)
    out = export(run, tmp_path / "out", "layout=llava_hf")
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [END, OWN]


def test_gguf_names_them_too(run, tmp_path):
    reader = gguf.GGUFReader(export(run, tmp_path / "out", "layout=gguf", "dtype=f32") / "model.gguf")
    ids = [reader.fields[f"tokenizer.ggml.{name}_token_id"].contents() for name in ("eos", "eot")]
    assert ids == [END, OWN]


@pytest.mark.parametrize("kind", BASES)
def test_nothing_of_the_base_s_answers_is_left(toys, tmp_path, kind):
    save_llm(tmp_path / "llm")
    (tmp_path / "llm" / "generation_config.json").write_text(json.dumps(BASES[kind]))
    out = export(train(toys, tmp_path / "runs", f"model.llm.path={tmp_path / 'llm'}"), tmp_path / "out")
    settings = json.loads((out / "generation_config.json").read_text())
    assert not {"temperature", "top_k", "top_p", "repetition_penalty", "num_beams", "min_new_tokens"} & settings.keys()
    plain = AutoModelForImageTextToText.from_pretrained(out).generation_config
    plain.validate(strict=True)
    assert (plain.do_sample, plain.eos_token_id) == (False, [OWN])
    assert json.loads((out / "parity.json").read_text())["from_the_folder_alone"] == 1


def test_a_base_s_penalties_do_not_change_our_answers(toys, tmp_path):
    save_llm(tmp_path / "llm")
    run = train(toys, tmp_path / "runs", f"model.llm.path={tmp_path / 'llm'}")
    answers = []
    for settings in ({}, SAMPLED, BASES["least length"]):
        (tmp_path / "llm" / "generation_config.json").write_text(json.dumps(settings))
        model, config = open_trained(str(run), [], Precision.fp32)
        answers.append([answer_ids(model, [prompt], 16).tolist() for prompt in Questions(model, config).prompts])
    assert answers[0] == answers[1] == answers[2]


# ------------------------------------------------------------------------------------------------- as a stranger asks


@pytest.fixture(scope="module")
def asked(toys, tmp_path_factory):
    """An exported folder, and what the trained model answers."""
    root = tmp_path_factory.mktemp("asked")
    run = train(toys, root / "runs")
    model, config = open_trained(str(run), [], Precision.fp32)
    questions = Questions(model, config)
    return export(run, root / "out"), questions, Parity.measure(model, questions.prompts).answers


def change(folder, **settings):
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def change_template(folder):
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text() + "and")


SPOILT = {
    "its template": change_template,
    "its stop tokens": lambda folder: change(folder, eos_token_id=[2]),
    "its settings": lambda folder: change(folder, repetition_penalty=4.0),
}


@pytest.mark.parametrize("what", SPOILT)
def test_the_comparison_sees_what_the_folder_alone_says(asked, tmp_path, what):
    folder, questions, answers = asked
    assert any(answer[-1] == OWN for answer in answers)
    assert sum(turns is not None for turns in questions.chats) >= 3
    assert plain_agreement(read(folder), folder, questions, answers) == 1
    shutil.copytree(folder, tmp_path / "out")
    SPOILT[what](tmp_path / "out")
    assert plain_agreement(read(tmp_path / "out"), tmp_path / "out", questions, answers) < 0.99


def test_an_adapter_says_when_its_base_ends_answers_elsewhere(toys, tmp_path, run_cli):
    # parts without a class: the base is the language model's own folder, whose end token is another
    save_llm(tmp_path / "llm", vocab_size=3000)
    more = ("model.projector={kind: mlp, shuffle_version: v1}", f"model.llm.path={tmp_path / 'llm'}")
    run = train(toys, tmp_path / "runs", "model.template=phi3_chat", *more)
    done = run_cli("export", f"ckpt={run}", f"out={tmp_path / 'out'}", "layout=adapter")
    assert done.code == 0, done.err
    assert "generation_config=GenerationConfig.from_pretrained(FOLDER)" in done.out.replace("\n", "")
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == [END, OWN]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "llm").generation_config.eos_token_id == OWN


# ----------------------------------------------------------------------------------------------- LoRA alone, and a base


def test_lora_alone_stands_over_a_base_with_the_trained_projector(asked, toys, tmp_path):
    from peft import PeftModel
    from safetensors.torch import load_file

    run = train(toys, tmp_path / "runs")
    out = export(run, tmp_path / "out", "layout=adapter_and_base")
    settings = json.loads((out / "adapter_config.json").read_text())
    assert settings["modules_to_save"] is None
    assert settings["base_model_name_or_path"] == str((out / "base").resolve())
    stored = load_file(out / "adapter_model.safetensors")
    assert all(".lora_A." in name or ".lora_B." in name for name in stored)
    base = AutoModelForImageTextToText.from_pretrained(out / "base", dtype=torch.float32)
    trained, config = open_trained(str(run), [], Precision.fp32)
    assert torch.equal(base.model.multi_modal_projector.linear_1.weight, trained.vlm.projector.linear_1.weight)
    questions = Questions(trained, config)
    answers = Parity.measure(trained, questions.prompts).answers
    assert plain_agreement(PeftModel.from_pretrained(base, out).eval(), out, questions, answers) == 1
    report = json.loads((out / "parity.json").read_text())
    assert report["max_difference"] <= 1e-4
    assert report["from_the_folder_alone"] == 1


@pytest.mark.parametrize(("scale", "difference", "passed"), [(35, 2e-4, True), (1, 2e-4, False), (35, 2e-3, False)])
def test_a_float32_export_is_judged_as_a_share_of_its_logits(scale, difference, passed):
    logits = torch.linspace(-scale, scale, 20).reshape(4, 5)  # (L, V)
    assert compare(Parity([logits], [[1]]), Parity([logits + difference], [[1]]), "fp32").passed is passed


@pytest.mark.parametrize("train_how", ["{vision: frozen, projector: full, llm: full}"])
def test_what_no_adapter_holds_is_refused_under_this_name_too(toys, tmp_path, run_cli, train_how):
    run = train(toys, tmp_path / "runs", f"stage.train={train_how}")
    done = run_cli("export", f"ckpt={run}", f"out={tmp_path / 'out'}", "layout=adapter_and_base")
    assert done.code == 2
    assert "layout=adapter_and_base: stage finetune trains every weight of llm" in done.err


# ---------------------------------------------------------------------------------- the template that a folder carries

WRITTEN = yaml.safe_load((Path(templates.__file__).with_name("templates.yaml")).read_text(encoding="utf-8"))
ELSEWHERE = {"internlm_chat", "llama3_chat", "cohere_chat"}  # their end tokens are no tokens of the toy's tokenizer


@pytest.mark.parametrize("name", sorted(WRITTEN.keys() - ELSEWHERE))
def test_a_folder_s_chat_template_writes_the_prompts_of_training(toys, tmp_path, name):
    config = load_config(toys.arguments(f"model.template={name}"))
    encoder, tokenizer = build_encoder(config)
    questions = Questions(Model(None, tokenizer, encoder, config), config, 6)
    save_processor(tokenizer, encoder, config.model, tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    processor.image_processor = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    asked = [(turns, prompt) for turns, prompt in zip(questions.chats, questions.prompts, strict=True) if turns]
    assert len(asked) >= 3
    for turns, prompt in asked:
        given = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
        assert processor.apply_chat_template(turns, **given)["input_ids"][0] == prompt.example.input_ids.tolist()


def test_gguf_refuses_a_template_without_a_question(toys, tmp_path, run_cli):
    run = train(toys, tmp_path / "runs", "model.template=plain")
    done = run_cli("export", f"ckpt={run}", f"out={tmp_path / 'out'}", "layout=gguf", "dtype=f32")
    assert done.code == 2
    assert "layout=gguf: model.template=plain shows no question. Use layout=parts" in done.err
