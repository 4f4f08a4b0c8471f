"""Expected answers may be thought out first: that has room, is read before likelihoods, and is not scored."""

import pytest
from toys import write_jsonl

from vlm_tune.config.parse import load_config
from vlm_tune.evaluation.evaluate import THINK_TOKENS, ask, open_test, read_questions, room_for_reasoning
from vlm_tune.evaluation.likelihood import encode_answers
from vlm_tune.evaluation.metrics import AUTO
from vlm_tune.model.build import build_model

THOUGHT = "a circle is seen, and it is not blue"
ANSWERS = {
    "beside": {"role": "assistant", "reasoning_content": THOUGHT, "content": "red"},
    "in the text": {"role": "assistant", "content": f"<think>\n{THOUGHT}\n</think>\n\nred \n"},
    "none": {"role": "assistant", "content": "red"},
}


@pytest.fixture(scope="module")
def opened(toys, tmp_path_factory):
    """Open the toy model on the same question three times, its answer thought out as ANSWERS say."""
    path = tmp_path_factory.mktemp("asked") / "test.jsonl"
    asked = {"role": "user", "content": "Which colour?"}
    write_jsonl(path, [{"id": name, "messages": [asked, answer]} for name, answer in ANSWERS.items()])
    model = build_model(load_config(toys.arguments(f"data.test={path}")))
    test = open_test(model.config, model)
    return model, test, read_questions(test)


def test_what_is_expected_is_the_answer_alone(opened):
    assert [question.expected for question in opened[2]] == ["red"] * 3


def test_reasoning_has_twice_the_room_of_the_longest_expected_and_none_where_none_is(opened):
    model, _, (beside, inside, none) = opened
    length = len(model.tokenizer.encode(THOUGHT, add_special_tokens=False))
    assert room_for_reasoning(model, [beside, none]) == 2 * length + THINK_TOKENS
    assert room_for_reasoning(model, [inside, none]) >= 2 * length + THINK_TOKENS
    assert room_for_reasoning(model, [none]) == 0


def test_an_answer_is_scored_by_what_follows_its_reasoning(opened, monkeypatch):
    model, test, questions = opened
    said = "<think>\nblue?\n</think>\n\nRed."
    monkeypatch.setattr("vlm_tune.evaluation.evaluate.answer", lambda model, prompts, most: [said] * len(prompts))
    asked = ask(model, test, questions, AUTO)
    assert [(each.answer, each.score) for each in asked] == [(said, 1.0)] * 3


def test_likelihoods_of_answers_are_behind_their_reasoning(opened):
    model, test, (beside, inside, none) = opened
    texts = [
        model.tokenizer.decode(encode_answers(test, each, ["blue"])[0].input_ids) for each in (beside, inside, none)
    ]
    assert texts[0] == texts[1]
    assert THOUGHT in texts[0]
    assert texts[0].index(THOUGHT) < texts[0].index("</think>") < texts[0].rindex("blue")
    assert THOUGHT not in texts[2]
