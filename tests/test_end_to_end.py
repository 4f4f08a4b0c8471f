"""The whole way through the command line: pretrain, fine-tune, resume, evaluate, export, chat."""

import io
import json
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from vlm_tune.config.schema import Precision
from vlm_tune.evaluation.evaluate import open_test, prompt_of, read_questions
from vlm_tune.export import parity
from vlm_tune.model.checkpoint import checkpoints
from vlm_tune.model.generate import answer, answering, embed_prompts
from vlm_tune.model.trained import open_trained

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def finished(toys, tmp_path_factory):
    """Pretrain, fine-tune as far as a kill after the fourth step, and go on; return the runs folder."""
    from vlm_tune.cli import main

    runs = tmp_path_factory.mktemp("runs")
    given = toys.arguments("stage.lora.dropout=0", "trainer.save_every=2", "trainer.val_every=3", runs=runs)
    for stage in ("pretrain", "finetune"):
        assert main([f"stage={stage}", *given]) == 0
    for name in ("checkpoints/step_00000006.ckpt", "report.json", "report.html", "predictions.jsonl"):
        (last_run(runs) / name).unlink()
    assert main(["stage=finetune", *given, "resume=last"]) == 0
    return runs


def last_run(finished):
    return (finished / "latest").resolve()


def test_the_fine_tuning_starts_from_the_pretrained_projector(finished):
    start = (last_run(finished) / "starts_from.txt").read_text()
    assert "_pretrain_tiny" in start
    assert start.endswith("step_00000006.ckpt")


def test_a_resumed_run_stays_in_its_folder(finished):
    assert len([path for path in finished.iterdir() if not path.is_symlink()]) == 2
    names = [path.name for path in checkpoints(last_run(finished))]
    assert names == ["step_00000004.ckpt", "step_00000006.ckpt"]


def test_the_run_folder_holds_what_its_reader_needs(finished):
    run = last_run(finished)
    names = {path.name for path in run.iterdir()}
    assert names >= {"config.yaml", "environment.json", "metrics.csv", "report.json", "report.html", "loss.svg"}
    assert names >= {"sample_answers.jsonl", "predictions.jsonl", "checkpoints"}
    report = json.loads((run / "report.json").read_text())
    assert set(report["evaluation"]) >= {"before", "after", "blind", "majority"}
    assert report["train_seconds"] > 0
    assert report["peak_rss_mb"] > 0
    assert [point["step"] for point in report["loss_curve"]] == list(range(1, 7))
    assert [point["step"] for point in report["val_curve"]] == [3, 6]
    assert report["run"]["init_from"].endswith(".ckpt")
    for name in ("before", "after", "blind", "majority"):
        assert report["evaluation"][name].keys() == {"colour", "shape"}
        assert all(0 <= share <= 1 for share in report["evaluation"][name].values())
    assert all(entry["picture"] and entry["before"] and entry["after"] for entry in report["answers"])


def test_a_run_that_needs_a_pretrained_projector_says_so_when_there_is_none(toys, tmp_path, run_cli):
    finished = run_cli("stage=finetune", *toys.arguments(runs=tmp_path))
    assert finished.code == 2
    assert (
        "holds no pretrain run of model=tiny. Run `python -m vlm_tune stage=pretrain model=tiny` first" in finished.err
    )


def test_evaluate_scores_a_finished_run(finished, run_cli):
    done = run_cli("evaluate", f"ckpt={last_run(finished)}")
    assert done.code == 0
    assert "exact match" in done.out
    answers = [json.loads(line) for line in (last_run(finished) / "predictions.jsonl").read_text().splitlines()]
    assert [entry["row"] for entry in answers] == list(range(6))


@pytest.fixture(scope="module")
def exported(finished, tmp_path_factory):
    """Export the fine-tuned toy model as transformers' own layout."""
    from vlm_tune.cli import main

    out = tmp_path_factory.mktemp("exported") / "model"
    assert main(["export", f"ckpt={last_run(finished)}", f"out={out}"]) == 0
    return out


def test_an_exported_model_gives_the_trained_logits_in_plain_transformers(finished, exported):
    model, config = open_trained(str(last_run(finished)), [], Precision.fp32)
    test = open_test(config, model)
    native = AutoModelForImageTextToText.from_pretrained(exported, dtype=torch.float32)
    compared = 0
    for question in read_questions(test):
        prompt = prompt_of(test, question.sample)
        with answering(model):
            embeddings, mask = embed_prompts(model, [prompt])
            ours = model.vlm.llm(inputs_embeds=embeddings, attention_mask=mask).logits
        if not len(prompt.tiles):
            continue
        pixels = model.vlm.vision.dtype
        from vlm_tune.data.tiles import normalize

        tiles = normalize(torch.from_numpy(prompt.tiles), model.vlm.normalization, pixels)
        ids = torch.from_numpy(prompt.example.input_ids).long().unsqueeze(0)
        with torch.no_grad():
            theirs = native(input_ids=ids, pixel_values=tiles).logits
        torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=0)
        compared += 1
    assert compared >= 4


