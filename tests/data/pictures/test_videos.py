"""Frames of video files: as many as the header says, those that were chosen, and each fault by its name."""

import json
import sys
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from vlm_tune.config.parse import load_config
from vlm_tune.config.schema import ImageConfig
from vlm_tune.data.datamodule import DataModule
from vlm_tune.data.dialects.dialects import parse_record
from vlm_tune.data.pictures.feature_cache import FeatureCache
from vlm_tune.data.pictures.images import ImageReader
from vlm_tune.data.pictures.videos import VideoHeader, choose_frames, read_frames, read_header
from vlm_tune.data.sample import Picture, Sample
from vlm_tune.errors import DataError
from vlm_tune.inspection.check import check_file
from vlm_tune.model.encoder import build_encoder

WIDTH, HEIGHT, RATE = 64, 48, 10
KINDS = {  # file -> codec and its options; B-frames, several key frames and none behind the first
    "a.mp4": ("libx264", {"g": "12"}),
    "b.mp4": ("mpeg4", {"bf": "2"}),
    "fragments.mp4": ("libx264", {"g": "12"}),
    "a.mov": ("libx264", {}),
    "a.avi": ("mpeg4", {"bf": "2"}),
    "a.mkv": ("libx264", {"g": "7"}),
    "a.webm": ("libvpx", {"auto-alt-ref": "1", "lag-in-frames": "16"}),
    "a.gif": ("gif", {}),
}


