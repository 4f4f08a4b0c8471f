"""InternVL's meta files are read as InternVL means them, and refused where a value says nothing."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from vlm_tune.data.sets.meta import MetaEntry, is_meta, read_meta
from vlm_tune.errors import DataError

ENTRY = {"root": "images", "annotation": "rows.jsonl"}


def write(tmp_path: Path, content: Any) -> Path:
    path = tmp_path / "meta.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_an_entry_beside_the_meta_file(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    fields = ENTRY | {"data_augment": True, "max_dynamic_patch": 6, "repeat_time": 3.5, "length": 10}
    root, rows = tmp_path / "images", tmp_path / "rows.jsonl"
    assert read_meta(write(tmp_path, {"dishes": fields})) == [MetaEntry("dishes", root, rows, True, 6, 3.5, 10)]


def test_an_entry_from_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here" / "images").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    assert read_meta(write(tmp_path, {"dishes": ENTRY}))[0].root == Path("images")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"a": ENTRY}, True),
        ({"conversations": []}, False),
        ({}, False),
        ([ENTRY], True),
        ([ENTRY | {"conversations": []}], False),
        ("{", False),
    ],
)
def test_a_meta_file_is_told_from_rows(tmp_path: Path, content: Any, expected: bool) -> None:
    assert is_meta(write(tmp_path, content)) is expected


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "meta.json: not JSON: "),
        ([], "meta.json: not a meta file. Write "),
        ({"a": 3}, "meta.json: a: not an object. Write {...}."),
        ({"a": {"root": "x"}}, 'meta.json: a: "annotation" is missing or not text. Write a path.'),
        ({"a": ENTRY | {"repeat": 2}}, 'meta.json: a: unknown field "repeat". Known: root, annotation, '),
        ({"a": ENTRY | {"data_augment": 1}}, '"data_augment" is 1. Write true or false.'),
        ({"a": ENTRY | {"max_dynamic_patch": 0}}, '"max_dynamic_patch" is 0. Write a whole number above 0'),
        ({"a": ENTRY | {"length": "9"}}, "\"length\" is '9'. Write a whole number above 0"),
        ({"a": ENTRY | {"repeat_time": 0}}, '"repeat_time" is 0. Write a number above 0: 0.5 takes half of the rows.'),
        ({"a": ENTRY | {"repeat_time": "2"}}, "\"repeat_time\" is '2'."),
    ],
)
def test_fault(tmp_path: Path, content: Any, reason: str) -> None:
    with pytest.raises(DataError, match=re.escape(reason)):
        read_meta(write(tmp_path, content))


def test_a_missing_meta_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"meta.json: cannot be read: No such file"):
        read_meta(tmp_path / "meta.json")


def test_the_mixtures_in_the_documentation_are_read(tmp_path: Path) -> None:
    page = (Path(__file__).parents[3] / "docs" / "data_format.md").read_text(encoding="utf-8").split("## Mixtures")[1]
    for name, pattern in (("meta.json", r"\n    (\{[^\n]*\})\n"), ("mixture.yaml", r"```yaml\n(.*?)```")):
        (found,) = re.findall(pattern, page, re.DOTALL)
        path = tmp_path / name
        path.write_text(found.replace("recipe:chat_text/", ""), encoding="utf-8")
        assert is_meta(path)
        assert read_meta(path)[0].annotation == tmp_path / "dishes.jsonl"


def test_a_set_that_is_named_twice_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, '{"a": {"annotation": "b.jsonl"}, "a": {"annotation": "c.jsonl"}}')
    with pytest.raises(DataError, match=r'meta.json: "a" stands twice in one object'):
        read_meta(path)
