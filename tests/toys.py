"""A model and a data set small enough to train in a second: built here from a seed, never downloaded."""

import json
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from transformers import AutoTokenizer, InternVLVisionConfig, InternVLVisionModel, LlamaConfig, LlamaForCausalLM

from vlm_tune.config.parse import load_config
from vlm_tune.config.schema import Config
from vlm_tune.data.batch import Batch
from vlm_tune.data.datamodule import DataModule
from vlm_tune.data.sets.micro_batches import MicroBatches
from vlm_tune.data.stream import MicroBatch
from vlm_tune.model.build import Model, build_model
from vlm_tune.model.parts.stage import PartSummary, apply_stage

TOKENIZER = Path(__file__).parent / "golden" / "tokenizer"
COLOURS = {"red": (220, 30, 30), "green": (30, 180, 30), "blue": (40, 40, 220), "white": (250, 250, 250)}
SHAPES = ("circle", "square")
SIZES = ((56, 56), (112, 56), (60, 130))  # one tile; two and a thumbnail, lying and standing
NUM_ROWS = 2500  # of the language model's table: fewer than the tokenizer's tokens, so that loading has to grow it


@dataclass(frozen=True)
class Toys:
    """Where the toy files lie, and the command line that trains on them."""

    vision: Path
    llm: Path
    data: Path

    def arguments(self, *more: str, runs: Path | None = None) -> list[str]:
        """Name the toy model and data, in float32 and without frills; `more` may override any of it."""
        ours = {
            "model": "tiny",
            "model.vision.path": self.vision,
            "model.llm.path": self.llm,
            "model.tiles.size": 56,
            "model.tiles.max": 2,
            "data.path": self.data / "train.jsonl",
            "data.workers": 0,
            "stage.pack_length": 160,
            "stage.max_steps": 6,
            "trainer.global_batch": 2,
            "trainer.precision": "fp32",
            "trainer.chat_every": 0,
            "trainer.num_chats": 2,
            "logger": "csv",
        }
        if runs is not None:
            ours["runs"] = runs
        given = {argument.partition("=")[0]: argument for argument in more}
        return [*(f"{key}={value}" for key, value in ours.items() if key not in given), *more]

    def model(self, *overrides: str) -> Model:
        """Build the toy model as it stands, nothing trained or frozen by a stage."""
        return build_model(load_config(self.arguments(*overrides)))

    def staged(self, *overrides: str) -> "Staged":
        """Build the toy model and data, with what the stage trains opened."""
        config = load_config(self.arguments(*overrides))
        model = build_model(config)
        config = model.config
        parts = apply_stage(model.vlm, config)
        data = DataModule(config, model.encoder)
        data.setup()
        return Staged(config, model, parts, data)


@dataclass(frozen=True)
class Staged:
    """A model, its stage and its data, as a run holds them before the first step."""

    config: Config
    model: Model
    parts: list[PartSummary]
    data: DataModule

    def batch(self, rows: list[int], packing: bool = True, step_weight: float | None = None) -> Batch:
        """Make one batch of training rows, weighted by themselves alone unless `step_weight` says otherwise."""
        assert self.data.train is not None
        settings = replace(self.data.settings(1), packing=packing)
        if step_weight is None:
            stream = self.data.stream()
            step_weight = float(stream.row_weights(rows).sum())
        item = MicroBatch(tuple(rows), 0, step_weight, (0, 0, 0))
        return MicroBatches(self.data.train.data, self.data.train.index, settings, True)[item]


def build_toys(folder: Path) -> Toys:
    """Write the two halves of a random model, and train, validation and test rows with their pictures."""
    toys = Toys(folder / "vision", folder / "llm", folder / "data")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        save_vision(toys.vision)
        save_llm(toys.llm)
    write_data(toys.data)
    return toys


def save_vision(folder: Path, **changes: Any) -> None:
    """Write a vision transformer of two layers: tiles of 56 pixels, 4 x 4 patches."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = InternVLVisionConfig(**sizes | {"image_size": [56, 56], "patch_size": [14, 14]} | changes)
    tower = InternVLVisionModel(config)
    for parameter in tower.parameters():  # a fresh encoder is all but blind: scaled up, each picture looks its own way
        if parameter.ndim > 1:
            parameter.data.mul_(3.0)
    tower.save_pretrained(folder)


def save_llm(folder: Path, **changes: Any) -> None:
    """Write a Llama of two layers with grouped queries, tied embeddings and the golden tokenizer."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": NUM_ROWS, "tie_word_embeddings": True}
    tokens = {"bos_token_id": 1, "eos_token_id": 5, "max_position_embeddings": 2048, "initializer_range": 0.1}
    LlamaForCausalLM(LlamaConfig(**sizes | heads | tokens | changes)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder)


def write_data(folder: Path) -> None:
    """Draw pictures and write train.jsonl (26 rows, each seventh without a picture), val.jsonl and test.jsonl (6)."""
    chance = random.Random(7)
    for part, count in (("train", 26), ("val", 6), ("test", 6)):
        (folder / "pictures").mkdir(parents=True, exist_ok=True)
        rows = [toy_row(f"{part}_{number}", number, folder, chance) for number in range(count)]
        write_jsonl(folder / f"{part}.jsonl", rows)


def toy_row(name: str, number: int, folder: Path, chance: random.Random) -> dict[str, Any]:
    """Make one row of the LLaVA dialect, and draw its picture; every third has a second turn."""
    if number % 7 == 6:
        numbers = chance.sample(range(10), 2)
        question = f"Which is larger, {numbers[0]} or {numbers[1]}?"
        return {"id": name, "task": "number", "conversations": turns((question, str(max(numbers))))}
    colour, shape = chance.choice(list(COLOURS)), chance.choice(SHAPES)
    path = f"pictures/{name}.png"
    draw(folder / path, colour, shape, chance.choice(SIZES))
    asked = [("What colour?", colour), ("What shape?", f"a {colour} {shape}")][:: 1 if number % 2 else -1]
    asked = asked[: 2 if number % 3 == 0 else 1]
    task = "colour" if asked[-1][0] == "What colour?" else "shape"
    asked[0] = (f"<image>\n{asked[0][0]}", asked[0][1])
    return {"id": name, "task": task, "image": path, "conversations": turns(*asked)}


def turns(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    """Write questions and answers in the LLaVA dialect."""
    return [
        {"from": speaker, "value": text} for pair in pairs for speaker, text in zip(("human", "gpt"), pair, strict=True)
    ]


def draw(path: Path, colour: str, shape: str, size: tuple[int, int]) -> None:
    """Draw one figure on grey."""
    image = Image.new("RGB", size, (120, 120, 120))
    width, height = size
    box = (width // 5, height // 5, width * 4 // 5, height * 4 // 5)
    brush = ImageDraw.Draw(image)
    (brush.ellipse if shape == "circle" else brush.rectangle)(box, fill=COLOURS[colour])
    image.save(path)


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write one JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
