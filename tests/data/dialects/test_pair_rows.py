"""Rows of preferences in the layouts of InternVL, TRL, ms-swift and LLaMA-Factory, and every way to get one wrong."""

from pathlib import Path
from typing import Any

import pytest

from vlm_tune.data.dialects.dialects import parse_record, recognise
from vlm_tune.data.sample import Message, Picture, Sample
from vlm_tune.errors import DataError

USER, GOOD, BAD = (
    {"role": role, "content": text} for role, text in (("user", "Q?"), ("assistant", "A cat."), ("assistant", "A dog."))
)
SEEN = {"role": "user", "content": "<image>\nQ?"}
PARTS = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Q?"}]}


def said(text: str) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": [{"type": "text", "text": text}]}]


INTERNVL = {"image": "a.png", "question": "<image>\nQ?", "chosen": "A cat.", "rejected": "A dog."}
TRL = {"images": ["a.png"], "prompt": [PARTS], "chosen": said("A cat."), "rejected": said("A dog.")}
SWIFT = {"messages": [SEEN, GOOD], "images": ["a.png"], "rejected_response": "A dog."}
FACTORY = {
    "images": ["a.png"],
    "conversations": [{"from": "human", "value": "<image>\nQ?"}],
    "chosen": {"from": "gpt", "value": "A cat."},
    "rejected": {"from": "gpt", "value": "A dog."},
}
SEEING = {
    "InternVL": INTERNVL,
    "InternVL without a mark": INTERNVL | {"question": "Q?"},
    "InternVL, a list of one": INTERNVL | {"image": ["a.png"]},
    "TRL": TRL,
    "TRL with marks": TRL | {"prompt": [SEEN], "chosen": [GOOD], "rejected": [BAD]},
    "ms-swift": SWIFT,
    "ms-swift, messages": {**SWIFT, "rejected_messages": [SEEN, BAD], "rejected_response": None},
    "ms-swift, the same pictures": SWIFT | {"rejected_images": ["a.png"]},
    "ms-swift, one turn": {
        "query": "<image>\nQ?",
        "response": "A cat.",
        "rejected_response": "A dog.",
        "images": ["a.png"],
    },
    "LLaMA-Factory": FACTORY,
    "LLaMA-Factory, no role": FACTORY | {"chosen": {"value": "A cat."}, "rejected": {"value": "A dog."}},
    "LLaMA-Factory, messages": {"messages": [SEEN], "chosen": GOOD, "rejected": BAD, "images": ["a.png"]},
}
BLIND = {
    "InternVL": {"question": "Q?", "chosen": "A cat.", "rejected": "A dog."},
    "TRL": {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    "TRL as text": {"prompt": "Q?", "chosen": "A cat.", "rejected": "A dog."},
    "TRL, whole conversations": {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "TRL, whole conversations and the prompt": {"prompt": "Q?", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "LLaMA-Factory, alpaca": {"instruction": "Q?", "input": "", "chosen": "A cat.", "rejected": "A dog."},
    "LLaMA-Factory, text": {
        "conversations": [{"from": "human", "value": "Q?"}],
        "chosen": "A cat.",
        "rejected": "A dog.",
    },
}


def parse(record: dict[str, Any]) -> Sample:
    return parse_record(record, "auto", "train.jsonl:17", 16, Path())


@pytest.mark.parametrize("layout", SEEING)
def test_a_row_with_a_picture_is_one_prompt_with_two_answers(layout: str) -> None:
    sample = parse(SEEING[layout])
    assert sample.pictures == (Picture("a.png"),)
    assert [part.strip() for part in sample.messages[0].parts if isinstance(part, str)] == ["Q?"]
    assert sample.messages[1:] == (Message("assistant", ("A cat.",), supervised=True),)
    assert sample.rejected == Message("assistant", ("A dog.",), supervised=True)


@pytest.mark.parametrize("layout", BLIND)
def test_a_row_of_text_is_one_prompt_with_two_answers(layout: str) -> None:
    sample = parse(BLIND[layout])
    assert [message.text.strip() for message in sample.turns] == ["Q?", "A cat.", "A dog."]
    assert [message.supervised for message in sample.turns] == [False, True, True]
    assert [message.role for message in sample.turns] == ["user", "assistant", "assistant"]


def test_pictures_without_a_place_stand_before_the_first_question_as_in_trl() -> None:
    sample = parse({"images": ["a.png", "b.png"], "prompt": "Q?", "chosen": "A cat.", "rejected": "A dog."})
    assert sample.messages[0].parts == (Picture("a.png"), Picture("b.png"), "Q?")


def test_reading_a_row_does_not_change_it() -> None:
    record = {"images": ["a.png"], "chosen": [USER, GOOD], "rejected": [USER, BAD]}
    assert parse(record) == parse(record)
    assert record["chosen"] == [USER, GOOD]


def test_of_several_answers_the_last_alone_is_trained_on() -> None:
    turns = [USER, {"role": "assistant", "content": "Hm."}, USER]
    sample = parse({"messages": [*turns, GOOD], "rejected_response": "A dog."})
    assert [message.supervised for message in sample.turns] == [False, False, False, True, True]


def test_the_branches_are_the_two_conversations() -> None:
    chosen, rejected = parse(INTERNVL).branches
    assert (chosen.messages[-1].text, rejected.messages[-1].text) == ("A cat.", "A dog.")
    assert chosen.messages[:-1] == rejected.messages[:-1]
    assert parse({"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}).rejected is None


def test_the_dialect_of_a_pair_is_that_of_its_halves() -> None:
    assert [recognise(record) for record in (INTERNVL, TRL, SWIFT, FACTORY)] == ["llava", "openai", "sharegpt", "llava"]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (INTERNVL | {"rejected": "A cat."}, "both answers of the pair are equal"),
        (INTERNVL | {"rejected": "A  cat.\n"}, "differ only in white space"),
        (INTERNVL | {"rejected": " \n"}, "rejected: .*the answer is empty"),
        (INTERNVL | {"chosen": " \n"}, "the answer is empty"),
        (INTERNVL | {"rejected": ""}, 'a pair of answers has "chosen". Write "chosen" and "rejected"'),
        (INTERNVL | {"chosen": None}, 'a pair of answers has "rejected"'),
        (INTERNVL | {"rejected_response": "A fox."}, 'a pair of answers has "chosen", "rejected", "rejected_response"'),
        ({"chosen": "A", "rejected": "B"}, "a pair without its question"),
        (INTERNVL | {"price": 3}, '"price" is not read in rows of llava'),
        (INTERNVL | {"image": "b.png", "question": "<image> <image> Q?"}, '2 "<image>" marks but 1 image'),
        (SWIFT | {"rejected_images": ["b.png"]}, '"rejected_images" differ from "images"'),
        (
            {**SWIFT, "rejected_response": None, "rejected_images": ["a.png"]},
            '"rejected_images" without "rejected_resp',
        ),
        ({"rejected_response": "A dog.", "text": "A"}, '"rejected_response" needs "messages"'),
        (
            {"messages": [USER, GOOD], "rejected_messages": [USER | {"content": "Why?"}, BAD]},
            "the two conversations of the pair differ in turn 1, before their last answers",
        ),
        (
            {"messages": [USER, GOOD], "rejected_messages": [USER, BAD, USER, GOOD]},
            "the two conversations of the pair differ in their number of turns",
        ),
        (TRL | {"messages": [USER, GOOD]}, '"messages" beside "prompt"'),
        (
            SWIFT | {"rejected_response": "<bbox>", "objects": {"ref": [], "bbox": [[1, 2, 3, 4]]}},
            'the turns hold 0 marks "<bbox>"',
        ),
    ],
)
def test_a_mistake_in_a_pair_is_named(record: dict[str, Any], reason: str) -> None:
    with pytest.raises(DataError, match=reason) as caught:
        parse(record)
    assert caught.value.where == "train.jsonl:17"


def test_fields_of_a_pair_may_be_ignored_together() -> None:
    record = {"messages": [USER, GOOD], "rejected_response": "A dog."}
    sample = parse_record(record, "auto", "a:1", 0, Path(), frozenset({"rejected_response"}))
    assert sample.rejected is None
