"""Dialects of conversations: LLaVA and InternVL, ShareGPT, OpenAI messages, XTuner."""

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from vlm_tune.config.hints import PICTURE_ENDINGS
from vlm_tune.data.dialects.fields import check_fields, check_part, check_turn, turn_fields
from vlm_tune.data.dialects.row import (
    VIDEO_MARK,
    Row,
    check_order,
    conversation,
    kind_of,
    listed,
    picture,
    place_pictures,
    row_pictures,
    single_turns,
)
from vlm_tune.data.pictures.near_paths import near
from vlm_tune.data.pictures.videos import choose_frames, read_header
from vlm_tune.data.sample import Message, Part, Picture, Role
from vlm_tune.errors import DataError

LLAVA_ROLES: Mapping[str, Role] = {"human": "user", "gpt": "assistant", "system": "system"}
_SHAREGPT_ROLES: Mapping[str, Role] = {
    **LLAVA_ROLES,
    "user": "user",
    "assistant": "assistant",
    "observation": "user",
    "tool": "user",
    "function_call": "assistant",
}
_OPENAI_ROLES: Mapping[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "tool": "user",
    "assistant": "assistant",
}
REASONING = ("reasoning_content", "reasoning", "thinking")


def read_llava(row: Row) -> list[Message]:
    """Read LLaVA and InternVL rows: conversations of human, gpt and system; image, images or video."""
    return _with_media(row, _turns(row, "conversations", LLAVA_ROLES, "llava"))


def read_sharegpt(row: Row) -> list[Message]:
    """Read ShareGPT rows: LLaVA's, plus tools; or "messages" of role and content, as LLaMA-Factory and swift do.

    observation and tool are turns of the user, function_call is one of the assistant. A "system" field of the row is
    the same as a first turn of the system.
    """
    key = "messages" if row.record.get("conversations") is None and "messages" in row.record else "conversations"
    messages = _turns(row, key, _SHAREGPT_ROLES, "sharegpt")
    system = row.optional("system")
    if system.strip():
        if messages and messages[0].role == "system":
            raise row.fault('both "system" and a first turn of the system. Keep one of them.')
        messages.insert(0, Message("system", (system,)))
    return _with_media(row, messages)


def _turns(row: Row, key: str, roles: Mapping[str, Role], dialect: str) -> list[Message]:
    """Read a list of {"from", "value"} or {"role", "content"} in order, without placing pictures yet."""
    messages: list[Message] = []
    known = turn_fields(dialect)
    for number, turn in enumerate(_turn_list(row, key), 1):
        is_sharegpt = turn.get("from") is not None
        name_key, text_key = ("from", "value") if is_sharegpt else ("role", "content")
        role = _role(row, turn.get(name_key), number, roles, name_key)
        check_turn(row, turn, number, known - {"role", "content"} if is_sharegpt else known - {"from", "value"})
        messages.append(_message(row, turn, number, role, (_spoken(row, turn.get(text_key), number, role, text_key),)))
    check_order(row, messages)
    return conversation(messages)


def _turn_list(row: Row, key: str) -> Sequence[Mapping[str, object]]:
    turns = row.required(key)
    if not isinstance(turns, list):
        raise row.fault(f'"{key}" is {kind_of(turns)}, not a list of turns. Write [{{...}}, {{...}}].')
    if not turns:
        raise row.fault(f'the conversation is empty: "{key}" holds no turns. Write some, or remove the row.')
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict):
            raise row.fault(f"turn {number} is {kind_of(turn)}, not an object. Write {{...}}.")
    return turns


def _role(row: Row, name: object, number: int, roles: Mapping[str, Role], key: str) -> Role:
    role = roles.get(name) if isinstance(name, str) else None
    if role is None:
        known = ", ".join(roles)
        raise row.fault(f'turn {number}: unknown role {name!r} in "{key}". Known here: {known}.')
    return role


def _spoken(row: Row, value: object, number: int, role: Role, key: str) -> str:
    name = f'turn {number}, "{key}"'
    if role == "system":
        return row.text(value, name)  # may be empty: then it is left out
    return row.answer(value, name) if role == "assistant" else row.question(value, name)


def _message(row: Row, turn: Mapping[str, object], number: int, role: Role, parts: tuple[Part, ...]) -> Message:
    """Return the message of a turn, an answer with its loss flag and its reasoning."""
    is_answer = role == "assistant"
    return Message(role, parts, is_answer and _has_loss(row, turn, number), _reasoning(row, turn, number, role))


def _reasoning(row: Row, turn: Mapping[str, object], number: int, role: Role) -> str:
    """Read the reasoning of an answer: "reasoning_content", also called "reasoning" or "thinking"."""
    given = [key for key in REASONING if turn.get(key) not in (None, "")]
    if not given:
        return ""
    name = f'turn {number}, "{given[0]}"'
    if len(given) > 1:
        raise row.fault(f'{name} and "{given[1]}". Keep one of them.')
    if role != "assistant":
        raise row.fault(f"{name} in a turn of the {role}. Only the assistant reasons: remove it.")
    return row.answer(turn[given[0]], name)


