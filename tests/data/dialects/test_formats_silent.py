"""What a row says is trained on or refused: no field that changes its meaning is passed over."""

import re
from typing import Any

import pytest

from vlm_tune.data.dialects.dialects import parse_record, recognise
from vlm_tune.data.sample import Picture, Sample
from vlm_tune.errors import DataError

TURNS = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
SHOWN = [{"from": "human", "value": "<image>Q"}, {"from": "gpt", "value": "A"}]
MESSAGES = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
FILM = [{"from": "human", "value": "<video>Q"}, {"from": "gpt", "value": "A"}]


def parse(record: dict[str, Any], fmt: str = "auto") -> Sample:
    return parse_record(record, fmt, "train.jsonl:17", 16)


def test_a_system_field_beside_a_picture_is_kept() -> None:
    record = {"conversations": SHOWN, "image": "a.jpg", "system": "Be brief."}
    assert recognise(record) == "sharegpt"
    assert parse(record).messages[0].text == "Be brief."


@pytest.mark.parametrize(
    ("fmt", "record", "reason"),
    [
        (
            "llava",
            {"conversations": TURNS, "system": "S"},
            '"system" is not read in rows of llava. Write it as the fi',
        ),
        ("openai", {"messages": MESSAGES, "system": "S"}, '"system" is not read in rows of openai. Write it as the fi'),
        (
            "openai",
            {"messages": MESSAGES, "tools": [{"type": "function"}]},
            '"tools" is not read in rows of openai. Write the tools in',
        ),
        ("llava", {"conversations": TURNS, "image_path": "a.jpg"}, '"image_path" is not read here. Name pictures in'),
        ("openai", {"messages": MESSAGES, "file_name": "b/a.PNG"}, '"file_name" is not read here. Name pictures in'),
        ("xtuner", {"input": "Q", "output": "A", "filepath": "a.webp"}, '"filepath" is not read here. Name pictures'),
        ("sharegpt", {"conversations": TURNS, "audios": ["a.wav"]}, '"audios" is not read in rows of sharegpt. Rem'),
        ("sharegpt", {"conversations": FILM, "videos": ["a.mp4", "b.mp4"]}, "2 videos. Only one a row is read"),
        (
            "openai",
            {"messages": MESSAGES, "videos": ["a.mp4"]},
            '"videos" is not read in rows of openai. Videos are re',
        ),
        (
            "xtuner",
            {"input": "Q", "output": "A", "video": "a.mp4"},
            '"video" is not read in rows of xtuner. Videos are',
        ),
        (
            "alpaca",
            {"instruction": "Q", "output": "A", "videos": ["a.mp4"]},
            '"videos" is not read in rows of alpaca. V',
        ),
        ("xtuner", {"conversation": [{"input": 0, "output": "A"}]}, 'turn 1, "input" is a number, not text'),
        ("xtuner", {"conversation": [{"system": 0, "input": "Q", "output": "A"}]}, 'turn 1, "system" is a number, not'),
        (
            "vqa",
            {"question": "Q", "A": "x", "B": "", "C": "y", "D": "z", "answer": "C"},
            'column "B" is empty, but "D"',
        ),
        ("vqa", {"question": "Q", "choices": [1.0, 2.0], "answer": 1.0}, 'the answer "1.0" fits more than one choice'),
    ],
)
def test_what_is_not_read_is_refused(fmt: str, record: dict[str, Any], reason: str) -> None:
    with pytest.raises(DataError, match=re.escape(reason)):
        parse(record, fmt)


@pytest.mark.parametrize("field", ["video", "videos"])
def test_one_video_may_stand_in_a_list(field: str) -> None:
    with pytest.raises(DataError, match=r'video "a.mp4" is not there'):
        parse({"conversations": FILM, field: ["a.mp4"]})


@pytest.mark.parametrize("record", [{"text": "T", "file_name": "page.png"}, {"text": "T", "filepath": "a.txt"}])
def test_where_a_text_came_from_is_no_picture(record: dict[str, Any]) -> None:
    assert parse(record, "text").messages[0].text == "T"


@pytest.mark.parametrize(("flags", "is_trained"), [({"loss": None, "weight": 0}, False), ({"loss": None}, True)])
def test_a_loss_flag_that_a_table_fills_with_null_is_none(flags: dict[str, Any], is_trained: bool) -> None:
    turns = [*TURNS, TURNS[0], TURNS[1] | flags]
    assert parse({"conversations": turns}).messages[-1].supervised == is_trained


def test_the_hint_of_a_question_stands_before_it() -> None:
    record = {"question": "What?", "hint": "It is red.", "A": "x", "B": "y", "answer": "A", "image": "a.jpg"}
    assert parse(record, "vqa").messages[0].text.startswith("\nIt is red.\nWhat?\nA. x\nB. y\n")


def test_all_columns_of_choices_are_read() -> None:
    record = {"question": "Q", **dict.fromkeys("ABCDE", "x"), "F": "y", "answer": "F"}
    with pytest.raises(DataError, match="fits no choice"):
        parse(record | {"answer": "G"}, "vqa")
    assert parse(record, "vqa").messages[-1].text == "F"


def test_vqa_puts_pictures_where_the_question_marks_them() -> None:
    """The mark was trained as text, and the picture put before it."""
    record = {"question": "<image>\nWhat is beside <image>?", "answer": "2", "images": ["a", "b"]}
    asked = parse(record, "vqa").messages[0].parts
    assert asked == (Picture("a"), "\nWhat is beside ", Picture("b"), "?")
    with pytest.raises(DataError, match=r'1 "<image>" mark but 2 images'):
        parse(record | {"question": "<image>\nWhat?"}, "vqa")
