"""A column means what its writer says: JSON is decoded, classes have names, and media that nobody reads are refused."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from vlm_tune.data.dialects.dialects import parse_record
from vlm_tune.data.rows.rows import Rows, open_rows
from vlm_tune.data.sample import Picture
from vlm_tune.errors import DataError

PARTS = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "Q"}]
MIXED = [{"role": "user", "content": PARTS}, {"role": "assistant", "content": 'It says "A".'}]
PLAIN = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
JSON = {"_type": "Json"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLM_TUNE_CACHE", str(tmp_path / "cache"))


def write(path: Path, column: pa.Array | list[Any], feature: object = None, name: str = "cell") -> Rows:
    """Write a table of one column, as datasets does where a feature is named, and open it."""
    table = pa.table({name: column})
    if feature is not None:
        features = {"info": {"features": {name: feature}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    pa.parquet.write_table(table, path / "a.parquet")
    return open_rows(path / "a.parquet")


def quoted(turns: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Write the contents of turns as JSON text."""
    return [turn | {"content": json.dumps(turn["content"])} for turn in turns]


# JSON


TURN = pa.struct({"role": pa.string(), "content": pa.json_()})
TEXT = pa.list_(pa.struct({"role": pa.string(), "content": pa.string()}))


@pytest.mark.parametrize("kind", [pa.list_(TURN), pa.large_list(TURN)])
def test_json_inside_turns_is_decoded(tmp_path: Path, kind: pa.DataType) -> None:
    rows = write(tmp_path, pa.array([quoted(MIXED), None, quoted(PLAIN)], TEXT).cast(kind), name="messages")
    assert [rows[number]["messages"] for number in range(3)] == [MIXED, None, PLAIN]


def test_a_picture_in_a_json_column_is_a_picture(tmp_path: Path) -> None:
    rows = write(tmp_path, pa.array([quoted(MIXED)], TEXT).cast(pa.list_(TURN)), name="messages")
    user, assistant = parse_record(rows[0], "openai", "a.parquet:1", 0).messages
    assert user.parts == (Picture("a.png"), "Q")
    assert assistant.parts == ('It says "A".',)


@pytest.mark.parametrize(
    ("column", "feature", "value"),
    [
        (pa.array(['{"a": [1]}'], pa.json_()), None, {"a": [1]}),  # parquet's own logical type, whoever wrote it
        (pa.array([None], pa.json_()), None, None),
        (['{"a": [1]}'], JSON, {"a": [1]}),
        ([['"x"', "2"]], {"_type": "List", "feature": JSON}, ["x", 2]),
        ([['"x"', "2"]], [JSON], ["x", 2]),
        ([['"x"', "2"]], {"_type": "Sequence", "feature": JSON}, ["x", 2]),
        ([{"a": ["1"]}], {"_type": "Sequence", "feature": {"a": JSON}}, {"a": [1]}),  # stored as an object of lists
        (
            [{"_type": "x", "a": "1"}],
            {"_type": {"_type": "Value", "dtype": "string"}, "a": JSON},
            {"_type": "x", "a": 1},
        ),
        (['"x"'], {"_type": "Value", "dtype": "string"}, '"x"'),
        (['"x"'], None, '"x"'),
    ],
)
def test_what_a_json_feature_means(tmp_path: Path, column: Any, feature: object, value: object) -> None:
    assert write(tmp_path, column, feature)[0] == {"cell": value}


def test_a_cell_of_a_json_column_that_is_no_json(tmp_path: Path) -> None:
    rows = write(tmp_path, ["1", "{"], JSON)
    with pytest.raises(
        DataError, match=r'^a.parquet:2: "cell" is a column of JSON, but this is not JSON: \'{\'. Write'
    ):
        rows[1]


QUOTED = [{"role": "user", "content": '"Q"'}, {"role": "assistant", "content": '"A"'}]
TEXT_TURNS = {"_type": "List", "feature": {"role": {"_type": "Value"}, "content": {"_type": "Value"}}}


