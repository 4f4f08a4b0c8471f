"""Frames by their own times: parts cut out without encoding anew, edit lists, uneven frames, and what is refused."""

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from vlm_tune.data.formats import parse_record
from vlm_tune.data.videos import VideoHeader, choose_frames, read_frames, read_header
from vlm_tune.errors import DataError

WIDTH, HEIGHT, STEP = 64, 48, 8  # of grey from frame to frame
EVEN = [Fraction(n, 10) for n in range(30)]
KINDS = {  # B-frames in "x264" and "bframes"; a key frame every 12
    "x264.mp4": ("libx264", {}),
    "x264.mov": ("libx264", {}),
    "x264.mkv": ("libx264", {}),
    "mpeg4.mp4": ("mpeg4", {}),
    "mpeg4.avi": ("mpeg4", {}),
    "vp8.webm": ("libvpx", {}),
    "vp9.webm": ("libvpx-vp9", {}),
}


def write(path: Path, times: Sequence[Fraction | float] = EVEN, rate: int = 10, **options: Any) -> Path:
    """Write a video whose frame n is grey of 8 * n, shown at `times[n]` seconds."""
    codec, settings = KINDS.get(path.name, ("libx264", {}))
    unit = Fraction(1, rate) if codec == "mpeg4" else Fraction(1, 3000)  # .avi and its codec know even times only
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=rate, options={"g": "12", "qmin": "2", "qmax": "2", **settings})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.codec_context.time_base = unit
        for number, time in enumerate(times):
            pixels = np.full((HEIGHT, WIDTH, 3), STEP * number % 256, np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = round(time / unit), unit
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def copy(source: Path, path: Path, change: Callable[[int, Any], bool | None]) -> Path:
    """Copy a video without encoding it anew; `change` may change a packet, and leave it out by False."""
    with av.open(str(source)) as read, av.open(str(path), "w") as written:
        stream = written.add_stream_from_template(read.streams.video[0])
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
STILL = [n / 10 for n in range(20)] + [20.0]
UNEVEN_KINDS = [*KINDS, "av1.webm"]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("times", [BURST, PAUSE, STILL])
def test_uneven_frames_have_their_own_times(name: str, times: list[float], tmp_path: Path) -> None:
    header = read_header(str(write(tmp_path / name, times)))
    assert header.times[:-1] == tuple(times)
    assert header.seconds >= times[-1]
    assert header.rate == header.num_frames / header.seconds


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(
    ("times", "clip", "frames"),
    [
        (BURST, (0, 1), [0, 1, 2, 3, 5, 6, 7, 8]),
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
