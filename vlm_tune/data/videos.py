"""Read video files through PyAV: how many frames there are from header and index, pixels only when they are asked for.

Plumbing before tiles (2). `choose_frames` alone decides which frames of a video the model sees: the text counts them by
it, and the same numbers are decoded.
"""

import os
import re
import stat
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from itertools import pairwise
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from PIL import Image

from vlm_tune.errors import DataError

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.stream import VideoStream

MIN_FRAMES, MAX_FRAMES = 8, 32  # of one video; InternVL, internvl_chat_finetune.py, min_num_frame and max_num_frame
ROUNDED = 1.0  # seconds by which a clip may end behind its video: people round

# What may be read, by the first bytes. The decoder of playlists, which fetches what they name, is never tried.
_SIGNATURES = {
    "mov": re.compile(rb".{4}(ftyp|moov|mdat|wide|free|skip|pnot)", re.DOTALL),  # .mp4, .mov, .m4v
    "matroska": re.compile(rb"\x1aE\xdf\xa3"),  # .mkv, .webm
    "avi": re.compile(rb"RIFF.{4}AVI ", re.DOTALL),
    "gif": re.compile(rb"GIF8[79]a"),
}
_LOST = 0.5  # seconds that may be missing at the end of a file which says how long it is
_UPRIGHT = {
    90: Image.Transpose.ROTATE_90,
    180: Image.Transpose.ROTATE_180,
    -180: Image.Transpose.ROTATE_180,
    -90: Image.Transpose.ROTATE_270,
}


@dataclass(frozen=True, slots=True)
class VideoHeader:
    """Hold what is known of a video without decoding it."""

    num_frames: int
    rate: float  # frames a second, on average
    size: tuple[int, int]  # (width, height) in pixels, as stored: a phone's turn is not in it


class _Packets(NamedTuple):
    """Hold the times of a video's frames, as they are shown, and where decoding can begin."""

    times: list[int]  # of each frame, ascending, in units of the stream
    keys: list[tuple[int, int]]  # (time shown, place to seek to) of frames that need no other, ascending


