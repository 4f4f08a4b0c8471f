"""Each fault of a row is an error with file, line, id, reason and remedy."""

import re
from pathlib import Path
from typing import Any

import pytest

from vlm_tune.data.dialects.dialects import parse_record
from vlm_tune.data.sample import Sample
from vlm_tune.errors import DataError

HUMAN, GPT = {"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}
USER, ASSISTANT = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}


def parse(record: Any, fmt: str, **options: Any) -> Sample:
    return parse_record(record, fmt, "train.jsonl:17", 16, **options)


def llava(*turns: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"id": "dish_0042", "conversations": list(turns), **fields}


def human(value: Any) -> dict[str, Any]:
    return {"from": "human", "value": value}


FAULTS: list[tuple[str, dict[str, Any], str]] = [
    ("llava", {}, 'no "conversations". It has no fields'),
    ("llava", {"foo": 1}, 'no "conversations". It has "foo": name the right dialect with data.format.'),
    ("llava", llava(), 'the conversation is empty: "conversations" holds no turns. Write some, or remove the row.'),
    ("llava", {"conversations": "x"}, '"conversations" is text, not a list of turns.'),
    ("llava", llava("x"), "turn 1 is text, not an object. Write {...}."),  # type: ignore[arg-type]
    ("llava", llava({"from": "bot", "value": "Q"}), "turn 1: unknown role 'bot' in \"from\". Known here: human, gpt,"),
    ("llava", llava({"value": "Q"}), 'turn 1: unknown role None in "role".'),
    ("llava", llava({"from": ["human"], "value": "Q"}), "turn 1: unknown role ['human']"),
    ("llava", llava({"from": "function_call", "value": "Q"}), "turn 1: unknown role 'function_call'"),
    ("llava", llava(HUMAN, HUMAN, GPT), "turns 1 and 2 are both from the user. Join them, or remove one."),
    ("llava", llava(HUMAN, GPT, GPT), "turns 2 and 3 are both from the assistant."),
    ("llava", llava(HUMAN, {"from": "system", "value": "S"}, GPT), "turn 2: the system may only speak first."),
    ("llava", llava(HUMAN), "no answer: the assistant answers no question. Write one, or remove the row."),
    ("llava", llava(GPT), "no answer: the assistant answers no question."),
    ("llava", llava(HUMAN, GPT, HUMAN), "the last turn has no answer. Write one, or remove the turn."),
    ("llava", llava(HUMAN, GPT | {"value": " \n"}), 'turn 2, "value": the answer is empty. Write one, or remove'),
    ("llava", llava(human(""), GPT), 'turn 1, "value" is empty. Write a text, or remove the turn.'),
    ("llava", llava(human(3), GPT), 'turn 1, "value" is a number, not text. Write it in quotes.'),
    ("llava", llava(human(None), GPT), 'turn 1, "value" is null, not text.'),
    ("llava", llava(HUMAN, GPT | {"value": {}}), 'turn 2, "value" is an object, not text.'),
    ("llava", llava(human("\ud800"), GPT), r"holds a broken character '\ud800' at 1. Write it again."),
    ("llava", llava(human("<image>"), GPT), '1 "<image>" mark but 0 images. Give each mark one path in "images".'),
    ("llava", llava(human("<image><image>"), GPT, image="a"), '2 "<image>" marks but 1 image. Give each mark one path'),
    ("llava", llava(HUMAN, GPT, image="a"), '0 "<image>" marks but 1 image. Write one "<image>" per image into the'),
    ("llava", llava(human("<image>"), GPT, image=["a", "b"]), '1 "<image>" mark but 2 images. Write one "<image>" per'),
    ("llava", llava(human("<image>"), GPT, image="a", images=["b"]), '"image" and "images" differ. Keep one of them.'),
    (
        "llava",
        llava(human("<image>"), GPT, image=3),
        "image 1 is a number. Give a path, a data URL or the encoded file.",
    ),
    ("llava", llava(human("<image>"), GPT, image=[""]), "image 1 is empty. Give a path"),
    ("llava", llava(human("<image>"), GPT, image={}), "image 1 is an object with no fields, which holds no picture"),
    (
        "llava",
        llava(human("<image>"), GPT, image="data:image/png,x"),
        "a data URL must be written as data:image/png;ba",
    ),
    ("llava", llava(human("<image>"), GPT, image="data:image/png;base64,?"), "image 1: not base64: "),
    ("llava", llava(human("<image>"), GPT, image="data:image/png;base64,"), "image 1: the data URL is empty."),
    ("llava", llava(human("<image>"), GPT, image="a", width=640), "1 widths and 0 heights for 1 images. Give one of"),
    ("llava", llava(human("<image>"), GPT, image="a", width_list=[1, 2], height_list=[1, 2]), "2 widths and 2 heights"),
    (
        "llava",
        llava(human("<image>"), GPT, image="a", width=0, height=1),
        "width or height is 0. Write pixels as a whole",
    ),
    ("llava", llava(human("<image>"), GPT, image="a", width="1", height=1), "width or height is '1'."),
    ("llava", llava(HUMAN, GPT, video="v"), '0 "<video>" marks but 1 video. Write one into a user\'s turn.'),
    (
        "llava",
        llava(human("<video>"), GPT, video="w"),
        'video "w" is not there. It is looked for below data.image.root.',
    ),
    ("llava", llava(human("<video>"), GPT, video="\0"), "the video cannot be read: "),
    ("llava", llava(human("<video>"), GPT, video="x" * 999), "the video cannot be read: "),
    ("llava", llava(human("<video>"), GPT, video="e"), 'video "e" holds no frames. Known: .jpg'),
    (
        "llava",
        llava(human("<video>"), GPT, video="m.mp4"),
        'video "m.mp4" is empty (0 bytes). Copy it again',
    ),
    ("llava", llava(human("<video>"), GPT, video="../v"), 'video "../v" lies outside of the image root.'),
    (
        "llava",
        llava(human("<video>"), GPT, video="v", clip=[0, 1]),
        '"clip" needs a video file, "v" is a folder. Keep only',
    ),
    (
        "llava",
        llava(human("<video>"), GPT, video="v", image="a"),
        'both "image" and "video". Split them into two rows.',
    ),
    ("sharegpt", llava(HUMAN, GPT, tools="[1]"), '"tools" is not read in rows of sharegpt. Write the tools into the'),
    ("sharegpt", llava({"from": "system", "value": "S"}, HUMAN, GPT, system="T"), 'both "system" and a first turn of'),
    ("openai", {"messages": [USER, ASSISTANT | {"loss": 2}]}, "turn 2: the loss flag is 2. Write true or false."),
    (
        "openai",
        {"messages": [USER, ASSISTANT | {"loss": False}]},
        'nothing to train on: every answer has "loss": false.',
    ),
    (
        "openai",
        {"messages": [USER, ASSISTANT | {"tool_calls": [1]}]},
        '"tool_calls" is not read in turn 2. Write the call into the text',
    ),
    ("openai", {"messages": [USER | {"content": []}, ASSISTANT]}, 'turn 1, "content" is empty.'),
    ("openai", {"messages": [USER | {"content": [{"type": "audio"}]}]}, "turn 1, part 1: unknown type 'audio'. Known:"),
    ("openai", {"messages": [USER | {"content": [3]}]}, "turn 1, part 1: unknown type None."),
    ("openai", {"messages": [USER | {"content": [{"type": "image"}]}]}, "turn 1, part 1: an image without a source."),
    ("openai", {"messages": [USER, ASSISTANT], "images": ["a"]}, '1 of "images" belong to no image part. Add {"type"'),
    (
        "openai",
        {"messages": [USER, ASSISTANT | {"content": [{"type": "image", "path": "a"}]}]},
        "turn 2, part 1: an image in a turn of the assistant. Only the user shows images.",
    ),
    (
        "openai",
        {"messages": [USER | {"content": [{"type": "image", "path": "a", "url": "b"}]}]},
        "turn 1, part 1: more than one source. Keep one.",
    ),
    ("xtuner", {"conversation": [{"input": "Q"}]}, 'turn 1: no answer: "output" is missing. Write one, or remove'),
    ("xtuner", {"conversation": [{"input": "Q", "output": ""}]}, 'turn 1, "output": the answer is empty.'),
    ("alpaca", {"instruction": "Q", "output": "<nooutput>"}, 'the output is "<nooutput>": the row has no answer.'),
    ("alpaca", {"instruction": " ", "output": "A"}, '"instruction" is empty.'),
    (
        "alpaca",
        {"instruction": "Q", "output": "A", "history": [["q"]]},
        '"history" 1 is not a pair [question, answer].',
    ),
    (
        "alpaca",
        {"instruction": "Q", "output": "A", "image": "a"},
        '"image" is not read in rows of alpaca. Such rows are text only.',
    ),
    ("oasst1", {"text": "Hi### Human: Q### Assistant: A"}, 'the text does not begin with "### Human:".'),
    ("oasst1", {"text": "### Human: Q### Human: Q### Assistant: A"}, "turns 1 and 2 are both from the user."),
    ("text", {"text": ""}, '"text": the answer is empty.'),
    ("openorca", {"question": "Q"}, 'no "response". It has "question"'),
    ("msagent", {"conversations": "open('x')"}, '"conversations" is text, not a list of turns. It is neither JSON nor'),
    ("msagent", {"conversations": [{"from": "robot", "value": "x"}]}, "turn 1: 'robot' is unknown or not in turn."),
    (
        "msagent",
        {"conversations": [{"from": "user", "value": "x"}, {"from": "assistant", "value": "<|startofexec|>{}"}]},
        "turn 2: the answer is empty before the result of a call.",
    ),
    (
        "msagent",
        {"conversations": [{"from": "user", "value": "x"}, {"from": "assistant", "value": "a<|startofexec|>{}"}]},
        "turn 2: <|startofexec|> without <|endofexec|>. Close it.",
    ),
    (
        "msagent",
        {
            "conversations": [
                {"from": "user", "value": "x"},
                {"from": "assistant", "value": "<|startofthink|>{'a': 1}<|endofthink|>"},
            ]
        },
        "turn 2: the call or its result is not JSON",
    ),
    ("caption", {"caption": "A"}, "a caption needs 1 image, the row has 0."),
    ("caption", {"image": ["a", "b"], "caption": "A"}, "a caption needs 1 image, the row has 2."),
    ("caption", {"image": "a"}, 'no "caption".'),
    (
        "vqa",
        {"question": "Q", "answer": "z", "choices": ["x", "y"]},
        'the answer "z" fits no choice. Write the letter,',
    ),
    ("vqa", {"question": "Q", "answer": 2, "choices": ["1", "2", "3"]}, 'the answer "2" fits more than one choice.'),
    ("vqa", {"question": "Q", "answer": 0, "choices": ["x"]}, "1 choices. Give 2 to 26 as a list, or none for an open"),
    ("vqa", {"question": "Q", "answer": 0, "choices": ["x", None]}, "choice 2 is null, not text. Write it in quotes."),
]


