"""Rows of preferences: a prompt with two answers is read as two conversations, and joined to one Sample."""

from collections.abc import Mapping
from dataclasses import replace

from vlm_tune.data.dialects.boxes import BOX_MARK
from vlm_tune.data.dialects.row import IMAGE_MARK, VIDEO_MARK, Record, Row, listed
from vlm_tune.data.sample import Sample

_TURNS = (("conversations", "from", "value", "gpt"), ("messages", "role", "content", "assistant"))
FIELDS = ("chosen", "rejected", "rejected_response", "rejected_messages", "rejected_images")


def halves(row: Row) -> tuple[Record, Record] | None:
    """Part a row of preferences into two rows of a plain dialect, the chosen one first; None for any other row.

    InternVL: image, question, chosen, rejected. TRL: prompt, chosen, rejected as text or messages, or no prompt but two
    whole conversations. ms-swift: messages, or query and response, with rejected_response or rejected_messages.
    LLaMA-Factory: conversations, or instruction and input, with chosen and rejected.

    Raise DataError for a row that lacks one of its answers, its question, or has pictures for each answer.
    """
    given = [name for name in FIELDS if row.record.get(name) not in (None, "", [])]
    if not given:
        return None
    rest = {name: value for name, value in row.record.items() if name not in FIELDS}
    if "chosen" in given or "rejected" in given:
        if given != list(FIELDS[:2]):
            named = ", ".join(f'"{name}"' for name in given)
            raise row.fault(f'a pair of answers has {named}. Write "chosen" and "rejected", both with a text, alone.')
        return _answered(row, rest, row.record["chosen"]), _answered(row, rest, row.record["rejected"])
    shown = listed(rest.get("images")) or listed(rest.get("image"))
    if "rejected_images" in given and listed(row.record["rejected_images"]) != shown:
        raise row.fault(
            '"rejected_images" differ from "images": both answers are to the same question and pictures, which the '
            "model reads once. Remove the row, or train on its chosen answer alone."
        )
    if "rejected_messages" in given:
        return rest, {**rest, "messages": row.record["rejected_messages"]}
    if "rejected_response" not in given:
        raise row.fault(
            '"rejected_images" without "rejected_response". Write the rejected answer, or remove the field.'
        )
    return rest, _replaced(row, rest, row.record["rejected_response"])


def _replaced(row: Row, rest: Record, answer: object) -> Record:
    """Put another answer in the place of the last one."""
    if rest.get("messages") is None and "response" in rest:
        return {**rest, "response": answer}
    turns = rest.get("messages")
    last = turns[-1] if isinstance(turns, list) and turns else None
    if not isinstance(last, Mapping) or not isinstance(turns, list):
        raise row.fault(
            '"rejected_response" needs "messages" that end with the chosen answer, or "query" and "response".'
        )
    changed = {**last, "value" if "value" in last else "content": answer}
    return {**rest, "messages": [*turns[:-1], changed]}


def _answered(row: Row, rest: Record, answer: object) -> Record:
    """Write a row's question and one of its answers as a row of a plain dialect."""
    if "question" in rest:
        asked = _with_mark(rest, row.question(rest["question"], '"question"'))
        turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]
        return {**{name: value for name, value in rest.items() if name != "question"}, "conversations": turns}
    for key, role, text, speaker in _TURNS:
        before = rest.get(key)
        if isinstance(before, list) and "prompt" not in rest:
            last = answer if isinstance(answer, Mapping) else {text: answer}
            named = {} if {"from", "role"} & last.keys() else {role: speaker}
            return {**rest, key: [*before, {**named, **last}]}
    if "instruction" in rest:
        return {**rest, "output": answer}
    return _of_trl(row, rest, answer)


def _of_trl(row: Row, rest: Record, answer: object) -> Record:
    """Join TRL's prompt and answer, each text or messages; without a prompt the answer is a whole conversation.

    Pictures without a place of their own stand before the text of the first question, as in TRL.
    """
    prompt = rest.get("prompt")
    said: list[object] = answer if isinstance(answer, list) else [{"role": "assistant", "content": answer}]
    if prompt is None and not isinstance(answer, list):
        raise row.fault('a pair without its question. Name it "question" or "prompt", or write whole conversations.')
    asked: list[object] = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    repeats = any(isinstance(turn, Mapping) and turn.get("content") == prompt for turn in said)
    turns = [*said] if prompt is None or repeats else [*asked, *said]  # the answers may be whole conversations
    pictures = listed(rest.get("images")) or listed(rest.get("image"))
    if pictures and not _has_places(turns):
        for place, turn in enumerate(turns):
            if isinstance(turn, Mapping) and turn.get("role") == "user":
                parts = [{"type": "image"}] * len(pictures) + [{"type": "text", "text": turn.get("content")}]
                turns[place] = {**turn, "content": parts}
                break
    kept = {name: value for name, value in rest.items() if name != "prompt"}
    if "messages" in kept:
        raise row.fault('"messages" beside "prompt", "chosen" and "rejected". Keep one of them.')
    return {**kept, "messages": turns}


def _has_places(turns: list[object]) -> bool:
    """Return whether turns say where pictures stand: by marks, or by parts."""
    for turn in turns:
        content = turn.get("content") if isinstance(turn, Mapping) else None
        if isinstance(content, str) and IMAGE_MARK in content:
            return True
        parts = content if isinstance(content, list) else []
        if any(isinstance(part, Mapping) and part.get("type") != "text" for part in parts):
            return True
    return False


def _with_mark(rest: Record, question: str) -> str:
    """Put the mark of a single picture or video before a question without one, as InternVL does."""
    for key, mark in (("image", IMAGE_MARK), ("images", IMAGE_MARK), ("video", VIDEO_MARK)):
        if len(listed(rest.get(key))) == 1 and mark not in question:
            return f"{mark}\n{question}"
    return question


def joined(row: Row, chosen: Sample, rejected: Sample) -> Sample:
    """Join two conversations that differ in their last answer alone; that answer alone is supervised.

    Raise DataError where they differ before it, where the answers are equal or differ only in white space.
    """
    better, worse = chosen.messages[-1], rejected.messages[-1]
    if chosen.messages[:-1] != rejected.messages[:-1]:
        pairs = enumerate(zip(chosen.messages[:-1], rejected.messages[:-1], strict=False), 1)
        turn = next((number for number, (one, other) in pairs if one != other), None)
        place = f"in turn {turn}" if turn else "in their number of turns"
        raise row.fault(
            f"the two conversations of the pair differ {place}, before their last answers. Both must answer the same "
            "question: cut them after the first answers that differ."
        )
    texts = [(message.reasoning, message.text) for message in (better, worse)]
    if texts[0] == texts[1]:
        raise row.fault("both answers of the pair are equal: there is nothing to prefer. Remove the row.")
    if len({tuple(" ".join(text.split()) for text in each) for each in texts}) == 1:
        raise row.fault("the answers of the pair differ only in white space. Remove the row, or mend them.")
    if chosen.boxes and any(BOX_MARK in message.written for message in (better, worse)):
        raise row.fault(f'"{BOX_MARK}" marks in the answers of a pair are not read. Write the boxes into the text.')
    asked = tuple(replace(message, supervised=False) for message in chosen.messages[:-1])
    better, worse = (replace(message, supervised=True) for message in (better, worse))
    return replace(chosen, messages=(*asked, better), rejected=worse)
