"""A run goes on with the rows that it had: other answers of equal size are noticed, another copy is not."""

import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image
from toys import turns, write_jsonl

from vlm_tune.config.parse import load_config
from vlm_tune.data.datamodule import DataModule
from vlm_tune.data.rows.cache import hashed
from vlm_tune.data.sample import Message, Picture, Sample
from vlm_tune.data.sets.index import trained_content
from vlm_tune.errors import CheckpointError
from vlm_tune.model.encoder import build_encoder


def picture(color: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (56, 56), color).save(file, "BMP")  # of one size, whatever the colour
    return file.getvalue()


RED, BLUE = picture("red"), picture("blue")


@pytest.fixture
def start(parts, tmp_path, monkeypatch):
    """Give a function that sets up the data module of a file."""
    monkeypatch.setenv("VLM_TUNE_CACHE", str(tmp_path / "cache"))

    def setup(path: Path, *overrides: str) -> DataModule:
        ours = ["model.tiles.size=56", "model.tiles.max=4", "data.val=none", "stage.pack_length=64"]
        config = load_config(["data=own", *parts, f"data.path='{path}'", *ours, *overrides])
        data = DataModule(config, build_encoder(config)[0])
        data.setup()
        return data

    return setup


def write(path: Path, answer: str = "A cat.", shown: bytes = RED, others: bytes = RED) -> Path:
    """Write ten rows into any kind of file; `answer` and `shown` are those of the sixth."""
    answers = [answer if number == 5 else "A cat." for number in range(10)]
    rows = [
        {"id": f"row_{n}", "conversations": turns(("<image>\nWhat is it?", each))} for n, each in enumerate(answers)
    ]
    pictures = [shown if number == 5 else others for number in range(10)]
    if path.suffix == ".parquet":
        records = [row | {"image": {"bytes": each, "path": None}} for row, each in zip(rows, pictures, strict=True)]
        pa.parquet.write_table(pa.Table.from_pylist(records), path)
    elif path.suffix == ".tar":
        with tarfile.open(path, "w") as archive:
            for number, (row, each) in enumerate(zip(rows, pictures, strict=True)):
                for ending, content in (("json", json.dumps(row).encode()), ("bmp", each)):
                    member = tarfile.TarInfo(f"{number:03}.{ending}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    elif path.suffix == ".csv":
        (path.parent / "a.bmp").write_bytes(RED)
        lines = [f"{row['id']},a.bmp,What is it?,{each}\n" for row, each in zip(rows, answers, strict=True)]
        path.write_text("id,image,question,answer\n" + "".join(lines))
    elif path.suffix == ".json":
        write(path.with_suffix(".jsonl"), answer)
        write(path.with_name("other.jsonl"))
        sets = {"one": {"annotation": "other.jsonl"}, "two": {"annotation": path.with_suffix(".jsonl").name}}
        path.write_text(json.dumps(sets))
    else:
        (path.parent / "a.bmp").write_bytes(RED)
        write_jsonl(path, [row | {"image": "a.bmp"} for row in rows])
    return path


KINDS = ["train.jsonl", "train.csv", "train.parquet", "train.tar", "meta.json"]


@pytest.mark.parametrize("name", KINDS)
def test_an_answer_changed_at_equal_length_is_refused(start, tmp_path, name):
    state = start(write(tmp_path / name)).state_dict()
    changed = start(write(tmp_path / name, "A act."))
    named = rf"{name}: two \(.*meta.jsonl\)" if name == "meta.json" else name
    message = rf"{named}: rows were changed since the run was interrupted, at equal sizes. Restore them, go on"
    with pytest.raises(CheckpointError, match=message):
        changed.load_state_dict(state)


@pytest.mark.parametrize("name", ["train.parquet", "train.tar"])
def test_a_picture_inside_a_row_changed_at_equal_size_is_refused(start, tmp_path, name):
    state = start(write(tmp_path / name)).state_dict()
    with pytest.raises(CheckpointError, match=rf"{name}: rows were changed since the run was interrupted"):
        start(write(tmp_path / name, shown=BLUE)).load_state_dict(state)


@pytest.mark.parametrize("name", ["train.parquet", "train.tar"])
def test_pictures_inside_rows_that_differ_in_a_few_pixels_are_never_shared(start, tmp_path, name):
    plain, marked = (Image.new("RGB", (300, 300)) for _ in range(2))
    marked.paste((255, 0, 0), (20, 148, 120, 151))  # 900 bytes of 270,000, between two samples of the file
    files = [io.BytesIO(), io.BytesIO()]
    for image, file in zip((plain, marked), files, strict=True):
        image.save(file, "BMP")
    data = start(write(tmp_path / name, shown=files[1].getvalue(), others=files[0].getvalue()))
    heads = data.train.index.head.tolist()
    assert len(set(heads)) == 2
    assert heads.count(heads[5]) == 1


@pytest.mark.parametrize("name", KINDS)
def test_a_file_that_was_touched_or_copied_goes_on(start, tmp_path, name):
    folder = tmp_path / "before"
    folder.mkdir()
    state = start(write(folder / name)).state_dict()
    for file in folder.iterdir():
        os.utime(file, (1, 1))
    start(folder / name).load_state_dict(state)
    shutil.copytree(folder, tmp_path / "after")
    start(tmp_path / "after" / name).load_state_dict(state)


def test_a_change_of_the_rows_may_be_allowed(start, tmp_path):
    state = start(write(tmp_path / "train.jsonl")).state_dict()
    start(write(tmp_path / "train.jsonl", "A act."), "resume_allow=[data.path]").load_state_dict(state)


def test_a_checkpoint_from_before_rows_were_named_goes_on(start, tmp_path):
    data = start(write(tmp_path / "train.jsonl"))
    state = data.state_dict()
    del state["content"]
    data.load_state_dict(state)


def test_a_set_whose_degradation_was_switched_is_refused(start, tmp_path):
    path = write(tmp_path / "meta.json")
    state = start(path).state_dict()
    sets = json.loads(path.read_text())
    sets["one"]["data_augment"] = True
    path.write_text(json.dumps(sets))
    with pytest.raises(CheckpointError, match=r"meta.json: one \(.*other.jsonl\): rows were changed"):
        start(path).load_state_dict(state)


# What a row says


def hash_of(*parts: str | Picture, supervised: bool = True, **fields: object) -> int:
    messages = (Message("user", parts), Message("assistant", ("A",), supervised))
    return hashed(trained_content(Sample(**{"id": "1", "messages": messages, "where": "a:1"} | fields)))


def test_each_part_of_what_is_trained_on_counts():
    large = bytes(1 << 20)
    different = [
        hash_of("Q"),
        hash_of("R"),
        hash_of("Q", supervised=False),
        hash_of("Q", is_plain=True),
        hash_of("Q", Picture("a.png")),
        hash_of(Picture("a.png"), "Q"),
        hash_of(Picture("b.png"), "Q"),
        hash_of(Picture("a.png", is_frame=True), "Q"),
        hash_of(Picture("a.png", frame=3), "Q"),
        hash_of(Picture("", large), "Q"),
        hash_of(Picture("", large[1:]), "Q"),
        hash_of(Picture("", large[1:] + b"x"), "Q"),
    ]
    assert len(set(different)) == len(different)


@pytest.mark.parametrize("field", [{"id": "2"}, {"where": "b:2"}])
def test_the_name_and_the_place_of_a_row_do_not_count(field):
    assert hash_of("Q", **field) == hash_of("Q")


@pytest.mark.parametrize("field", ["reasoning", "text"])
def test_what_a_row_says_is_all_that_it_says(field):
    def sample(said):
        thought = {"reasoning": said} if field == "reasoning" else {}
        parts = ("4",) if field == "reasoning" else (said,)
        return Sample("a", (Message("user", ("2+2?",)), Message("assistant", parts, True, **thought)))

    assert list(trained_content(sample("2+2=4"))) != list(trained_content(sample("2+2=5")))
