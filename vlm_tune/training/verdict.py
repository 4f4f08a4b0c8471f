"""Describe whether a model answers better than a guess without the picture, by the standard error."""

import math
from typing import Any

from vlm_tune.pages.report_html import margin
from vlm_tune.words import counted

CLEAR = 2  # standard errors
RIVALS = {
    "blind": ("the same model without its pictures", "nothing shows that it uses them"),
    "majority": ("always giving the most frequent answer", "nothing shows that it learned more than that"),
}


def verdicts(evaluation: dict[str, Any]) -> list[str]:
    """Name, for each task whose accuracy after training is not clearly above a guess, that guess.

    Clearly is two standard errors of the difference, with both shares taken as independent: 30 of 50 right against
    25 of 50 is a difference of 10 points with a standard error of 9.8.
    """
    said = []
    for task, after in evaluation["after"].items():
        count = evaluation["num_questions"][task]
        for kind, (rival, meaning) in RIVALS.items():
            guess = evaluation[kind][task]
            error = math.hypot(margin(after, count), margin(guess, count)) / 1.96
            if after - guess < CLEAR * error:
                said.append(
                    f"{task}: {after:.1%} is not clearly above {guess:.1%} of {rival} ({counted(count, 'question')}, "
                    f"standard error of the difference {100 * error:.1f} points): {meaning}"
                )
    return said
