"""The reasoning of an answer stands before it as the template writes it, and is trained on as the key says."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from vlm_tune.data.dialects.dialects import parse_record
from vlm_tune.data.encode import Encoder
from vlm_tune.data.example import NO_LOSS
from vlm_tune.data.fit import EncoderSettings
from vlm_tune.data.sample import Sample
from vlm_tune.data.text.chat_template import choose_template
from vlm_tune.data.text.templates import load_template
from vlm_tune.errors import DataError

GOLDEN = Path(__file__).parents[2] / "golden" / "tokenizer"
WHY = "Two on the left, one on the right, so three."
THOUGHT = f"<think>\n{WHY}\n</think>\n\n"
OWN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}[[{{ m.reasoning_content }}]] {% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def row(key: str = "reasoning_content", dialect: str = "openai", **more: Any) -> dict[str, Any]:
    """Make a row whose answer is thought out."""
    if dialect == "openai":
        turns = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "Three.", key: WHY} | more]
        return {"messages": turns}
    return {
        "conversations": [{"from": "human", "value": "How many?"}, {"from": "gpt", "value": "Three.", key: WHY} | more]
    }


def parse(record: dict[str, Any], dialect: str = "auto") -> Sample:
    return parse_record(record, dialect, "train.jsonl:17", 16)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(GOLDEN)


def texts(tokenizer, template, sample, **settings):
    """Encode a sample; return its whole text and what of it is supervised."""
    example = Encoder(tokenizer, template, EncoderSettings(**settings)).encode(sample)
    return tokenizer.decode(example.input_ids), tokenizer.decode(example.labels[example.labels != NO_LOSS])


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize("dialect", ["openai", "sharegpt", "llava"])
def test_reasoning_is_read_under_each_of_its_names(key, dialect):
    assert parse(row(key, dialect), dialect).messages[-1].reasoning == WHY


@pytest.mark.parametrize("name", ["chatml", "internvl2_5", "Hermes-2", "phi3-chat", "v1", "qwen_chat"])
def test_reasoning_stands_before_the_answer_and_is_trained_on(tokenizer, name):
    whole, supervised = texts(tokenizer, load_template(name), parse(row()))
    assert supervised.lstrip(" ").startswith(f"{THOUGHT}Three.")
    assert f"{THOUGHT}Three." in whole


@pytest.mark.parametrize("name", ["chatml", "internvl2_5", "qwen_chat"])
def test_reasoning_without_loss_is_only_shown(tokenizer, name):
    whole, supervised = texts(tokenizer, load_template(name), parse(row()), reasoning_loss=False)
    assert supervised == "Three.<|im_end|>"
    assert f"{THOUGHT}Three." in whole


def test_reasoning_of_a_turn_without_loss_carries_none(tokenizer):
    sample = parse({"messages": [*row()["messages"], *row(loss=False)["messages"]]})
    assert texts(tokenizer, load_template("chatml"), sample)[1] == f"{THOUGHT}Three.<|im_end|>"


def test_reasoning_is_one_text_with_its_marks(tokenizer):
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN)
    tokenizer.add_tokens(["<think>", "</think>"])
    example = Encoder(tokenizer, load_template("chatml")).encode(parse(row()))
    expected = tokenizer(f"{THOUGHT}Three.<|im_end|>", add_special_tokens=False)["input_ids"]
    assert example.labels[example.labels != NO_LOSS].tolist() == expected


def test_an_earlier_answers_reasoning_is_in_the_prompt_too(tokenizer):
    sample = parse({"messages": row()["messages"] * 2})
    encoder = Encoder(tokenizer, load_template("chatml"))
    prompt = encoder.encode_prompt(sample).input_ids.tolist()
    assert encoder.encode(sample).input_ids.tolist()[: len(prompt)] == prompt


def test_a_template_without_a_place_refuses_reasoning(tokenizer):
    with pytest.raises(
        DataError, match=r"train.jsonl:17 .*reasoning beside an answer, but model.template=plain has no"
    ):
        texts(tokenizer, load_template("plain"), parse(row()))


def test_the_tokenizers_own_template_says_where_reasoning_stands():
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN)
    tokenizer.chat_template = OWN
    template = choose_template("tokenizer", tokenizer)
    assert texts(tokenizer, template, parse(row()))[1] == f"[[{WHY}]] Three.<|im_end|>"


@pytest.mark.parametrize(
    "condition", ["false", "m.reasoning_content and loop.last"], ids=["leaves it out", "of the last answer alone"]
)
def test_a_template_of_the_tokenizer_that_leaves_reasoning_out_refuses_it(condition):
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN)
    tokenizer.chat_template = OWN.replace("m.reasoning_content %}", f"{condition} %}}", 1)
    with pytest.raises(DataError, match=r"model.template=tokenizer has no place for it"):
        texts(tokenizer, choose_template("tokenizer", tokenizer), parse(row()))


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (row(thinking="x"), 'turn 2, "reasoning_content" and "thinking". Keep one of them'),
        (row(reasoning_content=3), 'turn 2, "reasoning_content" is a number, not text'),
        (row(reasoning_content=["x"]), 'turn 2, "reasoning_content" is a list, not text'),
        (row(reasoning_content=" "), 'turn 2, "reasoning_content": the answer is empty'),
        (
            {"messages": [{"role": "user", "content": "Q", "reasoning": "x"}, row()["messages"][1]]},
            'turn 1, "reasoning" in a turn of the user',
        ),
    ],
)
def test_reasoning_that_says_two_things_or_nothing_is_refused(record, reason):
    with pytest.raises(DataError, match=reason):
        parse(record)


def test_empty_reasoning_is_none():
    assert parse(row(reasoning_content="")).messages[-1].reasoning == ""
