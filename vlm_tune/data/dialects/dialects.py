"""Dialects of the rows: raw record -> Sample. A new one: a function, a line of DIALECTS, its fields in fields.yaml.

The function turns a `Row` into messages; it belongs in chat.py, table.py or text.py, by its kind. For data.format=auto
`recognise` needs a branch too. Everything around it (ids, order, faults) is here, and what readers share is in row.py.
Nothing is repaired: a row becomes a Sample that says what the row says, or a DataError.
"""

import difflib
import functools
import importlib.util
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import cast

from vlm_tune.config.hints import PICTURE_ENDINGS
from vlm_tune.config.own_function import require_given
from vlm_tune.data.dialects.boxes import place_names
from vlm_tune.data.dialects.cells import read_cells
from vlm_tune.data.dialects.chat import LLAVA_ROLES, read_llava, read_openai, read_sharegpt, read_swift, read_xtuner
from vlm_tune.data.dialects.fields import Fields, check_fields, without
from vlm_tune.data.dialects.pairs import halves, joined
from vlm_tune.data.dialects.row import IMAGE_MARK, VIDEO_MARK, Record, Row, check_answered, kind_of
from vlm_tune.data.dialects.table import CAPTION_FIELDS, IMAGE_FIELDS, read_caption, read_vqa
from vlm_tune.data.dialects.text import read_alpaca, read_msagent, read_oasst1, read_openorca, read_text
from vlm_tune.data.rows.rows import Rows
from vlm_tune.data.sample import Boxes, Message, Picture, Sample
from vlm_tune.errors import ConfigError, DataError

Reader = Callable[[Row], list[Message]]

DIALECTS: dict[str, Reader] = {
    "llava": read_llava,
    "sharegpt": read_sharegpt,
    "openai": read_openai,
    "xtuner": read_xtuner,
    "swift": read_swift,
    "alpaca": read_alpaca,
    "alpaca_zh": functools.partial(read_alpaca, ending="_zh"),
    "oasst1": read_oasst1,
    "openorca": read_openorca,
    "msagent": read_msagent,
    "text": read_text,
    "caption": read_caption,
    "vqa": read_vqa,
}

_CONVERSATIONS = ("llava", "sharegpt", "openai", "xtuner", "swift")
_MEDIA = ("image", "images", "video", "videos", "audio", "audios")
# <img>a.jpg</img>, as in older rows of Qwen-VL and ms-swift
_NAMED_MEDIA = re.compile(r"<(img|image|audio|video)>(\w+://[^<]*|data:[^<]*|[^<\n]*\.\w{2,5})</\1>")

# What a user's own function may raise, apart from exception classes of its own and requests to stop.
_USER_FAULTS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NameError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


def parse_record(
    record: object, fmt: str, where: str, index: int, image_root: Path = Path(), ignored: Fields = frozenset()
) -> Sample:
    """Turn one raw record into a Sample.

    `fmt` is a name of DIALECTS, `auto` (recognised from this record), or `file.py:function`, a user's own function that
    takes the record and returns a Sample, or a record of a known dialect. It runs that code, so the name may only come
    from the command line, never from a data set, a meta file or a checkpoint.

    `index` is the id of a record without one; relative video paths start at `image_root`. Fields in `ignored`
    (data.ignore_fields) are treated as missing.

    Raise DataError for any fault of the record, and ConfigError for an unknown dialect.
    """
    if not isinstance(record, dict):
        raise DataError(f"a row must be an object, not {kind_of(record)}. Write {{...}}.", where)
    if ":" in fmt:
        return _parse_by_user(record, fmt, where, index, (image_root, ignored))
    own_id = _sample_id(record, where)
    record = read_cells(record, where, own_id)
    if ignored:  # after read_cells: a table may hold its turns as text
        record = {key: without(value, ignored) for key, value in record.items() if key not in ignored}
        own_id = _sample_id(record, where)
    if (pair := halves(Row(record, where, own_id, image_root))) is not None:
        chosen = parse_record(pair[0], fmt, where, index, image_root)
        try:
            rejected = parse_record(pair[1], fmt, where, index, image_root)
        except DataError as error:
            raise DataError(f"rejected: {error.reason}", where, own_id) from error
        return joined(Row(record, where, own_id, image_root), chosen, rejected)
    name = recognise(record, where) if fmt == "auto" else fmt
    reader = DIALECTS.get(name)
    if reader is None:
        raise unknown_dialect(name)
    row = Row(record, where, own_id, image_root)
    messages = reader(row)
    check_fields(row, name)  # after the reader: for a row of another dialect, what it lacks is the better message
    boxes: tuple[Boxes, ...] = ()
    if name in _CONVERSATIONS:
        _check_picture_fields(row, messages)
        messages, boxes = place_names(row, messages)
    _check_named_media(row, messages)
    check_answered(row, messages)
    sample_id = row.sample_id if row.sample_id is not None else str(index)
    return Sample(sample_id, tuple(messages), where, is_plain=name == "text", boxes=boxes)


