"""Tokens, masks and prompts equal the reference implementations' (recordings: tests/golden or VLM_TUNE_GOLDEN)."""

import json
import os
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from vlm_tune.data.dialects.dialects import parse_record
from vlm_tune.data.encode import Encoder
from vlm_tune.data.example import NO_LOSS
from vlm_tune.data.fit import EncoderSettings
from vlm_tune.data.sample import Message, Picture, Sample
from vlm_tune.data.text.templates import BOS, Segment, load_template, render
from vlm_tune.errors import DataError

GOLDEN = Path(os.environ.get("VLM_TUNE_GOLDEN", Path(__file__).parents[1] / "golden"))
OURS = {"default": "xtuner"}  # XTuner's name of a format -> ours, where they differ
ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


def rows_of(file):
    path = GOLDEN / file
    rows = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []  # a recording may hold some files only
    return [pytest.param(row, id=f"{index}-{row['template']}") for index, row in enumerate(rows)]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(GOLDEN / "tokenizer")


def sample_of(conversation):
    """Read human / gpt turns; each <image> is a picture where it stands."""
    messages = []
    for turn in conversation:
        parts = [turn["value"]]
        if turn["from"] == "human":
            texts = turn["value"].split("<image>")
            parts = [part for text in texts for part in (text, Picture("a.jpg"))][:-1]
        messages.append(Message(ROLES[turn["from"]], tuple(parts), supervised=turn["from"] == "gpt"))
    return Sample("golden", tuple(messages))


def joined(segments):
    """Join neighbours with the same loss flag into [text, has_loss]; pictures are written <image>."""
    runs = []
    for text, supervised in segments:
        if runs and runs[-1][1] == supervised:
            runs[-1][0] += text
        elif text:
            runs.append([text, supervised])
    return runs


def written(segments: list[Segment]):
    pairs = [(each.content if isinstance(each.content, str) else "<image>", each.supervised) for each in segments]
    return joined(pair for pair in pairs if pair[0] != BOS)  # the tokenizer's first token is no part of a template


@pytest.mark.parametrize("row", [*rows_of("label_masks.json"), *rows_of("label_masks_markup.json")])
def test_golden_label_masks(row, tokenizer):
    settings = EncoderSettings(tokens_per_tile=1, add_bos=row["add_bos"])
    encoder = Encoder(tokenizer, load_template(row["template"]), settings)
    example = encoder.encode(sample_of(row["conversation"]), lambda max_tiles: row["image_tokens"])
    assert example.input_ids.tolist() == row["input_ids"]
    assert example.labels.tolist() == row["labels"]
    assert tokenizer.decode(example.labels[example.labels != NO_LOSS]) == row["supervised_text"]


@pytest.mark.parametrize("row", rows_of("xtuner_templates.json"))
def test_golden_xtuner_templates(row):
    name = OURS.get(row["format"], row["format"])
    if not row["segments"]:  # XTuner leaves the record out in silence
        with pytest.raises(DataError):
            parse_record(row["record"], name, "golden.json:1", 0)
        return
    sample = parse_record(row["record"], name, "golden.json:1", 0)
    assert written(render(load_template(row["template"]), sample)) == joined(map(tuple, row["segments"]))


@pytest.mark.parametrize("row", rows_of("llava_prompts.json"))
def test_golden_llava_prompts(row):
    runs = written(render(load_template(row["template"]), sample_of(row["conversation"])))
    assert "".join(text for text, _ in runs) == row["prompt"]
    end = load_template(row["template"]).end
    answers = [turn["value"] + end for turn in row["conversation"] if turn["from"] == "gpt"]
    assert [text for text, has_loss in runs if has_loss] == row.get("supervised", answers)
