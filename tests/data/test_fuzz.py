"""Whatever a row holds, it becomes a Sample, or a DataError with file, line and reason; nothing else, and never a hang.

500 cases by default, 10,000 with `pytest -m slow` or VLM_TUNE_FUZZ=10000.
"""

import copy
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vlm_tune.data.dialects.dialects import DIALECTS, parse_record
from vlm_tune.data.rows.rows import open_rows
from vlm_tune.data.sample import Sample
from vlm_tune.errors import DataError

FEW, MANY = int(os.environ.get("VLM_TUNE_FUZZ", "500")), 10_000
PLACE = re.compile(r"train\.jsonl:17( \(id \"[^\n]*\"\))?: .+", re.DOTALL)

# A good row of each dialect, which the cases then damage in up to four places.
SAID = [{"from": "human", "value": "<image>\nQ"}, {"from": "gpt", "value": "A"}, {"from": "human", "value": "<image>R"}]
PARTS = [{"type": "text", "text": "Q"}, {"type": "image_url", "image_url": {"url": "a.jpg"}}, {"type": "image"}]
PLUGIN = '{"name": "f", "description": "d", "paths": [{"parameters": [{"name": "x", "description": "y"}]}]}'
CALL = 'T<|startofthink|>```JSON\n{"api_name": "f", "parameters": {}}```<|endofthink|>'
RESULT = "<|startofexec|>```JSON\n{}```<|endofexec|>So."
AGENT = [
    {"from": "system", "value": PLUGIN},
    {"from": "user", "value": "Q"},
    {"from": "assistant", "value": CALL + RESULT},
]
BASES: dict[str, list[dict[str, Any]]] = {
    "llava": [
        {
            "id": "x",
            "image": ["a", "b"],
            "width_list": [1, 2],
            "height_list": [3, 4],
            "conversations": [*SAID, SAID[1]],
        },
        {"id": 3, "image": "a", "width": 4, "height": 5, "conversations": SAID[:2]},
        {"video": "v", "clip": [0, 1], "conversations": [{"from": "human", "value": "<video>\nQ"}, SAID[1]]},
    ],
    "sharegpt": [
        {
            "images": ["a"],
            "system": "S",
            "tools": "",
            "conversations": [*SAID[:2], {"from": "tool", "value": "3"}, SAID[1]],
        },
        {"messages": [{"role": "user", "content": "<image>"}, {"role": "assistant", "content": "A"}], "images": ["a"]},
    ],
    "openai": [
        {
            "messages": [{"role": "user", "content": PARTS}, {"role": "assistant", "content": "A", "loss": True}],
            "image": "b",
        }
    ],
    "xtuner": [
        {"conversation": [{"system": "S", "input": "<image>", "output": "A", "output_with_loss": True}], "image": "a"},
        {"input": {"conversation": [{"input": "Q", "output": "A"}]}},
    ],
    "alpaca": [{"instruction": "I", "input": "", "output": "O", "history": [["q", "a"]], "system": ""}],
    "alpaca_zh": [{"instruction_zh": "I", "input_zh": "", "output_zh": "O"}],
    "oasst1": [{"text": "### Human: Q### Assistant: A### Human: R"}],
    "openorca": [{"id": 1, "system_prompt": "S", "question": "Q", "response": "A"}],
    "msagent": [{"conversations": AGENT}, {"conversations": repr(AGENT)}, {"conversations": json.dumps(AGENT)}],
    "text": [{"text": "T"}],
    "caption": [{"image": {"bytes": b"x", "path": "a"}, "caption": "C"}, {"file_name": "a", "text": "C"}],
    "vqa": [
        {"question": "Q", "choices": ["x", "y"], "answer": 1, "image": "a", "question_id": 4},
        {"question": "Q", "choices": "images", "answer": "A", "images": ["a", "b"]},
        {"question": "Q", "A": "x", "B": "y", "answer": "B", "food_meta": {"food_file": "a"}},
    ],
}

# Values of every kind, unicode of all kinds (halves of surrogate pairs too), and words that mean something to a reader.
VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    7,
    10**30,
    0.5,
    3.0,
    float("nan"),
    float("inf"),
    b"",
    b"x",
    "",
    " ",
    "\n",
]
VALUES += [
    "<image>",
    "<image><image>",
    "<video>\n",
    "A",
    "b",
    "1",
    "-1",
    "9" * 5000,
    "²",
    "true",
    "\ud800",
    "\0",
    "🍜菜",
]
VALUES += [
    "human",
    "gpt",
    "system",
    "user",
    "assistant",
    "tool",
    "observation",
    "function_call",
    "bot",
    "images",
    "text",
]
VALUES += [
    "### Human:",
    "### Assistant:",
    "###",
    CALL,
    RESULT,
    "<|startofthink|>",
    "<|startofexec|>",
    "<|endofexec|>",
    "{" * 9,
]
VALUES += [
    "data:image/png;base64,AAAA",
    "data:,",
    "data:image/png;base64,?",
    "file://a",
    "../..",
    "/",
    ".",
    "[1]",
    "{'a': [",
    "[",
]
VALUES += [
    "[" * 5000,
    "<nooutput>",
    [],
    {},
    [[]],
    [{}],
    [None],
    ["a", "a"],
    [1, 2],
    {"bytes": None},
    {"path": ""},
    {"url": 3},
]
values = st.sampled_from(VALUES)
values |= st.text(max_size=6)
values |= st.recursive(
    values, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
)
damage = st.lists(
    st.tuples(st.integers(0, 99), st.sampled_from(["set", "set", "drop", "twice", "wrap"]), values), max_size=4
)
cases = st.tuples(st.sampled_from([(name, base) for name, bases in BASES.items() for base in bases]), damage)
SETTINGS = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None, "derandomize": True}


