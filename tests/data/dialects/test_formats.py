"""Each dialect becomes a Sample that says what its row says. Its faults are in test_formats_faults.py."""

import base64
import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from vlm_tune.data.dialects.dialects import DIALECTS, parse_record, recognise, recognise_rows
from vlm_tune.data.rows.rows import open_rows
from vlm_tune.data.sample import Message, Picture, Sample
from vlm_tune.errors import ConfigError, DataError

HUMAN, GPT = {"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}
USER, ASSISTANT = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
PNG = base64.b64encode(b"\x89PNG").decode()


def parse(record: Any, fmt: str, **options: Any) -> Sample:
    return parse_record(record, fmt, "train.jsonl:17", 16, **options)


def spoken(sample: Sample) -> list[tuple[str, str]]:
    """Write the turns as (role, text), a picture as [path]."""
    return [
        (message.role, "".join(part if isinstance(part, str) else f"[{part.path}]" for part in message.parts))
        for message in sample.messages
    ]


def llava(*turns: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"id": "dish_0042", "conversations": list(turns), **fields}


def human(value: Any) -> dict[str, Any]:
    return {"from": "human", "value": value}


# What each dialect says


def test_llava_keeps_the_picture_where_it_stands() -> None:
    sample = parse(llava(human("<image>\nQ"), GPT, human("More?"), GPT, image="a.jpg"), "llava")
    assert sample == Sample(
        "dish_0042",
        (
            Message("user", (Picture("a.jpg"), "\nQ")),
            Message("assistant", ("A",), supervised=True),
            Message("user", ("More?",)),
            Message("assistant", ("A",), supervised=True),
        ),
        "train.jsonl:17",
    )


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("<image>Q", "[a]Q"),
        ("Q\n<image>", "Q\n[a]"),
        ("Q", None),
        ("Image-1: <image>\nImage-2: <image>\nQ", "Image-1: [a]\nImage-2: [b]\nQ"),
        ("<image><image>", "[a][b]"),
    ],
)
def test_pictures_follow_the_order_of_the_marks(text: str, written: str | None) -> None:
    paths = ["a", "b"][: text.count("<image>")]
    assert spoken(parse(llava(human(text), GPT, image=paths), "llava"))[0] == ("user", written or text)


def test_pictures_may_stand_in_different_turns() -> None:
    sample = parse(llava(human("<image>1"), GPT, human("<image>2"), GPT, images=["a", "b"]), "llava")
    assert [text for role, text in spoken(sample) if role == "user"] == ["[a]1", "[b]2"]


def test_a_mark_in_an_answer_or_a_system_text_is_text() -> None:
    turns = [{"from": "system", "value": "<image> is a tag"}, human("Q"), {"from": "gpt", "value": "Write <image>."}]
    sample = parse(llava(*turns), "llava")
    assert spoken(sample) == [("system", "<image> is a tag"), ("user", "Q"), ("assistant", "Write <image>.")]


@pytest.mark.parametrize("fmt", ["alpaca", "openorca", "openai", "text"])
def test_a_mark_is_text_where_the_dialect_has_none(fmt: str) -> None:
    record = {
        "alpaca": {"instruction": "<image>", "output": "A"},
        "openorca": {"question": "<image>", "response": "A"},
        "openai": {"messages": [{"role": "user", "content": "<image>"}, ASSISTANT]},
        "text": {"text": "<image>"},
    }[fmt]
    assert "<image>" in spoken(parse(record, fmt))[0][1]


@pytest.mark.parametrize(
    ("fields", "sizes"),
    [
        ({"image": "a", "width": 640, "height": 480}, [(640, 480)]),
        ({"image": ["a"], "width_list": [640], "height_list": [480]}, [(640, 480)]),
        ({"image": ["a", "b"], "width_list": [1, 2], "height_list": [3, 4]}, [(1, 3), (2, 4)]),
        ({"image": ["a", "b"], "width": None, "height": None}, [None, None]),
        ({"image": "a", "width": 640.0, "height": 480.0}, [(640, 480)]),
        ({"image": "a"}, [None]),
    ],
)
def test_internvl_sizes_are_kept(fields: dict[str, Any], sizes: list[tuple[int, int] | None]) -> None:
    marks = "<image>" * len(sizes)
    assert [picture.size for picture in parse(llava(human(marks), GPT, **fields), "llava").pictures] == sizes


def test_a_greeting_is_dropped_as_the_references_drop_it() -> None:
    greeting = {"from": "gpt", "value": "Hello, I am a model."}
    assert spoken(parse(llava(greeting, HUMAN, GPT), "llava")) == [("user", "Q"), ("assistant", "A")]


