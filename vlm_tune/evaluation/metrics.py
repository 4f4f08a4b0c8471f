"""Scores of answers, from 0 to 1: how each metric grades one answer, and what it says of a task."""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from vlm_tune.errors import ConfigError, DataError
from vlm_tune.evaluation.prediction import Prediction, by_task
from vlm_tune.evaluation.vqa import vqa_accuracy
from vlm_tune.words import percent

OVERLAP = 0.5  # from which a box counts as found, as on RefCOCO: intersection over union
NEAR = 0.5  # similarity from which ANLS counts an answer
_NUMBER = r"\s*(-?\d+(?:\.\d+)?)\s*"
_BOX = re.compile(rf"\[{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\]")
_OPTION = re.compile(r"^\(?([A-Z])[.):](?:\s+|$)(.*)$")
_LETTER = re.compile(  # "B", "(B)", "B. red"; "The answer is: **B**"; "答案是B", "选B"; "b" alone
    r"\W*([A-Z])(?:\W*$|[.):,])|.*\b(?i:answer|option|choice)(?: is)?\W{0,6}([A-Z])\b"
    r"|.*(?:答案|选)\W*[是为]?\W*([A-Z])(?![a-z])|\W*([a-z])\W*$",
    re.DOTALL,
)
_CHINESE = re.compile("[\u3400-\u9fff]")

Box = tuple[float, float, float, float]


def fold(text: str) -> str:
    """Drop case, outer space and punctuation, and forms of Unicode: " Grain legumes." -> "grain legumes"."""
    return re.sub(r"\s+", " ", unicodedata.normalize("NFKC", text)).strip(" .!?,;:\"'。、“”‘’").casefold()


def is_match(answer: str, expected: str) -> bool:
    """Return whether an answer matches the expected one: as text or, where that has boxes, box by box."""
    if "<box>" not in expected or not boxes_in(expected):
        return fold(answer) == fold(expected)
    return all(share >= OVERLAP for share in overlaps(answer, expected))


def overlaps(answer: str, expected: str) -> list[float]:
    """Return the overlap of each expected box with the nearest one that is left, and 0 for each box too many."""
    found, shares = boxes_in(answer), []
    for box in boxes_in(expected):
        nearest = max(found, key=lambda other: overlap(box, other), default=None)
        shares.append(overlap(box, nearest) if nearest else 0.0)
        if nearest:
            found.remove(nearest)
    return [*shares, *(0.0 for _ in found)]


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


def mean_overlap(asked: Prediction) -> float:
    """Return the mean intersection over union of the boxes, missing and needless ones counted as 0."""
    if not boxes_in(asked.expected):
        raise no_fit(asked, "iou", "has no box in its expected answer. Write <box>[[x1, y1, x2, y2]]</box>")
    return fmean(overlaps(asked.said, asked.expected))


def options_of(question: str) -> dict[str, str]:
    """Read the choices that a question lists, one a line: "A. red" -> {"A": "red"}; the last list counts."""
    options: dict[str, str] = {}
    for line in question.splitlines():
        if match := _OPTION.match(line.strip()):
            letter, text = match.groups()
            if letter == "A":
                options = {}
            if letter == chr(ord("A") + len(options)):
                options[letter] = text.strip()
    return options


def choice_of(answer: str, options: dict[str, str]) -> str | None:
    """Return the letter that an answer chooses: by its text, as a letter ("B", "(B)", "B. red", "The answer is B"),
    or because it holds the text of one choice alone; None where it chooses none.
    """
    said = fold(answer)
    same = [letter for letter, text in options.items() if text and fold(text) == said]
    if len(same) == 1:
        return same[0]
    match = _LETTER.match(answer.strip())
    if match and (letter := next(filter(None, match.groups())).upper()) in options:
        return letter
    held = [letter for letter, text in options.items() if text and re.search(rf"\b{re.escape(fold(text))}\b", said)]
    return held[0] if len(held) == 1 else None


def chosen(asked: Prediction) -> float:
    """Return 1 where an answer chooses what the expected one does."""
    options = options_of(asked.question)
    wanted = choice_of(asked.expected, options)
    if wanted is None:
        raise no_fit(asked, "choice", 'is no choice. List two or more, one a line ("A. red"), and expect one of them')
    return float(choice_of(asked.said, options) == wanted)


