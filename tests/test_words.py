"""One of something is written so, and everything else as many."""

import pytest

from vlm_tune.words import counted


@pytest.mark.parametrize(("number", "text"), [(0, "0 rows"), (1, "1 row"), (2, "2 rows"), (12000, "12,000 rows")])
def test_a_noun_agrees_with_its_number(number, text):
    assert counted(number, "row") == text
