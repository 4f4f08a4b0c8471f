"""What the dialects share: a raw record with its location, its pictures, and the order of its turns."""

import ast
import base64
import binascii
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vlm_tune.data.sample import Message, Part, Picture, Role
from vlm_tune.errors import DataError

Record = Mapping[str, object]

IMAGE_MARK, VIDEO_MARK = "<image>", "<video>"
_LONGEST_PATH = 4096  # characters; anything longer is the picture itself, in base64


@dataclass(slots=True)
class Row:
    """One raw record, with what an error message about it needs."""

    record: Record
    where: str
    sample_id: str | None  # None if the record has none
    image_root: Path  # of relative video folders

    def fault(self, reason: str) -> DataError:
        """Return the error to raise for this row."""
        return DataError(reason, self.where, self.sample_id)

    def text(self, value: object, name: str) -> str:
        """Return a value that must be text. Raise DataError for any other type, and for broken Unicode."""
        if not isinstance(value, str):
            raise self.fault(f"{name} is {kind_of(value)}, not text. Write it in quotes.")
        if not value.isascii():
            try:
                value.encode("utf-8")
            except UnicodeEncodeError as error:  # json reads half of a surrogate pair without complaint
                reason = f"{name} holds a broken character {value[error.start]!r} at {error.start + 1}. Write it again."
                raise self.fault(reason) from error
        return value

    def answer(self, value: object, name: str) -> str:
        """Return the text of an answer. Raise DataError if it is blank: there would be nothing to train on."""
        text = self.text(value, name)
        if not text.strip():
            raise self.fault(f"{name}: the answer is empty. Write one, or remove the turn.")
        return text

    def question(self, value: object, name: str) -> str:
        """Return a text of the user or the system. Raise DataError if it is blank."""
        text = self.text(value, name)
        if not text.strip():
            raise self.fault(f"{name} is empty. Write a text, or remove the turn.")
        return text

    def optional(self, key: str) -> str:
        """Return a text field, or "" if it is missing or null."""
        value = self.record.get(key)
        return "" if value is None else self.text(value, f'"{key}"')

    def required(self, key: str) -> object:
        """Return a field. Raise DataError if it is missing or null."""
        value = self.record.get(key)
        if value is None:
            raise self.fault(f'no "{key}". It has {_keys(self.record)}: name the right dialect with data.format.')
        return value


def kind_of(value: object) -> str:
    """Return the type of a value in the words of JSON."""
    kinds = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    kinds |= {int: "a number", float: "a number"}
    return kinds.get(type(value), type(value).__name__)


def _keys(record: Record) -> str:
    names = [f'"{key}"' for key in list(record)[:8]]
    return ", ".join(names) + (", ..." if len(record) > 8 else "") if names else "no fields"


def literal(text: str) -> object:
    """Parse a list or an object written in JSON or as Python prints it, without evaluating it.

    Raise ValueError for anything else.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(text)
    except (SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError("neither JSON nor a Python literal") from error


def listed(value: object) -> list[object]:
    """Return as a list a field that holds a list, one thing, nothing, or (in tables) a list written as text."""
    if value is None or value == "" or value == []:
        return []
    if isinstance(value, str) and value.startswith("["):
        try:
            parsed = literal(value)
        except ValueError:
            return [value]
        return parsed if isinstance(parsed, list) else [value]
    return value if isinstance(value, list) else [value]


def row_pictures(row: Row) -> list[Picture]:
    """Return the pictures of the fields "image" and "images", with the sizes that the row declares.

    Raise DataError if both fields are given and differ, for anything but pictures, and for sizes that do not match.
    """
    single, several = listed(row.record.get("image")), listed(row.record.get("images"))
    if single and several and single != several:
        raise row.fault('"image" and "images" differ. Keep one of them.')
    values = single or several
    if not values:
        return []
    sizes = _sizes(row, len(values))
    pairs = enumerate(zip(values, sizes, strict=True), 1)
    return [picture(row, value, f"image {number}", size) for number, (value, size) in pairs]


def picture(row: Row, value: object, name: str, size: tuple[int, int] | None = None) -> Picture:
    """Return a Picture for a path, a data URL, base64 text, bytes, or an object with "bytes" or "path".

    Raise DataError for anything else.
    """
    if isinstance(value, dict):
        given = next((key for key in ("bytes", "path") if value.get(key)), None)
        if given is None:
            reason = f'{name} is an object with {_keys(value)}, which holds no picture in "bytes" or "path".'
            raise row.fault(f"{reason} Give one of them, or a path or a data URL in place of the object.")
        name, value = f'{name}, "{given}"', value[given]
    if isinstance(value, bytes) and value:
        return Picture("", content=value, size=size)
    if not isinstance(value, str) or not value.strip():
        kind = "empty" if isinstance(value, str | bytes) else kind_of(value)
        raise row.fault(f"{name} is {kind}. Give a path, a data URL or the encoded file.")
    if value.startswith("data:") or len(value) > _LONGEST_PATH:
        return Picture("", content=_decode(row, value, name), size=size)
    return Picture(row.text(value, name).removeprefix("file://"), size=size)


def _decode(row: Row, value: str, name: str) -> bytes:
    """Decode base64, or a URL such as 'data:image/png;base64,iVBOR...'."""
    if value.startswith("data:"):
        head, _, value = value.partition(",")
        if not head.endswith(";base64"):
            raise row.fault(f"{name}: a data URL must be written as data:image/png;base64,...")
    try:
        content = base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError) as error:
        raise row.fault(f"{name}: not base64: {error}. Encode the picture again, or give its path.") from error
    if not content:
        raise row.fault(f"{name}: the data URL is empty. Encode the picture again, or give its path.")
    return content


def _sizes(row: Row, num_pictures: int) -> Sequence[tuple[int, int] | None]:
    """Read InternVL's width/height (one picture) or width_list/height_list."""
    record = row.record
    widths, heights = listed(record.get("width_list")), listed(record.get("height_list"))
    if not widths and not heights and num_pictures == 1:
        widths, heights = listed(record.get("width")), listed(record.get("height"))
    if not widths and not heights:
        return [None] * num_pictures
    if len(widths) != num_pictures or len(heights) != num_pictures:
        counts = f"{len(widths)} widths and {len(heights)} heights for {num_pictures} images"
        raise row.fault(f"{counts}. Give one of each per image, or none at all.")
    return [(_length(row, width), _length(row, height)) for width, height in zip(widths, heights, strict=True)]


