"""Read video files with PyAV: how many frames there are, and when, from their timestamps; pixels on demand.

Plumbing before tiles (2). `choose_frames` alone decides which frames of a video the model sees: those it returns are
counted in the text, and the same ones are decoded.
"""

import os
import re
import stat
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from hashlib import blake2b
from itertools import pairwise
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from PIL import Image

from vlm_tune.data.pictures.whole_files import is_whole, read_element
from vlm_tune.errors import DataError

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.stream import VideoStream

MIN_FRAMES, MAX_FRAMES = 8, 32  # of one video; InternVL, internvl_chat_finetune.py, min_num_frame and max_num_frame
ROUNDED = 1.0  # seconds by which a clip may end after its video: people round

# Supported formats by their first bytes. The playlist decoder, which would fetch what a playlist names, is never tried.
_SIGNATURES = {
    "mov": re.compile(rb".{4}(ftyp|moov|mdat|wide|free|skip|pnot)", re.DOTALL),  # .mp4, .mov, .m4v
    "matroska": re.compile(rb"\x1aE\xdf\xa3"),  # .mkv, .webm
    "avi": re.compile(rb"RIFF.{4}AVI ", re.DOTALL),
    "gif": re.compile(rb"GIF8[79]a"),
}
_TICK = 0.001  # seconds to which .mkv and .webm round the time of a frame
_SEGMENT = b"\x18\x53\x80\x67"  # id of the element that holds all others of an .mkv
_LOST = 0.5  # seconds that may be missing at the end of a file that states its duration
_UPRIGHT = {
    90: Image.Transpose.ROTATE_90,
    180: Image.Transpose.ROTATE_180,
    -180: Image.Transpose.ROTATE_180,
    -90: Image.Transpose.ROTATE_270,
}


@dataclass(frozen=True, slots=True)
class VideoHeader:
    """What is known of a video without decoding it."""

    num_frames: int
    rate: float  # frames per second, on average
    size: tuple[int, int]  # (width, height) in pixels as stored, before the rotation of a phone's video
    times: tuple[float, ...] = ()  # if frames are uneven: when each is shown, in seconds from the first; and the end

    @property
    def seconds(self) -> float:
        """Return the duration of the frames."""
        return self.times[-1] if self.times else self.num_frames / self.rate


class _Packet(NamedTuple):
    shown: int  # when, in units of the stream
    place: int  # to seek to
    length: int  # in units of the stream; 0: unknown
    is_key: bool
    is_discard: bool  # outside of the edit list


class _Scan(NamedTuple):
    header: VideoHeader
    times: list[int]  # of each frame, ascending, in units of the stream
    keys: list[tuple[int, int]]  # (time shown, place to seek to) of key frames, ascending