def choose_frames(header: VideoHeader, clip: tuple[float, float] | None = None) -> tuple[int, ...]:
    """Return the numbers of the frames that stand for a video, from 0: one a second, at least 8 and at most 32.

    `clip` (start, end) in seconds limits them to a part. The part is divided evenly, and the middle frame of each piece
    is taken: of 50 frames in 5 seconds 2, 8, 14, 21, 27, 33, 39, 46. A video of fewer than 8 frames gives all of them.
    Source: InternVL, get_frame_indices with sample="middle", as at inference. Its training draws the number, 8 to 32,
    and the places at random, so that a row's tokens differ in each epoch; here they are settled by the header.

    Raise DataError for a clip that is not in the video.
    """
    first, count, seconds = 0, header.num_frames, header.num_frames / header.rate
    if clip is not None:
        start, end = clip
        if start * header.rate >= count or end > seconds + ROUNDED:
            raise DataError(f'is {seconds:.2f} s long, "clip" is {start:g} to {end:g} s. Give a part of the video')
        seconds = end - start
        first = int(start * header.rate)
        count = max(1, min(int(seconds * header.rate), count - first))
    number = min(max(int(seconds), MIN_FRAMES), MAX_FRAMES, count)
    bounds = [count * piece // number for piece in range(number + 1)]
    return tuple(first + (begin + end - 1) // 2 for begin, end in pairwise(bounds))


def read_header(path: str) -> VideoHeader:
    """Read a video's number of frames, rate and size; nothing is decoded beyond what tells the codec's settings.

    .mp4, .mov and .avi have an index of their frames; .mkv, .webm, .gif and streamed .mp4 are read through to count
    them. What was found is kept for as long as the file does not change. Raise DataError without a place for a missing,
    empty, truncated or damaged file, one that is no video, and one without a video stream.
    """
    return _header_of(path, *_state(path))


def digest(path: str) -> bytes:
    """Return a hash of the whole file, computed once for as long as it does not change. Raise DataError."""
    return _digest_of(path, *_state(path))


def read_frames(path: str, numbers: Sequence[int]) -> Iterator[Image.Image]:
    """Yield the frames of these ascending numbers, RGB, upright where the file says how it was held.

    Decoding begins at the last frame before each that needs no other. Raise DataError as `read_header` does.
    """
    header = read_header(path)
    with open(path, "rb") as file, _damage(), _opened(file) as (container, stream):
        packets = _list_packets(container, stream)
        if len(packets.times) < header.num_frames:
            raise _truncated(f"{len(packets.times)} of {header.num_frames} frames are there")
        container.seek(0)
        for frame in _decode(container, stream, packets, [packets.times[number] for number in numbers]):
            if frame.is_corrupt:
                raise _truncated(f"the frame at {frame.time} s cannot be decoded")
            turn = _UPRIGHT.get(frame.rotation)
            image = frame.to_image()
            yield image if turn is None else image.transpose(turn)


def _decode(container: "InputContainer", stream: "VideoStream", packets: _Packets, targets: list[int]) -> Iterator[Any]:
    """Yield, for each time in ascending order, the first frame that is shown then or later."""
    frames, current = container.decode(stream), None
    for target in targets:
        place = bisect_right(packets.keys, target, key=lambda key: key[0]) - 1
        if place >= 0 and (current is None or packets.keys[place][0] > _shown(current)):
            container.seek(packets.keys[place][1], stream=stream)
            frames = container.decode(stream)
            current = next(frames, None)
            if current is None or _shown(current) > target:  # the container's index leads elsewhere
                container.seek(0)
                frames = container.decode(stream)
                current = next(frames, None)
        while current is not None and _shown(current) < target:
            current = next(frames, None)
        if current is None:
            raise _truncated("it ends before the last of its frames")
        yield current


def _shown(frame: Any) -> int:
    """Return when a frame (or the frame of a packet) is shown; .avi may say when it is decoded only."""
    time = frame.dts if frame.pts is None else frame.pts
    if time is None:
        raise DataError("has frames without a time. Convert it to .mp4")
    return int(time)


def _list_packets(container: "InputContainer", stream: "VideoStream") -> _Packets:
    """Read through the file, without decoding, for the times of all frames."""
    times, keys = [], []
    end = 0.0
    for packet in container.demux():
        if not packet.size or packet.is_discard:
            continue
        if packet.is_corrupt:
            raise _truncated("it ends within a frame")
        if packet.time_base and packet.pts is not None:
            end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        if packet.stream_index == stream.index:
            times.append(_shown(packet))
            if packet.is_keyframe:
                keys.append((times[-1], times[-1] if packet.dts is None else packet.dts))
    lost = (container.duration or 0) / 1e6 - end
    if "matroska" in container.format.name and lost > _LOST:  # the others have an index, or no length of their own
        raise _truncated(f"its last {lost:.1f} s are missing")
    return _Packets(sorted(times), sorted(keys))


@lru_cache(maxsize=4096)
def _header_of(path: str, size: int, _: int) -> VideoHeader:
    with open(path, "rb") as file, _damage(), _opened(file) as (container, stream):
        entries = stream.index_entries
        if stream.frames and len(entries) == stream.frames:
            if max(entry.pos + entry.size for entry in entries) > size:
                raise _truncated("it is shorter than its index says")
            num_frames = sum(entry.size > 0 and not entry.is_discard for entry in entries)
        else:
            num_frames = len(_list_packets(container, stream).times)
            if num_frames < stream.frames:
                raise _truncated(f"{num_frames} of {stream.frames} frames are there")
        rate = float(stream.average_rate or stream.guessed_rate or 0)
        if not num_frames or not rate:
            raise DataError("holds no frames. Remove the row")
        return VideoHeader(num_frames, rate, (stream.codec_context.width, stream.codec_context.height))


@lru_cache(maxsize=4096)
def _digest_of(path: str, size: int, _: int) -> bytes:
    found = blake2b(digest_size=16)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.digest()


def _state(path: str) -> tuple[int, int]:
    """Return size and time of a file; refuse what is not one, and an empty one."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise DataError(f"is not there: {error.strerror}. Give the path of a video file") from error
    if not stat.S_ISREG(status.st_mode):  # a pipe would block for ever
        raise DataError("is not a file. Give the path of a video file")
    if status.st_size == 0:
        raise DataError("is empty (0 bytes). Copy it again, or remove the row")
    return status.st_size, status.st_mtime_ns


@contextmanager
def _opened(file: BinaryIO) -> Iterator[tuple["InputContainer", "VideoStream"]]:
    """Open a video by its first bytes; yield the container and the stream of its pictures."""
    try:
        import av  # a quarter of a second, for those who have videos only
        from av.stream import Disposition
    except ImportError as error:
        raise DataError(
            f"needs the package av: {error}. pip install av, or extract the frames into a folder"
        ) from error

    first = file.read(16)
    file.seek(0)
    name = next((name for name, signature in _SIGNATURES.items() if signature.match(first)), None)
    if name is None:
        raise DataError(
            f"is not a video of a known kind (it starts with {first!r}). Readable are mp4, mov, mkv, webm, avi, gif"
        )
    if (name == "gif" and not _ends_as_gif(file)) or (name == "mov" and not _holds_its_boxes(file)):
        raise _truncated("its end is missing")
    file.seek(0)
    with av.open(file, "r", format=name, metadata_errors="ignore") as container:
        streams = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
        if not len(container.streams):
            raise _truncated("its index is missing")
        if not streams:
            raise DataError("has no video stream. Remove the row, or give another file")
        streams[0].codec_context.thread_count = 1  # workers are processes: one core each
        yield container, streams[0]


def _ends_as_gif(file: BinaryIO) -> bool:
    file.seek(-min(64, file.seek(0, os.SEEK_END)), os.SEEK_END)
    return file.read().rstrip(b"\0").endswith(b";")


def _holds_its_boxes(file: BinaryIO) -> bool:
    """Tell whether the boxes that an .mp4 consists of, each with its length, are there to their ends."""
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


@contextmanager
def _damage() -> Iterator[None]:
    """Report whatever a decoder raises on damaged bytes as a fault of the file."""
    try:
        yield
    except (DataError, MemoryError):
        raise
    except Exception as error:  # on damaged bytes a decoder may raise whatever it likes
        raise _truncated(getattr(error, "strerror", None) or str(error)) from error


def _truncated(detail: str) -> DataError:
    return DataError(f"is a truncated or damaged video: {detail}. Copy or export it again")
