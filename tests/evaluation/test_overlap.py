"""An answer with boxes is right where they overlap those that are expected, each with one of its own."""

import pytest

from vlm_tune.evaluation.metrics import AUTO, boxes_in, is_match, overlap
from vlm_tune.evaluation.prediction import Prediction


@pytest.mark.parametrize(
    ("one", "other", "share"),
    [
        ((0, 0, 10, 10), (0, 0, 10, 10), 1.0),
        ((0, 0, 10, 10), (5, 0, 15, 10), 1 / 3),
        ((0, 0, 10, 10), (10, 0, 20, 10), 0.0),  # they touch
        ((0, 0, 10, 10), (20, 20, 30, 30), 0.0),
        ((0, 0, 10, 10), (2, 2, 8, 8), 0.36),  # one inside the other
        ((5, 5, 5, 5), (5, 5, 5, 5), 0.0),  # no area
        ((10, 10, 0, 0), (0, 0, 10, 10), 0.0),  # upside down
    ],
)
def test_the_overlap_of_two_boxes_is_their_intersection_over_their_union(one, other, share):
    assert overlap(one, other) == pytest.approx(share)
    assert overlap(other, one) == pytest.approx(share)


@pytest.mark.parametrize(
    ("text", "boxes"),
    [
        ("<ref>cup</ref><box>[[1, 2, 3, 4]]</box>", [(1, 2, 3, 4)]),
        ("<box>[[1,2,3,4],[5, 6, 7, 8]]</box>", [(1, 2, 3, 4), (5, 6, 7, 8)]),
        ("at [0.5, -2, 3, 4]", [(0.5, -2, 3, 4)]),
        ("<box>[[1, 2, 3]]</box>", []),
        ("<box>[[1, 2, 3, 4", []),  # cut off
        ("nowhere", []),
    ],
)
def test_boxes_are_found_in_a_text(text, boxes):
    assert boxes_in(text) == boxes


ONE, TWO = "<box>[[0, 0, 100, 100]]</box>", "<box>[[0, 0, 100, 100], [500, 500, 600, 600]]</box>"


@pytest.mark.parametrize(
    ("answer", "expected", "is_right"),
    [
        (ONE, ONE, True),
        ("<box>[[0, 0, 100, 60]]</box>", ONE, True),
        ("<box>[[0, 0, 100, 40]]</box>", ONE, False),
        ("It is at [0, 0, 100, 100].", ONE, True),
        ("the cup", ONE, False),
        (TWO, ONE, False),  # one too many
        (ONE, TWO, False),
        ("<box>[[500, 500, 600, 600], [0, 0, 100, 100]]</box>", TWO, True),  # in any order
        ("<box>[[0, 0, 100, 100], [0, 0, 100, 99]]</box>", TWO, False),  # the same one twice
        ("[1, 2, 3, 4]", "[1, 2, 3, 5]", False),  # no boxes: text
    ],
)
def test_a_box_is_right_from_an_overlap_of_one_half(answer, expected, is_right):
    assert is_match(answer, expected) is is_right


def test_the_most_frequent_box_is_right_where_it_overlaps():
    expected = [ONE, ONE, "<box>[[0, 0, 100, 90]]</box>", "<box>[[0, 0, 10, 10]]</box>"]
    assert AUTO.majority([Prediction(row, "", "all", "", box, "") for row, box in enumerate(expected)]) == {"all": 0.75}