def choose_frames(header: VideoHeader, clip: tuple[float, float] | None = None) -> tuple[int, ...]:
    """Return the indices of the frames that represent a video: one per second, at least 8 and at most 32.

    `clip` (start, end) in seconds limits them to a part. The part is divided evenly, and the middle frame of each piece
    is taken: of 50 frames in 5 seconds 2, 8, 14, 21, 27, 33, 39, 46. A video of fewer than 8 frames gives all of them.
    Source: InternVL, get_frame_indices with sample="middle", as at inference. Its training draws the number, 8 to 32,
    and the places at random, so that a row's tokens differ in each epoch; here the header alone decides.

    If frames are uneven, the part is divided by time, and the frame shown in the middle of each piece is taken, but
    none twice: if one is shown throughout several pieces, its neighbours are taken for the others.

    Raise DataError for a clip outside the video.
    """
    first, count, seconds = 0, header.num_frames, header.seconds
    start, end = clip or (0.0, seconds)
    if clip is not None:
        if start >= seconds or end > seconds + ROUNDED:
            raise DataError(f'is {seconds:.2f} s long, "clip" is {start:g} to {end:g} s. Give a part of the video')
        seconds = end - start
        if header.times:
            first = bisect_right(header.times, start) - 1
            count = bisect_left(header.times, end, hi=count) - first
        else:
            first = int(start * header.rate)
            count = max(1, min(int(seconds * header.rate), count - first))
    number = min(max(int(seconds), MIN_FRAMES), MAX_FRAMES, count)
    if header.times:
        piece = (min(end, header.seconds) - start) / number
        shown = [bisect_right(header.times, start + (place + 0.5) * piece) - 1 for place in range(number)]
        return _without_repeats(shown, first, first + count)
    bounds = [count * piece // number for piece in range(number + 1)]
    return tuple(first + (begin + end - 1) // 2 for begin, end in pairwise(bounds))


def _without_repeats(numbers: list[int], first: int, end: int) -> tuple[int, ...]:
    """Move ascending numbers as little as possible to make each distinct, all within `first` to before `end`."""
    chosen: list[int] = []
    for place, number in enumerate(numbers):
        lowest = chosen[-1] + 1 if chosen else first
        chosen.append(min(max(number, lowest), end - len(numbers) + place))
    return tuple(chosen)


def read_header(path: str) -> VideoHeader:
    """Read the number, times and size of a video's frames, decoding no more than the codec's settings need.

    The whole file is read for the timestamps of its frames: the rate in a header may be wrong, and the index of an .mp4
    lists when frames are decoded. Frames that a player does not show do not count: those outside an edit list, and
    those before the first key frame of a part that was cut out without re-encoding. The result is cached for as long as
    the file does not change.

    Raise DataError, without a location, for a missing, empty, truncated or damaged file, for one that is no video, and
    for one without a video stream or without a frame that can be shown.
    """
    return _header_of(path, *_state(path))


def digest(path: str) -> bytes:
    """Return a hash of the whole file, computed again only if the file changes. Raise DataError."""
    return _digest_of(path, *_state(path))


def read_frames(path: str, numbers: Sequence[int]) -> Iterator[Image.Image]:
    """Yield the frames of these ascending indices, RGB, upright if the file says how the camera was held.

    Decoding begins at the last key frame before each. Raise DataError as `read_header` does.
    """
    scan = _scan(path, *_state(path))
    with open(path, "rb") as file, _damage(), _opened(file) as (container, stream):
        for frame in _decode(container, stream, scan.keys, [scan.times[number] for number in numbers]):
            if frame.is_corrupt:
                raise _truncated(f"the frame at {frame.time} s cannot be decoded")
            turn = _UPRIGHT.get(frame.rotation)
            image = frame.to_image()
            yield image if turn is None else image.transpose(turn)


def _decode(
    container: "InputContainer", stream: "VideoStream", keys: list[tuple[int, int]], targets: list[int]
) -> Iterator[Any]:
    """Yield, for each of the ascending times, the first frame shown then or later."""
    frames, current = container.decode(stream), None
    for target in targets:
        time, place = keys[bisect_right(keys, target, key=lambda key: key[0]) - 1]
        if current is None or time > _shown(current):
            container.seek(place, stream=stream)
            frames = container.decode(stream)
            current = next(frames, None)
            if current is None or _shown(current) > target:  # the container's index leads elsewhere
                container.seek(keys[0][1], stream=stream)
                frames = container.decode(stream)
                current = next(frames, None)
                if current is not None and _shown(current) > target:
                    raise _truncated("its first key frame cannot be decoded by itself")
        while current is not None and _shown(current) < target:
            current = next(frames, None)
        if current is None:
            raise _truncated("it ends before the last of its frames")
        yield current


def _shown(frame: Any) -> int:
    """Return when a frame is shown; an .avi may only say when it is decoded."""
    time = frame.dts if frame.pts is None else frame.pts
    if time is None:
        raise DataError("has frames without a time. Convert it to .mp4")
    return int(time)


@lru_cache(maxsize=4096)
def _header_of(path: str, size: int, changed: int) -> VideoHeader:
    return _scan(path, size, changed).header


@lru_cache(maxsize=2)  # the frames of a row are decoded right after they were counted
def _scan(path: str, size: int, _: int) -> _Scan:
    with open(path, "rb") as file, _damage(), _opened(file) as (container, stream):
        if not (unit := stream.time_base):
            raise _truncated("its times have no unit")
        packets, end = _list_packets(container, stream)
        entries = list(stream.index_entries)
        if max((entry.pos + entry.size for entry in entries if entry.size), default=0) > size:
            raise _truncated("it is shorter than its index says")
        lost = (container.duration or 0) / 1e6 - end if "matroska" in container.format.name else 0.0
        if lost > _LOST and not _shows_to_be_whole(file):
            raise _truncated(f"its last {lost:.1f} s are missing")
        lengths, keys = _keep_visible(packets, any(entry.is_keyframe for entry in entries))
        if lost > _LOST:
            lengths[max(lengths)] += round(lost / unit)  # its last frame stays, as with slides
        rate, times = _pace(lengths, unit, (stream.average_rate, stream.guessed_rate, stream.base_rate))
        codec = stream.codec_context
        header = VideoHeader(len(lengths), rate, (codec.width, codec.height), times)
        return _Scan(header, sorted(lengths), keys)


def _list_packets(container: "InputContainer", stream: "VideoStream") -> tuple[list[_Packet], float]:
    """Read through the file, without decoding, and return the packets of its frames, and its end in seconds."""
    packets: list[_Packet] = []
    ends: dict[int, int] = {}  # of each stream, in its units: converting each packet's to seconds would double the time
    keyed, by_shown = False, "matroska" in container.format.name  # its index says when key frames are shown
    for packet in container.demux():
        if not packet.size:
            continue
        if packet.is_corrupt:
            raise _truncated("it ends within a frame")
        number, shown, decoded, length = packet.stream_index, packet.pts, packet.dts, packet.duration or 0
        if shown is not None:
            ends[number] = max(ends.get(number, 0), shown + length)
        if number == stream.index:
            is_key = packet.is_keyframe
            keyed = keyed or is_key
            shown = decoded if shown is None else shown
            if shown is not None:
                place = shown if decoded is None or by_shown else decoded
                packets.append(_Packet(shown, place, length, is_key, packet.is_discard))
            elif keyed:  # what comes before a key frame may have lost its time
                raise DataError("has frames without a time. Convert it to .mp4")
    units = {each.index: each.time_base or 0 for each in container.streams}
    return packets, max((float(units[number] * end) for number, end in ends.items()), default=0.0)


def _keep_visible(packets: list[_Packet], indexed: bool) -> tuple[dict[int, int], list[tuple[int, int]]]:
    """Return time and length of each visible frame, and the key frames; `indexed`: the file claims to have some."""
    if not packets:
        raise DataError("holds no frames. Remove the row")
    first = next((number for number, packet in enumerate(packets) if packet.is_key), 0 if indexed else None)
    if first is None:
        raise DataError(f"has no key frame: none of its {len(packets)} frames can be shown. Cut it anew with one")
    start = packets[first].shown
    visible = [packet for packet in packets[first:] if packet.shown >= start and not packet.is_discard]
    lengths = {packet.shown: packet.length for packet in visible}
    if not lengths:
        raise DataError(f"hides all of its {len(packets)} frames by an edit list. Export it again, or remove the row")
    if len(lengths) == 1 < len(visible):
        raise DataError(f"gives all of its {len(visible)} frames the same time. Convert it anew")
    keys = [packet for packet in packets[first:] if packet.is_key] or packets[:1]
    return lengths, sorted((packet.shown, packet.place) for packet in keys)


def _pace(lengths: dict[int, int], unit: Fraction, rates: Iterable[Fraction | None]) -> tuple[float, tuple[float, ...]]:
    """Return the frame rate and, if the frames do not keep it, the time of each and the end, in seconds.

    The rates in a header are guesses of its writer: one counts only if every frame is shown at the time it implies.
    """
    numbers = sorted(lengths)
    seconds = [(number - numbers[0]) * unit.numerator / unit.denominator for number in numbers]
    length = float(lengths[numbers[-1]] * unit)
    for rate in (float(rate) for rate in rates if rate):
        slack = min(max(float(unit), _TICK), 0.5 / rate)
        if length < 2 / rate and all(abs(time - number / rate) <= slack for number, time in enumerate(seconds)):
            return rate, ()
    end = seconds[-1] + (length or seconds[-1] / max(1, len(seconds) - 1) or 1.0)
    return len(seconds) / end, (*seconds, end)


@lru_cache(maxsize=4096)
def _digest_of(path: str, size: int, _: int) -> bytes:
    found = blake2b(digest_size=16)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.digest()


def _state(path: str) -> tuple[int, int]:
    """Return size and modification time of a file; refuse an empty one, and what is not a file."""
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
    """Open a video as the format that its first bytes show; yield the container and its video stream."""
    try:
        import av  # takes a quarter of a second, so only for those who have videos
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
    if not is_whole(name, file):
        raise _truncated("its end is missing")
    file.seek(0)
    with av.open(file, "r", format=name, metadata_errors="ignore") as container:
        streams = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
        if not len(container.streams):
            raise _truncated("its index is missing")
        if not streams:
            raise DataError("has no video stream. Remove the row, or give another file")
        if not streams[0].codec_context:
            raise DataError("has pictures of a kind that cannot be decoded here. Convert it to .mp4 of H.264")
        streams[0].codec_context.thread_count = 1  # workers are processes: one core each
        yield container, streams[0]


def _shows_to_be_whole(file: BinaryIO) -> bool:
    """Tell whether all elements of a .mkv say how long they are, and are there to their ends.

    Asked where the frames end before the film does: there a length that is not known is no excuse, as it is elsewhere.
    """
    end, place = file.seek(0, os.SEEK_END), 0
    while place < end:
        element = read_element(file, place)
        if element is None:
            return False
        name, place, size = element
        if name != _SEGMENT:
            place += size
        elif place + size > end:
            return False
        else:
            end = place + size  # what it consists of follows
    return place == end


@contextmanager
def _damage() -> Iterator[None]:
    """Report whatever a decoder raises as a fault of the file."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # a decoder may raise anything on damaged bytes
        if type(error) is MemoryError:  # the machine's; a decoder has its own, for a file that says it is huge
            raise
        raise _truncated(getattr(error, "strerror", None) or str(error)) from error


def _truncated(detail: str) -> DataError:
    return DataError(f"is a truncated or damaged video: {detail}. Copy or export it again")
