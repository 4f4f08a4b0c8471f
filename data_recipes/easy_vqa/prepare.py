"""Make the easy-VQA benchmark: questions about one coloured shape, in the LLaVA dialect, official test split."""

import argparse
import hashlib
import json
import shutil
import sys
import tempfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from PIL import Image

from vlm_tune.errors import DataError
from vlm_tune.recipes.fetch import cache_folder, fetch_pypi, unpack
from vlm_tune.recipes.recipe import recipe_main, recipe_parser, write_rows

PACKAGE, VERSION = "easy-vqa", "1.0"
WHEEL = "easy_vqa-1.0-py3-none-any.whl"
SHA256 = "fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f"
NUM_QUESTIONS = {"train": 38575, "test": 9673}  # as published
SHAPES = ("circle", "rectangle", "triangle")

Row = dict[str, Any]


def prepare(options: argparse.Namespace) -> None:
    """Write train.jsonl, val.jsonl, test.jsonl and the pictures into `options.out`."""
    print(f"easy_vqa: PyPI {PACKAGE}=={VERSION}, 3.2 MB (MIT)")
    wheel = fetch_pypi(PACKAGE, VERSION, WHEEL, SHA256, cache_folder() / "downloads")
    with tempfile.TemporaryDirectory(dir=options.out) as unpacked:
        data = unpack(wheel, Path(unpacked)) / "easy_vqa" / "data"
        official = {part: read_part(data / part, part) for part in NUM_QUESTIONS}
        for part in NUM_QUESTIONS:
            shutil.copytree(data / part / "images", options.out / "images" / part, dirs_exist_ok=True)
    parts: dict[str, list[Row]] = defaultdict(list)
    for row in official["train"]:
        parts["val" if is_validation(row["image"]) else "train"].append(row)
    parts["test"] = official["test"]
    for name, rows in parts.items():
        write_rows(rows, options.out / f"{name}.jsonl")
        pictures = len({row["image"] for row in rows})
        answer, count = Counter(row["conversations"][-1]["value"] for row in rows).most_common(1)[0]
        print(f"easy_vqa: {name}: {len(rows)} questions, {pictures} pictures, {answer!r} is {count / len(rows):.1%}")


def read_part(folder: Path, part: str) -> list[Row]:
    """Turn the official questions, `[question, answer, picture]`, into rows."""
    questions = json.loads((folder / "questions.json").read_text(encoding="utf-8"))
    if len(questions) != NUM_QUESTIONS[part]:
        found = f"{len(questions)} questions, published are {NUM_QUESTIONS[part]}"
        raise DataError(f"{found}. Report it: the file is not the one known", str(folder))
    numbers: Counter[int] = Counter()
    sizes: dict[int, tuple[int, int]] = {}
    rows = []
    for question, answer, picture in questions:
        if picture not in sizes:
            with Image.open(folder / "images" / f"{picture}.png") as image:
                sizes[picture] = image.size
        turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
        row: Row = {"id": f"{part}-{picture}-{numbers[picture]}", "image": f"images/{part}/{picture}.png"}
        row.update(width=sizes[picture][0], height=sizes[picture][1], conversations=turns, task=task_of(answer))
        rows.append(row)
        numbers[picture] += 1
    return rows


def task_of(answer: str) -> str:
    """Name the kind of question by its answer: yes_no, shape or color."""
    if answer in ("yes", "no"):
        return "yes_no"
    return "shape" if answer in SHAPES else "color"


def is_validation(image: str) -> bool:
    """Put about a tenth of the training pictures aside, each with all its questions."""
    return int(hashlib.sha256(image.encode()).hexdigest(), 16) % 10 == 0


if __name__ == "__main__":
    sys.exit(recipe_main(prepare, recipe_parser(str(__doc__))))
