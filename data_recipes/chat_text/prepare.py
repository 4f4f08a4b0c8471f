"""Make a text-only chat set from chatterbot-corpus, without duplicates, in the OpenAI messages dialect."""

import argparse
import hashlib
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from vlm_tune.errors import DataError
from vlm_tune.recipes.fetch import cache_folder, fetch_pypi, unpack
from vlm_tune.recipes.recipe import recipe_main, recipe_parser, write_rows

PACKAGE, VERSION = "chatterbot-corpus", "1.3.3"
WHEEL = "chatterbot_corpus-1.3.3-py2.py3-none-any.whl"
SHA256 = "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154"

Row = dict[str, Any]


def prepare(options: argparse.Namespace) -> None:
    """Write train.jsonl and val.jsonl into `options.out`."""
    print(f"chat_text: PyPI {PACKAGE}=={VERSION}, 0.35 MB (BSD)")
    wheel = fetch_pypi(PACKAGE, VERSION, WHEEL, SHA256, cache_folder() / "downloads")
    rows: list[Row] = []
    seen: set[tuple[str, ...]] = set()
    num_read = 0
    with tempfile.TemporaryDirectory(dir=options.out) as unpacked:
        data = unpack(wheel, Path(unpacked)) / "chatterbot_corpus" / "data"
        for language in options.languages:
            for topic, turns in read_language(data, language):
                num_read += 1
                key = tuple(turn.casefold() for turn in turns)
                if key not in seen:
                    seen.add(key)
                    rows.append(make_row(f"{language}-{topic}-{len(rows):04d}", turns, language, topic))
    parts: dict[str, list[Row]] = {"train": [], "val": []}
    for row in rows:
        parts["val" if is_validation(row["messages"][0]["content"]) else "train"].append(row)
    for name, chosen in parts.items():
        write_rows(chosen, options.out / f"{name}.jsonl")
    counts = ", ".join(f"{len(chosen)} {name}" for name, chosen in parts.items())
    print(f"chat_text: {num_read} conversations, {len(rows)} distinct: {counts}")


def read_language(data: Path, language: str) -> Iterator[tuple[str, list[str]]]:
    """Yield (topic, turns) of each conversation; its last turn is left out where nobody answers it."""
    if not (data / language).is_dir():
        there = ", ".join(sorted(path.name for path in data.iterdir() if path.is_dir()))
        raise DataError(f"no language {language!r}. Those there are: {there}", where="--languages")
    for path in sorted((data / language).glob("*.yml")):
        # BaseLoader leaves every scalar a string: the answers "22" and "yes" are words here, not a number and a boolean
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
        for number, conversation in enumerate(content["conversations"], start=1):
            if not isinstance(conversation, list) or not all(isinstance(turn, str) for turn in conversation):
                print(f"chat_text: {language}/{path.name}, conversation {number} left out: not a list of turns")
                continue
            turns = [" ".join(turn.split()) for turn in conversation]
            turns = turns[: len(turns) - len(turns) % 2]
            if turns and all(turns):
                yield path.stem.lower(), turns


def make_row(row_id: str, turns: list[str], language: str, topic: str) -> Row:
    """Make one row; user and assistant take turns."""
    roles = ("user", "assistant")
    messages = [{"role": roles[index % 2], "content": turn} for index, turn in enumerate(turns)]
    return {"id": row_id, "messages": messages, "language": language, "topic": topic}


def is_validation(first_turn: str) -> bool:
    """Choose about a tenth by the opening, so that no opening of the validation part occurs in training."""
    return int(hashlib.sha256(first_turn.casefold().encode()).hexdigest(), 16) % 10 == 0


if __name__ == "__main__":
    parser = recipe_parser(str(__doc__))
    parser.add_argument("--languages", nargs="+", default=["english"], help="folders of the corpus, such as chinese")
    sys.exit(recipe_main(prepare, parser))
