"""A question of a test file, and what a model answered; nothing here knows torch."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from vlm_tune.data.sample import Sample


@dataclass(frozen=True)
class Question:
    """One row of a test file: everything before its last answer, and that answer."""

    row: int
    task: str
    sample: Sample
    expected: str
    answers: tuple[str, ...] = ()  # of its field "answers", for metrics that take several

    @property
    def text(self) -> str:
        """The last question."""
        return next(message.text for message in reversed(self.sample.messages) if message.role == "user").strip()

    @property
    def thought(self) -> str:
        """The reasoning that the expected answer's own text begins with; "" where it has none."""
        text = self.sample.messages[-1].text.strip()
        return text.removesuffix(conclusion(text))

    @property
    def reasoning(self) -> str:
        """All that the expected answer is thought out with, beside its text and in it."""
        return self.sample.messages[-1].reasoning + self.thought

    def answered(self, answer: str) -> "Prediction":
        """Return the question with a model's answer, which is not scored yet."""
        return Prediction(self.row, self.sample.id, self.task, self.text, self.expected, answer, self.answers)


@dataclass(frozen=True)
class Prediction:
    """A question and what the model answered."""

    row: int
    id: str
    task: str
    question: str
    expected: str
    answer: str
    answers: tuple[str, ...] = ()  # that are accepted beside or in place of the expected one, as the metric says
    score: float = 0.0  # from 0 to 1
    tokens: int = 0  # of the expected answer, where the score is their mean probability

    @property
    def said(self) -> str:
        """What is scored: the answer after its reasoning."""
        return conclusion(self.answer)

    @property
    def accepted(self) -> tuple[str, ...]:
        """The expected answer and all others of the row."""
        return (self.expected, *self.answers)

    @property
    def correct(self) -> bool:
        """Whether the answer is all that it should be."""
        return self.score >= 1


def conclusion(answer: str) -> str:
    """Return what an answer says after `<think>...</think>`: all of it without any, nothing where that does not end."""
    _, end, said = answer.rpartition("</think>")
    if end:
        return said.strip()
    return "" if answer.lstrip().startswith("<think>") else answer


def by_task(predictions: Sequence[Prediction]) -> Iterator[tuple[str, list[Prediction]]]:
    """Group predictions by task, in order of first appearance."""
    for task in dict.fromkeys(prediction.task for prediction in predictions):
        yield task, [prediction for prediction in predictions if prediction.task == task]


def count_tasks(predictions: list[Prediction]) -> dict[str, int]:
    """Count the questions of each task."""
    return {task: len(chosen) for task, chosen in by_task(predictions)}


def write_predictions(by_checkpoint: dict[str, list[Prediction]], path: Path) -> None:
    """Write one JSON line per question; of several checkpoints each line names its own."""
    lines = []
    for name, predictions in by_checkpoint.items():
        for prediction in predictions:
            line = asdict(prediction) | {"correct": prediction.correct}
            line = {key: value for key, value in line.items() if key not in ("answers", "tokens") or value}
            named = {"ckpt": name} if len(by_checkpoint) > 1 else {}
            lines.append(json.dumps(named | line, ensure_ascii=False))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
