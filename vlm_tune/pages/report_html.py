"""A run's report as one HTML page: report.json turned into the values that the template names."""

import math
import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from vlm_tune.config.schema import ImageConfig
from vlm_tune.data.pictures.images import ImageReader
from vlm_tune.data.sample import Picture
from vlm_tune.errors import DataError
from vlm_tune.evaluation.metrics import Box, is_match
from vlm_tune.evaluation.prediction import conclusion
from vlm_tune.pages.boxes import clipped_boxes
from vlm_tune.pages.page import picture_url, write_page
from vlm_tune.pages.report_chart import NARROW_SIZE, chart, curve, smoothed
from vlm_tune.words import percent

MAX_PICTURES = 60  # the page stays small enough to send; report.json has all answers
MAX_ANSWER = 600  # characters of one shown text
THUMBNAIL = (560, 380)  # pixels, twice the size on the page, for dense screens
QUALITY = 82  # of a thumbnail, as JPEG

SCORES = ("after", "before", "blind", "majority")
RIVALS = {"blind": "the same model without the picture", "majority": "always the most frequent answer"}
DATA_NAMES = {
    "path": "file",
    "rows": "training rows",
    "val_rows": "validation rows",
    "skipped": "rows left out",
    "shortened": "rows shortened",
    "supervised_share": "supervised tokens",
    "pack_fill": "packs filled",
    "tokens": "tokens a row",
    "tiles": "tiles a row",
}
SHARES = ("supervised_share", "pack_fill")
BLANK: dict[str, Any] = {
    "run": {},
    "evaluation": {},
    "loss_curve": [],
    "answers": [],
    "image": {},
    "parts": [],
    "data": {},
}
BLANK |= {"best": None, "train_seconds": 0, "peak_rss_mb": 0, "config": "", "environment": {}}


def write_html(report: dict[str, Any], path: Path) -> None:
    """Write the page of a report (the contents of report.json); a block that is missing or empty is left out.

    `run.samples` and `run.tokens` over `run.seconds` is the speed shown, so these three describe the same stretch.
    """
    report = BLANK | {name: block for name, block in report.items() if block}
    run = defaultdict(lambda: None, report["run"])
    drawings = {"wide": chart(report), "narrow": chart(report, NARROW_SIZE)}
    losses = [entry.get("loss") for entry in report["loss_curve"]]
    values = {
        "report": report,
        "run": run,
        "headline": list(headline(report["evaluation"])),
        "train": smoothed(curve(report, "loss_curve")),
        "scores": scores(report["evaluation"]),
        "drawings": {name: drawing for name, drawing in drawings.items() if drawing},
        "margin": 0,  # of the drawings
        "num_lost": sum(loss is None or not math.isfinite(loss) for loss in losses),
        "gallery": gallery(report["answers"], ImageConfig(**report["image"])),
        "data": data_facts(report["data"]),
    }
    heading = " · ".join(str(run[key]) for key in ("model", "stage") if run[key]) or "training run"
    write_page(path, "report.html", heading=heading, **values)


