"""What `check` reports on pictures whose look a setting decides: those turned by their EXIF data, and transparent ones.

Headers tell which pictures are turned, and which can be transparent. Whether any pixel is shows only when a picture is
decoded, which `check` does for nothing else. So a few are decoded, from chunks of rows spread evenly over the file; the
choice does not depend on data.workers.
"""

from collections import Counter
from typing import Any

from vlm_tune.data.pictures.images import ImageReader, Look
from vlm_tune.data.sample import Picture
from vlm_tune.errors import DataError
from vlm_tune.words import counted

CHUNKS, PER_CHUNK = 64, 8  # at most 512 pictures are decoded


class LookCount:
    """Counts the pictures in the chunks of one file; a picture's header is read once per process."""

    def __init__(self, reader: ImageReader, num_chunks: int) -> None:
        self._reader = reader
        self._stride = -(-num_chunks // CHUNKS) or 1
        self._known: dict[Picture, Look] = {}
        self._decoded: dict[Picture, bool] = {}  # of one chunk
        self._may_decode = 0

    def begin(self, chunk: int) -> None:
        """Start with the next chunk."""
        self._decoded = {}
        self._may_decode = 0 if chunk % self._stride else PER_CHUNK

    def look(self, picture: Picture, counts: Counter[str]) -> None:
        """Add a picture that is in order to the counts `turned`, `alpha`, `decoded` and `transparent`."""
        if picture.frame is not None:
            return
        look = self._read(picture)
        counts.update(turned=int(look.is_turned), alpha=int(look.has_alpha))
        if not look.has_alpha:
            return
        if picture in self._decoded or len(self._decoded) >= self._may_decode:
            return
        try:
            shows = self._reader.shows_through(picture)
        except DataError:  # damage between header and end is found by training, not by `check`
            return
        self._decoded[picture] = shows
        counts.update(decoded=1, transparent=int(shows))

    def _read(self, picture: Picture) -> Look:
        if picture.content is not None:
            return self._reader.read_look(picture)
        if picture not in self._known:
            if len(self._known) >= 1 << 16:
                self._known.clear()
            self._known[picture] = self._reader.read_look(picture)
        return self._known[picture]


def turned_fact(count: int, exif: bool) -> str:
    """Describe how pictures are trained that are not stored as they are shown, and what to set."""
    are = f"{counted(count, 'picture')} {'is' if count == 1 else 'are'} stored turned or mirrored, by EXIF data"
    if exif:
        return f"{are}. data.image.exif=true trains them upright"
    return f"{are}. data.image.exif=false trains them so: set it to true to train them as they are shown"


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
