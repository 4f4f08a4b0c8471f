"""What `check` reports on transparency: how many headers announce it, and how many pictures of a sample have it.

Whether any pixel is transparent shows only when a picture is decoded, which `check` does for nothing else. So a few
pictures are decoded, from chunks of rows spread evenly over the file; the choice does not depend on data.workers.
"""

from collections import Counter
from typing import Any

from vlm_tune.data.pictures.images import ImageReader
from vlm_tune.data.sample import Picture
from vlm_tune.errors import DataError
from vlm_tune.words import counted

CHUNKS, PER_CHUNK = 64, 8  # at most 512 pictures are decoded


class AlphaCount:
    """Counts the pictures in the chunks of one file; a picture's header is read once per process."""

    def __init__(self, reader: ImageReader, num_chunks: int) -> None:
        self._reader = reader
        self._stride = -(-num_chunks // CHUNKS) or 1
        self._known: dict[Picture, bool] = {}
        self._decoded: dict[Picture, bool] = {}  # of one chunk
        self._may_decode = 0

    def begin(self, chunk: int) -> None:
        """Start with the next chunk."""
        self._decoded = {}
        self._may_decode = 0 if chunk % self._stride else PER_CHUNK

    def look(self, picture: Picture, counts: Counter[str]) -> None:
        """Add a picture that is in order to the counts `alpha`, `decoded` and `transparent`."""
        if picture.frame is not None or not self._has_alpha(picture):
            return
        counts["alpha"] += 1
        if picture in self._decoded or len(self._decoded) >= self._may_decode:
            return
        try:
            shows = self._reader.shows_through(picture)
        except DataError:  # damage between header and end is found by training, not by `check`
            return
        self._decoded[picture] = shows
        counts.update(decoded=1, transparent=int(shows))

    def _has_alpha(self, picture: Picture) -> bool:
        if picture.content is not None:
            return self._reader.has_alpha(picture)
        if picture not in self._known:
            if len(self._known) >= 1 << 16:
                self._known.clear()
            self._known[picture] = self._reader.has_alpha(picture)
        return self._known[picture]


def alpha_fact(counts: dict[str, Any], alpha: str) -> str:
    """Describe what was counted, and what to set."""
    have = f"{counted(counts['alpha'], 'picture')} {'has' if counts['alpha'] == 1 else 'have'} an alpha channel"
    told = f"{have}; of {counts['decoded']:,} of them that were decoded, "
    if not counts["transparent"]:
        return f"{told}none is transparent"
    are = "is" if counts["transparent"] == 1 else "are"
    told += f"{counts['transparent']:,} {are} transparent. data.image.alpha={alpha} "
    if alpha != "drop":
        return f"{told}is laid below them"
    return f"{told}trains the colours that nobody sees: set white or black, whichever they are shown on"
