"""Examine what a run learned: the same questions before and after training, and blind."""

import json
import time
from pathlib import Path
from typing import Any

import lightning as L
from rich.console import Console

from vlm_tune.config.schema import Config
from vlm_tune.data.datamodule import DataModule
from vlm_tune.data.sets.dataset import Conversations
from vlm_tune.evaluation.evaluate import ask, blind, open_test, picture_of, read_questions
from vlm_tune.evaluation.metrics import AUTO
from vlm_tune.evaluation.prediction import Prediction, Question, count_tasks, write_predictions
from vlm_tune.model.build import Model
from vlm_tune.training.callbacks.chats import SampleAnswers, takes_part
from vlm_tune.training.intervals import every
from vlm_tune.training.report import RunReport, show_scores
from vlm_tune.training.verdict import verdicts
from vlm_tune.words import counted


class Examiner(L.Callback):
    """Ask the questions of the test file, or of the validation rows where there is none, before and after training."""

    def __init__(self, config: Config, model: Model, data: DataModule, console: Console) -> None:
        self.model = model
        self.chat_every = config.trainer.chat_every
        self.console = console
        self.scored: list[Question] = []
        self.shown: list[Question] = []
        self.test: Conversations | None = open_test(config, model)
        if self.test is not None:
            self.shown = read_questions(self.test, config.trainer.num_chats)
            if config.stage.evaluate:
                self.scored = read_questions(self.test, config.trainer.max_test_rows)
        elif data.val is not None:
            self.test, rows = data.val.data.sets[0], data.val.index.rows  # of a mixture, only its first set is used
            self.shown = read_questions(self.test, config.trainer.num_chats, rows[rows < len(self.test)])

    def enter(self, run: Path, max_steps: int) -> list[L.Callback]:
        """Set the run's folder; return the callbacks for training."""
        self.run = run
        self.chats = None
        if self.test is not None and self.shown:
            chat_every = every(self.chat_every, max_steps)
            self.chats = SampleAnswers(self.model, self.test, self.shown, chat_every, run, self.console)
        return [self, self.chats] if self.chats else [self]

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Score the model as the run finds it; a resumed run reads its scores back."""
        path = self.run / "scores_before.json"
        if self.scored and not trainer.strategy.broadcast(path.exists()) and takes_part(trainer, self.model):
            scores = AUTO.scores(self._ask(trainer, "before training"))
            if trainer.is_global_zero:
                path.write_text(json.dumps(scores), encoding="utf-8")

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Score the trained model, with and without pictures; keep its predictions."""
        if not self.scored or not takes_part(trainer, self.model):
            return
        self.predictions = self._ask(trainer, "after training")
        with blind(self.model):
            self.unseeing = self._ask(trainer, "blind")

    def on_load_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Score a finished run now: it has no step left after which it would be scored."""
        if checkpoint["global_step"] < trainer.max_steps:
            return
        if not self.model.vlm.is_split:
            self.model.vlm.to(trainer.strategy.root_device)
        self.on_train_end(trainer, module)

    def tell(self, report: RunReport) -> None:
        """Record and print the results."""
        if self.scored:
            write_predictions({self.run.name: self.predictions}, self.run / "predictions.jsonl")
            report.evaluation = {
                "before": json.loads((self.run / "scores_before.json").read_text(encoding="utf-8")),
                "after": AUTO.scores(self.predictions),
                "blind": AUTO.scores(self.unseeing),
                "majority": AUTO.majority(self.predictions),
                "num_questions": count_tasks(self.predictions),
            }
            report.evaluation["verdicts"] = verdicts(report.evaluation)
            show_scores(self.console, report.evaluation)
        if self.chats is not None:
            report.answers = self._answers(self.chats)

    def _ask(self, trainer: L.Trainer, title: str) -> list[Prediction]:
        assert self.test is not None
        start = time.perf_counter()
        predictions = ask(self.model, self.test, self.scored)
        seconds = time.perf_counter() - start
        if trainer.is_global_zero:
            self.console.print(f"{title}: {counted(len(predictions), 'question')} answered in {seconds:.0f} s")
        return predictions

    def _answers(self, chats: SampleAnswers) -> list[dict[str, Any]]:
        assert self.test is not None
        answers = []
        for question, before, after in zip(self.shown, chats.before, chats.now, strict=True):
            entry = {
                "picture": picture_of(self.test, question.sample),
                "question": question.text,
                "expected": question.expected,
            }
            answers.append(entry | {"before": before, "after": after})
        return answers
