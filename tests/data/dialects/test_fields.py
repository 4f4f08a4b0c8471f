"""A field of a row, a turn or a part is read, known to say nothing, or an error that names it."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from vlm_tune.config.parse import load_config
from vlm_tune.data.dialects.dialects import DIALECTS, parse_record, recognise
from vlm_tune.data.dialects.fields import known_fields, turn_fields
from vlm_tune.data.sample import Picture, Sample
from vlm_tune.errors import DataError

TABLE = yaml.safe_load(
    (Path(__file__).parents[3] / "vlm_tune" / "data" / "dialects" / "fields.yaml").read_text(encoding="utf-8")
)
TURNS = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
MESSAGES = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
ROWS: dict[str, dict[str, Any]] = {
    "llava": {"conversations": TURNS},
    "sharegpt": {"conversations": TURNS},
    "openai": {"messages": MESSAGES},
    "xtuner": {"conversation": [{"input": "Q", "output": "A"}]},
    "swift": {"query": "Q", "response": "A"},
    "alpaca": {"instruction": "Q", "output": "A"},
    "alpaca_zh": {"instruction_zh": "Q", "output_zh": "A"},
    "oasst1": {"text": "### Human: Q### Assistant: A"},
    "openorca": {"question": "Q", "response": "A"},
    "msagent": {"conversations": [{"from": "user", "value": "Q"}, {"from": "assistant", "value": "A"}]},
    "text": {"text": "A"},
    "caption": {"image": "a.jpg", "caption": "A"},
    "vqa": {"question": "Q", "answer": "A"},
}
by_dialect = pytest.mark.parametrize("dialect", DIALECTS)


def parse(record: dict[str, Any], dialect: str = "auto", *ignored: str) -> Sample:
    return parse_record(record, dialect, "train.jsonl:17", 16, ignored=frozenset(ignored))


def with_turn(dialect: str, **more: Any) -> dict[str, Any]:
    """Add fields to the last turn of the dialect's row."""
    ((key, turns),) = ROWS[dialect].items()
    return {key: [*turns[:-1], turns[-1] | more]}


def test_every_dialect_has_its_list() -> None:
    assert TABLE["dialects"].keys() == DIALECTS.keys() == ROWS.keys()


@by_dialect
def test_a_field_that_nobody_knows_is_refused(dialect: str) -> None:
    reason = f'train.jsonl:17: "price" is not read in rows of {dialect}. Where the model need not know: data.ignore_fi'
    with pytest.raises(DataError, match=re.escape(reason)):
        parse(ROWS[dialect] | {"price": 3}, dialect)


@by_dialect
@pytest.mark.parametrize("field", ["bbox", "tools", "kto_tag", "audio", "loss_scale"])
def test_a_field_that_changes_a_row_is_refused_with_its_way_out(dialect: str, field: str) -> None:
    reason = f'"{field}" is not read in rows of {dialect}. {TABLE["hints"][field]}.'
    with pytest.raises(DataError, match=re.escape(reason)):
        parse(ROWS[dialect] | {field: {"bbox": [[1, 2, 3, 4]]}}, dialect)


@by_dialect
@pytest.mark.parametrize("nothing", [None, "", [], {}, b""])
def test_a_field_without_a_value_says_nothing(dialect: str, nothing: Any) -> None:
    assert parse(ROWS[dialect] | {"objects": nothing, "price": nothing}, dialect).messages


@by_dialect
@pytest.mark.parametrize("value", [False, 0, 0.0, "no"])
def test_false_and_zero_are_values(dialect: str, value: Any) -> None:
    with pytest.raises(DataError, match='"kto_tag" is not read'):
        parse(ROWS[dialect] | {"kto_tag": value}, dialect)


@by_dialect
def test_what_a_row_is_called_and_where_it_came_from_is_harmless(dialect: str) -> None:
    about = dict.fromkeys(TABLE["harmless"], "x") | {"id": "a", "question_id": "b", "qid": "c"}
    assert parse(ROWS[dialect] | about, dialect).messages[-1] == parse(ROWS[dialect], dialect).messages[-1]


def test_all_unknown_fields_are_named_at_once() -> None:
    reason = '"price" and "colour" are not read in rows of llava.+data.ignore_fields=\\[price,colour\\]'
    with pytest.raises(DataError, match=reason):
        parse(ROWS["llava"] | {"price": 3, "colour": "red"}, "llava")


@by_dialect
def test_fields_that_are_ignored_count_as_not_there(dialect: str) -> None:
    record = ROWS[dialect] | {"price": 3, "tools": [1]}
    assert parse(record, dialect, "price", "tools") == parse(ROWS[dialect], dialect)


