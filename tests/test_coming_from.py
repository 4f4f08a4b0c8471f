"""Each line of docs/coming_from.md names a verb, keys and choices that are there, and values that compose."""

import re
from pathlib import Path

import pytest

from vlm_tune.cli import VERBS, is_word
from vlm_tune.config.parse import find_choice, load_config
from vlm_tune.config.usage import USAGE

PAGE = (Path(__file__).parents[1] / "docs/coming_from.md").read_text(encoding="utf-8")
ROWS = [line.strip("| ").split(" | ") for line in PAGE.splitlines() if line.startswith("| ") and "`" in line]
OURS = sorted({code for _, ours in ROWS for code in re.findall(r"`([^`]+)`", ours)})


def test_the_page_has_a_line_for_each_of_the_four():
    assert len(ROWS) > 40
    assert {theirs.split()[0] for theirs, _ in ROWS} == {"XTuner", "LLaMA-Factory", "ms-swift", "LLaVA"}


@pytest.mark.parametrize("line", OURS)
def test_our_side_is_true(line):
    words = line.split()
    verb = words.pop(0) if is_word(words[0]) else "train"
    assert verb in VERBS
    if verb == "configs":
        assert words == ["list"] or (words[0] == "copy" and find_choice("experiment", words[1]).is_file())
        return
    overrides = [word for word in words if word.partition("=")[0] not in USAGE[verb].keys]
    assert not any(map(is_word, overrides))
    load_config(overrides)
