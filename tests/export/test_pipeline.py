"""transformers' own pipeline answers from an exported folder as `chat` does from the run.

VLM_TUNE_DEMO_RUN names the run folder of a trained demo, whose test questions are then asked too.
"""

import os

import pytest
from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor, pipeline

from vlm_tune.cli import main
from vlm_tune.config.schema import Precision
from vlm_tune.evaluation.evaluate import open_test, prompt_of, read_questions
from vlm_tune.model.generate import answer
from vlm_tune.model.trained import open_trained

NUM_QUESTIONS, NEW_TOKENS = 40, 12


@pytest.fixture(scope="module", params=["toy", "demo"])
def run(request, toys, tmp_path_factory):
    """Give a trained run."""
    if request.param == "demo":
        if (named := os.environ.get("VLM_TUNE_DEMO_RUN")) is None:
            pytest.skip("VLM_TUNE_DEMO_RUN names no run of the demo")
        return named
    folder = tmp_path_factory.mktemp("runs")
    given = ("stage.init_from=none", "stage.lr={projector: 0.01, llm: 0.02}", "stage.max_steps=12")
    assert main(["stage=finetune", *toys.arguments(*given, "stage.evaluate=false", runs=folder)]) == 0
    return str(folder / "latest")


@pytest.mark.timeout(900)
def test_the_pipeline_says_what_chat_says(run, tmp_path):
    assert main(["export", f"ckpt={run}", f"out={tmp_path / 'hf'}", "layout=hf"]) == 0
    processor = AutoProcessor.from_pretrained(tmp_path / "hf")
    processor.image_processor = AutoImageProcessor.from_pretrained(tmp_path / "hf", backend="pil")
    ask = pipeline("image-text-to-text", model=str(tmp_path / "hf"), processor=processor, dtype="float32")
    model, config = open_trained(run, [], Precision.fp32)
    test = open_test(config, model)
    different, asked = [], 0
    for question in read_questions(test, NUM_QUESTIONS):
        sample = question.sample
        if len(sample.pictures) != 1:
            continue
        ours = answer(model, [prompt_of(test, sample)], NEW_TOKENS)[0]
        image = Image.open(test.root / sample.pictures[0].path).convert("RGB")
        turns = [
            {"role": turn.role, "content": [{"type": "text", "text": turn.text.strip()}]} for turn in sample.messages
        ]
        turns[0]["content"].insert(0, {"type": "image", "image": image})
        options = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
        said = ask(text=turns[:-1], generate_kwargs=options, return_full_text=False)
        asked += 1
        if said[0]["generated_text"].strip() != ours:
            different.append((sample.id, ours, said[0]["generated_text"]))
    assert asked >= 3
    assert not different, f"{len(different)} of {asked} answers differ"
