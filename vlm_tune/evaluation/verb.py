"""`python -m vlm_tune evaluate ckpt=RUN`: a table of scores, and predictions.jsonl."""

from rich.console import Console

from vlm_tune.console import follow, tell
from vlm_tune.errors import ConfigError
from vlm_tune.evaluation.evaluate import (
    BATCH,
    Prediction,
    ask,
    count_tasks,
    majority_scores,
    open_test,
    read_questions,
    score,
    score_table,
    write_predictions,
)
from vlm_tune.evaluation.metrics import OVERLAP
from vlm_tune.model.checkpoint import find_checkpoint, run_of
from vlm_tune.model.ready import new_file
from vlm_tune.model.trained import open_trained


def evaluate(ckpt: str, out: str, overrides: list[str], console: Console) -> list[Prediction]:
    """Answer a test file with a trained model, print its scores, and write every answer."""
    path = new_file(out) if out else run_of(find_checkpoint(ckpt)) / "predictions.jsonl"
    model, config = open_trained(ckpt, overrides)
    tell(console, model.notes)
    test = open_test(config, model)
    if test is None:
        raise ConfigError(
            "data.test is not set and there is no test.jsonl beside data.path: name a file, data.test=FILE"
        )
    questions = read_questions(test)
    predictions: list[Prediction] = []
    chunks = [questions[start : start + 4 * BATCH] for start in range(0, len(questions), 4 * BATCH)]
    for chunk in follow(chunks, "answering", "questions", len(questions), len):
        predictions += ask(model, test, chunk)
    has_boxes = any("<box>" in prediction.expected for prediction in predictions)
    measure = f"exact match, boxes from IoU {OVERLAP}" if has_boxes else "exact match"
    columns = {measure: score(predictions), "majority": majority_scores(predictions)}
    console.print(score_table(str(test.path), count_tasks(predictions), columns))
    write_predictions(predictions, path)
    console.print(f"answers: {path}")
    return predictions
