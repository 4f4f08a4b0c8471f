"""What the task own.yaml shows, asks, and how it scores: exact match, as `evaluate` counts it."""

import re
import unicodedata
from typing import Any

from PIL import Image


def pictures(row: dict[str, Any]) -> list[Image.Image]:
    """Open the picture of a row."""
    return [Image.open(row["image"]).convert("RGB")]


def question(row: dict[str, Any], lmms_eval_specific_kwargs: dict[str, Any] | None = None) -> str:
    """Return what is asked, behind the picture."""
    return str(row["question"])


def score(row: dict[str, Any], results: list[Any]) -> dict[str, float]:
    """Compare the answer with the expected one, but for case, outer space and punctuation, and forms of Unicode."""
    return {"exact_match": float(fold(str(results[0])) == fold(row["answer"]))}


def fold(text: str) -> str:
    """Drop case, outer space and punctuation, and forms of Unicode."""
    return re.sub(r"\s+", " ", unicodedata.normalize("NFKC", text)).strip(" .!?,;:\"'。、“”‘’").casefold()