@pytest.mark.parametrize(("fmt", "record", "reason"), FAULTS, ids=[fault[2][:60] for fault in FAULTS])
def test_fault(fmt: str, record: dict[str, Any], reason: str, tmp_path: Path) -> None:
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / "1.jpg").touch()
    (tmp_path / "e").mkdir()
    (tmp_path / "m.mp4").touch()
    identity = ' (id "dish_0042")' if "id" in record else ""
    with pytest.raises(DataError, match="^" + re.escape(f"train.jsonl:17{identity}: ") + ".*" + re.escape(reason)):
        parse(record, fmt, image_root=tmp_path)


def test_the_message_of_a_mark_without_image_is_exact() -> None:
    with pytest.raises(DataError) as caught:
        parse(llava(human("<image><image>"), GPT, image="a"), "llava")
    wanted = 'train.jsonl:17 (id "dish_0042"): 2 "<image>" marks but 1 image. Give each mark one path in "images".'
    assert str(caught.value) == wanted


@pytest.mark.parametrize("record", [[], "x", 3, None])
def test_a_row_must_be_an_object(record: object) -> None:
    with pytest.raises(DataError, match=r"train.jsonl:17: a row must be an object, not "):
        parse(record, "llava")


@pytest.mark.parametrize("given", [[], {}, True, 1.5, "a\nb"])
def test_an_id_must_be_text_or_a_number(given: object) -> None:
    with pytest.raises(DataError, match=r'"id" is .*. Write an id as one line of text or a whole number.'):
        parse(llava(HUMAN, GPT) | {"id": given}, "llava")