def test_a_field_that_is_read_can_be_ignored() -> None:
    record = ROWS["sharegpt"] | {"system": "Be brief."}
    assert len(parse(record).messages) == 3
    assert len(parse(record, "auto", "system").messages) == 2


def test_ignored_fields_are_a_key_of_the_data() -> None:
    assert load_config(["data.ignore_fields=[price,colour]"]).data.ignore_fields == ["price", "colour"]


# Turns and parts


@pytest.mark.parametrize("dialect", ["llava", "sharegpt", "openai", "xtuner", "msagent"])
@pytest.mark.parametrize("field", ["tool_calls", "function_call", "loss_scale", "train", "mood"])
def test_a_field_of_a_turn_is_known_or_refused(dialect: str, field: str) -> None:
    number = len(next(iter(ROWS[dialect].values())))
    with pytest.raises(DataError, match=f'"{field}" (is|are) not read in turn {number}'):
        parse(with_turn(dialect, **{field: [{"name": "look"}]}), dialect)
    assert parse(with_turn(dialect, **{field: None}), dialect) == parse(ROWS[dialect], dialect)
    assert parse(with_turn(dialect, **{field: 1}), dialect, field) == parse(ROWS[dialect], dialect)


def test_a_tool_call_beside_its_content_is_refused() -> None:
    """The row of ShareGPT with messages, whose call was left out without a word."""
    call = {"type": "function", "function": {"name": "lookup", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "<image>\nWhich part is it?"},
        {"role": "assistant", "content": "I look it up.", "tool_calls": [call]},
        {"role": "tool", "content": "valve 7", "tool_call_id": "1", "name": "lookup"},
        {"role": "assistant", "content": "It is valve 7."},
    ]
    with pytest.raises(DataError, match=r'"tool_calls" is not read in turn 2. Write the call into the text'):
        parse({"messages": messages, "images": ["a.png"]})


@pytest.mark.parametrize(
    "turn", [{"from": "gpt", "value": "A", "content": "B"}, {"from": "gpt", "value": "A", "role": "user"}]
)
def test_a_turn_written_twice_is_refused(turn: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="not read in turn 2"):
        parse({"conversations": [TURNS[0], turn]}, "sharegpt")


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        ({"type": "text", "text": "x", "image": "a.jpg"}, '"image" is not read in turn 1, part 2'),
        ({"type": "text", "text": "x", "mood": "sad"}, '"mood" is not read in turn 1, part 2'),
        ({"type": "image", "image": "a.jpg", "max_pixels": 9}, '"max_pixels" is not read in turn 1, part 2'),
        ({"type": "image", "image": "a.jpg", "text": "x"}, '"text" is not read in turn 1, part 2'),
        ({"type": "image_url", "image_url": {"url": "a", "detail": "fine"}}, '"detail" is not read in turn 1, part 2'),
        ({"type": "image", "image": "a.jpg", "detail": "low"}, '"detail" is not read in turn 1, part 2'),
    ],
)
def test_a_field_of_a_part_is_known_or_refused(part: dict[str, Any], reason: str) -> None:
    content = [{"type": "text", "text": "Q"}, part]
    with pytest.raises(DataError, match=reason):
        parse({"messages": [{"role": "user", "content": content}, MESSAGES[1]]})


@pytest.mark.parametrize("detail", ["auto", "high", "low", None])
def test_only_low_detail_makes_a_picture_one_tile(detail: str | None) -> None:
    part = {"type": "image_url", "image_url": {"url": "a.jpg", "detail": detail}, "text": None}
    (found,) = parse({"messages": [{"role": "user", "content": [part]}, MESSAGES[1]]}).pictures
    assert found == Picture("a.jpg", is_frame=detail == "low")


@pytest.mark.parametrize("dialect", ["llava", "sharegpt", "openai", "xtuner", "msagent"])
def test_the_lists_of_turns_are_not_those_of_rows(dialect: str) -> None:
    assert not {"conversations", "messages", "conversation"} & turn_fields(dialect)
    assert "id" in known_fields(dialect)


# Files that are named in the text