def write_video(path: Path, num_frames: int = 50, turned: int = 0, **options: str) -> Path:
    """Write a video whose frame n is grey of 5 * n, a white spot in its upper left corner."""
    codec, settings = KINDS.get(path.name, ("libx264", {}))
    container_options = {"movflags": "frag_keyframe+empty_moov"} if path.name.startswith("fragments") else options
    with av.open(str(path), "w", options=container_options) as container:
        stream: Any = container.add_stream(codec, rate=RATE, options=settings)
        stream.width, stream.height = WIDTH, HEIGHT
        stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
        if turned:
            stream.set_display_rotation(turned)
        for number in range(num_frames):
            pixels = np.full((HEIGHT, WIDTH, 3), 5 * number % 256, np.uint8)
            pixels[:16, :16] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def grey(image: Any) -> float:
    return float(np.asarray(image)[HEIGHT // 2 :].mean())


def row(**fields: Any) -> dict[str, Any]:
    said = [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "A pan."}]
    return {"id": "v1", "conversations": said, **fields}


def parse(folder: Path, **fields: Any) -> Sample:
    return parse_record(row(**fields), "llava", "train.jsonl:17", 16, folder)


# Which frames


@pytest.mark.parametrize(
    ("num_frames", "rate", "clip", "expected"),
    [
        (50, 10, None, (2, 8, 14, 21, 27, 33, 39, 46)),  # 5 seconds: no fewer than 8
        (8, 10, None, tuple(range(8))),
        (3, 10, None, (0, 1, 2)),  # InternVL would show the last one again and again
        (12 * 30, 30, None, tuple(range(14, 360, 30))),  # one a second
        (50, 10, (1, 3), (10, 13, 15, 18, 20, 23, 25, 28)),
        (50, 10, (4.9, 5.0), (49,)),
        (50, 10, (4, 5.9), (40, 41, 42, 43, 45, 46, 47, 48)),  # people round
    ],
)
def test_frames_are_the_middles_of_even_pieces(num_frames, rate, clip, expected) -> None:
    assert choose_frames(VideoHeader(num_frames, rate, (1, 1)), clip) == expected


def test_a_long_video_gives_32_frames() -> None:
    chosen = choose_frames(VideoHeader(30 * 3600, 30, (1, 1)))
    assert len(chosen) == 32
    assert chosen[0] == (30 * 3600 // 32 - 1) // 2


@pytest.mark.parametrize(("clip", "end"), [((5, 6), 6), ((6, 9), 9), ((0, 7), 7)])
def test_a_clip_out_of_the_video_is_refused(clip, end) -> None:
    with pytest.raises(DataError, match=rf'is 5.00 s long, "clip" is {clip[0]} to {end} s. Give a part'):
        choose_frames(VideoHeader(50, 10, (1, 1)), clip)


@pytest.mark.parametrize("name", KINDS)
def test_the_frames_that_are_chosen_are_those_that_are_decoded(name: str, tmp_path: Path) -> None:
    path = str(write_video(tmp_path / name))
    header = read_header(path)
    assert header == VideoHeader(50, 10, (WIDTH, HEIGHT))
    for numbers in (choose_frames(header), (0, 1, 2, 49), (47,), tuple(range(50))):
        seen = [grey(image) for image in read_frames(path, numbers)]
        np.testing.assert_allclose(seen, [5 * number for number in numbers], atol=5)


def test_frames_are_counted_without_their_bytes(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4")
    raw = path.read_bytes()
    start, end = raw.index(b"mdat") + 4, raw.index(b"moov") - 4
    path.write_bytes(raw[:start] + bytes(end - start) + raw[end:])
    header = read_header(str(path))
    assert header.num_frames == 50
    with pytest.raises(DataError, match="is a truncated or damaged video: "):
        list(read_frames(str(path), choose_frames(header)))


@pytest.mark.parametrize(
    ("turned", "size", "corner"), [(90, (HEIGHT, WIDTH), (-8, 8)), (180, (WIDTH, HEIGHT), (-8, -8))]
)
def test_a_phones_turn_is_honoured(turned: int, size: tuple[int, int], corner: tuple[int, int], tmp_path: Path) -> None:
    path = write_video(tmp_path / "t.mp4", 9, turned)
    image = next(read_frames(str(path), [1]))
    assert image.size == size
    assert np.asarray(image)[corner].mean() > 200  # counterclockwise: the upper left corner comes to the lower left


# In a row


def test_a_video_file_becomes_frames_in_the_text(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", 3)
    parts = parse(tmp_path, video="a.mp4").messages[0].parts
    frames = [Picture("a.mp4", is_frame=True, frame=number) for number in range(3)]
    assert parts == ("Frame-1: ", frames[0], "\nFrame-2: ", frames[1], "\nFrame-3: ", frames[2], "\nWhat?")


def test_a_clip_limits_the_frames(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4")
    numbers = [picture.frame for picture in parse(tmp_path, video="a.mp4", clip=[1, 3]).pictures]
    assert numbers == [10, 13, 15, 18, 20, 23, 25, 28]


def write_faulty(folder: Path) -> None:
    whole = write_video(folder / "a.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    front = write_video(folder / "front.mp4", movflags="faststart").read_bytes()
    (folder / "front.mp4").write_bytes(front[:-9])
    for name in ("a.mkv", "a.webm", "a.avi", "a.gif", "fragments.mp4"):
        raw = write_video(folder / name).read_bytes()
        (folder / f"cut_{name}").write_bytes(raw[: int(len(raw) * 0.8)])
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("#EXTM3U\nhttp://127.0.0.1/a.ts\n")
    with av.open(str(folder / "sound.mp4"), "w") as container:
        stream: Any = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faulty")
    write_faulty(folder)
    return folder


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"video": "b.mp4"}, r'video "b.mp4" is not there'),
        ({"video": "../a.mp4"}, r"lies outside of the image root"),
        ({"video": "cut.mp4"}, r'video "cut.mp4" is a truncated or damaged video: its end is missing'),
        ({"video": "front.mp4"}, r"is a truncated or damaged video: its end is missing"),
        ({"video": "cut_a.mkv"}, r"is a truncated or damaged video: its end is missing"),
        ({"video": "cut_a.webm"}, r"is a truncated or damaged video: "),
        ({"video": "cut_a.avi"}, r"is a truncated or damaged video: "),
        ({"video": "cut_a.gif"}, r"is a truncated or damaged video: its end is missing"),
        ({"video": "cut_fragments.mp4"}, r"is a truncated or damaged video: its end is missing"),
        ({"video": "empty.mp4"}, r'video "empty.mp4" is empty \(0 bytes\)'),
        ({"video": "text.mp4"}, r"is not a video of a known kind \(it starts with b'#EXTM3U"),
        ({"video": "sound.mp4"}, r"has no video stream"),
        ({"video": "a.mp4", "clip": [3, 1]}, r'"clip" is \[3, 1\]. Write \[start, end\] in seconds'),
        ({"video": "a.mp4", "clip": [1, "2"]}, r'"clip" is \[1, \'2\'\]. Write'),
        ({"video": "a.mp4", "clip": 7}, r'"clip" is 7. Write'),
        ({"video": "a.mp4", "clip": [9, 12]}, r'video "a.mp4" is 5.00 s long, "clip" is 9 to 12 s'),
    ],
)
def test_faults_of_videos_name_the_row(fields: dict[str, Any], reason: str, faulty: Path) -> None:
    with pytest.raises(DataError, match=rf'train.jsonl:17 \(id "v1"\): .*{reason}'):
        parse(faulty, **fields)


def test_a_link_out_of_the_root_is_refused(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "a.mp4").symlink_to(write_video(tmp_path / "a.mp4"))
    with pytest.raises(DataError, match=r"lies outside of the image root"):
        parse(tmp_path / "root", video="a.mp4")


def test_frames_of_too_many_pixels_are_refused(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4")
    reader = ImageReader(ImageConfig(max_pixels=1000), tmp_path)
    with pytest.raises(DataError, match=r'video "a.mp4" is too large: 64 x 48 pixels, data.image.max_pixels=1000'):
        reader.read_size(Picture("a.mp4", is_frame=True, frame=0))


def test_without_the_decoder_the_fault_is_not_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "a.mp4")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(DataError, match=r"needs the package av: .* pip install av"):
        read_header(str(path))


def test_a_file_that_changes_is_read_anew(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 20)
    assert read_header(str(path)).num_frames == 20
    write_video(tmp_path / "a.mp4", 30)
    assert read_header(str(path)).num_frames == 30


def test_the_row_in_the_documentation_is_read(tmp_path: Path) -> None:
    page = (Path(__file__).parents[3] / "docs" / "data_format.md").read_text(encoding="utf-8")
    example = json.loads(page.split("## Videos")[1].split("```json\n")[1].split("\n```")[0])
    write_video(tmp_path / example["video"])
    sample = parse_record(example, "auto", "train.jsonl:1", 0, tmp_path)
    assert [picture.frame for picture in sample.pictures] == [7, 12, 17, 22, 27, 32, 37, 42]


# In training


def test_frames_have_keys_of_their_own_in_the_feature_cache(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4")
    write_video(tmp_path / "b.mkv", 40)
    reader, cache = ImageReader(ImageConfig(), tmp_path), FeatureCache(tmp_path)
    frames = [Picture(name, is_frame=True, frame=number) for name in ("a.mp4", "b.mkv") for number in (1, 11)]
    assert len({cache.key(reader.read_content(frame), 1) for frame in frames}) == 4


def test_a_videos_row_is_trained_with_one_tile_a_frame(
    tmp_path: Path, parts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLM_TUNE_CACHE", str(tmp_path / "cache"))
    write_video(tmp_path / "a.mp4")
    (tmp_path / "train.jsonl").write_text(json.dumps(row(video="a.mp4")) + "\n")
    config = load_config(["data=own", *parts, f"data.path={tmp_path}/train.jsonl", "data.val=none"])
    module = DataModule(config, build_encoder(config)[0])
    module.setup()
    assert module.train is not None
    assert module.train.index.tiles.tolist() == [8]
    batch = next(iter(module.train_dataloader()))
    assert batch.tiles is not None
    seen = [grey(tile.numpy()[:, -9:]) for tile in batch.tiles]
    np.testing.assert_allclose(seen, [5 * number for number in (2, 8, 14, 21, 27, 33, 39, 46)], atol=5)


def test_check_lists_a_truncated_video(faulty: Path, parts: list[str], tmp_path: Path) -> None:
    rows = [row(video="a.mp4"), row(video="front.mp4") | {"id": "v2"}]
    (faulty / "train.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    config = load_config(["data=own", *parts, f"data.path={faulty}/train.jsonl"])
    found = check_file(config, build_encoder(config)[0], faulty / "train.jsonl")
    assert [(fault.kind, fault.row, fault.id) for fault in found.faults] == [("video", 1, "v2")]
    assert found.images == {"found": 8}
