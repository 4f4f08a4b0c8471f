"""Scores of answers: exact match, ignoring case, outer space and closing punctuation."""

import re
from collections import Counter


def fold(text: str) -> str:
    """Drop case, outer space and closing punctuation: " Grain legumes." -> "grain legumes"."""
    return re.sub(r"\s+", " ", text).strip().strip(".!,;:\"'").casefold()


def is_match(answer: str, expected: str) -> bool:
    """Return whether an answer matches the expected one."""
    return fold(answer) == fold(expected)


def majority(expected: list[str]) -> float:
    """Accuracy of always giving the most frequent answer."""
    return Counter(map(fold, expected)).most_common(1)[0][1] / len(expected)
