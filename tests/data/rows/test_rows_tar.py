"""Which files of a shard are a sample, and in which order its pictures come."""

import io
import json
import re
import tarfile
from pathlib import Path

import pytest

from vlm_tune.data.dialects.dialects import parse_record
from vlm_tune.data.rows.rows import Rows, open_rows
from vlm_tune.errors import DataError

GREEN_FIRST = ("0.green.png", "0.red.png")  # as tar --sort=name puts them


def shard(path: Path, members: list[tuple[str, bytes | str]]) -> Rows:
    """Pack files, and symbolic links where the content is text, and open the shard."""
    with tarfile.open(path / "a.tar", "w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            if isinstance(content, str):
                member.type, member.linkname = tarfile.SYMTYPE, content
                archive.addfile(member)
            else:
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return open_rows(path / "a.tar")


def of_row(path: Path, fields: dict[str, object], pictures: tuple[str, ...] = GREEN_FIRST) -> list[str]:
    """Return the names of the pictures of a sample, in the order in which they are read."""
    members = [(name, name.encode()) for name in pictures]
    row = shard(path, sorted([*members, ("0.json", json.dumps(fields).encode())]))[0]
    assert "image" not in row
    images = row["images"]
    assert isinstance(images, list)
    assert all(image["bytes"] == image["path"].encode() for image in images)
    return [image["path"] for image in images]


@pytest.mark.parametrize(
    "fields",
    [
        {"images": ["0.red.png", "0.green.png"]},
        {"images": ["photos/0.red.png", "photos/0.green.png"]},
        {"images": ["red.png", "green.png"]},
        {"image": ["0.red.png", "0.green.png"]},
        {"images": [{"path": "0.red.png"}, {"path": "0.green.png", "bytes": None}]},
    ],
)
def test_the_rows_own_order_of_its_pictures_rules(tmp_path: Path, fields: dict[str, object]) -> None:
    assert of_row(tmp_path, fields) == ["0.red.png", "0.green.png"]


def test_a_row_may_name_some_of_the_pictures_and_one_of_them_twice(tmp_path: Path) -> None:
    assert of_row(tmp_path, {"images": ["0.red.png", "0.red.png"]}) == ["0.red.png", "0.red.png"]


@pytest.mark.parametrize(
    "sources",
    [
        [{"type": "image", "image": "0.red.png"}, {"type": "image", "path": "green.png"}],
        [{"type": "image_url", "image_url": {"url": f"photos/0.{color}.png"}} for color in ("red", "green")],
    ],
)
def test_the_parts_of_a_message_may_name_the_pictures(tmp_path: Path, sources: list[dict[str, object]]) -> None:
    content = [*sources, {"type": "text", "text": "Colours?"}]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "red, green"}]
    members = [(name, name.encode()) for name in GREEN_FIRST]
    rows = shard(tmp_path, [*members, ("0.json", json.dumps({"messages": turns}).encode())])
    sample = parse_record(rows[0], "openai", rows.where(0), 0)
    assert [picture.content for picture in sample.pictures] == [b"0.red.png", b"0.green.png"]


@pytest.mark.parametrize("fields", [{}, {"images": None}, {"images": []}])
def test_without_names_the_order_is_the_archives(tmp_path: Path, fields: dict[str, object]) -> None:
    assert of_row(tmp_path, fields) == list(GREEN_FIRST)


def test_one_name_of_old_stands_for_one_picture(tmp_path: Path) -> None:
    assert of_row(tmp_path, {"image": "coco/17.jpg"}, ("0.png",)) == ["0.png"]


@pytest.mark.parametrize("names", [["1.png", "2.png"], ["0.red.png", "2.png"], ["1.png"], ["1.png", "2.png", "3.png"]])
def test_names_that_fit_no_picture_are_refused(tmp_path: Path, names: list[str]) -> None:
    reason = f"the .json names the pictures {', '.join(names)}; the sample holds 0.green.png, 0.red.png."
    with pytest.raises(DataError, match="^" + re.escape(f"a.tar:0: {reason} Write the names of its files, or none")):
        of_row(tmp_path, {"images": names})


@pytest.mark.parametrize(
    "name", ["._0.png", "a/._0.png", "README", "a/LICENSE", ".hidden.png", "__meta__", "__index__/0.png"]
)
def test_what_is_no_file_of_a_sample_is_passed_over(tmp_path: Path, name: str) -> None:
    rows = shard(
        tmp_path, [(name, b"1"), ("0.json", b'{"k": 1}'), (f"{name}", b"2"), ("0.png", b"x"), (f"{name}", b"3")]
    )
    assert len(rows) == 1
    assert rows[0] == {"id": "0", "k": 1, "images": [{"bytes": b"x", "path": "0.png"}]}
    assert rows.where(0) == "a.tar:0"


@pytest.mark.parametrize(
    "names", [("0.png", "0.png"), ("0.png", "0.PNG"), ("0.json", "0.json"), ("0.a.png", "0.A.png")]
)
def test_a_repeated_name_is_refused(tmp_path: Path, names: tuple[str, str]) -> None:
    rows = shard(tmp_path, [(name, b"{}") for name in names])
    ending = names[1].partition(".")[2].lower()
    with pytest.raises(DataError, match=re.escape(f'a.tar:0: two files end in ".{ending}". Keep one of them, or')):
        rows[0]


@pytest.mark.parametrize("names", [("0.png", "1.png", "0.json", "1.json"), ("0.json", "1.json", "0.json")])
def test_a_sample_whose_files_lie_apart_is_refused(tmp_path: Path, names: tuple[str, ...]) -> None:
    with pytest.raises(
        DataError, match=r"^a.tar:0: the files of this sample lie apart, or it is there twice. Pack with"
    ):
        shard(tmp_path, [(name, b"{}") for name in names])


def test_a_link_is_no_picture(tmp_path: Path) -> None:
    rows = shard(tmp_path, [("0.json", b"{}"), ("0.png", "../photos/1.png")])
    with pytest.raises(
        DataError, match=r"^a.tar:0: 0.png is a link, not a file. Pack the shard with tar --dereference"
    ):
        rows[0]


def test_two_captions_that_differ_are_refused(tmp_path: Path) -> None:
    rows = shard(
        tmp_path, [("0.json", b'{"caption": "A"}'), ("0.txt", b"A"), ("1.json", b'{"caption": "A"}'), ("1.txt", b"B")]
    )
    assert rows[0] == {"id": "0", "caption": "A"}
    with pytest.raises(
        DataError, match=r'^a.tar:1: ".txt" and another file give different captions. Keep one of them.'
    ):
        rows[1]


@pytest.mark.parametrize("ending", ["avif", "jfif", "heic", "jxl"])
def test_a_picture_of_a_rare_kind_is_not_passed_over(tmp_path: Path, ending: str) -> None:
    assert of_row(tmp_path, {}, (f"0.{ending}",)) == [f"0.{ending}"]