def _check_picture_fields(row: Row, messages: list[Message]) -> None:
    """Refuse a conversation without pictures if its row names one in a field that only tables use."""
    if any(isinstance(part, Picture) for message in messages for part in message.parts):
        return
    for key in IMAGE_FIELDS:
        value = row.record.get(key)
        if isinstance(value, str) and value.lower().endswith(PICTURE_ENDINGS):
            raise row.fault(f'"{key}" is not read here. Name pictures in "image" or "images", with "<image>" marks.')


def _check_named_media(row: Row, messages: list[Message]) -> None:
    """Refuse files named in the text of a question: the model would be trained on the name and never see the file."""
    for message in messages:
        if message.role == "user" and (match := _NAMED_MEDIA.search(message.text)):
            remedy = 'Name pictures in "images", and write "<image>" in their places.'
            raise row.fault(f"the text names a file in {match[0]:.80}. {remedy}")


def _sample_id(record: Record, where: str) -> str | None:
    """Return the record's id, under any of the names that data sets use, or None."""
    for key in ("id", "question_id", "qid"):
        value = record.get(key)
        if value is None or value == "":
            continue
        if isinstance(value, str) and value.isprintable():
            return value
        if isinstance(value, int | float) and not isinstance(value, bool) and value == value // 1:
            return str(int(value))  # a table with gaps stores whole numbers as floats
        raise DataError(f'"{key}" is {value!r:.80}. Write an id as one line of text or a whole number.', where)
    return None


def recognise(record: Record, where: str = "") -> str:
    """Return the dialect that a record is written in, used on the first row with data.format=auto.

    Raise DataError for a record that matches none.
    """
    is_text = isinstance(record.get("conversations"), str)
    record = read_cells(record, where)
    record, _ = halves(Row(record, where, None, Path())) or (record, None)  # a pair is what its chosen half is
    keys = record.keys()
    has_picture = any(record.get(key) for key in (*_MEDIA, *IMAGE_FIELDS))
    if "messages" in keys:
        return "sharegpt" if has_picture and _has_marks(record["messages"]) else "openai"
    if "conversations" in keys:
        turns = str(record["conversations"])
        # MSAgent writes the list as text and includes its tools; tables write any other conversation as text, too
        if "<|startofthink|>" in turns or (is_text and ('"description"' in turns or turns == "[]")):
            return "msagent"
        is_llava = has_picture and not record.get("system") and _is_llava(record["conversations"])
        return "llava" if is_llava else "sharegpt"
    if "conversation" in keys or isinstance(record.get("input"), dict):
        return "xtuner"
    if "query" in keys and "response" in keys:
        return "swift"
    if "question" in keys and "answer" in keys:
        return "vqa"
    if has_picture and any(key in keys for key in CAPTION_FIELDS):
        return "caption"
    by_keys = {
        "alpaca_zh": ("instruction_zh", "output_zh"),
        "alpaca": ("instruction", "output"),
        "openorca": ("question", "response"),
        "xtuner": ("input", "output"),
        "text": ("text",),
    }
    for name, needed in by_keys.items():
        if all(key in keys for key in needed):
            return "oasst1" if name == "text" and "### Human:" in str(record["text"]) else name
    shown = ", ".join(f'"{key}"' for key in list(keys)[:8]) or "no fields"
    reason = f"no known dialect has the fields {shown}. Known: {', '.join(DIALECTS)}"
    raise DataError(f"{reason}. Name one with data.format=NAME, or your own with data.format=file.py:function.", where)


