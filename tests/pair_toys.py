"""Rows of preferences about the toy pictures, and the command line that trains on them."""

import json
from pathlib import Path
from typing import Any

from tests.toys import Toys, write_jsonl

ALL = (
    "stage=mpo",
    "stage.init_from=none",
    "stage.evaluate=false",
    "stage.lr={projector: 1e-2, llm: 1e-2}",
    "stage.train.projector=full",
    "stage.lora={rank: 4, alpha: 8, dropout: 0}",
    "data.test=none",
    "trainer.num_chats=0",
)


def pair_rows(toys: Toys, part: str) -> list[dict[str, Any]]:
    """Turn the toy rows of one turn into pairs, in InternVL's layout: the answer of the next such row is worse."""
    lines = (toys.data / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if len(row["conversations"]) == 2]
    answers = [row["conversations"][1]["value"] for row in rows]
    made = []
    for number, row in enumerate(rows):
        others = [answer for answer in answers[number:] + answers if answer != answers[number]]
        asked = {"id": row["id"], "question": row["conversations"][0]["value"]}
        shown = {"image": row["image"]} if "image" in row else {}
        made.append({**asked, **shown, "chosen": answers[number], "rejected": others[0]})
    return made


def pair_arguments(toys: Toys, folder: Path, *more: str, runs: Path | None = None) -> list[str]:
    """Write train.jsonl and val.jsonl of pairs, and name them with the toy model."""
    for part in ("train", "val"):
        write_jsonl(folder / f"{part}.jsonl", pair_rows(toys, part))
    own = [f"data.path={folder}/train.jsonl", f"data.image.root={toys.data}"]
    return toys.arguments(*ALL, *own, *more, runs=runs)
