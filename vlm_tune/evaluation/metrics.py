"""Scores of answers: exact match but for case, outer space and closing punctuation; boxes by how far they overlap."""

import re
from collections import Counter

OVERLAP = 0.5  # from which a box counts as found, as on RefCOCO: intersection over union
_NUMBER = r"\s*(-?\d+(?:\.\d+)?)\s*"
_BOX = re.compile(rf"\[{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\]")

Box = tuple[float, float, float, float]


def fold(text: str) -> str:
    """Drop case, outer space and closing punctuation: " Grain legumes." -> "grain legumes"."""
    return re.sub(r"\s+", " ", text).strip().strip(".!,;:\"'").casefold()


def is_match(answer: str, expected: str) -> bool:
    """Return whether an answer matches the expected one: as text or, where that has a `<box>`, box by box."""
    if "<box>" not in expected:
        return fold(answer) == fold(expected)
    found, wanted = boxes_in(answer), boxes_in(expected)
    if len(found) != len(wanted):
        return False
    for box in wanted:
        nearest = max(found, key=lambda other: overlap(box, other))
        if overlap(box, nearest) < OVERLAP:
            return False
        found.remove(nearest)
    return True


def boxes_in(text: str) -> list[Box]:
    """List the boxes that a text names, [x1, y1, x2, y2] in thousandths of the picture."""
    return [(float(x1), float(y1), float(x2), float(y2)) for x1, y1, x2, y2 in _BOX.findall(text)]


def overlap(one: Box, other: Box) -> float:
    """Return the intersection of two boxes over their union; 0 where a box has no area."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    common = max(0.0, width) * max(0.0, height)
    union = sum(max(0.0, x2 - x1) * max(0.0, y2 - y1) for x1, y1, x2, y2 in (one, other)) - common
    return common / union if union > 0 else 0.0


def majority(expected: list[str]) -> float:
    """Accuracy of always giving the most frequent answer."""
    most = Counter(map(fold, expected)).most_common(1)[0][0]
    return sum(is_match(most, each) for each in expected) / len(expected)
