"""Draw the boxes that a text names over their picture: clipped to it, whatever numbers a model wrote."""

from PIL import Image, ImageDraw, ImageFont

from vlm_tune.evaluation.metrics import Box, boxes_in

MAX_BOXES = 20  # of one text: a model that repeats itself writes hundreds
INK, HALO = "#ffd60a", "#16150f"


def clipped_boxes(text: str, size: tuple[int, int]) -> list[Box]:
    """List the boxes of a text with a `<box>` as [left, top, right, bottom] in pixels of a picture of (width, height).

    What leaves the picture is cut off, and a box of which nothing is left is not drawn.
    """
    boxes = boxes_in(text)[:MAX_BOXES] if "<box>" in text else []
    sides = (*size, *size)
    inside = [
        tuple(min(max(edge, 0.0), 1000.0) * side / 1000 for edge, side in zip(box, sides, strict=True)) for box in boxes
    ]
    return [(x1, y1, x2, y2) for x1, y1, x2, y2 in inside if x1 < x2 and y1 < y2]


def with_boxes(picture: Image.Image, text: str) -> Image.Image | None:
    """Return a copy of a picture with a text's boxes on it, numbered if there are several; None where it names none."""
    boxes = clipped_boxes(text, picture.size)
    if not boxes:
        return None
    drawn = picture.convert("RGB")
    pen, line = ImageDraw.Draw(drawn), max(2, min(picture.size) // 150)
    font = ImageFont.load_default(8 * line)
    for number, box in enumerate(boxes, 1):
        for ink, width in ((HALO, 2 * line), (INK, line)):
            pen.rectangle(box, outline=ink, width=width)
        if len(boxes) > 1:
            place = (box[0] + 3 * line, box[1] + 2 * line)
            pen.text(place, str(number), INK, font, stroke_width=line, stroke_fill=HALO)
    return drawn
