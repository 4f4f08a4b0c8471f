"""Boxes of a row become text, as InternVL writes them: `<ref>name</ref>`, `<box>[[x1, y1, x2, y2]]</box>`.

The numbers are thousandths of the picture's width and height, not of a tile's, whatever becomes of the picture later. A
row gives them in "objects", as ms-swift does, with marks in the turns where they belong. Source of marks and rounding:
ms-swift, swift/llm/template (`<ref-object>`, `<bbox>`; norm1000).
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from vlm_tune.data.dialects.fields import check_part
from vlm_tune.data.dialects.row import Row, kind_of, listed, literal
from vlm_tune.data.sample import Boxes, Message, Picture, Sample
from vlm_tune.errors import DataError
from vlm_tune.words import counted

NAME_MARK, BOX_MARK = "<ref-object>", "<bbox>"
SCALES = {"real": None, "norm1": 1.0, "norm_1": 1.0, "norm1000": 1000.0, "norm_1000": 1000.0}
_TOGETHER = frozenset(("ref", "bbox", "bbox_type", "image_id"))
_APART = frozenset(("caption", "bbox", "bbox_type", "image"))

Corners = tuple[float, float, float, float]


def place_names(row: Row, messages: list[Message]) -> tuple[list[Message], tuple[Boxes, ...]]:
    """Write the names of a row's objects in their places; return its boxes, which wait for the sizes of the pictures.

    Raise DataError where names, boxes and marks do not match.
    """
    names, boxes = _read(row)
    pictures = [part for message in messages for part in message.parts if isinstance(part, Picture)]
    if not (names or boxes or pictures):
        return messages, ()  # a text may speak of such marks
    for mark, key, given in ((NAME_MARK, "ref", names), (BOX_MARK, "bbox", boxes)):
        found = sum(message.written.count(mark) for message in messages)
        if found != len(given):
            reason = f'the turns hold {counted(found, "mark")} "{mark}", but "{key}" of "objects" lists {len(given)}'
            raise row.fault(f"{reason}. Write one mark where each belongs.")
    for each in boxes:
        if not 0 <= each.picture < len(pictures):
            reason = f'"objects" names image {each.picture}, counted from 0, of {len(pictures)}'
            raise row.fault(f'{reason}. Mend "image_id".')
    return _fill(messages, NAME_MARK, [f"<ref>{name}</ref>" for name in names]) if names else messages, boxes


def _fill(messages: Iterable[Message], mark: str, texts: list[str]) -> list[Message]:
    """Replace the marks of all turns by texts, in their order; an answer's reasoning stands before it."""
    waiting = iter(texts)

    def fill(text: str) -> str:
        return re.sub(mark, lambda _: next(waiting), text)

    filled = []
    for message in messages:
        reasoning = fill(message.reasoning)
        parts = tuple(fill(part) if isinstance(part, str) else part for part in message.parts)
        filled.append(replace(message, reasoning=reasoning, parts=parts))
    return filled


def _read(row: Row) -> tuple[list[str], tuple[Boxes, ...]]:
    """Read "objects": lists of names and boxes side by side, or (older) one object after the other."""
    objects = row.record.get("objects")
    if isinstance(objects, str) and objects:
        try:
            objects = literal(objects)
        except ValueError:
            raise row.fault('"objects" is text, and neither JSON nor a Python literal. Write an object.') from None
    if not objects:
        return [], ()
    if isinstance(objects, Mapping):
        check_part(row, objects, '"objects"', _TOGETHER)
        names, corners = listed(objects.get("ref")), listed(objects.get("bbox"))
        pictures = listed(objects.get("image_id"))
        pictures += [0] * (len(corners) - len(pictures))  # as ms-swift: the first picture
        kinds = [objects.get("bbox_type")] * len(corners)
    elif isinstance(objects, list) and all(isinstance(each, Mapping) for each in objects):
        for number, each in enumerate(objects, 1):
            check_part(row, each, f'"objects" {number}', _APART)
        names = [each["caption"] for each in objects if each.get("caption") is not None]
        corners = [each["bbox"] for each in objects if each.get("bbox") is not None]
        pictures = [each.get("image") or 0 for each in objects if each.get("bbox") is not None]
        kinds = [each.get("bbox_type") for each in objects if each.get("bbox") is not None]
    else:
        raise row.fault(f'"objects" is {kind_of(objects)}, not an object. Write {{"ref": [...], "bbox": [...]}}.')
    if len(pictures) != len(corners):
        raise row.fault(f'"image_id" holds {len(pictures)} numbers for {len(corners)} boxes. Write one for each.')
    texts = [_name(row, name, number) for number, name in enumerate(names, 1)]
    together = zip(corners, kinds, pictures, strict=True)
    return texts, tuple(_boxes(row, *each, number) for number, each in enumerate(together, 1))


