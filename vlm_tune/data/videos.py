"""Read video files through PyAV: how many frames there are from header and index, pixels only when they are asked for.

Plumbing before tiles (2). `choose_frames` alone decides which frames of a video the model sees: the text counts them by
it, and the same numbers are decoded.
"""

import os
import re
import stat
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from PIL import Image

from vlm_tune.data.whole_files import is_whole
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
    "mpegts": re.compile(rb"\x47.{187}\x47.{187}\x47", re.DOTALL),
}
_REORDERED = 17  # packets: no codec moves a frame by more than 16
_UPRIGHT = {
    90: Image.Transpose.ROTATE_90,
    180: Image.Transpose.ROTATE_180,
    -180: Image.Transpose.ROTATE_180,
    -90: Image.Transpose.ROTATE_270,
}


@dataclass(frozen=True, slots=True)
class VideoHeader:
    """Hold what is known of a video without decoding it.

    Times are the frames' own stamps: what a header says of a rate is an average, or a guess.
    """

    times: "array[float]"  # seconds, when each frame is shown, ascending from 0
    seconds: float  # when the last one ends
    size: tuple[int, int]  # (width, height) in pixels, as stored: a phone's turn is not in it
    tick: float  # seconds, what stamps are rounded to

    @property
    def num_frames(self) -> int:
        """Count the frames that are shown."""
        return len(self.times)

    @property
    def rate(self) -> float | None:
        """Frames a second; None where they do not come evenly."""
        return _even_rate(self.times, self.tick)


class _Packets(NamedTuple):
    """Hold the times of a video's frames, as they are shown, and where decoding can begin."""

    times: list[int]  # of each frame, ascending, in units of the stream
    keys: list[tuple[int, int]]  # (time shown, place to seek to) of frames that need no other, ascending
    end: int  # when the last frame ends


