"""The recipe of boxes: each picture holds what its rows say, where they say it, and nothing else that a name fits."""

import importlib.util
import json
import random
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from vlm_tune.data.dialects.boxes import write_boxes
from vlm_tune.data.dialects.dialects import parse_record
from vlm_tune.evaluation.metrics import overlap
from vlm_tune.recipes.recipe import recipe_folders


def load_recipe() -> ModuleType:
    """Load the recipe from its file: recipes are programs, not modules of the package."""
    spec = importlib.util.spec_from_file_location("grounding_recipe", recipe_folders()["grounding"] / "prepare.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


grounding = load_recipe()


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(grounding, "NUM_SHAPES", {"train": 12, "val": 3, "test": 3})
    monkeypatch.setattr(grounding, "NUM_ALONE", {"train": 5, "val": 2})


@pytest.fixture
def demo(tmp_path):
    """Write a prepared demo of one photo in each part."""
    (tmp_path / "demo/images").mkdir(parents=True)
    for number, (part, file) in enumerate(grounding.PHOTOS.items()):
        name = f"images/{part}.jpeg"
        Image.new("RGB", (900, 500), (90, 60 * number, 90)).save(tmp_path / "demo" / name)
        (tmp_path / f"demo/{file}.jsonl").write_text(2 * (json.dumps({"image": name}) + "\n"))
    return tmp_path / "demo"


@pytest.mark.parametrize("form", grounding.SHAPES)
def test_a_form_touches_all_four_sides_of_its_box(form):
    mask = np.asarray(grounding.draw_shape(form, 60)) > 40
    assert mask.shape == (60, 60)
    assert all(side.any() for side in (mask[:2], mask[-2:], mask[:, :2], mask[:, -2:]))


def test_a_picture_shows_two_to_four_things_that_differ_in_name_and_do_not_overlap(few):
    for _, picture, found in grounding.shape_pictures("train"):
        assert 2 <= len(found) <= 4
        assert len({expression for expression, _ in found}) == len(found)
        covered = np.zeros(picture.size[::-1], int)
        for _, (left, top, right, bottom) in found:
            assert 0 <= left < right <= picture.width
            assert 0 <= top < bottom <= picture.height
            covered[top:bottom, left:right] += 1
        assert covered.max() == 1


def test_a_picture_of_one_shape_shows_nothing_else(few):
    alone = list(grounding.shape_pictures("train", alone=True))
    assert [len(found) for _, _, found in alone] == [1] * 5
    assert not {name for name, _, _ in alone} & {name for name, _, _ in grounding.shape_pictures("train")}


def test_each_box_lies_in_a_place_of_its_own_and_ends_where_cells_do():
    boxes = grounding.places(random.Random(0), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.7), (1.0, 1.0)] * 4)
    assert all(edge % grounding.CELL == 0 for box in boxes for edge in box)
    assert {grounding.place(box) for box in boxes} == {(x, y) for x in (0, 250, 500, 750) for y in (0, 250, 500, 750)}
    side = grounding.SIDE // 4
    assert all(left // side == (right - 1) // side for left, _, right, _ in boxes)
    assert all(top // side == (bottom - 1) // side for _, top, _, bottom in boxes)


def test_the_same_pictures_come_every_time_and_no_picture_comes_twice(few):
    seen = [picture.tobytes() for part in grounding.NUM_SHAPES for _, picture, _ in grounding.shape_pictures(part)]
    again = [picture.tobytes() for part in grounding.NUM_SHAPES for _, picture, _ in grounding.shape_pictures(part)]
    assert seen == again
    assert len(set(seen)) == len(seen) == 18


def test_emoji_lie_on_photos_of_their_own_part_with_tight_boxes(demo):
    red = Image.new("RGBA", (100, 50), (255, 0, 0, 255))
    for part in grounding.PHOTOS:
        made = list(grounding.emoji_pictures(part, demo, dict.fromkeys(("flag", "bar", "sign", "door", "belt"), red)))
        assert len(made) == grounding.COPIES[part]
        for name, picture, found in made:
            assert name.startswith(f"emoji-{part}-")
            assert picture.size == (grounding.SIDE, grounding.SIDE)
            is_red = (np.asarray(picture) == (255, 0, 0)).all(-1)
            boxed = np.zeros_like(is_red)
            for _, (left, top, right, bottom) in found:
                boxed[top:bottom, left:right] = True
            assert (is_red == boxed).all()


def test_its_rows_are_read_as_questions_whose_reasoning_looks_at_all_things_before_one_box_is_given():
    found = [("the red star", (120, 24, 180, 60)), ("the blue star", (0, 0, 60, 48))]
    row, _ = grounding.asking_rows("shapes-test-0000", found, 3)
    sample = write_boxes(parse_record(row, "auto", "test.jsonl:1", 0), lambda picture: (240, 240))
    question, answer = sample.messages
    assert question.text == "\nWhere is <ref>the red star</ref>?"
    assert answer.reasoning.splitlines() == [
        "the blue star at 0, 0",
        "the red star at 500, 0",
        "So the red star at 500, 0",
    ]
    assert answer.text == "<box>[[500, 100, 750, 250]]</box>"
    assert (row["task"], sample.pictures[0].path) == ("shapes", "images/shapes-test-0000.jpeg")


def test_what_a_picture_shows_is_listed_from_left_to_right_with_where_its_box_begins():
    found = [("the red star", (0, 180, 60, 240)), ("the sun", (60, 12, 108, 60)), ("the cat", (180, 0, 228, 48))]
    row = grounding.listing_row("shapes-train-0000", found)
    assert row["messages"][1]["content"].splitlines() == [
        "the red star at 0, 750",
        "the sun at 250, 0",
        "the cat at 750, 0",
    ]
    assert "objects" not in row


def test_a_blind_guess_is_rarely_right():
    """The one box that is nearest to most: what an answer without a look at the picture can reach."""
    dice = random.Random(0)
    boxes = [box for _ in range(400) for box in grounding.places(dice, [(1.0, 1.0)] * 3)]
    best = max(sum(overlap(guess, box) >= 0.5 for box in boxes) for guess in boxes[::10])
    assert best / len(boxes) < 0.15
