"""Frames by their own times: parts cut out without encoding anew, edit lists, uneven frames, and what is refused."""

import os
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from vlm_tune.data.dialects.dialects import parse_record
from vlm_tune.data.pictures.videos import VideoHeader, choose_frames, read_frames, read_header
from vlm_tune.errors import DataError

WIDTH, HEIGHT, STEP = 64, 48, 8  # of grey from frame to frame
EVEN = [Fraction(n, 10) for n in range(30)]
MPEG4 = {"sc_threshold": "1000000000", "qmin": "2", "qmax": "2"}  # no key frames but those that are asked for
KINDS = {  # a key frame every 12; B-frames but in "mpeg4", "vp8" and "vp9"
    "x264.mp4": ("libx264", {}),
    "x264.mov": ("libx264", {}),
    "x264.mkv": ("libx264", {}),
    "mpeg4.mp4": ("mpeg4", MPEG4),
    "mpeg4.avi": ("mpeg4", MPEG4),
    "bframes.avi": ("mpeg4", MPEG4 | {"bf": "2"}),
    "bframes.mkv": ("mpeg4", MPEG4 | {"bf": "2"}),
    "hevc.mkv": ("libx265", {"x265-params": "keyint=12:scenecut=0:log-level=none"}),  # frames before an open key frame
    "av1.webm": ("libsvtav1", {}),
    "vp8.webm": ("libvpx", {}),
    "vp9.webm": ("libvpx-vp9", {}),
}
REFRESHED = ("libx264", {"intra-refresh": "1"})  # bit by bit: no frame but the first is whole by itself


