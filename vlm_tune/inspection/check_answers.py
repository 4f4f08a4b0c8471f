"""Count how often each short answer occurs: a model that always gives the most frequent one looks good at first."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from vlm_tune.data.sample import Sample

SHORT = 40  # characters of an answer that may be one of a few
MAX_QUESTION = 200  # characters of a question that may be asked of many pictures
MAX_KEPT = 20_000  # answers that are counted at once; beyond that the rarer half is forgotten
SHOWN = 20  # answers in the report
QUESTIONS, OFTEN = 10, 5  # questions in the report, and how often one must be asked to appear there


@dataclass
class Answers:
    """Counts of the answers that are trained on."""

    short: Counter[str] = field(default_factory=Counter)
    asked: Counter[tuple[str, str]] = field(default_factory=Counter)  # (question, short answer)
    sums: Counter[str] = field(default_factory=Counter)  # short, long

    def add(self, sample: Sample) -> None:
        """Count the answers of a row, each under the question before it; plain text has no answers."""
        if sample.is_plain:
            return
        question = ""
        for message in sample.messages:
            text = message.text.strip()
            if not message.supervised:
                question = text
            elif len(text) > SHORT:
                self.sums["long"] += 1
            else:
                self.sums["short"] += 1
                self.short[text] += 1
                if 0 < len(question) <= MAX_QUESTION:
                    self.asked[question, text] += 1

    def merge(self, other: "Answers") -> None:
        """Add the counts of other rows."""
        for name, counts in vars(other).items():
            own = getattr(self, name)
            own.update(counts)
            if len(own) > MAX_KEPT:  # frequent answers stay, and memory is bounded
                setattr(self, name, Counter(dict(own.most_common(MAX_KEPT // 2))))

    def summary(self) -> dict[str, Any]:
        """Return the most frequent short answers, and those to the most frequent questions."""
        by_question: dict[str, Counter[str]] = {}
        for (question, answer), times in self.asked.items():
            by_question.setdefault(question, Counter())[answer] += times
        often = sorted(by_question.items(), key=lambda item: -item[1].total())[:QUESTIONS]
        return {
            "short": self.sums["short"],
            "long": self.sums["long"],
            "most": [list(entry) for entry in self.short.most_common(SHOWN)],
            "questions": [
                {
                    "question": question,
                    "times": answers.total(),
                    "answers": [list(e) for e in answers.most_common(SHOWN)],
                }
                for question, answers in often
                if answers.total() >= OFTEN
            ],
        }