def _has_loss(row: Row, turn: Mapping[str, object], number: int) -> bool:
    """Read a turn's loss flag: "loss" (true or false, as text too, as XTuner does) or OpenAI's "weight" (0 or 1)."""
    value = turn.get("weight") if turn.get("loss") is None else turn["loss"]
    if value is None:
        return True
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if isinstance(value, bool | int | float) and value in (0, 1):
        return bool(value)
    raise row.fault(f"turn {number}: the loss flag is {value!r}. Write true or false.")


def _with_media(row: Row, messages: list[Message]) -> list[Message]:
    videos = [video for key in ("video", "videos") for video in listed(row.record.get(key))]
    if not videos:
        return place_pictures(row, messages, row_pictures(row))
    if row_pictures(row):
        raise row.fault('both "image" and "video". Split them into two rows.')
    if len(videos) > 1:
        raise row.fault(f"{len(videos)} videos. Only one a row is read: split them into rows.")
    return _place_frames(row, messages, video_parts(_frames(row, row.text(videos[0], '"video"'))))


def video_parts(frames: Sequence[Picture]) -> tuple[Part, ...]:
    """Write frames as InternVL does: 'Frame-1: ', picture, line end, 'Frame-2: ', picture, ..."""
    parts: list[Part] = []
    for number, frame in enumerate(frames, 1):
        parts += ["\n" * (number > 1) + f"Frame-{number}: ", frame]
    return tuple(parts)


def _frames(row: Row, video: str) -> list[Picture]:
    """List the frames of a video: those that `choose_frames` picks from a file, or all pictures of a folder."""
    try:
        path = (row.image_root / video).resolve()
        if not path.is_relative_to(row.image_root.resolve()):
            raise row.fault(f'video "{video}" lies outside of the image root. Move it, or set data.image.root.')
        if path.is_file():
            return [Picture(video, is_frame=True, frame=number) for number in _chosen(row, video, str(path))]
        names = [entry.name for entry in path.iterdir() if entry.suffix.lower() in PICTURE_ENDINGS]
    except FileNotFoundError as error:
        hint = near(str(row.image_root), video)
        raise row.fault(f'video "{video}" is not there{hint} It is looked for below data.image.root.') from error
    except (OSError, ValueError) as error:  # no permission, a name too long, a zero byte in it
        raise row.fault(f"the video cannot be read: {error}. Fix the path.") from error
    if row.record.get("clip") is not None:
        raise row.fault(f'"clip" needs a video file, "{video}" is a folder. Keep only the clip\'s frames in it.')
    if not names:
        raise row.fault(f'video "{video}" holds no frames. Known: {", ".join(PICTURE_ENDINGS)}.')
    names.sort(key=lambda name: [int(piece) if piece.isdecimal() else piece for piece in re.split(r"(\d+)", name)])
    return [Picture(str(Path(video) / name), is_frame=True) for name in names]


def _chosen(row: Row, video: str, path: str) -> tuple[int, ...]:
    clip = _clip(row)
    try:
        return choose_frames(read_header(path), clip)
    except DataError as error:
        raise row.fault(f'video "{video}" {error.reason}.') from error


def _clip(row: Row) -> tuple[float, float] | None:
    """Read InternVL's clip: [start, end] in seconds."""
    clip = listed(row.record.get("clip"))
    if not clip:
        return None
    times = [time for time in clip if isinstance(time, int | float) and not isinstance(time, bool)]
    if len(clip) != 2 or len(times) != 2 or not 0 <= times[0] < times[1] <= sys.float_info.max:
        raise row.fault(f'"clip" is {row.record["clip"]!r:.80}. Write [start, end] in seconds.')
    return times[0], times[1]


def _place_frames(row: Row, messages: list[Message], frames: tuple[Part, ...]) -> list[Message]:
    marks = [message.text.count(VIDEO_MARK) if message.role == "user" else 0 for message in messages]
    if sum(marks) != 1:
        raise row.fault(f'{sum(marks)} "{VIDEO_MARK}" marks but 1 video. Write one into a user\'s turn.')
    number = marks.index(1)
    before, after = messages[number].text.split(VIDEO_MARK)
    after = after if after.startswith("\n") else f"\n{after}"
    messages[number] = Message("user", tuple(part for part in (before, *frames, after) if part))
    return messages


_SOURCES = ("image_url", "image", "path", "url", "base64")
_TEXT_PART = frozenset(("type", "text"))
_IMAGE_PART = frozenset(("type", *_SOURCES))
_SOURCE = frozenset(("url", "path", "bytes"))
_DETAILS = ("auto", "high", "low")


