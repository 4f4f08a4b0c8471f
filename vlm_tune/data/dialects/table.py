"""Dialects of tables: image-caption pairs, and questions with choices about one or several images (FoodieQA)."""

from itertools import takewhile

from vlm_tune.data.dialects.row import IMAGE_MARK, Row, kind_of, listed, picture, place_pictures, row_pictures
from vlm_tune.data.sample import Message, Part, Picture

IMAGE_FIELDS = ("image_path", "file_name", "filepath")  # beside image and images
CAPTION_FIELDS = ("caption", "text")
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_CHOOSE = "Answer with the option's letter from the given choices directly."


def read_caption(row: Row) -> list[Message]:
    """Read an image and its caption: the user shows the image and says nothing, as in LLaVA's pretraining."""
    pictures = _pictures(row)
    if len(pictures) != 1:
        raise row.fault(
            f"a caption needs 1 image, the row has {len(pictures)}. Fill one of image, image_path, file_name."
        )
    name = next((name for name in CAPTION_FIELDS if row.record.get(name) is not None), CAPTION_FIELDS[0])
    caption = row.answer(row.required(name), f'"{name}"')
    return [Message("user", (pictures[0],)), Message("assistant", (caption,), supervised=True)]


def _pictures(row: Row) -> list[Picture]:
    found = row_pictures(row)
    others = [row.record[name] for name in IMAGE_FIELDS if row.record.get(name)]
    meta = row.record.get("food_meta")
    if isinstance(meta, dict) and meta.get("food_file"):
        others.append(meta["food_file"])  # FoodieQA's questions about one image
    return found or [picture(row, value, f"image {number}") for number, value in enumerate(others, 1)]


def read_vqa(row: Row) -> list[Message]:
    """Read a question about images: question, answer, optional choices, image or images.

    With choices, the answer is an index from 0, a letter, or the text of a choice, and the model learns the letter.
    FoodieQA's questions about four images have no written choices: the images themselves are A, B, C, D
    (choices: "images", or FoodieQA's own fields).
    """
    pictures = _pictures(row)
    question = row.question(row.required("question"), '"question"')
    value = row.required("answer")
    answer = str(value) if kind_of(value) == "a number" else row.answer(value, '"answer"')
    if hint := row.optional("hint").strip():  # MMBench: what the question needs beside the picture
        question = f"{hint}\n{question}"
    choices = _choices(row)
    if not choices and _chooses_image(row, pictures):
        letters = _LETTERS[: len(pictures)]
        parts: list[Part] = []
        for letter, shown in zip(letters, pictures, strict=True):
            parts += [f"{letter}. ", shown, "\n"]
        answer = _letter(row, answer, list(letters))
        parts.append(f"{question}\n{_CHOOSE}")
    else:
        options = "".join(f"\n{letter}. {choice}" for letter, choice in zip(_LETTERS, choices, strict=False))
        if choices:
            answer = _letter(row, answer, choices)
        text = question + options + (f"\n{_CHOOSE}" if choices else "")
        if IMAGE_MARK in question:  # which says where the pictures are
            return place_pictures(row, [Message("user", (text,)), Message("assistant", (answer,), True)], pictures)
        parts = [*_shown(pictures), text]
    return [Message("user", tuple(parts)), Message("assistant", (answer,), supervised=True)]


def _shown(pictures: list[Picture]) -> list[Part]:
    """Return '<picture>\\n' for one picture, 'Image-1: <picture>\\n...' for several, as InternVL writes them."""
    parts: list[Part] = []
    for number, shown in enumerate(pictures, 1):
        parts += [f"Image-{number}: "] if len(pictures) > 1 else []
        parts += [shown, "\n"]
    return parts


def _choices(row: Row) -> list[str]:
    """Read the field "choices" (a list, or a list written as text), or MMBench's columns A, B, C, D, ..."""
    value = row.record.get("choices")
    if value == "images":
        return []
    values = listed(value) or _columns(row)
    if len(values) == 1 or len(values) > len(_LETTERS):
        raise row.fault(f"{len(values)} choices. Give 2 to {len(_LETTERS)} as a list, or none for an open question.")
    for number, choice in enumerate(values, 1):
        if not isinstance(choice, str) and kind_of(choice) != "a number":
            raise row.fault(f"choice {number} is {kind_of(choice)}, not text. Write it in quotes.")
    return [row.question(str(choice), f"choice {number}").strip() for number, choice in enumerate(values, 1)]


def _columns(row: Row) -> list[object]:
    """Read the columns A, B, C, ...; the last ones may be empty."""
    letters = list(takewhile(lambda letter: letter in row.record, _LETTERS))
    while letters and row.record[letters[-1]] in (None, ""):
        letters.pop()
    empty = next((letter for letter in letters if row.record[letter] in (None, "")), None)
    if empty is not None:  # the letters after it would shift
        raise row.fault(f'column "{empty}" is empty, but "{letters[-1]}" is not. Fill it, or move the others up.')
    return [row.record[letter] for letter in letters]


def _chooses_image(row: Row, pictures: list[Picture]) -> bool:
    """Whether the images are the choices: the row says so, or it is FoodieQA's, which leaves "choices" empty."""
    is_foodie = "question_type" in row.record and "question_id" in row.record
    return row.record.get("choices") == "images" or (is_foodie and len(pictures) > 1)


def _letter(row: Row, answer: str, choices: list[str]) -> str:
    """Return the letter of the right choice. Raise DataError if the answer matches no choice, or several."""
    answer = answer.strip()
    whole = answer.removesuffix(".0")  # tables with gaps store whole numbers as floats
    found = {number for number, choice in enumerate(choices) if choice in (answer, whole)}
    found |= {number for number in range(len(choices)) if whole == str(number)}
    if len(answer) == 1 and answer in _LETTERS[: len(choices)]:
        found.add(_LETTERS.index(answer))
    if len(found) != 1:
        how = "fits no choice" if not found else "fits more than one choice"
        raise row.fault(f'the answer "{answer}" {how}. Write the letter, the index from 0, or the text of one choice.')
    return _LETTERS[found.pop()]
