"""`python -m vlm_tune answer ckpt=RUN data.path=FILE out=FILE`: answer many questions, and go on where it stopped."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from vlm_tune.config.hints import PICTURE_ENDINGS
from vlm_tune.config.schema import AugmentConfig
from vlm_tune.console import follow, tell
from vlm_tune.data.rows.rows import Rows, open_rows
from vlm_tune.data.sample import Sample
from vlm_tune.data.sets.dataset import Conversations, PictureSettings
from vlm_tune.data.sets.paths import find_file
from vlm_tune.errors import ConfigError, DataError
from vlm_tune.evaluation.evaluate import BATCH, picture_of, prompt_of
from vlm_tune.evaluation.prediction import Question
from vlm_tune.evaluation.wanted import Asked
from vlm_tune.model.build import Model
from vlm_tune.model.checkpoint import find_checkpoint
from vlm_tune.model.generate import answer
from vlm_tune.model.ready import is_model
from vlm_tune.model.trained import open_any
from vlm_tune.words import counted

PLACE = "A"  # in place of an answer, which all dialects ask for; no prompt holds it
REPLIES = {"human": "gpt", "user": "assistant"}
BEGIN = b'{"row": '  # of each line
Line = dict[str, Any]


class QuestionRows:
    """Rows of a file whose questions need no answer."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self.where = rows.where

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, object]:
        return with_place(self.rows[index])


class PictureRows:
    """One question about each picture of a folder, by name."""

    def __init__(self, folder: Path, question: str) -> None:
        self.names = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in PICTURE_ENDINGS)
        self.question = question
        if not self.names:
            raise DataError(f"no picture in the folder ({', '.join(PICTURE_ENDINGS)}). Name another", str(folder))

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, object]:
        name = self.names[index]
        return {"id": name, "image": name, "question": self.question, "answer": PLACE}

    def where(self, index: int) -> str:
        """Return the picture's name."""
        return self.names[index]


def with_place(record: dict[str, object]) -> dict[str, object]:
    """Give a question at the end of a row a place for its answer; a row that has one stays as it is."""
    for name in ("conversations", "messages"):
        turns = record.get(name)
        if isinstance(turns, list) and turns and isinstance(turns[-1], dict):
            speaker, text = ("from", "value") if "from" in turns[-1] else ("role", "content")
            reply = REPLIES.get(str(turns[-1].get(speaker)))
            return record | {name: [*turns, {speaker: reply, text: PLACE}]} if reply else record
    for asked, place in (("question", "answer"), ("query", "response"), ("instruction", "output")):
        if asked in record and record.get(place) in (None, ""):
            return record | {place: PLACE}
    return record


def answer_all(asked: Asked, console: Console) -> int:
    """Answer every row that the file of answers does not hold yet; return 1 where some cannot be asked."""
    done, path = read_answers(asked.out), find_file(asked.data.path)
    rows = PictureRows(path, asked.question) if asked.question else QuestionRows(open_rows(path))
    model, config = open_any(asked.ckpt, asked.overrides, asked.model)
    tell(console, model.notes)
    pictures = PictureSettings(config.model.tiles, config.model.vision.normalize, AugmentConfig())
    test = Conversations(path, asked.data, model.encoder, pictures, rows)
    name = asked.ckpt if is_model(asked.ckpt) else str(find_checkpoint(asked.ckpt))
    require_same(done, test, name, asked.out)
    faults = sum("error" in line for line in done)
    if done:
        console.print(f"{counted(len(done), 'answer')} of {asked.out} kept", soft_wrap=True)
    chunks = [range(start, min(start + BATCH, len(test))) for start in range(len(done), len(test), BATCH)]
    with asked.out.open("a", encoding="utf-8") as file:
        for chunk in follow(chunks, "answering", "questions", len(test) - len(done), len):
            lines = answer_rows(model, test, chunk, asked.max_new_tokens)
            file.writelines(json.dumps(line | {"ckpt": name}, ensure_ascii=False) + "\n" for line in lines)
            file.flush()
            faults += sum("error" in line for line in lines)
    console.print(f"answers: {asked.out}", soft_wrap=True)
    if faults:
        console.print(f'{counted(faults, "row")} could not be asked: "error" of their lines says why', soft_wrap=True)
    return int(faults > 0)


def answer_rows(model: Model, test: Conversations, rows: range, max_new_tokens: int) -> list[Line]:
    """Answer some rows in one batch; a line holds the answer, or why the row could not be asked."""
    lines: list[Line] = []
    prompts = []
    for row in rows:
        try:
            sample = test.sample(row)
            prompts.append(prompt_of(test, sample))
            lines.append(describe(test, row, sample))
        except DataError as error:
            lines.append({"row": row, "error": str(error)})
    answers = iter(answer(model, prompts, max_new_tokens) if prompts else [])
    return [line if "error" in line else line | {"answer": next(answers)} for line in lines]


def describe(test: Conversations, row: int, sample: Sample) -> Line:
    """Return what a line says of its question."""
    question = Question(row, "", sample, "").text
    return {"row": row, "id": sample.id, "picture": picture_of(test, sample), "question": question}


def read_answers(out: Path) -> list[Line]:
    """Read the lines of an earlier call, and cut off one that its end left half written."""
    if not out.exists():
        return []
    content = out.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    try:
        lines = [json.loads(line) for line in whole.splitlines()]
    except ValueError:
        lines = [None]
    is_ours = all(isinstance(line, dict) and line.get("row") == row for row, line in enumerate(lines))
    if not (is_ours and BEGIN.startswith(content[len(whole) :][: len(BEGIN)])):
        raise ConfigError(f"out={out}: not a file of answers, and nothing else is overwritten. Name another")
    if len(whole) < len(content):
        out.write_bytes(whole)
    return lines


def require_same(done: list[Line], test: Conversations, ckpt: str, out: Path) -> None:
    """Raise ConfigError where earlier answers are another model's, or to other questions."""
    for line in done:
        row = line["row"]
        if line.get("ckpt") != ckpt:
            raise ConfigError(f"out={out}: row {row} was answered by {line.get('ckpt')}. Name another file")
        if row >= len(test) or ("error" not in line and describe(test, row, test.sample(row)).items() - line.items()):
            raise ConfigError(f"out={out}: row {row} answers another question than {test.path} asks. Name another file")
