"""Keep a conversation as a row that training reads: OpenAI's messages, one JSON object in a new file."""

import json
from pathlib import Path

from vlm_tune.config.schema import Config
from vlm_tune.data.dialects.chat import read_openai
from vlm_tune.data.dialects.fields import check_fields
from vlm_tune.data.dialects.row import Row
from vlm_tune.data.pictures.images import ImageReader
from vlm_tune.data.sample import Message, Part, Picture
from vlm_tune.errors import DataError


def save_messages(messages: list[Message], name: str) -> Path:
    """Write a conversation to a new .jsonl file, pictures by their paths; return it.

    Pictures below the file's folder are named from there, so that data.path=FILE trains on the row as it is.
    """
    path = Path(name).expanduser().resolve()
    if not any(message.role == "assistant" for message in messages):
        raise DataError("nothing to save: ask something first")
    if any(message.role == "system" for message in messages[1:]):
        raise DataError("a conversation with calls of tools has no row of training. Save one of a chat without tools=")
    if path.suffix != ".jsonl" or not path.parent.is_dir():
        raise DataError(f"{name}: name a .jsonl file in a folder that is there")
    turns = [
        {"role": message.role, "content": [_described(part, path.parent) for part in message.parts]}
        if any(isinstance(part, Picture) for part in message.parts)
        else {"role": message.role, "content": message.text}
        for message in messages
    ]
    try:
        with path.open("x", encoding="utf-8") as file:  # never over a file that is there
            file.write(json.dumps({"id": path.stem, "messages": turns}, ensure_ascii=False) + "\n")
    except FileExistsError:
        raise DataError(f"{name}: the file is there already. Name a new one: nothing is overwritten") from None
    except OSError as error:
        raise DataError(f"{name}: cannot be written: {error.strerror}. Name another file") from error
    return path


def _described(part: Part, folder: Path) -> dict[str, object]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    path = Path(part.path)
    shown = path.relative_to(folder) if path.is_relative_to(folder) else path
    return {"type": "image_url", "image_url": {"url": shown.as_posix()}}


def load_messages(name: str, config: Config) -> list[Message]:
    """Read the first row of a file of OpenAI messages; raise DataError for no such row, and for missing pictures."""
    path = Path(name).expanduser().resolve()
    try:
        line = path.read_text(encoding="utf-8").partition("\n")[0]
        record = json.loads(line)
    except (OSError, ValueError) as error:
        raise DataError(f"{name}: no conversation can be read: {error}. Name a file that /save has written") from error
    if not isinstance(record, dict):
        raise DataError(f"{name}: no row of messages. Name a file that /save has written")
    row = Row(record, f"{path.name}:1", None, path.parent)
    check_fields(row, "openai")
    return [
        Message(each.role, tuple(_found(part, path.parent, config) for part in each.parts), each.supervised)
        for each in read_openai(row)
    ]


def _found(part: Part, folder: Path, config: Config) -> Part:
    """Return a picture with its whole path, after a look at it."""
    if isinstance(part, str) or part.content is not None:
        return part
    picture = Picture(str((folder / part.path).resolve()))
    ImageReader(config.data.image, Path(picture.path).parent).open_picture(picture)
    return picture