def _length(row: Row, value: object) -> int:
    if isinstance(value, float) and value.is_integer():  # tables with gaps store whole numbers as floats
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise row.fault(f"width or height is {value!r}. Write pixels as a whole number above 0, or leave both out.")
    return value


def place_pictures(row: Row, messages: list[Message], pictures: list[Picture]) -> list[Message]:
    """Replace the `<image>` marks of the user's turns by the row's pictures; marks in answers stay text.

    Raise DataError if their numbers differ: neither a picture nor a mark may be left over.
    """
    placed = []
    num_marks = 0
    for message in messages:
        text = message.parts[0] if message.role == "user" and len(message.parts) == 1 else ""
        if isinstance(text, str) and IMAGE_MARK in text:
            pieces = text.split(IMAGE_MARK)
            parts: list[Part] = [pieces[0]] if pieces[0] else []
            for piece in pieces[1:]:
                if num_marks < len(pictures):
                    parts.append(pictures[num_marks])
                if piece:
                    parts.append(piece)
                num_marks += 1
            message = Message("user", tuple(parts))
        placed.append(message)
    if num_marks != len(pictures):
        marks, images = "mark" if num_marks == 1 else "marks", "image" if len(pictures) == 1 else "images"
        remedy = f'Write one "{IMAGE_MARK}" per image into the user\'s turns.'
        if num_marks > len(pictures):
            remedy = 'Give each mark one path in "images".'
        raise row.fault(f'{num_marks} "{IMAGE_MARK}" {marks} but {len(pictures)} {images}. {remedy}')
    return placed


def single_turns(row: Row, system_key: str, question: object, answer: object, name: str) -> list[Message]:
    """Return the messages of a row with one question and its answer; "history" holds the pairs before them."""
    system = row.optional(system_key)
    messages = [Message("system", (system,))] if system.strip() else []
    for number, pair in enumerate(listed(row.record.get("history")), 1):
        if not isinstance(pair, list) or len(pair) != 2:
            raise row.fault(f'"history" {number} is not a pair [question, answer]. Write it so, or remove it.')
        messages += _pair(row, pair[0], pair[1], f'"history" {number}')
    return messages + _pair(row, question, answer, name)


def _pair(row: Row, question: object, answer: object, name: str) -> list[Message]:
    return [
        Message("user", (row.question(question, name),)),
        Message("assistant", (row.answer(answer, name),), supervised=True),
    ]


def check_order(row: Row, messages: Sequence[Message]) -> None:
    """Refuse turns out of order: the system may only speak first, then user and assistant alternate.

    The DataError gives the number of the turn, counted as in the record.
    """
    previous: Role | None = None
    for number, message in enumerate(messages, 1):
        role = message.role
        if role == "system" and number > 1:
            raise row.fault(f"turn {number}: the system may only speak first. Move its text to the first turn.")
        if role == previous:
            raise row.fault(f"turns {number - 1} and {number} are both from the {role}. Join them, or remove one.")
        previous = role


def conversation(messages: list[Message]) -> list[Message]:
    """Drop an empty system text and a greeting from the beginning of a conversation.

    A greeting is an assistant's turn before the first question. LLaVA, InternVL and XTuner drop it: it answers nothing.
    """
    system = messages[:1] if messages and messages[0].role == "system" else []
    turns = messages[len(system) :]
    if turns and turns[0].role == "assistant":
        turns = turns[1:]
    return system + turns if any(message.text.strip() for message in system) else turns


def check_answered(row: Row, messages: Sequence[Message]) -> None:
    """Refuse a conversation without an answer, with an unanswered last turn, or with nothing to train on."""
    answers = [message for message in messages if message.role == "assistant"]
    if not answers:
        raise row.fault("no answer: the assistant answers no question. Write one, or remove the row.")
    if messages[-1].role != "assistant":
        raise row.fault("the last turn has no answer. Write one, or remove the turn.")
    if not any(message.supervised for message in answers):
        raise row.fault('nothing to train on: every answer has "loss": false. Set one to true, or remove the row.')
