"""Every recorded row of XTuner's dialects gives XTuner's conversation."""

import json
import os
from pathlib import Path

import pytest

from vlm_tune.data.dialects.dialects import parse_record
from vlm_tune.data.sample import Message, Picture, Sample
from vlm_tune.errors import DataError

GOLDEN = Path(os.environ.get("VLM_TUNE_GOLDEN", Path(__file__).parents[2] / "golden"))
RECORDED = GOLDEN / "xtuner_formats.json"  # a recording may hold some files only
CASES = json.loads(RECORDED.read_text(encoding="utf-8")) if RECORDED.exists() else []
OURS = {"default": "xtuner"}  # XTuner's name -> ours, where they differ


def spoken(message: Message) -> str:
    """Write a turn as XTuner does: its picture goes to the front (ours stays; a template may move it)."""
    has_picture = any(isinstance(part, Picture) for part in message.parts)
    return f"<image>\n{message.text.strip()}" if has_picture else message.text


def xtuner_conversation(sample: Sample) -> list[dict[str, object]]:
    """Write a Sample as XTuner's list of single turns."""
    turns: list[dict[str, object]] = [{}]
    for message in sample.messages:
        if message.role == "assistant":
            turns[-1] |= {"output": spoken(message), "output_with_loss": message.supervised}
            turns.append({})
        else:
            turns[-1]["input" if message.role == "user" else "system"] = spoken(message)
    return [normal(turn) for turn in turns[:-1]]


def normal(turn: dict[str, object]) -> dict[str, object]:
    """Leave out what says nothing: an empty text, and that an answer is trained on."""
    return {key: value for key, value in turn.items() if value != "" and (key, value) != ("output_with_loss", True)}


@pytest.mark.parametrize("number", range(len(CASES)))
def test_golden_conversation_equals_xtuner(number: int) -> None:
    case = CASES[number]
    name = OURS.get(case["format"], case["format"])
    if not case["conversation"]:  # XTuner drops the row in silence
        with pytest.raises(DataError, match=r"t.jsonl:7.*no answer"):
            parse_record(case["record"], name, "t.jsonl:7", 6)
        return
    sample = parse_record(case["record"], name, "t.jsonl:7", 6)
    assert xtuner_conversation(sample) == [normal(turn) for turn in case["conversation"]]


def is_recognisable(case: dict[str, object]) -> bool:
    """Tell whether there is something to compare: without a tool call nothing tells MSAgent's rows from ShareGPT's."""
    is_plain_agent = case["format"] == "msagent" and "<|startofthink|>" not in str(case["record"])
    return bool(case["conversation"]) and not is_plain_agent


@pytest.mark.parametrize("number", [number for number, case in enumerate(CASES) if is_recognisable(case)])
def test_golden_record_is_recognised(number: int) -> None:
    case = CASES[number]
    name = OURS.get(case["format"], case["format"])
    assert parse_record(case["record"], "auto", "", 0) == parse_record(case["record"], name, "", 0)
