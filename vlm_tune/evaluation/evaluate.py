"""Ask a model the questions of a test file and score its answers by task."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.table import Table

from vlm_tune.config.schema import AugmentConfig, Config
from vlm_tune.data.sample import Sample
from vlm_tune.data.sets.dataset import Conversations, PictureSettings
from vlm_tune.data.sets.paths import find_test
from vlm_tune.errors import DataError
from vlm_tune.evaluation.metrics import is_match, majority
from vlm_tune.model.build import Model
from vlm_tune.model.generate import Prompt, answer

BATCH = 32
SPARE_TOKENS = 4  # an answer longer than the longest expected one is wrong anyway


@dataclass(frozen=True)
class Question:
    """One row of a test file: everything before its last answer, and that answer."""

    row: int
    task: str
    sample: Sample
    expected: str

    @property
    def text(self) -> str:
        """The last question."""
        return next(message.text for message in reversed(self.sample.messages) if message.role == "user").strip()


@dataclass(frozen=True)
class Prediction:
    """A question and what the model answered."""

    row: int
    id: str
    task: str
    question: str
    expected: str
    answer: str
    correct: bool


def open_test(config: Config, model: Model) -> Conversations | None:
    """Open the test file: data.test, or test.jsonl next to the training file; None when there is none."""
    path = find_test(config)
    if path is None:
        return None
    pictures = PictureSettings(config.model.tiles, config.model.vision.normalize, AugmentConfig())
    return Conversations(path, config.data, model.encoder, pictures)


def read_questions(test: Conversations, limit: int = -1, among: npt.NDArray[np.int64] | None = None) -> list[Question]:
    """Read the rows whose last turn is an answer. The row's own `task` field names its task; the default is "all".

    If there are more rows than `limit`, evenly spaced ones are taken.
    """
    rows = np.arange(len(test)) if among is None else among
    if 0 <= limit < len(rows):
        rows = rows[np.linspace(0, len(rows) - 1, limit).astype(int)]
    questions = []
    for row in rows.tolist():
        sample = test.sample(row)
        if sample.is_plain:  # it asks nothing
            continue
        if sample.messages[-1].role != "assistant":
            raise DataError("the last turn is not an answer: there is nothing to compare with", sample.where, sample.id)
        task = str(test.rows[row].get("task", "all"))
        questions.append(Question(row, task, sample, sample.messages[-1].text.strip()))
    return questions


def picture_of(test: Conversations, question: Question) -> str | None:
    """Return the path of a question's first picture; None where it has none, or one that is no file of its own."""
    first = question.sample.pictures[0] if question.sample.pictures else None
    return str(test.root / first.path) if first and first.path and first.frame is None else None


def prompt_of(test: Conversations, sample: Sample) -> Prompt:
    """Encode everything up to the last question."""
    example = test.encoder.encode_prompt(sample, test.tiling(sample))
    return Prompt(example, test.make_tiles(sample, example))


def ask(
    model: Model,
    test: Conversations,
    questions: list[Question],
    max_new_tokens: int | None = None,
    report: Callable[[int], None] = lambda done: None,
) -> list[Prediction]:
    """Answer all questions greedily, in batches of similar length.

    Without `max_new_tokens` answers may be a little longer than the longest expected one.
    """
    if max_new_tokens is None:
        expected = [model.tokenizer.encode(q.expected, add_special_tokens=False) for q in questions]
        max_new_tokens = max(map(len, expected)) + SPARE_TOKENS
    predictions: dict[int, Prediction] = {}
    prompts = {question.row: prompt_of(test, question.sample) for question in questions}
    by_length = sorted(questions, key=lambda question: len(prompts[question.row].example.input_ids))
    for start in range(0, len(by_length), BATCH):
        batch = by_length[start : start + BATCH]
        answers = answer(model, [prompts.pop(question.row) for question in batch], max_new_tokens)
        for question, text in zip(batch, answers, strict=True):
            is_right = is_match(text, question.expected)
            predictions[question.row] = Prediction(
                question.row, question.sample.id, question.task, question.text, question.expected, text, is_right
            )
        report(len(batch))
    return [predictions[question.row] for question in questions]


def score(predictions: list[Prediction]) -> dict[str, float]:
    """Exact-match accuracy of each task, as a fraction."""
    return {task: sum(p.correct for p in chosen) / len(chosen) for task, chosen in by_task(predictions)}


def majority_scores(predictions: list[Prediction]) -> dict[str, float]:
    """What always giving the most frequent answer of each task would score."""
    return {task: majority([p.expected for p in chosen]) for task, chosen in by_task(predictions)}


def by_task(predictions: list[Prediction]) -> Iterator[tuple[str, list[Prediction]]]:
    """Group predictions by task, in order of first appearance."""
    for task in dict.fromkeys(prediction.task for prediction in predictions):
        yield task, [prediction for prediction in predictions if prediction.task == task]


def score_table(title: str, num_questions: dict[str, int], columns: dict[str, dict[str, float]]) -> Table:
    """Build a table with the scores of each task side by side."""
    table = Table("task", "questions", *columns, title=title, title_justify="left")
    for task, count in num_questions.items():
        table.add_row(task, str(count), *(f"{scores[task]:.1%}" for scores in columns.values()))
    return table


def count_tasks(predictions: list[Prediction]) -> dict[str, int]:
    """Count the questions of each task."""
    return {task: len(chosen) for task, chosen in by_task(predictions)}


@contextmanager
def blind(model: Model) -> Iterator[None]:
    """Answer with the image features set to zero, to see what the pictures contribute."""
    model.vlm.is_blind = True
    try:
        yield
    finally:
        model.vlm.is_blind = False


def write_predictions(predictions: list[Prediction], path: Path) -> None:
    """Write one JSON line per question."""
    lines = [json.dumps(asdict(prediction), ensure_ascii=False) for prediction in predictions]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
