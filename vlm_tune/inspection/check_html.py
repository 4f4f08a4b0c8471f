"""The findings of `check` as one HTML page, worded as in the terminal."""

from pathlib import Path
from typing import Any

from vlm_tune.inspection import check_report
from vlm_tune.inspection.check_answers import SHORT
from vlm_tune.inspection.check_samples import Look
from vlm_tune.pages.page import write_page


def write_html(report: dict[str, Any], looks: list[Look], path: Path) -> None:
    """Write the page of a report (the contents of check.json), and of a few rows as the model sees them."""
    values = {"report": report, "looks": looks, "words": check_report, "max_short": SHORT}
    write_page(path, "check.html", heading=Path(report["path"]).name, **values)