def _name(row: Row, value: object, number: int) -> str:
    name = row.question(value, f'"objects", name {number}')
    if NAME_MARK in name or BOX_MARK in name:
        raise row.fault(f'"objects", name {number} holds a mark itself: {name!r:.80}. Write the name alone.')
    return name


def _boxes(row: Row, value: object, kind: object, picture: object, number: int) -> Boxes:
    """Read one box, or several that one mark stands for."""
    kind = kind or "real"
    if kind not in SCALES:
        raise row.fault(f'"bbox_type" is {kind!r:.40}. Known: {", ".join(SCALES)}.')
    if not isinstance(picture, int) or isinstance(picture, bool):
        raise row.fault(f"box {number} is of image {picture!r:.40}. Write its number, counted from 0.")
    is_list = isinstance(value, list) and bool(value) and all(isinstance(each, list) for each in value)
    several: Sequence[object] = value if is_list else [value]  # type: ignore[assignment]
    return Boxes(tuple(_corners(row, each, number) for each in several), SCALES[str(kind)], picture)


def _corners(row: Row, value: object, number: int) -> Corners:
    numbers = [float(each) for each in value if _is_number(each)] if isinstance(value, list) else []
    if not isinstance(value, list) or len(value) != 4 or len(numbers) != 4:
        raise row.fault(f"box {number} is {value!r:.60}. Write four numbers, [x1, y1, x2, y2].")
    x1, y1, x2, y2 = numbers
    if x1 >= x2 or y1 >= y2:
        raise row.fault(f"box {number} is {value!r:.60}: not from its upper left to its lower right corner. Mend it.")
    return x1, y1, x2, y2


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def write_boxes(sample: Sample, measure: Callable[[Picture], tuple[int, int]]) -> Sample:
    """Write the boxes that wait into their places, in thousandths of their pictures.

    `measure` returns the (width, height) of a picture in pixels. Raise DataError for a box that leaves its picture.
    """
    if not sample.boxes:
        return sample
    pictures, sizes = sample.pictures, {}
    texts = []
    for number, boxes in enumerate(sample.boxes, 1):
        if boxes.scale is None and boxes.picture not in sizes:
            sizes[boxes.picture] = measure(pictures[boxes.picture])
        width, height = sizes[boxes.picture] if boxes.scale is None else (boxes.scale, boxes.scale)
        for x1, y1, x2, y2 in boxes.corners:
            if x1 < 0 or y1 < 0 or x2 > width or y2 > height:
                reason = f"box {number} is [{x1:g}, {y1:g}, {x2:g}, {y2:g}], in a picture of {width:g} x {height:g}"
                raise DataError(f'{reason}. Mend it, or its "bbox_type".', sample.where, sample.id)
        sides = (width, height, width, height)
        thousandths = [[int(edge / side * 1000) for edge, side in zip(box, sides)] for box in boxes.corners]  # noqa: B905
        texts.append(f"<box>{thousandths}</box>")
    return replace(sample, messages=tuple(_fill(sample.messages, BOX_MARK, texts)), boxes=())
