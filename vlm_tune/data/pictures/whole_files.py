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


def read_element(file: BinaryIO, place: int) -> tuple[bytes, int, int] | None:
    """Read an element of a .mkv at a place: its name, where its content begins, and the length of that.

    A name and a length are each as long as their leading zeros say. None where there is no element, or one whose length
    was not known when it was written (of a live recording): nothing shows whether such a file is whole.
    """
    file.seek(place)
    head = file.read(12).ljust(12, b"\0")
    name = 9 - head[0].bit_length()
    width = 9 - head[min(name, 4)].bit_length()
    unknown = (1 << 7 * width) - 1
    size = int.from_bytes(head[name : name + width]) & unknown
    return None if name > 4 or width > 8 or size == unknown else (head[:name], place + name + width, size)


def _holds_its_elements(file: BinaryIO) -> bool:
    """Look at the elements that a .mkv consists of; what tells no length counts as whole."""
    end, place = file.seek(0, os.SEEK_END), 0
    while place < end and (element := read_element(file, place)) is not None:
        place = element[1] + element[2]
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