@pytest.mark.parametrize("turns", [QUOTED, quoted(MIXED)])
def test_turns_that_datasets_wrote_as_json_text_are_refused(tmp_path: Path, turns: list[dict[str, str]]) -> None:
    rows = write(tmp_path, [turns], TEXT_TURNS, "messages")
    with pytest.raises(
        DataError, match=r'^a.parquet:1: "messages" holds JSON text in every "content": .*Name the .jsonl'
    ):
        rows[0]


@pytest.mark.parametrize("contents", [('"To be"', "Hamlet"), ("[3, 1]", "[1, 3]"), ('{"a": 1}', '{"b": 2}')])
def test_turns_that_happen_to_look_like_json_stay(tmp_path: Path, contents: tuple[str, str]) -> None:
    turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), contents, strict=True)]
    assert write(tmp_path, [turns], TEXT_TURNS, "messages")[0]["messages"] == turns


# Classes and media


def test_a_class_is_its_name(tmp_path: Path) -> None:
    rows = write(tmp_path, [1, -1, None, 2], {"_type": "ClassLabel", "names": ["cat", "dog"]})
    assert [rows[number]["cell"] for number in range(3)] == ["dog", None, None]
    with pytest.raises(DataError, match=r'^a.parquet:4: "cell" is class 2, but its ClassLabel\(\) has 2 names. Write'):
        rows[3]


def test_a_video_is_its_path(tmp_path: Path) -> None:
    rows = write(tmp_path, [{"bytes": None, "path": "wok.mp4"}, {"bytes": b"x", "path": None}], {"_type": "Video"})
    assert rows[0] == {"cell": "wok.mp4"}
    with pytest.raises(
        DataError, match=r'^a.parquet:2: "cell" holds the video itself, as Video\(\) of datasets. Save it'
    ):
        rows[1]


@pytest.mark.parametrize("kind", ["Audio", "Pdf", "Nifti", "Mesh", "BioSequence", "BioStructure"])
def test_media_that_are_not_read_are_named(tmp_path: Path, kind: str) -> None:
    feature = {"_type": "List", "feature": {"_type": kind}}
    rows = write(tmp_path, [[], [{"bytes": b"x", "path": None}]], feature, "speech")
    assert rows[0] == {"speech": []}
    with pytest.raises(
        DataError, match=re.escape(f'a.parquet:2: "speech" is {kind}() of datasets, which is not read.')
    ):
        rows[1]


# As datasets itself writes and reads them


PROGRAM = """
import json, sys
from datasets import ClassLabel, Dataset, Features, Image, Json, LargeList, List, Sequence, Value
features = Features({
    "messages": List({"role": Value("string"), "content": Json()}), "meta": Json(), "many": LargeList(Json()),
    "label": ClassLabel(names=["cat", "dog"]), "old": Sequence({"a": Value("int32"), "b": Json()}),
    "image": Image(decode=False),
})
row = {"messages": json.loads(sys.argv[2]), "meta": {"k": [1, "x"]}, "many": [{"q": 1}, "s"], "label": 1,
       "old": {"a": [1], "b": [{"z": 1}]}, "image": {"bytes": b"x", "path": "a.png"}}
table = Dataset.from_list([row], features=features)
table.save_to_disk(sys.argv[1] + "/set")
table.to_parquet(sys.argv[1] + "/set.parquet")
"""


def test_what_datasets_writes_is_read_as_datasets_reads_it(tmp_path: Path) -> None:
    """Run in a process of its own: importing datasets takes seconds and keeps threads."""
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), json.dumps(MIXED)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    wanted = {"messages": MIXED, "meta": {"k": [1, "x"]}, "many": [{"q": 1}, "s"], "label": "dog"}
    wanted |= {"old": {"a": [1], "b": [{"z": 1}]}, "image": {"bytes": b"x", "path": "a.png"}}
    assert open_rows(tmp_path / "set")[0] == wanted
    assert open_rows(tmp_path / "set.parquet")[0] == wanted