def test_the_exported_processor_makes_the_tokens_of_training(finished, exported):
    model, config = open_trained(str(last_run(finished)), [], Precision.fp32)
    test = open_test(config, model)
    processor = AutoProcessor.from_pretrained(exported)
    question = next(each for each in read_questions(test) if each.sample.pictures and len(each.sample.messages) == 2)
    picture = test.reader.open_picture(question.sample.pictures[0])
    content = [{"type": "image", "image": picture}, {"type": "text", "text": question.text}]
    made = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True
    )
    assert made["input_ids"][0] == prompt_of(test, question.sample).example.input_ids.tolist()


def test_plain_transformers_reads_a_picture_and_answers_as_the_trained_model(finished, exported):
    # the whole way without code of ours: template, tiles, pixels, tokens, generation
    model, config = open_trained(str(last_run(finished)), [], Precision.fp32)
    test = open_test(config, model)
    processor = AutoProcessor.from_pretrained(exported)
    native = AutoModelForImageTextToText.from_pretrained(exported, dtype=torch.float32)
    compared = 0
    for question in read_questions(test):
        if not question.sample.pictures or len(question.sample.messages) > 2:
            continue
        picture = test.reader.open_picture(question.sample.pictures[0])
        content = [{"type": "image", "image": picture}, {"type": "text", "text": question.text}]
        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        inputs = processor.apply_chat_template([{"role": "user", "content": content}], **options)
        said = native.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        theirs = processor.decode(said, skip_special_tokens=True).strip()
        assert theirs == answer(model, [prompt_of(test, question.sample)], 8)[0]
        compared += 1
    assert compared >= 3


def test_an_exported_model_is_trained_further(toys, exported, tmp_path, run_cli):
    # it needs no earlier stage: a whole model brings its own projector
    given = toys.arguments(f"model.path={exported}", "model.vision.path=null", "model.llm.path=null", runs=tmp_path)
    done = run_cli("stage=finetune", *given)
    assert done.code == 0, done.err
    assert "starts from: the base weights" in done.out


def test_an_export_of_16_bits_is_one_throughout(finished, tmp_path, run_cli):
    done = run_cli("export", f"ckpt={last_run(finished)}", f"out={tmp_path / 'half'}", "dtype=fp16")
    assert done.code == 0, done.err
    weights = load_file(tmp_path / "half" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float16}


def test_an_export_that_answers_otherwise_does_not_get_its_name(finished, tmp_path, run_cli, monkeypatch):
    monkeypatch.setattr(parity, "FLOAT32_BOUND", -1.0)  # no difference is small enough
    done = run_cli("export", f"ckpt={last_run(finished)}", f"out={tmp_path / 'model'}")
    assert done.code == 2
    assert "model.failed: the exported model differs from the trained one (logits differ by" in done.err
    assert [path.name for path in tmp_path.iterdir()] == ["model.failed"]


def test_an_export_reports_its_parity_and_overwrites_nothing(finished, exported, run_cli):
    parity = json.loads((exported / "parity.json").read_text())
    assert parity["passed"]
    assert parity["max_difference"] <= 1e-4
    again = run_cli("export", f"ckpt={last_run(finished)}", f"out={exported}")
    assert again.code == 2
    assert "the folder is not empty" in again.err


def test_the_parts_layout_loads_back_to_the_same_answers(finished, tmp_path, run_cli):
    done = run_cli("export", f"ckpt={last_run(finished)}", f"out={tmp_path / 'parts'}", "layout=parts")
    assert done.code == 0, done.err
    assert json.loads((tmp_path / "parts" / "parity.json").read_text())["max_difference"] <= 1e-4
    assert AutoTokenizer.from_pretrained(tmp_path / "parts" / "llm").convert_tokens_to_ids("<IMG_CONTEXT>") > 0


def test_chat_answers_and_survives_a_missing_picture(toys, finished, monkeypatch, run_cli):
    lines = "What colour?\n/reset\n/image nowhere.png\n/nonsense\nWhich is larger, 1 or 2?\n/exit\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    picture = next((toys.data / "pictures").glob("test_*.png"))
    done = run_cli("chat", f"ckpt={last_run(finished)}", f"image={picture}")
    assert done.code == 0
    assert "nowhere.png" in done.out
    assert "/nonsense: no such command" in done.out


def test_text_only_fine_tuning_is_the_same_run_without_pictures(toys, tmp_path, run_cli):
    rows = [
        {"messages": [{"role": "user", "content": f"Say {n}"}, {"role": "assistant", "content": str(n)}]}
        for n in range(8)
    ]
    data = tmp_path / "text.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = toys.arguments(f"data.path={data}", "data.val=none", "stage.max_steps=2", runs=tmp_path / "runs")
    done = run_cli("stage=sft", *arguments)
    assert done.code == 0, done.err
    assert "0 tiles" in done.out
