"""Dropout is seeded by the position alone, by a rule that no version of Python changes."""

import pytest

from vlm_tune.training.module import dropout_seed

POSITION = (0, 1, 2, 3)  # seed, step, micro-batch, rank


def test_the_seed_of_a_position_is_a_known_number():
    assert dropout_seed(*POSITION) == 12927410244083705794


@pytest.mark.parametrize("place", range(4))
def test_each_number_of_a_position_counts(place):
    other = [number + (at == place) for at, number in enumerate(POSITION)]
    assert dropout_seed(*other) != dropout_seed(*POSITION)
