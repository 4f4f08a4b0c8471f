"""Answers do not depend on company: a batch of prompts is answered as each one alone, and by the plain formula."""

from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch

from vlm_tune.data.fit import no_pictures
from vlm_tune.data.sample import Message, Sample
from vlm_tune.evaluation.evaluate import answer_once, blind, prompt_of
from vlm_tune.model.generate import Prompt, answer, answer_text, answering, embed_prompts

ROWS = [0, 1, 6, 2, 13]  # pictures of one and of three tiles, one and two turns, no picture


@pytest.fixture(scope="module")
def staged(toys):
    return toys.staged("stage=finetune")


@pytest.fixture(scope="module")
def prompts(staged):
    data = staged.data.train.data
    return [prompt_of(data, data.sample(row)) for row in ROWS]


def parts_of(model):
    return model.vlm.vision, model.vlm.llm.get_output_embeddings()


@torch.no_grad()
def greedy(model, prompt, count):
    """Take the likeliest next token, one whole pass over everything so far for each: no cache, no padding, no mask."""
    vlm = model.vlm.eval()
    embeddings, _ = embed_prompts(model, [prompt])
    ids = []
    for _ in range(count):
        logits = vlm.llm(inputs_embeds=embeddings, use_cache=False).logits[0, -1]
        ids.append(int(logits.argmax()))
        if ids[-1] in model.encoder.stop_ids:
            break
        new = vlm.llm.get_input_embeddings()(torch.tensor([[ids[-1]]]))
        embeddings = torch.cat([embeddings, new], dim=1)
    return model.tokenizer.decode(ids, skip_special_tokens=True).strip()


def test_the_prompts_differ_in_length_and_pictures(prompts):
    # or the tests below would not pad
    assert len({len(prompt.example.input_ids) for prompt in prompts}) > 2
    assert {len(prompt.tiles) for prompt in prompts} >= {0, 3}


def test_a_batch_is_answered_as_each_prompt_alone(staged, prompts):
    together = answer(staged.model, prompts, 12)
    assert together == [answer(staged.model, [prompt], 12)[0] for prompt in prompts]
    assert len(set(together)) > 1


@pytest.mark.parametrize("number", range(len(ROWS)))
def test_an_answer_is_the_plain_greedy_one(staged, prompts, number):
    assert answer(staged.model, [prompts[number]], 8) == [greedy(staged.model, prompts[number], 8)]


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("<ref>it</ref><box>[[1, 2]]</box><|im_end|>", "<ref>it</ref><box>[[1, 2]]</box>"),
        ("yes<|im_end|><|endoftext|><|endoftext|>", "yes"),
        ("<|im_start|>a <quad>b</quad></s>", "a <quad>b</quad>"),
        ("<img>a</img>", "a"),
    ],
)
def test_an_answer_keeps_the_tokens_that_belong_to_it(staged, text, read):
    ids = staged.model.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert answer_text(staged.model, ids) == read


@pytest.mark.parametrize(("is_blind", "pictures", "rows"), [(False, 2, 3), (True, 1, 2)])
def test_a_picture_is_read_once_and_equal_prompts_are_answered_once(staged, prompts, is_blind, pictures, rows):
    model, one = staged.model, prompts[0]
    longer = Prompt(
        replace(one.example, input_ids=np.append(one.example.input_ids, one.example.input_ids[-1])), one.tiles
    )
    asked, seen = [one, Prompt(one.example, 255 - one.tiles), longer, one], []
    with blind(model) if is_blind else nullcontext():
        alone = [answer(model, [prompt], 1)[0] for prompt in asked]
        hooks = [part.register_forward_hook(lambda _, given, made: seen.append(len(made))) for part in parts_of(model)]
        assert answer_once(model, asked, 1) == alone
    for hook in hooks:
        hook.remove()
    assert seen == [pictures * len(one.tiles), rows]


def test_padding_stands_on_the_left_and_is_masked(staged, prompts):
    with answering(staged.model):
        embeddings, mask = embed_prompts(staged.model, prompts)
    lengths = [len(prompt.example.input_ids) for prompt in prompts]
    assert mask.sum(dim=1).tolist() == lengths
    assert embeddings.shape[:2] == mask.shape == (len(ROWS), max(lengths))
    assert all(row[-1] == 1 and (row.diff() >= 0).all() for row in mask)


def test_prompts_of_text_alone_are_answered(staged):
    sample = Sample("chat", (Message("user", ("Hello",)), Message("assistant", ("",), supervised=True)))
    example = staged.model.encoder.encode_prompt(sample, no_pictures)
    prompt = Prompt(example, np.zeros((0, 56, 56, 3), dtype=np.uint8))
    assert answer(staged.model, [prompt], 8) == [greedy(staged.model, prompt, 8)]


def test_an_answer_ends_at_the_templates_end(staged, prompts, monkeypatch):
    free = answer(staged.model, prompts[:1], 12)[0]
    first = int(staged.model.tokenizer(free, add_special_tokens=False)["input_ids"][0])
    stop_ids = (*staged.model.encoder.stop_ids, first)  # a random model never says the real ones
    monkeypatch.setattr(staged.model.encoder, "stop_ids", stop_ids)
    assert len(answer(staged.model, prompts[:1], 12)[0]) < len(free)


def test_dropout_is_off_while_answering(toys):
    staged = toys.staged("stage=finetune", "stage.lora.dropout=0.9")
    data = staged.data.train.data
    prompt = prompt_of(data, data.sample(0))
    staged.model.vlm.train()
    with torch.no_grad():
        for name, weight in staged.model.vlm.named_parameters():
            if "lora_B" in name:
                weight.normal_()  # an untrained adapter adds nothing that dropout could change
    assert answer(staged.model, [prompt], 8) == answer(staged.model, [prompt], 8)


@pytest.mark.parametrize("stage", ["stage=finetune", "stage=finetune_full"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_answers_are_in_the_arithmetic_of_training(toys, stage, precision):
    model = toys.staged(stage, f"trainer.precision={precision}").model
    with answering(model):
        assert torch.is_autocast_enabled("cpu") == (precision == "bf16")


def test_each_module_gets_its_own_mode_back(staged, prompts):
    vlm = staged.model.vlm
    vlm.train()
    vlm.vision.eval()
    before = [module.training for module in vlm.modules()]
    answer(staged.model, prompts[:1], 2)
    assert [module.training for module in vlm.modules()] == before
    assert set(before) == {True, False}


def test_a_failure_gives_the_modes_back_too(staged):
    staged.model.vlm.train()
    with pytest.raises(ZeroDivisionError), answering(staged.model):
        raise ZeroDivisionError
    assert staged.model.vlm.training