def test_an_empty_system_text_is_left_out() -> None:
    assert spoken(parse(llava({"from": "system", "value": " "}, HUMAN, GPT), "llava"))[0] == ("user", "Q")


def test_sharegpt_tools_speak_on_the_users_side() -> None:
    turns = [HUMAN, {"from": "function_call", "value": "f()"}, {"from": "observation", "value": "3"}, GPT]
    sample = parse(llava(*turns, system="S"), "sharegpt")
    roles = [(message.role, message.supervised) for message in sample.messages]
    assert roles == [("system", False), ("user", False), ("assistant", True), ("user", False), ("assistant", True)]


def test_sharegpt_reads_messages_with_marks() -> None:
    record = {"messages": [{"role": "user", "content": "<image>Q"}, ASSISTANT], "images": ["a.jpg"]}
    assert spoken(parse(record, "auto")) == [("user", "[a.jpg]Q"), ("assistant", "A")]


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "a.jpg"}},
        {"type": "image_url", "image_url": "a.jpg"},
        {"type": "image_url", "image_url": {"url": "file://a.jpg"}},
        {"type": "image", "image": "a.jpg"},
        {"type": "image", "path": "a.jpg"},
    ],
)
def test_openai_image_parts(part: dict[str, Any]) -> None:
    record = {"messages": [{"role": "user", "content": [{"type": "text", "text": "Q"}, part]}, ASSISTANT]}
    assert parse(record, "openai").messages[0].parts == ("Q", Picture("a.jpg"))


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}},
        {"type": "image", "image": {"bytes": b"\x89PNG", "path": None}},
        {"type": "image", "image": b"\x89PNG"},
    ],
)
def test_openai_image_content(part: dict[str, Any]) -> None:
    record = {"messages": [{"role": "user", "content": [part]}, ASSISTANT]}
    assert parse(record, "openai").pictures == (Picture("", content=b"\x89PNG"),)


def test_openai_image_parts_without_source_take_the_rows_images() -> None:
    content = [{"type": "image"}, {"type": "text", "text": "and"}, {"type": "image"}]
    record = {"messages": [{"role": "user", "content": content}, ASSISTANT], "images": ["a", "b"]}
    assert spoken(parse(record, "openai"))[0] == ("user", "[a]and[b]")


@pytest.mark.parametrize(
    ("flag", "supervised"),
    [
        ({"loss": False}, False),
        ({"loss": "False"}, False),
        ({"loss": "true"}, True),
        ({"loss": None}, True),
        ({"weight": 0}, False),
        ({"weight": 1.0}, True),
        ({}, True),
    ],
)
def test_the_loss_flag_of_a_turn(flag: dict[str, Any], supervised: bool) -> None:
    record = {"messages": [USER, ASSISTANT | flag, USER, ASSISTANT]}
    assert parse(record, "openai").messages[1].supervised is supervised


def test_xtuner_reads_system_and_loss_of_each_turn() -> None:
    turns = [{"system": "S", "input": "<image>\nQ", "output": "A"}]
    turns += [{"system": "T", "input": "R", "output": "B", "output_with_loss": False}]
    sample = parse({"conversation": turns, "image": "a"}, "xtuner")
    first = [("system", "S"), ("user", "[a]\nQ"), ("assistant", "A")]
    assert spoken(sample) == [*first, ("system", "T"), ("user", "R"), ("assistant", "B")]
    assert [message.supervised for message in sample.messages if message.role == "assistant"] == [True, False]


def test_xtuner_nested_in_input() -> None:
    record = {"input": {"conversation": [{"system": "S", "input": "Q", "output": "A"}]}}
    assert spoken(parse(record, "auto")) == [("system", "S"), ("user", "Q"), ("assistant", "A")]


def test_xtuner_pretraining_has_an_empty_question() -> None:
    sample = parse({"conversation": [{"input": "", "output": "A"}]}, "xtuner")
    assert sample.messages[0] == Message("user", ())


def test_text_is_one_answer_and_all_supervised() -> None:
    assert parse({"text": " a\n"}, "text").messages == (Message("assistant", (" a\n",), supervised=True),)


def test_alpaca_history_comes_first() -> None:
    record = {"instruction": "Q", "input": "I", "output": "A", "history": [["q", "a"]], "system": "S"}
    turns = [("system", "S"), ("user", "q"), ("assistant", "a"), ("user", "Q\nI"), ("assistant", "A")]
    assert spoken(parse(record, "alpaca")) == turns


def test_oasst1_keeps_headings_and_drops_an_open_question() -> None:
    text = "### Human: Q### Assistant: A\n### Steps\n1### Human: R"
    assert spoken(parse({"text": text}, "auto")) == [("user", "Q"), ("assistant", "A\n### Steps\n1")]


