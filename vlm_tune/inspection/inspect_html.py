"""What the model sees of one row, as one HTML page."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from vlm_tune.inspection import inspect_text
from vlm_tune.inspection.inspect_row import SUPERVISED, Seen, Token, runs_of
from vlm_tune.pages.boxes import clipped_boxes
from vlm_tune.pages.page import picture_url, write_page

MAX_SIDE = 1200  # pixels of a picture in the page
TILE_SIDE = 224  # pixels of a tile in the page, for high-density screens
MAX_TILES = 64  # of one row in the page
MAX_TOKENS = 3000  # lines of the table of all tokens; image tokens take one line per tile

Run = tuple[int, str, int, list[Token]]  # position of the first token, kind, tile (0 = none), tokens


def write_html(seen: Seen, path: Path) -> None:
    """Write the page of a row."""
    runs, worse = list(placed_runs(seen.tokens)), list(placed_runs(seen.rejected))
    lines = list(token_lines(runs))
    said = "".join(message.text for message in seen.sample.turns)
    size = seen.pictures[0].image.size if seen.pictures else (0, 0)
    drawn = [("expected", "", box) for box in clipped_boxes(said, size)]
    values = {"seen": seen, "runs": runs, "worse": worse, "lines": lines[:MAX_TOKENS], "num_lines": len(lines)}
    limits = {"boxes": drawn, "max_tiles": MAX_TILES, "url": small_url, "words": inspect_text}
    write_page(path, "inspect.html", heading=seen.sample.id, **values, **limits)


def small_url(picture: Image.Image | npt.NDArray[np.uint8]) -> str:
    """Return the URL of a picture of the row, or of a tile as it is cut (H, W, 3), smaller where it is large."""
    image = picture.copy() if isinstance(picture, Image.Image) else Image.fromarray(picture)
    side = MAX_SIDE if isinstance(picture, Image.Image) else TILE_SIDE
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return picture_url(image)


def placed_runs(tokens: list[Token]) -> Iterator[Run]:
    """Yield each run of tokens with the position where it begins."""
    position = 0
    for kind, tile, run in runs_of(tokens):
        yield position, kind, tile, run
        position += len(run)


def token_lines(runs: list[Run]) -> Iterator[tuple[str, str, str, str, str]]:
    """List all tokens: position, id, label, kind and text; the tokens of a tile are one line."""
    for first, kind, tile, run in runs:
        if tile:
            yield f"{first}–{first + len(run) - 1}", str(run[0].id), "–", kind, f"tile {tile}"
            continue
        for place, token in enumerate(run, first):
            label = str(token.id) if kind == SUPERVISED else "–"
            yield str(place), str(token.id), label, kind, repr(token.text)[1:-1]
