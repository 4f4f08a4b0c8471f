"""Whether a file is complete, judging by the lengths that its format stores. Nothing is decoded."""

import os
from typing import BinaryIO


def is_whole(name: str, file: BinaryIO) -> bool:
    """Return whether a file (mov, matroska, avi, gif, AVIF, HEIF) ends where it says; True for any other format.

    This moves the position in the file.
    """
    holds_all = _RULES.get(name)
    return holds_all is None or holds_all(file)


def _ends_as_gif(file: BinaryIO) -> bool:
    file.seek(-min(64, file.seek(0, os.SEEK_END)), os.SEEK_END)
    return file.read().rstrip(b"\0").endswith(b";")


def _holds_its_boxes(file: BinaryIO) -> bool:
    """Whether the boxes of an .mp4, .avif or .heic are complete."""
    end, place = file.seek(0, os.SEEK_END), 0
    while place + 8 <= end:
        file.seek(place)
        box = file.read(16)
        size = int.from_bytes(box[:4])
        if size == 1:  # a long one
            size = int.from_bytes(box[8:])
        if size < 8:  # 0: it reaches to the end
            return True
        place += size
    return place <= end


def _holds_its_elements(file: BinaryIO) -> bool:
    """Look at the elements that a .mkv consists of: a number, a length (each as long as its leading zeros say)."""
    end, place = file.seek(0, os.SEEK_END), 0
    while place < end:
        file.seek(place)
        head = file.read(12).ljust(12, b"\0")
        id_length = 9 - head[0].bit_length()
        size_length = 9 - head[min(id_length, 4)].bit_length()
        if id_length > 4 or size_length > 8:  # something behind the film
            return True
        size = int.from_bytes(head[id_length : id_length + size_length]) - (1 << 7 * size_length)
        if size == (1 << 7 * size_length) - 1:  # written live: the length was not known
            return True
        place += id_length + size_length + size
    return place <= end


def _holds_its_chunks(file: BinaryIO) -> bool:
    """Whether the chunks of an .avi are complete."""
    end, place = file.seek(0, os.SEEK_END), 0
    while place + 8 <= end:
        file.seek(place)
        head = file.read(8)
        if head[:4] != b"RIFF":  # something after the film
            return True
        place += 8 + int.from_bytes(head[4:], "little")
    return place <= end


_RULES = {
    "gif": _ends_as_gif,
    "mov": _holds_its_boxes,
    "AVIF": _holds_its_boxes,
    "HEIF": _holds_its_boxes,
    "matroska": _holds_its_elements,
    "avi": _holds_its_chunks,
}
