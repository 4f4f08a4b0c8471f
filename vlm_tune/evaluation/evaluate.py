"""Ask a model the questions of a test file and score its answers by task."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress

import numpy as np
import numpy.typing as npt
from rich.table import Table

from vlm_tune.config.schema import AugmentConfig, Config
from vlm_tune.data.dialects.row import literal
from vlm_tune.data.sample import Sample
from vlm_tune.data.sets.dataset import Conversations, PictureSettings
from vlm_tune.data.sets.paths import find_test
from vlm_tune.errors import ConfigError, DataError
from vlm_tune.evaluation.metrics import AUTO, Metric
from vlm_tune.evaluation.prediction import Prediction, Question, conclusion
from vlm_tune.model.build import Model
from vlm_tune.model.generate import Prompt, answer
from vlm_tune.words import percent

BATCH, BATCH_TOKENS = 32, 1 << 14  # questions answered side by side at most, and their tokens with those of the answers
CHUNK = 4 * BATCH  # questions sorted into batches
SPARE_TOKENS = 4  # beyond the longest expected answer: one that is longer still is wrong anyway ...
GRADED_TOKENS = 64  # ... but where part of it may be right
THINK_TOKENS = 16  # of the marks of reasoning

Key = tuple[int, bytes, int, bytes]  # of a prompt: its tiles, its tokens


def open_test(config: Config, model: Model) -> Conversations | None:
    """Open the test file: data.test, or test.jsonl next to the training file; None when there is none."""
    path = find_test(config)
    if path is None:
        return None
    pictures = PictureSettings(config.model.tiles, config.model.vision.normalize, AugmentConfig())
    return Conversations(path, config.data, model.encoder, pictures)


def read_questions(
    test: Conversations, limit: int = -1, among: npt.NDArray[np.int64] | None = None, by: str = "task"
) -> list[Question]:
    """Read the rows whose last turn is an answer. The row's own field `by` names its task; the default is "all".

    If there are more rows than `limit`, evenly spaced ones are taken. Raise ConfigError where no row has the field.
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
        record = test.rows[row]
        task, answers = str(record.get(by, "all")), accepted_answers(record.get("answers"), sample)
        questions.append(Question(row, task, sample, conclusion(sample.messages[-1].text.strip()), answers))
    if by != "task" and questions and not any(by in test.rows[question.row] for question in questions):
        raise ConfigError(f"by={by}: no row of {test.path} has this field. Name one that they have")
    return questions


def accepted_answers(value: object, sample: Sample) -> tuple[str, ...]:
    """Read the answers that a row accepts: texts, or VQA's objects with an "answer" each."""
    with suppress(ValueError):  # a table holds a list as text
        value = literal(value) if isinstance(value, str) and value.startswith("[") else value
    if value is None or value in ("", []):
        return ()
    given = value if isinstance(value, list | tuple) else []
    texts = [each.get("answer") if isinstance(each, dict) else each for each in given]
    texts = [str(text) if isinstance(text, int | float) else text for text in texts]
    found = tuple(text for text in texts if isinstance(text, str))
    if not found or len(found) < len(texts):
        raise DataError('"answers" is no list of texts. Write those that are accepted', sample.where, sample.id)
    return found


def picture_of(test: Conversations, sample: Sample) -> str | None:
    """Return the path of a question's first picture; None where it has none, or one that is no file of its own."""
    first = sample.pictures[0] if sample.pictures else None
    return str(test.root / first.path) if first and first.path and first.frame is None else None


def prompt_of(test: Conversations, sample: Sample) -> Prompt:
    """Encode everything up to the last question."""
    example = test.encoder.encode_prompt(sample, test.tiling(sample))
    return Prompt(example, test.make_tiles(sample, example))


def ask(
    model: Model,
    test: Conversations,
    questions: list[Question],
    metric: Metric = AUTO,
    max_new_tokens: int | None = None,
) -> list[Prediction]:
    """Answer all questions greedily, in batches of similar length, and score the answers.

    Without `max_new_tokens` answers may be a little longer than the longest expected one, or twice as long where an
    answer may be right in part; reasoning before them twice as long as the longest expected.
    """
    if max_new_tokens is None:
        room = room_for_answers(model, questions, metric.is_strict)
        max_new_tokens = room + room_for_reasoning(model, questions)
    predictions = []
    for start in range(0, len(questions), CHUNK):  # the pictures of so many questions are in memory at a time
        chunk = questions[start : start + CHUNK]
        texts = answer_once(model, [prompt_of(test, question.sample) for question in chunk], max_new_tokens)
        answered = zip(chunk, texts, strict=True)
        predictions += [metric.graded(question.answered(text)) for question, text in answered]
    return predictions


def room_for_answers(model: Model, questions: list[Question], is_strict: bool) -> int:
    """Count the tokens that answers may have, their reasoning apart."""
    longest = _most_tokens(model, (text for question in questions for text in (question.expected, *question.answers)))
    return longest + SPARE_TOKENS if is_strict else max(2 * longest, GRADED_TOKENS)


def room_for_reasoning(model: Model, questions: list[Question]) -> int:
    """Count the tokens that the reasoning before answers may have: none where no expected answer has any."""
    longest = _most_tokens(model, (question.reasoning for question in questions))
    return 2 * longest + THINK_TOKENS if longest else 0


def _most_tokens(model: Model, texts: Iterable[str]) -> int:
    return max(len(model.tokenizer.encode(text, add_special_tokens=False)) for text in texts)


def answer_once(model: Model, prompts: list[Prompt], max_new_tokens: int) -> list[str]:
    """Answer prompts in batches of similar length, questions about one picture side by side, and equal prompts once."""
    keys = []
    for prompt in prompts:
        ids, tiles = prompt.example.input_ids, b"" if model.vlm.is_blind else prompt.tiles.tobytes()
        keys.append((len(prompt.tiles), hashlib.sha256(tiles).digest(), len(ids), ids.tobytes()))
    distinct = dict(sorted(zip(keys, prompts, strict=True), key=lambda each: each[0]))
    texts: dict[Key, str] = {}
    lengths = [len(prompt.example.input_ids) for prompt in distinct.values()]
    for batch in batches_of(list(distinct), lengths, max_new_tokens):
        answers = answer(model, [distinct[key] for key in batch], max_new_tokens)
        texts |= zip(batch, answers, strict=True)
    return [texts[key] for key in keys]


def batches_of(keys: list[Key], lengths: list[int], max_new_tokens: int) -> Iterator[list[Key]]:
    """Part questions into batches: BATCH of them at most, and BATCH_TOKENS when padded to the longest."""
    batch: list[Key] = []
    longest = 0
    for key, length in zip(keys, lengths, strict=True):
        longest = max(longest, length)
        if len(batch) == BATCH or (batch and (len(batch) + 1) * (longest + max_new_tokens) > BATCH_TOKENS):
            yield batch
            batch, longest = [], length
        batch.append(key)
    if batch:
        yield batch


def score_table(
    title: str,
    num_questions: dict[str, int],
    columns: dict[str, dict[str, float]],
    shown: Callable[[float], str] = percent,
) -> Table:
    """Build a table with the scores of each task side by side."""
    table = Table("task", "questions", *columns, title=title, title_justify="left")
    for task, count in num_questions.items():
        table.add_row(task, str(count), *(shown(scores[task]) for scores in columns.values()))
    return table


@contextmanager
def blind(model: Model) -> Iterator[None]:
    """Answer with the image features set to zero, to see what the pictures contribute."""
    model.vlm.is_blind = True
    try:
        yield
    finally:
        model.vlm.is_blind = False