def anls(asked: Prediction) -> float:
    """Return the average normalised Levenshtein similarity to the nearest accepted answer, 0 below one half.

    Source: Biten et al. 2019, "Scene text visual question answering".
    """
    from torchmetrics.functional.text import edit_distance  # late: it imports torch

    near = 0.0
    for accepted in asked.accepted:
        said, wanted = (" ".join(text.lower().split()) for text in (asked.said, accepted))
        longest = max(len(said), len(wanted), 1)
        near = max(near, 1 - float(edit_distance([said], [wanted])) / longest)
    return near if near >= NEAR else 0.0


def bleu(asked: list[Prediction]) -> float:
    """Return BLEU-4 of all answers together against the accepted ones, as sacreBLEU computes it.

    Source: Post 2018, "A call for clarity in reporting BLEU scores". Chinese is cut into characters.
    """
    from torchmetrics.functional.text import sacre_bleu_score

    said, wanted = [each.said for each in asked], [list(dict.fromkeys(each.accepted)) for each in asked]
    cut = "zh" if any(_CHINESE.search(text) for texts in wanted for text in texts) else "13a"
    return float(sacre_bleu_score(said, wanted, tokenize=cut))  # type: ignore[arg-type]


def chrf(asked: Prediction) -> float:
    """Return chrF of one answer, 1 for an accepted one: BLEU of a single short answer is 0.

    Source: Popović 2015, "chrF: character n-gram F-score for automatic MT evaluation".
    """
    from torchmetrics.functional.text import chrf_score

    if fold(asked.said) in map(fold, asked.accepted):
        return 1.0
    return float(chrf_score([asked.said], [list(dict.fromkeys(asked.accepted))], n_word_order=0))  # type: ignore[arg-type]


def perplexity(asked: list[Prediction]) -> float:
    """Return exp of the mean loss of all tokens: each score is the mean probability of so many."""
    losses = [-math.log(max(each.score, 1e-300)) * each.tokens for each in asked]
    return math.exp(sum(losses) / sum(each.tokens for each in asked))


def mean_score(asked: list[Prediction]) -> float:
    """Return the mean of the scores."""
    return fmean(each.score for each in asked)


@dataclass(frozen=True)
class Metric:
    """A way to score answers."""

    measure: str  # as tables name it
    grade: Callable[[Prediction], float]
    total: Callable[[list[Prediction]], float] = mean_score  # of a task
    shown: Callable[[float], str] = percent
    is_strict: bool = False  # an answer longer than the expected one is wrong anyway
    is_generated: bool = True  # else the likelihood of what the row holds is measured
    is_choice: bool = False

    @property
    def is_likelihood(self) -> bool:
        """Whether the expected answers themselves are measured, and none is chosen."""
        return not (self.is_generated or self.is_choice)

    def graded(self, asked: Prediction) -> Prediction:
        """Score an answer; raise DataError for a question that the metric does not fit."""
        return replace(asked, score=self.grade(asked))

    def scores(self, predictions: Sequence[Prediction]) -> dict[str, float]:
        """Score each task."""
        return {task: self.total(asked) for task, asked in by_task(predictions)}

    def majority(self, predictions: Sequence[Prediction]) -> dict[str, float]:
        """Score what always giving the most frequent answer of each task would."""
        constant = []
        for _, asked in by_task(predictions):
            most = Counter(fold(each.expected) for each in asked).most_common(1)[0][0]
            said = next(each.expected for each in asked if fold(each.expected) == most)
            constant += [self.graded(replace(each, answer=said)) for each in asked]
        return self.scores(constant)


AUTO = Metric("exact match", lambda asked: float(is_match(asked.said, asked.expected)), is_strict=True)
METRICS = {
    "auto": AUTO,
    "exact": Metric("exact match", lambda asked: float(fold(asked.said) in map(fold, asked.accepted)), is_strict=True),
    "vqa": Metric("VQA accuracy", vqa_accuracy),
    "choice": Metric("multiple choice", chosen, is_choice=True),
    "likelihood": Metric("multiple choice by likelihood", chosen, is_generated=False, is_choice=True),
    "anls": Metric("ANLS", anls),
    "iou": Metric("mean IoU", mean_overlap),
    "caption": Metric("BLEU-4", chrf, bleu),
    "perplexity": Metric("perplexity", lambda asked: asked.score, perplexity, "{:,.2f}".format, is_generated=False),
}


def metric_of(name: str) -> Metric:
    """Return a metric by its name; raise ConfigError for one that there is not."""
    if name not in METRICS:
        raise ConfigError(f"metric={name}: no such metric. There are: {', '.join(METRICS)}")
    return METRICS[name]


def no_fit(asked: Prediction, metric: str, reason: str) -> DataError:
    """Make the error for a question that a metric does not fit."""
    return DataError(f"metric={metric}: the row {reason}, or take another metric", f"row {asked.row}", asked.id)
