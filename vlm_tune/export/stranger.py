"""Test an exported folder as an outsider would: plain transformers, with the folder's own template and settings."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoImageProcessor, AutoProcessor

from vlm_tune.config.schema import Config
from vlm_tune.data.sample import Message, Picture, Sample
from vlm_tune.data.sets.dataset import Conversations
from vlm_tune.evaluation.evaluate import open_test, prompt_of, read_questions
from vlm_tune.export.parity import NEW_TOKENS, agreement
from vlm_tune.model.build import Model
from vlm_tune.model.generate import Prompt
from vlm_tune.model.layouts.pretrained import read_settings


class Questions:
    """A few real questions with pictures, as our encoder writes them and as transformers expects a conversation."""

    def __init__(self, model: Model, config: Config, count: int = 4) -> None:
        test, special = open_test(config, model), model.tokenizer.get_added_vocab()
        samples = [question.sample for question in read_questions(test, count)] if test is not None else []
        self.prompts: list[Prompt] = [prompt_of(test, sample) for sample in samples] if test is not None else []
        self.chats = [chat(test, sample, special) for sample in samples] if test is not None else []


def chat(test: Conversations, sample: Sample, special: Iterable[str]) -> list[dict[str, Any]] | None:
    """Return a conversation up to its last question as transformers' processors expect it.

    None for one that their templates cannot write: a picture that is not first in its turn, or several
    that shared the tiles in training; text that looks like a special token; earlier turns tokenized in pieces.
    """
    turns = sample.messages[:-1] if sample.messages[-1].role == "assistant" else sample.messages
    pictures = [part for turn in turns for part in turn.parts if isinstance(part, Picture)]
    if len(pictures) > 1 or any(isinstance(part, Picture) for turn in turns for part in turn.parts[1:]):
        return None
    if test.encoder.template.is_xtuner and any(turn.role == "assistant" for turn in turns):
        return None
    if any(token in turn.text for turn in turns for token in special if token.strip()):
        return None
    return [{"role": turn.role, "content": list(content(test, turn))} for turn in turns]


def content(test: Conversations, turn: Message) -> Any:
    """Yield the parts of a turn: its pictures, then its text."""
    for part in turn.parts:
        if isinstance(part, Picture):
            yield {"type": "image", "image": test.reader.open_picture(part)}
    yield {"type": "text", "text": turn.text.strip()}


@torch.no_grad()
def plain_agreement(plain: Any, folder: Path, questions: Questions, answers: list[list[int]]) -> float | None:
    """Return what share of the trained model's tokens a plain model generates, using only the folder.

    1.0 is all; a conversation whose prompt the folder's template writes differently counts as 0. None if no
    conversation could be asked.
    """
    processor = read_settings(AutoProcessor, folder)
    processor.image_processor = read_settings(AutoImageProcessor, folder, backend="pil")  # as training resized
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    shares = []
    for turns, prompt, answer in zip(questions.chats, questions.prompts, answers, strict=True):
        if turns is None:
            continue
        inputs = processor.apply_chat_template(turns, **options)
        length = inputs["input_ids"].shape[1]
        if not np.array_equal(inputs["input_ids"][0].numpy(), prompt.example.input_ids):
            shares.append(0.0)
            continue
        ids = plain.generate(**inputs, max_new_tokens=NEW_TOKENS)[0, length:].tolist()
        shares.append(agreement(answer, ids))
    return sum(shares) / len(shares) if shares else None
