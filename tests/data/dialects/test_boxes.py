"""Boxes of rows become text once, in thousandths of their picture, whatever becomes of the picture later."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from vlm_tune.config.parse import load_config
from vlm_tune.config.schema import AugmentConfig, DataConfig, ImageConfig, TileRule
from vlm_tune.data.dialects.boxes import write_boxes
from vlm_tune.data.dialects.dialects import parse_record
from vlm_tune.data.sets.dataset import Conversations, PictureSettings
from vlm_tune.errors import DataError
from vlm_tune.model.encoder import build_encoder

FIND = {
    "messages": [
        {"role": "user", "content": "<image>Find <ref-object>."},
        {"role": "assistant", "content": "At <bbox>."},
    ],
    "images": ["a.jpg"],
    "objects": {"ref": ["the red cup"], "bbox": [[20, 10, 100, 80]]},
}


def parse(record, fmt="auto"):
    return parse_record(record, fmt, "train.jsonl:1", 0)


def spoken(record, size=(200, 100), fmt="auto"):
    return [message.text for message in write_boxes(parse(record, fmt), lambda picture: size).messages]


def with_objects(**changed):
    return FIND | {"objects": FIND["objects"] | changed}


def test_pixels_become_thousandths_of_the_picture():
    assert spoken(FIND) == ["Find <ref>the red cup</ref>.", "At <box>[[100, 100, 500, 800]]</box>."]


def test_thousandths_are_cut_off_as_the_reference_does():
    assert spoken(with_objects(bbox=[[1, 1, 2, 2]]), (3, 3))[1] == "At <box>[[333, 333, 666, 666]]</box>."


@pytest.mark.parametrize(
    ("kind", "box"),
    [
        ("real", [50, 25, 100, 100]),
        ("norm1", [0.25, 0.25, 0.5, 1]),
        ("norm_1", [0.25, 0.25, 0.5, 1]),
        ("norm1000", [250, 250, 500, 1000]),
        ("norm_1000", [250, 250, 500, 1000]),
    ],
)
def test_boxes_may_be_pixels_shares_or_thousandths(kind, box):
    assert spoken(with_objects(bbox=[box], bbox_type=kind))[1] == "At <box>[[250, 250, 500, 1000]]</box>."


def test_one_mark_may_stand_for_several_boxes():
    row = with_objects(bbox=[[[0, 0, 20, 10], [100, 50, 200, 100]]])
    assert spoken(row)[1] == "At <box>[[0, 0, 100, 100], [500, 500, 1000, 1000]]</box>."


def test_reasoning_may_hold_names_and_boxes_too():
    think = {"role": "assistant", "reasoning_content": "I see <ref-object> at <bbox>.", "content": "At <bbox>."}
    row = with_objects(ref=["a cup", "the cup"], bbox=[[0, 0, 20, 10], [20, 10, 100, 80]]) | {
        "messages": [FIND["messages"][0], think]
    }
    sample = write_boxes(parse(row), lambda picture: (200, 100))
    assert sample.messages[0].text == "Find <ref>a cup</ref>."
    assert sample.messages[1].reasoning == "I see <ref>the cup</ref> at <box>[[0, 0, 100, 100]]</box>."
    assert sample.messages[1].text == "At <box>[[100, 100, 500, 800]]</box>."
    silent = replace(sample.messages[1], parts=("There.",))
    assert replace(sample, messages=(sample.messages[0], silent)).is_located  # so it is not mirrored


OLD = [{"caption": "the red cup", "bbox": [20, 10, 100, 80], "bbox_type": "real", "image": 0}]


@pytest.mark.parametrize("objects", [OLD, str(OLD)], ids=["list", "text"])
def test_older_rows_describe_one_object_after_the_other(objects):
    row = {"query": "<image>Find <ref-object>.", "response": "At <bbox>.", "images": ["a.jpg"], "objects": objects}
    assert spoken(row) == spoken(FIND)


@pytest.mark.parametrize("dialect", ["llava", "sharegpt", "openai", "swift", "xtuner"])
def test_every_dialect_of_conversations_reads_them(dialect):
    question, answer = "<image>Find <ref-object>.", "At <bbox>."
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    rows = {
        "llava": {"conversations": turns},
        "sharegpt": {"conversations": turns},
        "openai": {
            "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Find <ref-object>."}]},
                FIND["messages"][1],
            ]
        },
        "swift": {"query": question, "response": answer},
        "xtuner": {"conversation": [{"input": question, "output": answer}]},
    }
    row = rows[dialect] | {key: FIND[key] for key in ("images", "objects")}
    assert spoken(row, fmt=dialect)[-2:] == spoken(FIND)


def test_a_box_is_of_the_picture_that_it_names():
    row = FIND | {
        "messages": [
            {"role": "user", "content": "<image><image>Both <ref-object>s?"},
            {"role": "assistant", "content": "<bbox> and <bbox>"},
        ],
        "images": ["a.jpg", "b.jpg"],
        "objects": {"ref": ["cup"], "bbox": [[10, 10, 20, 20], [10, 10, 20, 20]], "image_id": [0, 1]},
    }
    sizes = {"a.jpg": (100, 100), "b.jpg": (20, 20)}
    sample = write_boxes(parse(row), lambda picture: sizes[picture.path])
    assert sample.messages[1].text == "<box>[[100, 100, 200, 200]]</box> and <box>[[500, 500, 1000, 1000]]</box>"


def test_boxes_are_written_once():
    sample = write_boxes(parse(FIND), lambda picture: (200, 100))
    assert write_boxes(sample, lambda picture: (1, 1)) == sample


@pytest.mark.parametrize(
    ("objects", "reason"),
    [
        ({"bbox": [[1, 2, 3]]}, "box 1 is [1, 2, 3]. Write four numbers"),
        ({"bbox": [[1, 2, 3, "4"]]}, "Write four numbers"),
        ({"bbox": [[1, 2, 3, float("nan")]]}, "Write four numbers"),
        ({"bbox": [7]}, "box 1 is 7. Write four numbers"),
        ({"bbox": [[30, 2, 3, 4]]}, "not from its upper left to its lower right corner"),
        ({"bbox": [[1, 2, 3, 2]]}, "not from its upper left"),
        ({"bbox": []}, 'the turns hold 1 mark "<bbox>", but "bbox" of "objects" lists 0'),
        ({"bbox": [[1, 2, 3, 4]] * 2}, 'the turns hold 1 mark "<bbox>", but "bbox" of "objects" lists 2'),
        ({"ref": []}, 'the turns hold 1 mark "<ref-object>", but "ref" of "objects" lists 0'),
        ({"ref": [""]}, '"objects", name 1 is empty'),
        ({"ref": ["a <bbox>"]}, "holds a mark itself"),
        ({"bbox_type": "relative"}, "\"bbox_type\" is 'relative'. Known: real, norm1, norm_1, norm1000, norm_1000"),
        ({"image_id": [1]}, '"objects" names image 1, counted from 0, of 1'),
        ({"image_id": [0, 0]}, '"image_id" holds 2 numbers for 1 boxes'),
        ({"image_id": ["a"]}, "box 1 is of image 'a'"),
        ({"points": [[1, 2]]}, '"points" is not read in "objects"'),
        ({"bbox": [[20, 10, 201, 80]]}, "box 1 is [20, 10, 201, 80], in a picture of 200 x 100"),
        ({"bbox": [[-1, 10, 20, 80]]}, "box 1 is [-1, 10, 20, 80], in a picture of 200 x 100"),
        ({"bbox": [[0, 0, 1, 1.5]], "bbox_type": "norm1"}, "in a picture of 1 x 1"),
    ],
)
def test_a_faulty_box_is_refused(objects, reason):
    with pytest.raises(DataError, match=re.escape(reason)):
        spoken(with_objects(**objects))


@pytest.mark.parametrize("objects", ["[not a literal", 7, ["a"]])
def test_objects_of_another_kind_are_refused(objects):
    with pytest.raises(DataError, match='"objects" is'):
        parse(FIND | {"objects": objects})


def test_a_text_may_speak_of_the_marks():
    row = {"messages": [{"role": "user", "content": "What is <bbox>?"}, {"role": "assistant", "content": "A mark."}]}
    assert spoken(row)[0] == "What is <bbox>?"


# ------------------------------------------------------------------------------------------------------- with pictures


@pytest.fixture
def opened(parts, tmp_path):
    """Give a function that opens a row about one picture, 40 pixels wide and 20 high, as a data set."""

    def open_rows(row, image=ImageConfig(), augment=AugmentConfig(), **tiles):  # noqa: B008
        pixels = np.zeros((20, 40, 3), np.uint8)
        pixels[5:15, 10:20] = 255
        exif = Image.Exif()
        exif[0x0112] = 6  # to be shown turned
        Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
        (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
        config = load_config(parts)
        encoder, _ = build_encoder(config)
        settings = PictureSettings(replace(config.model.tiles, **tiles), config.model.vision.normalize, augment)
        return Conversations(tmp_path / "rows.jsonl", replace(DataConfig(path=""), image=image), encoder, settings)

    return open_rows


ROW = FIND | {"images": ["a.png"], "objects": {"ref": ["white"], "bbox": [[10, 5, 20, 15]]}}


@pytest.mark.parametrize("rule", ["dynamic", "pad", "resize"])
def test_the_numbers_are_of_the_picture_whatever_its_tiles(opened, rule):
    sample = opened(ROW, rule=TileRule(rule)).sample(0)
    assert sample.messages[1].text == "At <box>[[250, 250, 500, 750]]</box>."


@pytest.mark.parametrize(("exif", "seen"), [(False, [250, 250, 500, 750]), (True, [500, 125, 1000, 375])])
def test_pixels_are_those_of_the_picture_as_it_is_read(opened, exif, seen):
    sample = opened(ROW, ImageConfig(exif=exif)).sample(0)
    assert sample.messages[1].text == f"At <box>[{seen}]</box>."


@pytest.mark.parametrize(("row", "stays"), [(ROW, True), (FIND | {"images": ["a.png"], "objects": None}, False)])
def test_a_picture_with_a_box_is_not_mirrored_or_cropped(opened, row, stays):
    if not stays:
        turns = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "A cup."}]
        row = row | {"messages": turns}
    data = opened(row, augment=AugmentConfig(flip=True, crop=0.5))
    sample = data.sample(0)
    example = data.encoder.encode(sample, data.tiling(sample))
    plain = data.make_tiles(sample, example)
    changed = [data.make_tiles(sample, example, np.random.default_rng(seed)) for seed in range(8)]
    assert all(np.array_equal(plain, each) for each in changed) == stays