def headline(evaluation: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield the accuracy of up to two tasks, or the mean of more, against the best guess without the picture."""
    scores = {kind: dict(evaluation.get(kind) or {}) for kind in SCORES}
    tasks = list(scores["after"])
    if len(tasks) > 2:
        scores = {kind: {"": sum(values.values()) / len(values)} if values else {} for kind, values in scores.items()}
    for task, after in scores["after"].items():
        name = f"{task.replace('_', ' ')}, right answers" if task else f"right answers, mean of {len(tasks)} tasks"
        guesses = [(scores[kind][task], rival) for kind, rival in RIVALS.items() if task in scores[kind]]
        note = ""
        if guesses:
            guess, rival = max(guesses)
            note = f"{100 * abs(after - guess):.1f} points {'above' if after >= guess else 'below'} {rival}"
        yield name, percent(after), note


def scores(evaluation: dict[str, Any]) -> dict[str, Any]:
    """Collect, by task, the scores after training, before it, blind, and of the most frequent answer."""
    kinds = [kind for kind in SCORES if evaluation.get(kind)]
    asked = evaluation.get("num_questions") or {}
    tasks = []
    for name in dict.fromkeys(task for kind in kinds for task in evaluation[kind]):
        shares, count = {kind: evaluation[kind].get(name) for kind in kinds}, asked.get(name, 0)
        points = 100 * margin(shares[kinds[0]] or 0.0, count)
        tasks.append({"name": name, "shares": shares, "count": count, "margin": points})
    return {"kinds": kinds, "tasks": tasks, "is_counted": bool(asked)}


def margin(share: float, count: int) -> float:
    """Return half of the 95% interval of a share, after Agresti and Coull (1998): not 0 when all or none are right."""
    adjusted = (share * count + 2) / (count + 4)
    return 1.96 * math.sqrt(adjusted * (1 - adjusted) / (count + 4))


def gallery(answers: list[dict[str, Any]], look: ImageConfig) -> dict[str, Any]:
    """Return the test pictures as training saw them, each once, with its questions and the answers before and after."""
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for index, answer in enumerate(answers):
        picture = answer.get("picture") or ""
        groups.setdefault((picture, -1 if picture else index), []).append(answer)  # text: a card for each
    shown = list(groups.items())[:MAX_PICTURES]
    after, before = (sum(is_right(answer, key) for answer in answers) for key in ("after", "before"))
    summary = f"{after:,} of {len(answers):,} right after training (marked ✓), {before:,} before."
    if not after + before:
        summary = f"Word for word, none of the {len(answers):,} is the expected answer."
    if len(shown) < len(groups):
        summary += f" The first {len(shown):,} of {len(groups):,} are shown; report.json has all answers."
    title = "Answers about test pictures" if any(picture for picture, _ in groups) else "Answers"
    cards = [card(picture, asked, look) for (picture, _), asked in shown]
    has_boxes = any(card["boxes"] for card in cards)
    return {"title": title, "summary": summary, "cards": cards, "has_boxes": has_boxes}


def card(picture: str, asked: list[dict[str, Any]], look: ImageConfig) -> dict[str, Any]:
    """Return one picture with what was asked about it: (question, [(key, answer, whether it is right, note)])."""
    questions = []
    for answer in asked:
        lines = [
            (key, shorten(str(answer[key]).strip()), is_right(answer, key), "")
            for key in ("expected", "before", "after")
            if answer.get(key) is not None
        ]
        questions.append((shorten(str(answer.get("question") or "").replace("<image>", "").strip()), lines))
    name, shown = os.path.basename(picture), thumbnail(picture, look) if picture else None
    boxes = list(located(asked, shown[1:])) if shown else []
    return {"name": name, "picture": shown, "questions": questions, "boxes": boxes}


def located(asked: list[dict[str, Any]], size: tuple[int, int]) -> Iterator[tuple[str, str, Box]]:
    """Yield the boxes expected and answered about a picture of (width, height): kind, number of the question, box."""
    for number, answer in enumerate(asked, 1):
        for key in ("expected", "after"):
            for box in clipped_boxes(conclusion(str(answer.get(key) or "")), size):
                yield key, str(number) if len(asked) > 1 else "", box


def is_right(answer: dict[str, Any], key: str) -> bool:
    """Return whether the answer before or after training is the expected one."""
    given, expected = answer.get(key), answer.get("expected")
    return key != "expected" and bool(given) and bool(expected) and is_match(conclusion(str(given)), str(expected))


def thumbnail(picture: str, look: ImageConfig) -> tuple[str, int, int] | None:
    """Return a picture as training saw it, small: its URL, width and height; None where the file cannot be read."""
    image = small_picture(picture, look)
    return (picture_url(image, QUALITY), *image.size) if image else None


def small_picture(picture: str, look: ImageConfig) -> Image.Image | None:
    """Open a picture as training saw it, small; None where the file cannot be read."""
    return open_small(ImageReader(look, Path("/")), Picture(os.path.abspath(picture)))


def open_small(reader: ImageReader, picture: Picture) -> Image.Image | None:
    """Open a picture, small; None where it cannot be read."""
    try:
        image = reader.open_picture(picture)
    except DataError:
        return None
    image.thumbnail(THUMBNAIL, Image.Resampling.LANCZOS)
    return image


def shorten(text: str) -> str:
    """Cut a very long text; report.json keeps it whole."""
    return text if len(text) <= MAX_ANSWER else text[:MAX_ANSWER].rstrip() + " …"


def data_facts(data: dict[str, Any]) -> dict[str, str]:
    """Describe what the model was trained on: name -> value."""
    return {
        DATA_NAMES.get(key, key.replace("_", " ")): data_text(key, value)
        for key, value in data.items()
        if value is not None
    }


def data_text(key: str, value: Any) -> str:
    """Format one fact about the data: 2,000 / 97.0% / median 60, at most 120."""
    if isinstance(value, dict):
        names = {"p50": "median", "max": "at most"}
        return ", ".join(f"{names.get(name, name)} {data_text('', number)}" for name, number in value.items())
    if key in SHARES and isinstance(value, float):
        return percent(value)
    return f"{value:,}" if isinstance(value, int | float) else str(value)