def recognise_rows(rows: Rows, ignored: Fields = frozenset(), num_tried: int = 100) -> str:
    """Return the dialect of the first row that is readable and matches one, so that a faulty first row does no harm.

    If none of the first `num_tried` rows does, raise the DataError of the first one.
    """
    first: DataError | None = None
    for number in range(min(num_tried, len(rows))):
        try:
            return recognise(without(rows[number], ignored), rows.where(number))
        except DataError as error:
            first = first or error
    assert first is not None, "open_rows refuses what holds no rows"
    raise first


def _has_marks(messages: object) -> bool:
    turns = messages if isinstance(messages, list) else []
    texts = [str(turn.get("content", turn.get("value"))) for turn in turns if isinstance(turn, dict)]
    return any(mark in text for text in texts for mark in (IMAGE_MARK, VIDEO_MARK))


def _is_llava(turns: object) -> bool:
    return isinstance(turns, list) and all(
        isinstance(turn, dict) and str(turn.get("from")) in LLAVA_ROLES for turn in turns
    )


def unknown_dialect(name: str) -> ConfigError:
    """Return the error for an unknown data.format, with the nearest name."""
    near = difflib.get_close_matches(name, DIALECTS, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return ConfigError(f"data.format={name} is unknown: {hint}Known: auto, {', '.join(DIALECTS)}, or file.py:function.")


def require_format(name: str) -> None:
    """Raise ConfigError if data.format is no dialect, or names a function whose file does not exist."""
    path, sign, _ = name.rpartition(":")
    if sign:
        require_given(name)
        if not Path(path).is_file():
            raise no_file(name)
    elif name not in ("auto", *DIALECTS):
        raise unknown_dialect(name)


def no_file(name: str) -> ConfigError:
    """Return the error for a `file.py:function` whose file does not exist."""
    path = name.rpartition(":")[0]
    return ConfigError(f"data.format={name}: {path} is not a Python file that is there. Write file.py:function.")


@functools.cache
def user_function(name: str) -> Callable[[Record], object]:
    """Load `file.py:function` by path. Raise ConfigError if the file or function is missing or does not load."""
    require_given(name)
    path, _, function = name.rpartition(":")
    spec = importlib.util.spec_from_file_location(f"vlm_tune_user_{Path(path).stem}", path)
    if spec is None or spec.loader is None or not Path(path).is_file():
        raise no_file(name)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (*_USER_FAULTS, SyntaxError, ImportError) as error:
        raise ConfigError(f"data.format={name}: {path} does not load: {type(error).__name__}: {error}") from error
    found = getattr(module, function, None)
    if not callable(found):
        raise ConfigError(f"data.format={name}: {path} has no function {function}.")
    return cast(Callable[[Record], object], found)


def _parse_by_user(record: Record, fmt: str, where: str, index: int, settings: tuple[Path, Fields]) -> Sample:
    own_id = _sample_id(record, where)
    try:
        result = user_function(fmt)(record)
    except DataError as error:
        raise DataError(error.reason, where, own_id) from error
    except _USER_FAULTS as error:
        reason = f"{fmt} failed: {type(error).__name__}: {error}. Mend the function or the row."
        raise DataError(reason, where, own_id) from error
    if isinstance(result, Sample):
        check_answered(Row(record, where, own_id, settings[0]), result.messages)
        return replace(result, id=result.id or str(index), where=where)
    if isinstance(result, dict):
        return parse_record(result, "auto", where, index, *settings)
    raise DataError(f"{fmt} returned {kind_of(result)}, not a Sample or a record. Mend the function.", where, own_id)