@pytest.mark.parametrize(
    "text",
    [
        "<img>dishes/42.jpg</img>\nWhat is it?",
        "Picture 1: <img>/data/a.PNG</img> What?",
        "<img>https://example.org/a</img>What?",
        "<audio>a.wav</audio>What is said?",
        "<video>clips/wok.mp4</video>",
        "<img>data:image/png;base64,iVBO</img>",
    ],
)
@pytest.mark.parametrize("dialect", ["sharegpt", "openai", "swift", "alpaca", "xtuner"])
def test_a_file_that_is_named_in_a_question_is_refused(dialect: str, text: str) -> None:
    records = {
        "sharegpt": {"conversations": [{"from": "human", "value": text}, TURNS[1]]},
        "openai": {"messages": [{"role": "user", "content": text}, MESSAGES[1]]},
        "swift": {"query": text, "response": "A"},
        "alpaca": {"instruction": text, "output": "A"},
        "xtuner": {"conversation": [{"input": text, "output": "A"}]},
    }
    with pytest.raises(DataError, match=r'the text names a file in <.+Name pictures in "images"'):
        parse(records[dialect], dialect)


@pytest.mark.parametrize("text", ['What is <img src="a.jpg">?', "Is <img></img> HTML?", "<img>the tag</img>", "a.jpg"])
def test_text_about_files_is_text(text: str) -> None:
    assert parse({"query": text, "response": "A"}).messages[0].text == text


# swift


def test_swift_rows_are_read() -> None:
    record = {
        "query": "<image>What colour is it?",
        "response": "Green.",
        "images": ["p/a.png"],
        "history": [["Hi", "Hello."]],
        "system": "Be brief.",
    }
    assert recognise(record) == "swift"
    sample = parse(record)
    assert [message.role for message in sample.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert sample.messages[3].parts == (sample.pictures[0], "What colour is it?")
    assert [message.supervised for message in sample.messages] == [False, False, True, False, True]


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"history": [["only one"]]}, '"history" 1 is not a pair'),
        ({"images": ["a.jpg"]}, '0 "<image>" marks but 1 image'),
        ({"response": " "}, '"query" or "response": the answer is empty'),
        ({"objects": {"bbox": [[1, 2, 3, 4]]}}, 'the turns hold 0 marks "<bbox>", but "bbox" of "objects" lists 1'),
    ],
)
def test_a_faulty_swift_row_is_refused(more: dict[str, Any], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        parse(ROWS["swift"] | more)


# Fields in other places


def test_ignored_fields_reach_turns_that_a_cell_holds_as_text() -> None:
    turns = '[{"from": "human", "value": "Hi", "mood": "sad"}, {"from": "gpt", "value": "Ho"}]'
    with pytest.raises(DataError, match='"mood" is not read in turn 1'):
        parse({"conversations": turns}, "sharegpt")
    assert len(parse({"conversations": turns}, "sharegpt", "mood").messages) == 2


@pytest.mark.parametrize(
    ("field", "remedy"),
    [("image", 'Name it in "images" of the row'), ("videos", 'Name it in "video"'), ("system", "as a turn of its own")],
)
def test_a_field_of_rows_in_a_turn_is_sent_to_its_place(field: str, remedy: str) -> None:
    turn = {"from": "human", "value": "Q", field: "a"}
    with pytest.raises(DataError, match=f'"{field}" is not read in turn 1. .*{remedy}'):
        parse({"conversations": [turn, TURNS[1]]}, "sharegpt")


@pytest.mark.parametrize(("name", "written"), [("Score (1-5)", "'Score (1-5)'"), ("a,b", "'a,b'"), ("price", "price")])
def test_the_line_that_ignores_a_field_works(name: str, written: str) -> None:
    with pytest.raises(DataError, match=re.escape(f"data.ignore_fields=[{written}]")):
        parse(ROWS["llava"] | {name: 3}, "llava")
    assert load_config([f"data.ignore_fields=[{written}]"]).data.ignore_fields == [name]


def test_a_picture_of_a_rare_kind_is_not_passed_over() -> None:
    with pytest.raises(DataError, match='"file_name" is not read here'):
        parse(ROWS["openai"] | {"file_name": "a.avif"}, "openai")


def test_frames_of_a_rare_kind_are_frames(tmp_path: Path) -> None:
    (tmp_path / "clip").mkdir()
    for name in ("1.jpg", "2.avif", "3.TIFF"):
        (tmp_path / "clip" / name).touch()
    record = {"conversations": [{"from": "human", "value": "<video>Q"}, TURNS[1]], "video": "clip"}
    sample = parse_record(record, "llava", "train.jsonl:17", 16, tmp_path)
    assert [Path(picture.path).name for picture in sample.pictures] == ["1.jpg", "2.avif", "3.TIFF"]


def test_each_dialect_says_its_fields() -> None:
    assert set(TABLE["dialects"]) == set(DIALECTS)
