"""A picture that is not there: the file whose path differs only in its writing is named, and so is an object."""

import json
import unicodedata
from pathlib import Path

import pytest

from vlm_tune.config.schema import ImageConfig
from vlm_tune.data.dialects.dialects import parse_record
from vlm_tune.data.pictures.images import ImageReader
from vlm_tune.data.pictures.near_paths import near
from vlm_tune.data.sample import Picture
from vlm_tune.errors import DataError

NAME = "café/crème.png"


@pytest.mark.parametrize(
    ("on_disk", "in_row", "differs"),
    [
        ("p/a.png", "p\\a.png", r"by / in place of \\"),
        ("p/q/a.png", "p\\q\\a.png", r"by / in place of \\"),
        ("p/a.png", "P/A.PNG", r"in the case of letters"),
        ("p/a.png", "P\\a.png", r"by / in place of \\ and in the case of letters"),
        (unicodedata.normalize("NFD", NAME), NAME, r"in its Unicode form \(NFC in the row, NFD on disk\)"),
        (NAME, unicodedata.normalize("NFD", NAME), r"in its Unicode form \(NFD in the row, NFC on disk\)"),
    ],
)
def test_a_path_that_differs_in_its_writing_alone_is_told(on_disk, in_row, differs, tmp_path: Path) -> None:
    (tmp_path / on_disk).parent.mkdir(parents=True)
    (tmp_path / on_disk).touch()
    with pytest.raises(
        DataError, match=rf"is not there; did you mean .*\? It differs only {differs}: write it so"
    ) as e:
        ImageReader(ImageConfig(), tmp_path).read_size(Picture(in_row))
    written = str(e.value).partition("did you mean ")[2].partition("? It")[0]
    assert (tmp_path / json.loads(written)).is_file()


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({"url": "a.png"}, r'image 1 is an object with "url", which holds no picture in "bytes" or "path"'),
        ({"bytes": None, "path": None}, r'image 1 is an object with "bytes", "path", which holds no picture'),
        ({}, r"image 1 is an object with no fields, which holds no picture"),
        ({"path": {"url": "a.png"}}, r'image 1, "path" is an object. Give a path'),
    ],
)
def test_an_object_without_a_picture_is_named_with_its_fields(value, reason: str, tmp_path: Path) -> None:
    said = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A pan."}]
    with pytest.raises(DataError, match=reason):
        parse_record({"images": [value], "conversations": said}, "llava", "train.jsonl:1", 0, tmp_path)


def test_a_link_to_nothing_is_called_so(tmp_path):
    (tmp_path / "a.jpg").symlink_to("gone.jpg")
    assert near(str(tmp_path), "a.jpg") == ": it is a link to gone.jpg, which is not there."
