"""What a model finds likely: perplexity is its loss, and choices behind one question are measured as each alone."""

import math

import pytest
import torch
from PIL import Image
from toys import write_jsonl

from vlm_tune.config.parse import load_config
from vlm_tune.data.batch import add_pictures, collate
from vlm_tune.evaluation.evaluate import open_test, read_questions
from vlm_tune.evaluation.likelihood import choices, encode_answers, token_losses, weigh
from vlm_tune.evaluation.metrics import METRICS
from vlm_tune.model.build import build_model


@pytest.fixture(scope="module")
def opened(toys, tmp_path_factory):
    """Open the toy model on questions with choices, each with a picture."""
    path = tmp_path_factory.mktemp("asked") / "test.jsonl"
    rows = [
        {
            "image": f"pictures/test_{n}.png",
            "question": "Which?",
            "answer": n % 3,
            "choices": ["red", "a blue one", "x"],
        }
        for n in range(4)
    ]
    write_jsonl(path, [row | {"question": f"Which of {n}?"} for n, row in enumerate(rows)])
    config = load_config(toys.arguments(f"data.test={path}", "data.format=vqa", f"data.image.root={toys.data}"))
    model = build_model(config)
    test = open_test(model.config, model)
    return model, test, read_questions(test)


def test_the_choice_of_least_loss_is_chosen_as_if_each_were_alone(opened):
    model, test, questions = opened
    assert choices(questions[0]) == ["A", "B", "C"]
    together = token_losses(model, test, [(question, choices(question)) for question in questions])
    for question, losses, said in zip(
        questions, together, weigh(model, test, questions, METRICS["likelihood"]), strict=True
    ):
        alone = [token_losses(model, test, [(question, [answer])])[0][0] for answer in choices(question)]
        for one, other in zip(losses, alone, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-4)
        totals = [float(each.sum()) for each in alone]
        assert said.answer == "ABC"[totals.index(min(totals))]
        assert said.score == (said.answer == question.expected)


def test_perplexity_is_the_loss_of_training(opened):
    model, test, questions = opened
    examples = [encode_answers(test, question, [question.expected])[0] for question in questions]
    batch = collate(examples, [1.0] * len(examples), packing=True)
    add_pictures(
        batch,
        examples,
        [test.make_tiles(q.sample, e) for q, e in zip(questions, examples, strict=True)],
        [],
        test.encoder.context_id,
    )
    model.vlm.eval()
    with torch.no_grad():
        loss = float(model.vlm(batch)) / len(batch.targets)
    measured = METRICS["perplexity"].scores(weigh(model, test, questions, METRICS["perplexity"]))["all"]
    assert math.log(measured) == pytest.approx(loss, abs=1e-4)


def test_of_several_turns_the_last_answer_alone_is_measured(opened, toys):
    model, _, _ = opened
    test = open_test(model.config, model)
    test = type(test)(toys.data / "test.jsonl", load_config(toys.arguments()).data, model.encoder, test.pictures)
    question = next(each for each in read_questions(test) if len(each.sample.messages) > 2)
    ends = encode_answers(test, question, [question.expected])[0]
    alone = len(model.tokenizer.encode(question.expected, add_special_tokens=False))
    assert alone < ends.num_supervised <= alone + 2  # and the end of the answer


def test_choices_stand_behind_the_same_tiles_where_a_longer_one_leaves_room_for_fewer(toys, tmp_path):
    Image.effect_noise((112, 56), 80).convert("RGB").save(tmp_path / "wide.png")
    asked = {"image": "wide.png", "question": "Which?", "answer": "x", "choices": ["x", "y"]}
    write_jsonl(tmp_path / "test.jsonl", [asked])
    rows = (f"data.test={tmp_path}/test.jsonl", "data.format=vqa", f"data.image.root={tmp_path}")
    answers = ["x", "x x x"]

    def opened_with(*more):
        model = build_model(load_config(toys.arguments(*rows, *more)))
        test = open_test(model.config, model)
        return model, test, read_questions(test)[0]

    _, test, question = opened_with()
    most = len(encode_answers(test, question, answers[:1])[0].input_ids)
    model, test, question = opened_with("data.on_too_long=fewer_tiles", f"data.max_length={most}")
    short, long = (encode_answers(test, question, [answer])[0].num_tiles for answer in answers)
    assert short > long, "the longer answer leaves room for fewer tiles"
    for order in (answers, answers[::-1]):
        assert [each.num_tiles for each in encode_answers(test, question, order)] == [long, long]
        assert len(token_losses(model, test, [(question, order)])[0]) == 2