def places(node: Any) -> list[tuple[Any, Any]]:
    """List every (container, key) of a record, outermost first."""
    inner = list(node.items()) if isinstance(node, dict) else list(enumerate(node)) if isinstance(node, list) else []
    return [(node, key) for key, _ in inner] + [place for _, value in inner for place in places(value)]


def damaged(base: dict[str, Any], steps: list[tuple[int, str, Any]]) -> Any:
    record = {"row": copy.deepcopy(base)}
    for number, action, value in steps:
        inner = places(record["row"])
        node, key = inner[number * 7919 % len(inner)] if inner and number != 50 else (record, "row")
        if action == "drop" and node is not record:
            del node[key]
        elif action == "twice" and isinstance(node, list):
            node.insert(key, node[key])
        else:
            node[key] = copy.deepcopy([node[key], value] if action == "wrap" else value)
    return record["row"]


def attempt(action: Callable[[], Any]) -> Any:
    try:
        return action()
    except DataError as error:
        return error


def check_sample(sample: Sample) -> None:
    """Hold what every reader of a Sample relies on."""
    assert sample.where == "train.jsonl:17"
    assert sample.id
    assert any(message.supervised for message in sample.messages)
    assert sample.messages[-1].role == "assistant"
    for message in sample.messages:
        assert message.role in ("system", "user", "assistant")
        assert message.role == "assistant" or not message.supervised
        assert message.role != "assistant" or message.text.strip()
        assert all(part for part in message.parts)
        message.text.encode("utf-8")
    for picture in sample.pictures:
        assert bool(picture.path) != bool(picture.content)
        assert isinstance(picture.path, str)
        assert isinstance(picture.content, bytes | None)
        assert picture.size is None or min(picture.size) > 0


def outcome(record: Any, fmt: str, folder: Path) -> Sample | DataError:
    found = attempt(lambda: parse_record(record, fmt, "train.jsonl:17", 16, folder))
    if isinstance(found, DataError):
        assert PLACE.fullmatch(str(found)), str(found)
        str(found).encode("utf-8")  # it will be printed
    else:
        check_sample(found)
    return found


def run_records(num_cases: int, folder: Path) -> list[Sample | DataError]:
    found: list[Sample | DataError] = []

    @settings(max_examples=num_cases, **SETTINGS)
    @given(cases, st.sampled_from([*[None] * 30, *["auto"] * 6, *DIALECTS]))
    def each(case: Any, fmt: str | None) -> None:
        (name, base), steps = case
        found.append(outcome(damaged(base, steps), fmt or name, folder))

    each()
    return found


def run_files(num_cases: int, folder: Path) -> int:
    num_read = 0
    line = cases.map(lambda case: json.dumps(damaged(case[0][1], case[1]), default=repr).encode()) | st.binary(
        max_size=9
    )
    line |= st.sampled_from(
        [b"{", b"}", b"[", b"]", b'"', b"\\", b"\\\\", b'{"a": "\\\\"}', b'{"a": "]},{["}', b"\xef\xbb\xbf", b" "]
    )
    ends = st.sampled_from([b"\n", b"\r\n", b"\n\n", b",\n", b",\n  ", b",", b""])
    files = st.lists(st.tuples(line, ends), max_size=4).map(lambda lines: b"".join(text + end for text, end in lines))

    @settings(max_examples=num_cases, **SETTINGS)
    @given(files, st.sampled_from([b"", b"[", b"[\n", b"\n["]), st.sampled_from([b"", b"]"]), st.booleans())
    def each(content: bytes, opening: bytes, closing: bytes, is_lines: bool) -> None:
        nonlocal num_read
        path = folder / ("train.jsonl" if is_lines else "train.json")
        path.write_bytes(opening + content + closing)
        rows = attempt(lambda: open_rows(path))
        if isinstance(rows, DataError):
            assert str(rows).startswith(path.name), str(rows)
            return
        assert len(rows) > 0
        last = 1
        for number in range(len(rows)):
            written = re.fullmatch(re.escape(path.name) + r":(\d+)( row \d+)?", rows.where(number))
            assert written, rows.where(number)
            assert last <= int(written[1]) <= (opening + content).count(b"\n") + 1
            last = int(written[1])
            record = attempt(lambda number=number: rows[number])
            num_read += isinstance(record, dict)
            if not isinstance(record, dict):
                assert re.match(re.escape(path.name) + r":\d+( row \d+)?: not ", str(record)), str(record)

    each()
    return num_read


def test_every_record_becomes_a_sample_or_a_fault(tmp_path: Path) -> None:
    found = run_records(FEW, tmp_path)
    assert len(found) >= FEW
    assert sum(isinstance(each, Sample) for each in found) > FEW // 20
    assert sum(isinstance(each, DataError) for each in found) > FEW // 20


def test_every_file_gives_rows_or_faults(tmp_path: Path) -> None:
    assert run_files(FEW, tmp_path) > FEW // 20


@pytest.mark.slow
def test_ten_thousand_records(tmp_path: Path) -> None:
    assert len({str(each) for each in run_records(MANY, tmp_path)}) > 1000


@pytest.mark.slow
def test_many_files(tmp_path: Path) -> None:
    assert run_files(MANY // 4, tmp_path) > MANY // 80
