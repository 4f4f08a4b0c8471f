"""Sample answers: the model answers the same few questions before, during and after training."""

import json
import math
import os
from pathlib import Path
from typing import Any

import lightning as L
from rich.console import Console
from rich.table import Table

from vlm_tune.data.batch import Batch
from vlm_tune.data.sets.dataset import Conversations
from vlm_tune.evaluation.evaluate import ask, picture_of, room_for_reasoning
from vlm_tune.evaluation.prediction import Question
from vlm_tune.model.build import Model
from vlm_tune.training.callbacks.loggers import show_answers
from vlm_tune.training.run_folder import append, drop_lines_after

NUM_TOKENS = 32  # of a sample answer, its reasoning apart


class SampleAnswers(L.Callback):
    """Ask fixed questions every `chat_every` optimizer steps; write all answers to sample_answers.jsonl."""

    def __init__(
        self, model: Model, test: Conversations, questions: list[Question], every: int, run: Path, console: Console
    ) -> None:
        self.model = model
        self.test = test
        self.questions = questions
        self.every = every
        self.path = run / "sample_answers.jsonl"
        self.console = console
        self.before: list[str] = []
        self.now: list[str] = []
        self.last_step = -1  # the last step whose answers are in the file
        self.is_finished = False

    def on_fit_start(self, trainer: L.Trainer, module: Any) -> None:
        """Answer before the first step; a resumed run reads its answers back."""
        if trainer.is_global_zero:
            drop_lines_after(self.path, math.inf)  # a line that a crash cut off
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        answers = trainer.strategy.broadcast([json.loads(line)["answer"] for line in lines])
        self.last_step = trainer.strategy.broadcast(json.loads(lines[-1])["step"] if lines else -1)
        count = len(self.questions)
        self.before = answers[:count] if answers else self._ask(trainer, 0)
        self.now = answers[-count:] if answers else self.before
        if self.is_finished and self.last_step < trainer.max_steps:  # killed between checkpoint and answers
            self._ask(trainer, trainer.max_steps)

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        """Drop the answers after the step that the run continues from: they are generated again."""
        if trainer.is_global_zero:
            drop_lines_after(self.path, trainer.global_step)
        if self.last_step > trainer.global_step:
            self.last_step = -1

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Answer every `chat_every` steps."""
        step = trainer.global_step
        is_whole_step = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        is_due = self.every and step % self.every == 0 and step < trainer.max_steps
        if is_whole_step and is_due:
            self._tell(trainer, f"step {step}")

    def on_train_end(self, trainer: L.Trainer, module: Any) -> None:
        """Answer after the last step, beside the answers before the first."""
        self._tell(trainer, "after training")

    def _tell(self, trainer: L.Trainer, title: str) -> None:
        is_said = self.last_step == trainer.global_step  # a run that stops early may have just answered
        answers = self.now if is_said else self._ask(trainer, trainer.global_step)
        if trainer.is_global_zero:
            self._print(title, answers)

    def on_load_checkpoint(self, trainer: L.Trainer, module: Any, checkpoint: dict[str, Any]) -> None:
        """Note whether the run is finished: it has no step left after which it would answer."""
        self.is_finished = checkpoint["global_step"] >= trainer.max_steps

    def _ask(self, trainer: L.Trainer, step: int) -> list[str]:
        if not takes_part(trainer, self.model):
            return []
        room = NUM_TOKENS + room_for_reasoning(self.model, self.questions)
        predictions = ask(self.model, self.test, self.questions, max_new_tokens=room)
        self.now, self.last_step = [prediction.answer for prediction in predictions], step
        if not trainer.is_global_zero:
            return self.now
        entries = []
        for question, prediction in zip(self.questions, predictions, strict=True):
            entry = {"step": step, "id": prediction.id, "question": prediction.question}
            entry |= {"expected": prediction.expected, "answer": prediction.answer}
            path = picture_of(self.test, question.sample)
            entries.append(entry | {"picture": path and os.path.abspath(path)})
        append(self.path, "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries))
        for logger in trainer.loggers:
            show_answers(logger, step, entries)
        return self.now

    def _print(self, title: str, answers: list[str]) -> None:
        table = Table("question", "expected", "before", "now", title=f"sample answers, {title}", title_justify="left")
        for question, before, now in zip(self.questions, self.before, answers, strict=True):
            table.add_row(question.text, question.expected, before, now)
        self.console.print(table)


def takes_part(trainer: L.Trainer, model: Model) -> bool:
    """Return whether this process answers questions: the first one does, and all do if the weights are sharded."""
    return trainer.is_global_zero or model.vlm.is_split