def choose_frames(header: VideoHeader, clip: tuple[float, float] | None = None) -> tuple[int, ...]:
    """Return the numbers of the frames that stand for a video, from 0: one a second, at least 8 and at most 32.

    `clip` (start, end) in seconds limits them to a part: from the frame that is on the screen at its start on. The part
    is divided evenly, and the middle frame of each piece is taken: of 50 frames in 5 seconds 2, 8, 14, 21, 27, 33, 39,
    46. A video of fewer than 8 frames gives all of them. Source: InternVL, get_frame_indices with sample="middle", as
    at inference. Its training draws the number, 8 to 32, and the places at random, so that a row's tokens differ in
    each epoch; here they are settled by the header.

    Raise DataError for a clip that is not in the video.
    """
    first, count, seconds = 0, header.num_frames, header.seconds
    if clip is not None:
        start, end = clip
        if start >= seconds or end > seconds + ROUNDED:
            raise DataError(f'is {seconds:.2f} s long, "clip" is {start:g} to {end:g} s. Give a part of the video')
        seconds = end - start
        first, count = _part(header, start, end)
    number = min(max(int(seconds + _slack(header.tick)), MIN_FRAMES), MAX_FRAMES, count)
    bounds = [count * piece // number for piece in range(number + 1)]
    return tuple(first + (begin + end - 1) // 2 for begin, end in pairwise(bounds))


def _part(header: VideoHeader, start: float, end: float) -> tuple[int, int]:
    """Return the first frame of a clip and how many there are.

    Of even frames as many as InternVL takes, int(seconds * rate); of others those that are on the screen within it.
    """
    slack, rate = _slack(header.tick), header.rate
    first = bisect_right(header.times, start + slack) - 1
    if rate is None:
        count = bisect_left(header.times, end - slack) - first
    else:
        count = min(int((end - start + slack) * rate), header.num_frames - first)
    return first, max(1, count)


def _slack(tick: float) -> float:
    """Return by how many seconds a stamp may be off: half of what it is rounded to, where that is not a frame."""
    return min(tick / 2, 0.001)


def _even_rate(times: Sequence[float], tick: float) -> float | None:
    """Return the frames a second where each stands, but for rounding, where an even rate puts it; else None."""
    if len(times) < 2 or times[-1] <= times[0]:
        return None
    gap, off = (times[-1] - times[0]) / (len(times) - 1), min(tick, 0.002) * 1.001
    is_even = all(abs(time - times[0] - number * gap) <= off for number, time in enumerate(times))
    return 1 / gap if is_even else None


def read_header(path: str) -> VideoHeader:
    """Read a video's number of frames, rate and size; nothing is decoded beyond what tells the codec's settings.

    .mp4, .mov and .avi have an index of their frames; .mkv, .webm, .gif, .ts and streamed .mp4 are read through for
    their stamps, and so is .mp4 whose index does not tell when each frame is shown (a cut without encoding anew). What
    was found is kept for as long as the file does not change. Raise DataError without a place for a missing,
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
        elif current is None:
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
    """Read through the file, without decoding, for the times of all frames that can be shown.

    What a cut without encoding anew has left over is not among them: frames that the file hides, and those that come,
    or are shown, before the first frame that needs no other.
    """
    times: list[int] = []
    keys: list[tuple[int, int]] = []
    end, first_key = 0, None
    for packet in container.demux(stream):
        if packet.is_corrupt:
            raise _truncated("it ends within a frame")
        if not packet.size or (first_key is None and not packet.is_keyframe):
            continue
        time = _shown(packet)
        first_key = time if first_key is None else first_key
        if packet.is_discard or time < first_key:
            continue
        times.append(time)
        end = max(end, time + (packet.duration or 0))
        if packet.is_keyframe:
            keys.append((time, time if packet.dts is None else packet.dts))
    return _Packets(sorted(times), sorted(keys), end)


def _list_index(container: "InputContainer", stream: "VideoStream") -> list[int] | None:
    """Return the times of all frames from the file's index alone; None where that cannot tell them.

    It says when frames are decoded. That is when they are shown, but for a constant, where their order is the same or
    where they come evenly, unless the file hides some of them or its first cannot be shown.
    """
    entries = stream.index_entries
    if not stream.frames or len(entries) != stream.frames or not entries[0].is_keyframe:
        return None
    if any(entry.is_discard for entry in entries):
        return None
    times = [entry.timestamp for entry in entries if entry.size > 0]
    if not stream.codec_context.has_b_frames:
        return times
    is_even = _even_rate([float(time) for time in times], 1.0) is not None
    return times if is_even and _shows_first(container, stream) else None


def _shows_first(container: "InputContainer", stream: "VideoStream") -> bool:
    """Tell whether the first frame to be decoded is the first to be shown."""
    shown = [_shown(packet) for packet in islice(container.demux(stream), _REORDERED) if packet.size]
    return bool(shown) and shown[0] == min(shown)


@lru_cache(maxsize=512)  # a minute's times take 15 kB
def _header_of(path: str, size: int, _: int) -> VideoHeader:
    with open(path, "rb") as file, _damage(), _opened(file) as (container, stream):
        if any(entry.pos + entry.size > size for entry in stream.index_entries):
            raise _truncated("it is shorter than its index says")
        times, end = _list_index(container, stream), 0
        if times is None:
            times, _keys, end = _list_packets(container, stream)
        if not times or not stream.time_base:
            raise DataError("holds no frames that can be shown: none stands by itself. Remove the row")
        tick = float(stream.time_base)
        seconds = array("d", [(time - times[0]) * tick for time in times])
        end = max(end, _stated_end(container, stream))
        frame = (stream.codec_context.width, stream.codec_context.height)
        return VideoHeader(seconds, _length(seconds, tick, (end - times[0]) * tick), frame, tick)


def _stated_end(container: "InputContainer", stream: "VideoStream") -> int:
    """Return when the pictures end as the file says, in units of the stream; 0 where it does not."""
    if stream.duration:
        return (stream.start_time or 0) + stream.duration
    if len(container.streams) > 1 or not container.duration or not stream.time_base:
        return 0
    return int(container.duration / 1_000_000 / stream.time_base)


def _length(times: Sequence[float], tick: float, end: float) -> float:
    """Return when the last frame ends, in seconds: as an even rate goes on, else as the file says, else a guess."""
    rate = _even_rate(times, tick)
    if rate is not None:
        return len(times) / rate
    return end if end > times[-1] else times[-1] + (times[-1] - times[-2] if len(times) > 1 else tick)


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

    first = file.read(512)
    file.seek(0)
    name = next((name for name, signature in _SIGNATURES.items() if signature.match(first)), None)
    if name is None:
        raise DataError(
            f"is not a video of a known kind (it starts with {first[:16]!r}). Readable are mp4, mov, mkv, webm, avi, "
            "gif, ts"
        )
    if not is_whole(name, file):
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
