"""Videos that were cut without encoding anew, and such whose frames come unevenly: the stamps of the frames decide."""

from array import array
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from vlm_tune.data.videos import VideoHeader, choose_frames, read_frames, read_header
from vlm_tune.errors import DataError

WIDTH, HEIGHT = 64, 48
EVEN = [number / 10 for number in range(50)]
UNEVEN = [n / 10 for n in range(20)] + [2 + n / 2 for n in range(10)] + [7 + n / 25 for n in range(20)]
KINDS = {
    "x264.mp4": ("libx264", {"g": "12"}),  # with B-frames
    "one_key.mp4": ("libx264", {"g": "50", "bf": "3"}),
    "x264.mov": ("libx264", {"g": "12"}),
    "mpeg4.mp4": ("mpeg4", {"g": "12"}),
    "vp9.webm": ("libvpx-vp9", {"g": "12"}),
    "x264.mkv": ("libx264", {"g": "12"}),
    "x264.ts": ("libx264", {"g": "12"}),
    "mpeg4.avi": ("mpeg4", {"g": "12"}),
}


def write(path: Path, times: list[float]) -> Path:
    """Write a video whose frame n is grey of 5 * n and is shown at times[n]."""
    codec, options = KINDS[path.name]
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=10, options=options)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for number, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(np.full((HEIGHT, WIDTH, 3), 5 * number, np.uint8), format="rgb24")
            frame.pts, frame.time_base = round(1000 * time), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def cut(source: Path, start: float) -> Path:
    """Copy the packets from the key frame before `start` on, so that `start` becomes 0: .mp4 hides what is before."""
    target = source.with_name(f"cut_{source.name}")
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        stream = old.streams.video[0]
        copy = new.add_stream_from_template(stream)
        assert stream.time_base is not None
        first = int(start / stream.time_base)
        old.seek(first, stream=stream)
        for packet in old.demux(stream):
            if packet.dts is not None and packet.pts is not None:
                packet.pts, packet.dts, packet.stream = packet.pts - first, packet.dts - first, copy
                new.mux(packet)
    return target


def shown(path: Path, numbers: Any = None) -> list[int]:
    """Name the frames by their grey."""
    numbers = range(read_header(str(path)).num_frames) if numbers is None else numbers
    return [round(float(np.asarray(image).mean()) / 5) for image in read_frames(str(path), numbers)]


@pytest.mark.parametrize("times", [EVEN, UNEVEN], ids=["even", "uneven"])
@pytest.mark.parametrize("name", ["x264.mp4", "one_key.mp4", "x264.mov"])
def test_a_cut_that_hides_its_beginning_shows_the_rest(name: str, times: list[float], tmp_path: Path) -> None:
    path = cut(write(tmp_path / name, times), 1.75)
    assert shown(path) == list(range(18, 50))
    assert shown(path, [0]) == [18]
    assert shown(path, [31]) == [49]


@pytest.mark.parametrize("name", ["x264.mkv", "x264.ts"])
def test_frames_before_the_first_key_frame_do_not_count(name: str, tmp_path: Path) -> None:
    path = cut(write(tmp_path / name, EVEN), 1.75)
    assert shown(path) == list(range(24, 50))


@pytest.mark.parametrize("name", KINDS)
def test_times_are_those_of_the_frames(name: str, tmp_path: Path) -> None:
    header = read_header(str(write(tmp_path / name, UNEVEN)))
    np.testing.assert_allclose(header.times, UNEVEN, atol=0.0015)
    assert header.rate is None


@pytest.mark.parametrize("name", ["x264.mp4", "vp9.webm", "x264.mkv"])
@pytest.mark.parametrize(("clip", "expected"), [((2, 6), range(20, 28)), ((2.2, 3.4), range(20, 23))])
def test_a_clip_of_uneven_frames_is_what_is_on_the_screen(name, clip, expected, tmp_path: Path) -> None:
    path = write(tmp_path / name, UNEVEN)
    assert choose_frames(read_header(str(path)), clip) == tuple(expected)
    assert shown(path, expected) == list(expected)


def test_a_long_last_frame_is_no_damage(tmp_path: Path) -> None:
    path = write(tmp_path / "vp9.webm", [0, 0.1, 0.2, 3.0])
    header = read_header(str(path))
    assert header.num_frames == 4
    assert header.seconds >= 3.0


@pytest.mark.parametrize(("tick", "rate"), [(1e-3, 30), (1e-3, 60), (1 / 600, 29.97), (1 / 90000, 25)])
def test_rounded_stamps_choose_as_exact_ones(tick: float, rate: float) -> None:
    exact = array("d", [n / rate for n in range(600)])
    rounded = array("d", [round(time / tick) * tick for time in exact])
    headers = [VideoHeader(times, 600 / rate, (1, 1), tick) for times in (exact, rounded)]
    for clip in (None, (1, 3), (2.5, 7.25), (1 / 3, 2 / 3)):
        assert choose_frames(headers[0], clip) == choose_frames(headers[1], clip)


@pytest.mark.parametrize("name", ["x264.mkv", "vp9.webm", "mpeg4.avi"])
def test_a_file_without_its_end_is_found(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, UNEVEN)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DataError, match="is a truncated or damaged video: its end is missing"):
        read_header(str(path))