def read_openai(row: Row) -> list[Message]:
    """Read OpenAI messages: content as text or as a list of text and image parts, and a loss flag for each answer.

    An image part without a source, as TRL writes them, takes the next of the row's "images".
    """
    waiting = row_pictures(row)
    messages: list[Message] = []
    known = turn_fields("openai")
    for number, turn in enumerate(_turn_list(row, "messages"), 1):
        role = _role(row, turn.get("role"), number, _OPENAI_ROLES, "role")
        check_turn(row, turn, number, known)
        content = turn.get("content")
        if isinstance(content, list):
            parts = _content_parts(row, content, number, role, waiting)
        else:
            parts = (_spoken(row, content, number, role, "content"),)
        messages.append(_message(row, turn, number, role, parts))
    if waiting:
        reason = f'{len(waiting)} of "images" belong to no image part. Add {{"type": "image"}} parts'
        raise row.fault(f'{reason}, or use data.format=sharegpt, which reads "<image>" marks.')
    check_order(row, messages)
    return conversation(messages)


def _content_parts(
    row: Row, content: list[object], number: int, role: Role, waiting: list[Picture]
) -> tuple[Part, ...]:
    parts: list[Part] = []
    for place, part in enumerate(content, 1):
        name = f"turn {number}, part {place}"
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(part, dict) and kind == "text":
            check_part(row, part, name, _TEXT_PART)
            text = row.text(part.get("text"), f'{name}, "text"')
            parts += [text] if text else []
        elif isinstance(part, dict) and kind in ("image", "image_url"):
            if role != "user":
                raise row.fault(f"{name}: an image in a turn of the {role}. Only the user shows images.")
            check_part(row, part, name, _IMAGE_PART)
            parts.append(_image_part(row, part, name, waiting))
        else:
            raise row.fault(f"{name}: unknown type {kind!r}. Known: text, image, image_url.")
    if not any(isinstance(part, Picture) or part.strip() for part in parts):
        _spoken(row, "", number, role, "content")  # raises: the same words as for empty text
    return tuple(parts)


def _image_part(row: Row, part: Mapping[str, object], name: str, waiting: list[Picture]) -> Picture:
    """Read {"type": "image_url", "image_url": {"url": ...}}, or "image" in any of the forms of transformers.

    A picture of low "detail" is one tile; every other has the tiles that the model's settings give it.
    """
    sources = [part[key] for key in _SOURCES if part.get(key) is not None]
    if len(sources) > 1:
        raise row.fault(f"{name}: more than one source. Keep one.")
    if sources:
        source = sources[0]
        if not isinstance(source, dict):
            return picture(row, source, name)
        detail = source.get("detail")
        check_part(row, {**source, "detail": None} if detail in _DETAILS else source, name, _SOURCE)
        return replace(picture(row, source.get("url", source), name), is_frame=detail == "low")
    if not waiting:
        raise row.fault(f'{name}: an image without a source. Give it a "url" or a "path", or list it in "images".')
    return waiting.pop(0)


def read_xtuner(row: Row) -> list[Message]:
    """Read XTuner's conversation: a list of {"system", "input", "output", "output_with_loss"}, or one such row.

    Each may have a system text. An empty input is allowed: that is how XTuner writes continued pretraining.
    """
    messages: list[Message] = []
    known = turn_fields("xtuner")
    for number, turn in enumerate(_xtuner_turns(row), 1):
        if turn is not row.record:
            check_turn(row, turn, number, known)
        system, question = (_optional(row, turn, number, key) for key in ("system", "input"))
        if turn.get("output") is None:
            raise row.fault(f'turn {number}: no answer: "output" is missing. Write one, or remove the turn.')
        answer = row.answer(turn["output"], f'turn {number}, "output"')
        if system.strip():
            messages.append(Message("system", (system,)))
        messages.append(Message("user", (question,) if question else ()))
        is_supervised = _has_loss(row, {"loss": turn.get("output_with_loss")}, number)
        messages.append(Message("assistant", (answer,), supervised=is_supervised))
    return place_pictures(row, messages, row_pictures(row))


def _optional(row: Row, turn: Mapping[str, object], number: int, key: str) -> str:
    text = turn.get(key)
    return "" if text is None else row.text(text, f'turn {number}, "{key}"')


def _xtuner_turns(row: Row) -> Sequence[Mapping[str, object]]:
    nested = row.record.get("input")
    if isinstance(nested, dict):  # a tutorial writes {"input": {"conversation": [...]}}
        row = replace(row, record=nested)
        check_fields(row, "xtuner")
        return _turn_list(row, "conversation")
    if "output" in row.record and "conversation" not in row.record:
        return [row.record]
    return _turn_list(row, "conversation")


def read_swift(row: Row) -> list[Message]:
    """Read ms-swift's rows of one turn: "query" and "response", earlier turns in "history", and "system"."""
    name = '"query" or "response"'
    return _with_media(row, single_turns(row, "system", row.required("query"), row.required("response"), name))
