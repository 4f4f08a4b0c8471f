"""Accuracy as VQA's official evaluation computes it: what ten people answered, and how answers are normalised.

Source: github.com/GT-Vision-Lab/VQA, PythonEvaluationTools/vqaEvaluation/vqaEval.py; its oddities are kept, since
published numbers hold them.
"""

import re
from statistics import fmean

from vlm_tune.errors import DataError
from vlm_tune.evaluation.prediction import Prediction

ENOUGH = 3  # people that agree with an answer make it right
ARTICLES = ("a", "an", "the")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {"none": "0"} | {word: str(number) for number, word in enumerate(NUMBERS)}
_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're
there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've
when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't
wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
CONTRACTIONS = (
    {  # what people write without one of its apostrophes
        form[:place] + form[place + 1 :]: form
        for form in _CONTRACTED.split()
        for place, letter in enumerate(form)
        if letter == "'"
    }
    | {"somebody'd": "somebodyd"}
)


def vqa_accuracy(asked: Prediction) -> float:
    """Return min(1, n/3) for n people who gave the answer, on average over leaving out each of them in turn.

    Raise DataError for a row that does not say what several people answered.
    """
    people = list(asked.answers)
    if len(people) <= ENOUGH:
        raise DataError(
            f'metric=vqa: the row has {len(people)} "answers". Give those of ten people, or take another metric',
            f"row {asked.row}",
            asked.id,
        )
    if len(set(people)) > 1:
        people = [strip_marks(answer) for answer in people]
    if any(answer != answer.lower() for answer in people):  # VQA's own are in small letters: these are a user's
        people = [normalise(answer) for answer in people]
    said = normalise(asked.said)
    agree = [answer == said for answer in people]
    return fmean(min(1.0, (sum(agree) - own) / ENOUGH) for own in agree)


def normalise(answer: str) -> str:
    """Drop punctuation, case and articles, write numbers as digits and contractions with their apostrophes."""
    words = strip_marks(re.sub(r"[\n\t]", " ", answer).strip()).lower().split()
    digits = [_DIGITS.get(word, word) for word in words]
    return " ".join(CONTRACTIONS.get(word, word) for word in digits if word not in ARTICLES)


def strip_marks(text: str) -> str:
    """Take punctuation out: beside a space it goes, elsewhere a space comes in its place; 1,000 loses its comma."""
    shown = text
    has_thousands = re.search(r"\d,\d", text)
    for mark in _MARKS:
        is_apart = f"{mark} " in text or f" {mark}" in text
        shown = shown.replace(mark, "" if is_apart or has_thousands else " ")
    return re.sub(r"\.(?!\d)", "", shown, count=int(re.UNICODE))
