"""`python -m vlm_tune evaluate ckpt=RUN`: a table of scores, and predictions.jsonl."""

from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from vlm_tune.config.schema import DataConfig
from vlm_tune.console import follow, tell
from vlm_tune.data.pictures.images import CheckedPictures
from vlm_tune.data.sample import Sample
from vlm_tune.data.sets.dataset import Conversations
from vlm_tune.evaluation.evaluate import CHUNK, ask, open_test, read_questions, score_table
from vlm_tune.evaluation.likelihood import weigh
from vlm_tune.evaluation.metrics import OVERLAP, Metric
from vlm_tune.evaluation.prediction import Prediction, Question, count_tasks, write_predictions
from vlm_tune.evaluation.wanted import Wanted
from vlm_tune.model.checkpoint import find_checkpoint, run_of
from vlm_tune.model.ready import new_file
from vlm_tune.model.trained import open_any


@dataclass(frozen=True)
class Examined:
    """The questions of a test file, and what each checkpoint answered."""

    test: Conversations
    metric: Metric
    measure: str
    samples: dict[int, Sample]  # by row
    answers: dict[str, list[Prediction]]  # by the checkpoint's name

    @property
    def scores(self) -> dict[str, dict[str, float]]:
        """The score of each task, by checkpoint."""
        return {name: self.metric.scores(predictions) for name, predictions in self.answers.items()}


def evaluate(wanted: Wanted, console: Console) -> Examined:
    """Answer a test file with each checkpoint, print their scores side by side, and write every answer."""
    ckpts, metric = wanted.ckpts, wanted.metric
    path = new_file(wanted.out) if wanted.out else run_of(find_checkpoint(ckpts[0])) / "predictions.jsonl"
    data = wanted.config(ckpts[0]).data  # all are asked the questions of the first, as it reads them
    answers = {}
    for name, ckpt in zip(short_names(ckpts), ckpts, strict=True):
        test, questions, answers[name] = examine(ckpt, wanted, data, console)
    first = next(iter(answers.values()))
    has_boxes = wanted.metric.measure == "exact match" and any("<box>" in each.expected for each in first)
    measure = f"{metric.measure}, boxes from IoU {OVERLAP}" if has_boxes else metric.measure
    samples = {question.row: question.sample for question in questions}
    examined = Examined(test, metric, measure, samples, answers)
    columns = {measure: examined.scores[name]} if len(answers) == 1 else examined.scores
    if not metric.is_likelihood:
        columns = columns | {"majority": metric.majority(first)}
    title = str(test.path) if len(answers) == 1 else f"{test.path}: {measure}"
    console.print(score_table(title, count_tasks(first), columns, metric.shown))
    write_predictions(answers, path)
    console.print(f"answers: {path}")
    return examined


def examine(
    ckpt: str, wanted: Wanted, data: DataConfig, console: Console
) -> tuple[Conversations, list[Question], list[Prediction]]:
    """Open one checkpoint, and score its answers."""
    metric = wanted.metric
    model, config = open_any(ckpt, wanted.overrides, wanted.model)
    tell(console, model.notes)
    test = open_test(replace(config, data=data), model)
    assert test is not None, "looked at before"
    questions, pictures = read_questions(test, by=wanted.by), CheckedPictures(test.reader)
    for question in questions:
        metric.graded(question.answered(question.expected))  # whether it fits all, before the first one is asked
        test.encoder.encode_prompt(question.sample, test.tiling(question.sample, pictures.check))
    predictions: list[Prediction] = []
    chunks = [questions[start : start + CHUNK] for start in range(0, len(questions), CHUNK)]
    for chunk in follow(chunks, "answering", "questions", len(questions), len):
        if metric.is_generated:
            predictions += ask(model, test, chunk, metric, wanted.max_new_tokens)
        else:
            predictions += weigh(model, test, chunk, metric)
    return test, questions, predictions


def short_names(ckpts: tuple[str, ...]) -> tuple[str, ...]:
    """Name checkpoints by the last part of their paths, where that tells them apart."""
    names = tuple(Path(ckpt).name for ckpt in ckpts)
    return names if len(set(names)) == len(names) else ckpts
