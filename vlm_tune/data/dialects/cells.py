"""Fields that a table holds as text: parsed where a dialect wants a list or an object.

The name of the field decides, never the look of the text: an answer may be JSON, and stays text.
"""

from vlm_tune.data.dialects.row import Record, literal
from vlm_tune.errors import DataError

_LISTS = ("conversations", "messages", "conversation", "history", "rejected_messages")  # text is never right here
_MEDIA = ("image", "images", "video", "videos", "objects")  # the name of a file may begin with a bracket


def read_cells(record: Record, where: str, sample_id: str | None = None) -> Record:
    """Parse the lists and objects that a record holds as text, in JSON or as Python prints them.

    Turns stored as an object of lists (datasets' older Sequence) become a list of objects.
    Raise DataError for turns given as text that is not a list.
    """
    changed: dict[str, object] = {}
    for name in _LISTS:
        value = record.get(name)
        if isinstance(value, str) and value.strip():
            value = changed[name] = _parsed(name, value, where, sample_id)
        if isinstance(value, dict):
            changed[name] = _turns(value)
    for name in _MEDIA:
        value = record.get(name)
        if isinstance(value, str) and value.startswith(("[", "{")):
            try:
                changed[name] = literal(value)
            except ValueError:
                continue  # a path
    return {**record, **changed} if changed else record


def _parsed(name: str, text: str, where: str, sample_id: str | None) -> object:
    try:
        return literal(text)
    except ValueError as error:
        reason = f'"{name}" is text, not a list of turns. It is neither JSON nor a Python list, and begins with'
        remedy = "Write the list by json.dumps, or the rows as .jsonl."
        raise DataError(f"{reason} {text[:60]!r}. {remedy}", where, sample_id) from error


def _turns(columns: dict[str, object]) -> object:
    """Turn {"from": [a, b], "value": [c, d]} into [{"from": a, "value": c}, ...]; leave any other object as it is."""
    lists = [values for values in columns.values() if isinstance(values, list)]
    if not lists or len(lists) < len(columns) or len({len(values) for values in lists}) > 1:
        return columns
    return [dict(zip(columns, values, strict=True)) for values in zip(*lists, strict=True)]
