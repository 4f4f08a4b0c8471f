"""The worst answers of an evaluation as one page: pictures, questions, what was expected, and what each model said."""

from pathlib import Path
from statistics import fmean
from typing import Any

from vlm_tune.evaluation.prediction import Prediction, by_task
from vlm_tune.evaluation.verb import Examined
from vlm_tune.pages.page import picture_url, write_page
from vlm_tune.pages.report_html import MAX_PICTURES, QUALITY, located, open_small, shorten
from vlm_tune.words import counted, percent


def write_worst(examined: Examined, path: Path) -> None:
    """Write the page: the scores, and of each task the answers that scored least, 60 in all."""
    answers = list(examined.answers.values())
    by_row = {each.row: [predictions[place] for predictions in answers] for place, each in enumerate(answers[0])}
    tasks = list(by_task(answers[0]))[:MAX_PICTURES]
    most = MAX_PICTURES // max(1, len(tasks))
    sections = []
    for task, asked in tasks:
        means = sorted((fmean(other.score for other in by_row[each.row]), each.row) for each in asked)
        wrong = [row for mean, row in means if mean < 1]
        cards = [card(examined, row, by_row[row]) for row in wrong[:most]]
        sections.append(
            {"task": task, "cards": cards, "summary": summary(examined, len(wrong), len(cards), len(asked))}
        )
    scores, shown = examined.scores, examined.metric.shown
    table = [
        {"task": task, "count": len(asked), "scores": [shown(each[task]) for each in scores.values()]}
        for task, asked in by_task(answers[0])
    ]
    values = {"names": list(scores), "measure": examined.measure, "table": table, "sections": sections}
    write_page(path, "worst.html", heading=examined.test.path.name, file=str(examined.test.path), **values)


def summary(examined: Examined, wrong: int, shown: int, count: int) -> str:
    """Say how many answers of a task could be better, and how many of them are shown."""
    if examined.metric.is_likelihood:
        return f"The {shown:,} least likely of {count:,} expected answers."
    if not wrong:
        return f"All {counted(count, 'question')} were answered as expected."
    text = f"{wrong:,} of {counted(count, 'question')} {'was' if wrong == 1 else 'were'} not answered as expected"
    text += " by at least one model" if len(examined.answers) > 1 else ""
    return text + (f"; the worst {shown:,} are shown." if shown < wrong else ".")


def card(examined: Examined, row: int, predictions: list[Prediction]) -> dict[str, Any]:
    """Return a question's first picture with the question and all answers, as the template's cards are."""
    sample = examined.samples[row]
    image = open_small(examined.test.reader, sample.pictures[0]) if sample.pictures else None
    first = predictions[0]
    lines = [("expected", shorten(" | ".join(dict.fromkeys(first.accepted))), False, "")]
    for name, said in zip(examined.answers, predictions, strict=True):
        key, is_graded = name if len(predictions) > 1 else "answer", 0 < said.score < 1
        if said.tokens:
            lines.append((key, f"{percent(said.score)} a token, {said.tokens} tokens", False, ""))
        else:
            lines.append((key, shorten(said.answer), said.correct, percent(said.score) if is_graded else ""))
    more = len(sample.pictures) - 1
    question = shorten(first.question) + (f"\n(and {more} more pictures)" if more > 0 else "")
    name = Path(sample.pictures[0].path).name or sample.where if sample.pictures else ""
    boxes = located([{"expected": first.accepted[0], "after": first.answer}], image.size) if image else ()
    return {
        "name": name,
        "picture": (picture_url(image, QUALITY), *image.size) if image else None,
        "questions": [(question, lines)],
        "boxes": list(boxes),
    }
