"""The fields of rows and turns: read, known to be harmless, or refused. Nothing is silently ignored."""

import re
from collections.abc import Mapping
from functools import cache
from importlib import resources
from itertools import chain
from typing import Any

import yaml

from vlm_tune.data.dialects.row import Record, Row

Fields = frozenset[str]


def check_fields(row: Row, dialect: str) -> None:
    """Refuse fields of a row that its dialect neither reads nor knows to be harmless.

    A field without a value (null, "", an empty list) is fine: in a table, each row has the columns of all.
    """
    _refuse(row, row.record, known_fields(dialect), f"in rows of {dialect}")


def check_turn(row: Row, turn: Mapping[str, object], number: int, known: Fields) -> None:
    """Refuse unknown fields of a turn, which is counted from 1."""
    if turn.keys() - known:  # almost never true: a cheap test, since there are many turns
        _refuse(row, turn, known, f"in turn {number}")


def check_part(row: Row, part: Mapping[str, object], name: str, known: Fields) -> None:
    """Refuse unknown fields of a part of a turn (`turn 1, part 2`)."""
    _refuse(row, part, known, f"in {name}")


def _refuse(row: Row, record: Record, known: Fields, place: str) -> None:
    unknown = [key for key in record if key not in known and _says(record[key])]
    if not unknown:
        return
    hints: dict[str, str] = _read()["hints"] | (_read()["turn_hints"] if row.record is not record else {})
    hinted = next((key for key in unknown if key in hints), None)
    if hinted is not None:
        raise row.fault(f'"{hinted}" is not read {place}. {hints[hinted]}.')
    names = " and ".join(f'"{key}"' for key in unknown)
    keys = ",".join(key if re.fullmatch(r"\w+", key) else f"'{key}'" for key in map(str, unknown))
    verb = "is" if len(unknown) == 1 else "are"
    raise row.fault(
        f"{names} {verb} not read {place}. Where the model need not know: data.ignore_fields=[{keys}]; "
        "else write it into the text, or name the right dialect with data.format."
    )


def without(value: Any, ignored: Fields) -> Any:
    """Remove the ignored fields from a record, its turns and their parts."""
    if isinstance(value, dict):
        return {key: without(each, ignored) for key, each in value.items() if key not in ignored}
    return [without(each, ignored) for each in value] if isinstance(value, list) else value


def _says(value: object) -> bool:
    return value is not None and not (isinstance(value, str | bytes | list | dict) and not value)


@cache
def known_fields(dialect: str) -> Fields:
    """Return the fields of rows that a dialect reads or may ignore."""
    table = _read()
    own = table["dialects"][dialect]
    pictures = () if dialect in table["text_only"] else table["pictures"]
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if dialect == "vqa" else ""  # its columns of choices
    return frozenset(chain(own["row"], own.get("harmless", ()), table["harmless"], pictures, letters))


@cache
def turn_fields(dialect: str) -> Fields:
    """Return the fields of turns that a dialect reads or may ignore."""
    table = _read()
    return frozenset(chain(table["dialects"][dialect]["turn"], table["turn_harmless"]))


@cache
def _read() -> dict[str, Any]:
    text = resources.files("vlm_tune.data.dialects").joinpath("fields.yaml").read_text(encoding="utf-8")
    table: dict[str, Any] = yaml.safe_load(text)
    return table
