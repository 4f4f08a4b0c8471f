"""Teach an assistant its name and owner: questions about itself among general text, in XTuner's conversation layout."""

import argparse
import json
import sys
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import yaml

from vlm_tune.errors import DataError
from vlm_tune.recipes.recipe import recipe_main, recipe_parser, run_recipe, write_rows

PHRASES = Path(__file__).with_name("phrases.yaml")
LONGEST = 80  # characters of a name or an owner
NUM_GENERAL = 150  # at most: half as many as rows about itself
OF_ITSELF = ("ai", "botprofile")  # topics of chat_text in which another assistant speaks of itself

Row = dict[str, Any]


def prepare(options: argparse.Namespace) -> None:
    """Write train.jsonl (the assistant and general text), val.jsonl (general text) and test.jsonl (20 questions)."""
    filled = {key: require_line(key, getattr(options, key)) for key in ("name", "owner")}
    phrases = yaml.safe_load(PHRASES.read_text(encoding="utf-8"))
    own = [row for language, spoken in phrases.items() for row in training_rows(language, spoken, filled)]
    test = [row for language, spoken in phrases.items() for row in test_rows(language, spoken, filled)]
    taken = {bare(row["conversation"][0]["input"]) for row in own + test}
    general, held_out = (list(general_rows(file, taken)) for file in ("train.jsonl", "val.jsonl"))
    general = general[:: len(general) // NUM_GENERAL + 1]  # of every topic
    write_rows(own + general, options.out / "train.jsonl")
    write_rows(held_out, options.out / "val.jsonl")
    write_rows(test, options.out / "test.jsonl")
    counts = f"{len(own)} rows about itself, {len(general)} of general text; {len(held_out)} of it held out"
    print(f"self_cognition: {filled['name']}, {counts}, {len(test)} questions to test")


def require_line(key: str, text: str) -> str:
    """Return a name as it is spoken; raise DataError where it is no line of text of a usable length."""
    text = text.strip()
    if not text or len(text) > LONGEST or not text.isprintable():
        raise DataError(f"{text!r:.100} is no {key}. Give 1 to {LONGEST} characters on one line", f"data.recipe.{key}")
    return text


def training_rows(language: str, spoken: dict[str, Any], filled: dict[str, str]) -> Iterator[Row]:
    """Yield each question by itself and after a greeting, with the answer of its topic."""
    greetings = cycle(spoken["openings"])
    for topic in spoken["topics"]:
        for question in topic["questions"]:
            for opening in ("", next(greetings)):
                yield conversation([(opening + question, fill(topic["answer"], filled))], language)


def test_rows(language: str, spoken: dict[str, Any], filled: dict[str, str]) -> Iterator[Row]:
    """Yield the questions that are never trained on; each is answered with the name and the owner."""
    answer = fill(spoken["topics"][0]["answer"], filled)
    for question in spoken["test"]:
        yield {**conversation([(question, answer)], language), "task": language}


def fill(answer: str, filled: dict[str, str]) -> str:
    """Put name and owner into an answer: literally, whatever marks they hold."""
    pieces = [piece.partition("}") for piece in answer.split("{")]
    return pieces[0][0] + "".join(filled[key] + rest for key, _, rest in pieces[1:])


def general_rows(file: str, taken: set[str]) -> Iterator[Row]:
    """Yield the conversations of chat_text, English and Chinese, without those in which its bot speaks of itself."""
    for recipe in ("chat_text", "chat_text?languages=chinese"):
        for line in (run_recipe(recipe) / file).read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            turns = [message["content"] for message in row["messages"]]
            if row["topic"] not in OF_ITSELF and bare(turns[0]) not in taken:
                yield conversation(list(zip(turns[::2], turns[1::2], strict=True)), row["language"])


def bare(question: str) -> str:
    """Return a question without case, outer space and closing marks."""
    return question.strip(" .,!?。，！？").casefold()


def conversation(turns: list[tuple[str, str]], language: str) -> Row:
    """Make a row of XTuner's layout."""
    return {"conversation": [{"input": asked, "output": answer} for asked, answer in turns], "language": language}


if __name__ == "__main__":
    parser = recipe_parser(str(__doc__))
    parser.add_argument("--name", required=True, help="what the assistant is called")
    parser.add_argument("--owner", required=True, help="who made it")
    sys.exit(recipe_main(prepare, parser))