@pytest.mark.parametrize("field", ["image", "images", "image_path", "file_name"])
def test_a_caption_answers_the_picture(field: str) -> None:
    record = {field: "a.jpg", "caption": "A cat."}
    assert spoken(parse(record, "auto")) == [("user", "[a.jpg]"), ("assistant", "A cat.")]


def test_a_table_may_hold_the_picture_itself_in_base64() -> None:
    content = b"\xff\xd8\xff" * 2000
    record = {"image": base64.b64encode(content).decode(), "caption": "A cat."}
    assert parse(record, "caption").pictures == (Picture("", content=content),)


@pytest.mark.parametrize("answer", [1, "1", "B", "tofu", 1.0, "1.0"])
@pytest.mark.parametrize("choices", [["rice", "tofu"], '["rice", "tofu"]', "['rice', 'tofu']"])
def test_vqa_answers_with_the_letter(answer: Any, choices: Any) -> None:
    record = {"question": "What?", "choices": choices, "answer": answer, "image": "a", "question_id": 3}
    sample = parse(record, "auto")
    prompt = "[a]\nWhat?\nA. rice\nB. tofu\nAnswer with the option's letter from the given choices directly."
    assert spoken(sample) == [("user", prompt), ("assistant", "B")]
    assert sample.id == "3"


def test_vqa_reads_the_columns_a_to_d() -> None:
    record = {"question": "What?", "A": "rice", "B": "tofu", "C": "", "D": None, "answer": "B", "image": "a"}
    assert spoken(parse(record, "vqa"))[0][1].startswith("[a]\nWhat?\nA. rice\nB. tofu\nAnswer")


def test_vqa_without_choices_keeps_the_answer() -> None:
    record = {"question": "How many?", "answer": 2, "images": ["a", "b"]}
    assert spoken(parse(record, "vqa")) == [("user", "Image-1: [a]\nImage-2: [b]\nHow many?"), ("assistant", "2")]


@pytest.mark.parametrize("mark", [{"choices": "images"}, {"choices": "", "question_type": "taste", "question_id": "q"}])
def test_vqa_the_images_may_be_the_choices(mark: dict[str, Any]) -> None:
    record = {"question": "Which?", "answer": "1", "images": ["a", "b"], **mark}
    turns = spoken(parse(record, "vqa"))
    assert turns[0][1].startswith("A. [a]\nB. [b]\nWhich?\nAnswer")
    assert turns[1] == ("assistant", "B")


def test_foodieqa_names_its_one_image_in_food_meta() -> None:
    record = {"question": "What?", "choices": ["x", "y"], "answer": "0", "food_meta": {"food_file": "14.jpg"}}
    assert parse(record, "vqa").pictures == (Picture("14.jpg"),)


def test_video_frames_follow_their_numbers(tmp_path: Path) -> None:
    for number in (10, 2, 1):
        (tmp_path / "clip").mkdir(exist_ok=True)
        (tmp_path / "clip" / f"frame{number}.jpg").touch()
    sample = parse(llava(human("<video>\nWhat?"), GPT, video="clip"), "llava", image_root=tmp_path)
    one, two, ten = (f"[clip/frame{number}.jpg]" for number in (1, 2, 10))
    assert spoken(sample)[0][1] == f"Frame-1: {one}\nFrame-2: {two}\nFrame-3: {ten}\nWhat?"
    assert all(picture.is_frame for picture in sample.pictures)


def test_a_missing_id_is_the_rows_number() -> None:
    assert parse({"conversations": [HUMAN, GPT]}, "llava").id == "16"


@pytest.mark.parametrize(("given", "written"), [(7, "7"), (7.0, "7"), ("七", "七"), ("", "16"), (None, "16")])
def test_ids(given: Any, written: str) -> None:
    assert parse(llava(HUMAN, GPT) | {"id": given}, "llava").id == written


# Recognition


@pytest.mark.parametrize(
    ("record", "name"),
    [
        (llava(human("<image>Q"), GPT, image="a"), "llava"),
        (llava(HUMAN, GPT, video="a"), "llava"),
        (llava(HUMAN, GPT), "sharegpt"),
        (llava({"from": "user", "value": "<image>"}, GPT, image="a"), "sharegpt"),
        ({"conversations": "[]"}, "msagent"),
        ({"messages": [USER, ASSISTANT]}, "openai"),
        ({"messages": [{"role": "user", "content": "<image>"}], "images": ["a"]}, "sharegpt"),
        ({"conversation": []}, "xtuner"),
        ({"input": "q", "output": "a"}, "xtuner"),
        ({"instruction": "q", "input": "", "output": "a"}, "alpaca"),
        ({"instruction_zh": "q", "output_zh": "a"}, "alpaca_zh"),
        ({"system_prompt": "", "question": "q", "response": "a"}, "openorca"),
        ({"text": "### Human: q### Assistant: a"}, "oasst1"),
        ({"text": "plain"}, "text"),
        ({"image": "a", "text": "plain"}, "caption"),
        ({"question": "q", "answer": "a", "image": "a"}, "vqa"),
    ],
)
def test_recognise(record: dict[str, Any], name: str) -> None:
    assert recognise(record) == name