def write(path: Path, times: Sequence[Fraction | float] = EVEN, rate: int = 10) -> Path:
    """Write a video whose frame n is grey of 8 * n, shown at `times[n]` seconds."""
    codec, settings = KINDS.get(path.name, REFRESHED)
    unit = Fraction(1, rate) if codec == "mpeg4" else Fraction(1, 3000)  # .avi and its codec know even times only
    with normal_scheduling(), av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=rate, options={"g": "12", **settings})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.codec_context.time_base = unit
        for number, time in enumerate(times):
            pixels = np.full((HEIGHT, WIDTH, 3), STEP * number % 256, np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = round(time / unit), unit
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@contextmanager
def normal_scheduling() -> Iterator[None]:
    """Take back what SVT-AV1 does where it may (as root): it makes the process that encodes a real-time one."""
    before = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        if os.sched_getscheduler(0) != before[0]:
            os.sched_setscheduler(0, *before)


def copy(source: Path, path: Path, change: Callable[[int, Any], bool | None]) -> Path:
    """Copy a video without encoding it anew; `change` may change a packet, and leave it out by False."""
    with av.open(str(source)) as read, av.open(str(path), "w") as written:
        stream = written.add_stream_from_template(read.streams.video[0], opaque=True)
        for number, packet in enumerate(packet for packet in read.demux(video=0) if packet.size):
            if change(number, packet) is not False:
                packet.stream = stream
                written.mux(packet)
    return path


def shift(packet: Any, seconds: float) -> None:
    ticks = round(seconds / packet.time_base)
    packet.pts = None if packet.pts is None else packet.pts + ticks
    packet.dts = None if packet.dts is None else packet.dts + ticks


def seen(path: Path, numbers: Sequence[int]) -> list[int]:
    """Say by their grey which frames of the written video these are."""
    return [round(float(np.asarray(image)[HEIGHT // 2 :].mean()) / STEP) for image in read_frames(str(path), numbers)]


def all_seen(path: Path) -> list[int]:
    return seen(path, range(read_header(str(path)).num_frames))


def chosen(path: Path, clip: tuple[float, float] | None = None) -> list[int]:
    return seen(path, choose_frames(read_header(str(path)), clip))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("even")

    def made(name: str) -> Path:
        return folder / name if (folder / name).exists() else write(folder / name)

    return made


# Parts cut out without encoding anew


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("seconds", [0, -0.9, 20])
def test_a_cut_begins_at_its_first_key_frame(name: str, seconds: float, source: Any, tmp_path: Path) -> None:
    path = copy(source(name), tmp_path / name, lambda number, packet: number >= 5 and not shift(packet, seconds))
    assert all_seen(path) == list(range(12, 30))
    assert chosen(path) == [12, 14, 16, 19, 21, 23, 25, 28]


@pytest.mark.parametrize("name", KINDS)
def test_a_cut_may_hold_one_key_frame_far_behind_its_start(name: str, source: Any, tmp_path: Path) -> None:
    path = copy(source(name), tmp_path / name, lambda number, _: number >= 14)
    assert all_seen(path) == list(range(24, 30))


@pytest.mark.parametrize("name", ["x264.mp4", "x264.mov", "mpeg4.mp4"])
@pytest.mark.parametrize(("hidden", "first"), [(0.5, 5), (1.1, 11), (1.3, 13), (2.5, 25)])
def test_frames_before_an_edit_list_do_not_count(
    name: str, hidden: float, first: int, source: Any, tmp_path: Path
) -> None:
    path = copy(source(name), tmp_path / name, lambda _, packet: shift(packet, -hidden))
    assert all_seen(path) == list(range(first, 30))
    assert seen(path, [2, 3]) == [first + 2, first + 3]


def test_a_clip_of_a_cut_counts_from_what_is_shown_first(source: Any, tmp_path: Path) -> None:
    path = copy(source("x264.mp4"), tmp_path / "a.mp4", lambda _, packet: shift(packet, -1.3))
    assert read_header(str(path)).seconds == pytest.approx(1.7)
    assert chosen(path, (0.5, 1.0)) == [18, 19, 20, 21, 22]


@pytest.mark.parametrize("name", ["x264.mkv", "vp8.webm", "x264.mp4"])
@pytest.mark.parametrize("clip", [None, (1, 2)])
def test_a_video_that_starts_late_is_read_as_if_it_started_at_zero(
    name: str, clip: Any, source: Any, tmp_path: Path
) -> None:
    late = copy(source(name), tmp_path / name, lambda _, packet: shift(packet, 100))
    assert chosen(late, clip) == chosen(source(name), clip)


# Uneven frames

BURST = [n / 10 for n in range(20)] + [2.0 + n for n in range(10)]  # 2 s at 10 frames a second, then one a second
PAUSE = [n / 10 for n in range(15)] + [9 + n / 10 for n in range(15)]
TIMED = [name for name in KINDS if name != "bframes.avi"]  # which says in what order frames are decoded only
STILL = [n / 10 for n in range(20)] + [20.0]


@pytest.mark.parametrize("name", TIMED)
@pytest.mark.parametrize("times", [BURST, PAUSE, STILL])
def test_uneven_frames_have_their_own_times(name: str, times: list[float], tmp_path: Path) -> None:
    header = read_header(str(write(tmp_path / name, times)))
    assert header.times[:-1] == tuple(times)
    assert header.seconds >= times[-1]
    assert header.rate == header.num_frames / header.seconds


@pytest.mark.parametrize("name", TIMED)
@pytest.mark.parametrize(
    ("times", "clip", "frames"),
    [
        (BURST, (0, 1), [0, 1, 3, 4, 5, 6, 8, 9]),
        (BURST, (4, 8), [22, 23, 24, 25]),
        (BURST, (4.5, 6.5), [22, 23, 24]),  # each that is shown at some time of it
        (PAUSE, (3, 8), [14]),
        (PAUSE, (8.5, 9.3), [14, 15, 16, 17]),
        (STILL, (1.7, 20), [17, 18, 19]),
    ],
)
def test_a_clip_of_uneven_frames_is_what_is_shown_then(
    name: str, times: list[float], clip: tuple[float, float], frames: list[int], tmp_path: Path
) -> None:
    assert chosen(write(tmp_path / name, times), clip) == frames


@pytest.mark.parametrize("name", ["x264.mp4", "x264.mkv", "vp8.webm"])
def test_frames_are_chosen_by_time(name: str, tmp_path: Path) -> None:
    assert chosen(write(tmp_path / name, BURST)) == [5, 15, 20, 21, 22, 23, 24, 25, 26, 27, 28]  # of 11.1 s


@pytest.mark.parametrize(
    ("times", "clip", "expected"),
    [
        ((*range(9), 9.5, 30.0), None, tuple(range(10))),  # no more frames than pieces: all of them
        ((*(n / 10 for n in range(12)), 9.0), None, tuple(range(3, 12))),
        ((0.0, *(7 + n / 10 for n in range(12)), 9.0), (0, 9), (0, 1, 2, 3, 4, 5, 6, 7, 12)),
        ((*range(5), 90.0), (0, 91), (0, 1, 2, 3, 4)),
    ],
)
def test_no_frame_is_taken_twice(times: tuple[float, ...], clip: Any, expected: tuple[int, ...]) -> None:
    assert choose_frames(VideoHeader(len(times) - 1, 1.0, (1, 1), tuple(map(float, times))), clip) == expected


@pytest.mark.parametrize(("rate", "count"), [(24, 240), (30, 100), (Fraction(30000, 1001), 121), (25, 50), (60, 90)])
def test_even_frames_with_rounded_times_are_chosen_as_ever(rate: Any, count: int, tmp_path: Path) -> None:
    path = write(tmp_path / "vp8.webm", [n / rate for n in range(count)], rate)  # .webm rounds to milliseconds
    header = read_header(str(path))
    assert (header.times, header.rate) == ((), pytest.approx(float(rate)))
    assert choose_frames(header) == choose_frames(VideoHeader(count, float(rate), (1, 1)))


@pytest.mark.parametrize("name", ["x264.mp4", "x264.mkv"])
def test_a_constant_rate_is_found_where_the_header_says_another(name: str, source: Any, tmp_path: Path) -> None:
    path = copy(source("x264.mkv"), tmp_path / name, lambda _, packet: shift(packet, 3))  # 1000 a second in .mkv
    assert read_header(str(path)) == VideoHeader(30, 10, (WIDTH, HEIGHT))


def test_times_of_decoding_do_not_count(source: Any, tmp_path: Path) -> None:
    def stretch(number: int, packet: Any) -> None:  # even dts, uneven pts
        packet.pts += 2000 * (number % 3)

    path = copy(source("mpeg4.mp4"), tmp_path / "a.mp4", stretch)
    assert len(read_header(str(path)).times) == 31


@pytest.mark.parametrize("missing", [1, 15])
def test_a_frame_that_an_avi_leaves_out_keeps_its_time(missing: int, tmp_path: Path) -> None:
    path = write(tmp_path / "mpeg4.avi", EVEN[:missing] + EVEN[missing + 1 :])
    assert chosen(path, (2, 2.3)) == [19, 20, 21]


def test_a_last_frame_that_stays_is_not_missing(tmp_path: Path) -> None:
    path = write(tmp_path / "vp8.webm", [0.0, 1.0, 2.0], 1)
    raw = bytearray(path.read_bytes())
    place = raw.index(b"\x44\x89\x88") + 3  # how long the file is, in milliseconds
    raw[place : place + 8] = struct.pack(">d", 9000.0)
    path.write_bytes(raw)
    assert read_header(str(path)).times == (0.0, 1.0, 2.0, 9.0)
    path.write_bytes(raw[:-1])
    with pytest.raises(DataError, match=r"is a truncated or damaged video: its end is missing"):
        read_header(str(path))


# Faults


def reason(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        chosen(path)
    return caught.value.reason


@pytest.mark.parametrize("name", ["x264.mkv", "vp8.webm", "vp9.webm"])
def test_a_cut_without_a_key_frame_is_refused(name: str, source: Any, tmp_path: Path) -> None:
    path = copy(source(name), tmp_path / name, lambda number, _: 3 <= number < 10)
    assert reason(path) == "has no key frame: none of its 7 frames can be shown. Cut it anew with one"


@pytest.mark.parametrize("first", [3, 5])
def test_a_key_frame_that_is_none_is_refused(first: int, tmp_path: Path) -> None:
    refreshed = write(tmp_path / "refreshed.mp4")
    path = copy(refreshed, tmp_path / "a.mp4", lambda number, _: number >= first)
    assert "its first key frame cannot be decoded by itself" in reason(path)


def test_an_edit_list_that_hides_all_is_refused(source: Any, tmp_path: Path) -> None:
    path = copy(source("mpeg4.mp4"), tmp_path / "a.mp4", lambda _, packet: shift(packet, -60))
    assert re.match(r"hides all of its \d+ frames by an edit list\. Export it again", reason(path))


@pytest.mark.parametrize("name", ["vp8.webm", "x264.mkv"])
def test_frames_of_one_time_are_refused(name: str, source: Any, tmp_path: Path) -> None:
    def stop(_: int, packet: Any) -> None:
        packet.pts = packet.dts = 0

    path = copy(source(name), tmp_path / name, stop)
    assert reason(path) == "gives all of its 30 frames the same time. Convert it anew"


def patched(source: Path, path: Path, old: bytes, new: bytes, skip: int = 0) -> Path:
    raw = bytearray(source.read_bytes())
    place = raw.index(old) + skip
    raw[place : place + len(new)] = new
    path.write_bytes(raw)
    return path


def test_pictures_of_an_unknown_kind_are_refused(source: Any, tmp_path: Path) -> None:
    path = patched(source("x264.mp4"), tmp_path / "a.mp4", b"avc1\0\0\0\0\0\0\0\1", b"zzzz")
    assert reason(path) == "has pictures of a kind that cannot be decoded here. Convert it to .mp4 of H.264"


def test_an_avi_that_ends_between_two_frames_is_refused(source: Any, tmp_path: Path) -> None:
    raw = source("mpeg4.avi").read_bytes()
    path = tmp_path / "a.avi"
    path.write_bytes(raw[: raw.rindex(b"00dc", 0, raw.index(b"idx1"))])
    assert reason(path) == "is a truncated or damaged video: its end is missing. Copy or export it again"


@pytest.mark.parametrize("name", ["x264.mp4", "mpeg4.avi", "x264.mkv", "vp8.webm"])
@pytest.mark.parametrize("share", [0.02, 0.1, 0.3, 0.5, 0.7])
def test_a_part_of_a_file_is_refused(name: str, share: float, source: Any, tmp_path: Path) -> None:
    raw = source(name).read_bytes()
    (tmp_path / name).write_bytes(raw[: int(len(raw) * share)])
    assert reason(tmp_path / name)


@pytest.mark.parametrize("unit", [b"\0\0\0\0", b"\xff\xff\xff\xff", b"\0\0\0\1"])
@pytest.mark.parametrize("clip", [None, (0.5, 1.5)])
def test_a_senseless_unit_of_time_is_no_strangers_fault(unit: bytes, clip: Any, source: Any, tmp_path: Path) -> None:
    path = patched(source("x264.mp4"), tmp_path / "a.mp4", b"mdhd", unit, skip=16)
    with suppress(DataError):
        assert len(chosen(path, clip)) <= 30


@pytest.mark.parametrize("end", [10**400, 1e308])
def test_a_clip_of_a_senseless_end_is_refused(end: float, source: Any) -> None:
    said = [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "A pan."}]
    row = {"id": "v1", "video": "x264.mp4", "clip": [0, end], "conversations": said}
    with pytest.raises(DataError, match=r'"clip" is '):
        parse_record(row, "llava", "train.jsonl:17", 16, source("x264.mp4").parent)
