"""What the columns of a table mean beyond what they store: JSON, class names, and media that are not supported.

Arrow itself marks JSON (parquet's logical type, and the `Json()` of datasets); the rest follows from the features that
datasets stores with the schema. A cell becomes what datasets itself would return, or an error naming its feature.
"""

import json
from collections.abc import Callable, Mapping
from functools import partial

import pyarrow as pa

Decode = Callable[[object], object]

# Features of datasets 5.2 whose content a model would have to see or hear.
_UNREAD = ("Audio", "Pdf", "Nifti", "Mesh", "BioSequence", "BioStructure")

_TURNS = {"messages": "content", "conversations": "value"}  # columns of turns, and the field of their text


def cell_decoders(schema: pa.Schema) -> dict[str, Decode]:
    """Return a decoder for each column whose cells mean something other than they store.

    A decoder raises ValueError, saying what is wrong and what to do, for a cell that cannot be read.
    """
    features = _features(schema)
    found = {column.name: _decoder(column.type, features.get(column.name)) for column in schema}
    for name in _TURNS:
        if name in features and found.get(name) is None:
            found[name] = partial(_refuse_quoted, _TURNS[name])
    return {name: decode for name, decode in found.items() if decode is not None}


def _features(schema: pa.Schema) -> Mapping[str, object]:
    """Read the features that datasets keeps in a schema's metadata; empty if it did not write the table."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}
    return features if isinstance(features, dict) else {}


def _decoder(stored: pa.DataType, feature: object) -> Decode | None:
    """Return the decoder for cells of this type and feature, or None if they need none."""
    kind = _kind(feature)
    if kind == "Json" or isinstance(stored, pa.JsonType):
        return _read_json
    if kind == "ClassLabel" and isinstance(feature, dict) and pa.types.is_integer(stored):
        return partial(_class_name, feature.get("names") or [])
    if kind == "Video":
        return _video_path
    if kind in _UNREAD:
        return partial(_refuse, kind)
    if pa.types.is_struct(stored):
        return _struct_decoder(stored, feature)
    if isinstance(stored, pa.ListType | pa.LargeListType | pa.FixedSizeListType | pa.ListViewType):
        inner = feature[0] if isinstance(feature, list) and feature else None
        if isinstance(feature, dict):
            inner = feature.get("feature")
        each = _decoder(stored.value_type, inner)
        return None if each is None else partial(_read_list, each)
    return None


def _kind(feature: object) -> str:
    """Return the class name of a feature; "" for a plain group of fields, one of which may be called "_type"."""
    kind = feature.get("_type") if isinstance(feature, dict) else None
    return kind if isinstance(kind, str) else ""


def _struct_decoder(stored: pa.StructType, feature: object) -> Decode | None:
    fields = feature if isinstance(feature, dict) else {}
    if _kind(feature) in ("Sequence", "List"):  # Sequence({...}) of datasets before 4 is stored as an object of lists
        inner = fields.get("feature")
        each = inner if isinstance(inner, dict) else {}
        fields = {name: {"_type": "List", "feature": kind} for name, kind in each.items()}
    found = {field.name: _decoder(field.type, fields.get(field.name)) for field in stored}
    changing = {name: decode for name, decode in found.items() if decode is not None}
    return partial(_read_struct, changing) if changing else None


def _read_list(each: Decode, cell: object) -> object:
    return [each(value) for value in cell] if isinstance(cell, list) else cell


def _read_struct(changing: dict[str, Decode], cell: object) -> object:
    if not isinstance(cell, dict):
        return cell
    return cell | {name: decode(cell[name]) for name, decode in changing.items()}


def _read_json(cell: object) -> object:
    if not isinstance(cell, str):
        return cell
    try:
        return json.loads(cell)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is a column of JSON, but this is not JSON: {cell!r:.60}. Write the row again") from error


def _class_name(names: list[str], cell: object) -> object:
    if not isinstance(cell, int) or cell == -1:  # datasets writes -1 for a missing label
        return None
    if not 0 <= cell < len(names):
        raise ValueError(f"is class {cell}, but its ClassLabel() has {len(names)} names. Write the names as text")
    return names[cell]


def _video_path(cell: object) -> object:
    """Return the path of a video; one stored inside the table cannot be opened."""
    if not isinstance(cell, dict):
        return cell
    if cell.get("bytes") is not None or not cell.get("path"):
        raise ValueError("holds the video itself, as Video() of datasets. Save it as a file and give its path as text")
    return cell["path"]


def _refuse(kind: str, cell: object) -> object:
    if cell is not None:
        raise ValueError(f"is {kind}() of datasets, which is not read. Remove the column if the row needs none of it")
    return None


def _refuse_quoted(field: str, cell: object) -> object:
    """Refuse turns whose text is JSON throughout.

    If the first 10 MB of a .jsonl hold only text and a later block also holds a list, datasets (5.2) keeps the type of
    the column and writes every value of that block as JSON text: '"A cat."' with its quotes, and the list as text.
    """
    turns = cell if isinstance(cell, list) else []
    texts = [text for turn in turns if isinstance(turn, dict) and (text := turn.get(field)) is not None]
    if texts and all(isinstance(text, str) and _is_quoted(text) for text in texts):
        reason = f'holds JSON text in every "{field}": {texts[0]!r:.60}. datasets does that if the types of the values'
        raise ValueError(f"{reason} differ within a file. Name the .jsonl itself, or make the table again with Json()")
    return cell


def _is_quoted(text: str) -> bool:
    """Whether a text is the JSON of a string or of a list of parts."""
    if not text.startswith(('"', "[{")):
        return False
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, str) or all(isinstance(part, dict) and "type" in part for part in value)