def test_a_faulty_first_row_does_not_hide_the_dialect(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"foo": 1}\n{"text" 1}\n{"text": "x"}\n', encoding="utf-8")
    assert recognise_rows(open_rows(tmp_path / "a.jsonl")) == "text"
    with pytest.raises(DataError, match=r"a.jsonl:1: no known dialect"):
        recognise_rows(open_rows(tmp_path / "a.jsonl"), num_tried=2)


def test_an_unknown_dialect_lists_the_known_ones() -> None:
    with pytest.raises(DataError, match=r't:1: no known dialect has the fields "foo". Known: llava, .*, vqa. Name one'):
        recognise({"foo": 1}, "t:1")


def test_the_rows_in_the_documentation_are_recognised() -> None:
    text = (Path(__file__).parents[3] / "docs" / "data_format.md").read_text(encoding="utf-8")
    rows = re.findall(r"### `(\w+)`\n.*?```json\n(.*?)\n```", text, re.DOTALL)
    assert [name for name, _ in rows] == list(DIALECTS)
    for name, row in rows:
        assert parse(json.loads(row), "auto") == parse(json.loads(row), name)
        assert recognise(json.loads(row)) == name


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"data.format=lava is unknown: did you mean llava\? Known: auto, llava"):
        parse({}, "lava")


@pytest.mark.parametrize("fmt", DIALECTS)
def test_parsing_leaves_the_record_as_it_was(fmt: str) -> None:
    record = {
        "conversations": [human("<image>Q"), GPT],
        "messages": [USER, ASSISTANT],
        "image": "a",
        "text": "t",
        "history": [["q", "a"]],
    }
    before = repr(record)
    with suppress(DataError):
        parse(record, fmt)
    assert repr(record) == before


# A function of the user's own


def own(tmp_path: Path, body: str) -> str:
    path = tmp_path / "mine.py"
    path.write_text(body, encoding="utf-8")
    return f"{path}:read"


def test_an_own_function_may_return_a_record_of_a_known_dialect(tmp_path: Path) -> None:
    name = own(tmp_path, "def read(row):\n    return {'input': row['q'], 'output': row['a']}\n")
    assert spoken(parse({"q": "Q", "a": "A"}, name)) == [("user", "Q"), ("assistant", "A")]


def test_an_own_function_may_return_a_sample(tmp_path: Path) -> None:
    body = "from vlm_tune.data.sample import Message, Sample\n"
    body += "def read(row):\n    return Sample('x', (Message('assistant', (row['a'],), True),))\n"
    assert parse({"a": "A"}, own(tmp_path, body)) == Sample(
        "x", (Message("assistant", ("A",), supervised=True),), "train.jsonl:17"
    )


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("def read(row):\n    return row['b']\n", "failed: KeyError: 'b'. Mend the function or the row."),
        ("def read(row):\n    return 3\n", "returned a number, not a Sample or a record."),
        ("def read(row):\n    return {'input': 'Q', 'output': ''}\n", 'turn 1, "output": the answer is empty.'),
    ],
)
def test_a_fault_in_an_own_function_names_the_row(tmp_path: Path, body: str, reason: str) -> None:
    with pytest.raises(DataError, match=r"train.jsonl:17.*" + re.escape(reason)):
        parse({"a": "A"}, own(tmp_path, body))


@pytest.mark.parametrize(
    ("body", "name", "reason"),
    [
        ("x = 1\n", "mine.py:read", "has no function read."),
        ("import nothing_like_that\n", "mine.py:read", "does not load: ModuleNotFoundError"),
        ("def read(:\n", "mine.py:read", "does not load: SyntaxError"),
        ("", "other.py:read", "is not a Python file that is there. Write file.py:function."),
    ],
)
def test_an_own_function_that_does_not_load(tmp_path: Path, body: str, name: str, reason: str) -> None:
    own(tmp_path, body)
    with pytest.raises(ConfigError, match=re.escape(reason)):
        parse({}, f"{tmp_path}/{name}")
