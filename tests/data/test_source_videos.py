"""Videos of a source: files and lists of frames, which frames are taken, what is refused."""

from __future__ import annotations

import importlib.util
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from copd_megatron.data.settings import FieldMap, SourceSettings, VideoSettings
from copd_megatron.data.sources import Source, open_source
from copd_megatron.data.video import sampled
from copd_megatron.errors import DataError

VIDEO, IMAGE = {"type": "video"}, {"type": "image"}


def text(content: str) -> dict[str, str]:
    return {"type": "text", "text": content}


def pixels(number: int, width: int = 16, height: int = 8) -> np.ndarray:
    """Frame `number` of every clip."""
    return np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)


def write_clip(
    target: Path | io.BytesIO, frames: int, fps: int = 10, width: int = 16, height: int = 8, kind: str = "matroska"
) -> None:
    """A video file without loss."""
    import av

    with av.open(target, "w", format=kind, options={"movflags": "faststart"} if kind == "mov" else {}) as container:
        stream = container.add_stream("ffv1" if kind == "matroska" else "png", rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, height, "bgr0" if kind == "matroska" else "rgb24"
        for number in range(frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels(number, width, height), format="rgb24")))
        container.mux(stream.encode())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "clips").mkdir()
    write_clip(tmp_path / "clips" / "a.mkv", frames=30)
    write_clip(tmp_path / "clips" / "b.mov", frames=12, fps=6, kind="mov")
    for number in range(12):
        Image.fromarray(pixels(number)).save(tmp_path / "clips" / f"{number}.png")
    return tmp_path


def open_rows(folder: Path, *rows: dict[str, Any], frames: bool = False, **settings: Any) -> Source:
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps({"answer": "1"} | row) + "\n" for row in rows))
    names = FieldMap(videos="videos", video_fps="fps" if frames else None, **settings.pop("fields", {}))
    return open_source(SourceSettings(path=str(path), verifier="exact", fields=names, **settings))


def numbers(frames: Sequence[Image.Image]) -> list[int]:
    """Which frames of a clip these are."""
    known = {pixels(number).tobytes(): number for number in range(30)}
    return [known[np.asarray(frame).tobytes()] for frame in frames]


def listed(count: int, start: int = 0) -> list[str]:
    return [f"clips/{number}.png" for number in range(start, start + count)]


def test_files_are_read_beside_the_data_file_and_sampled_at_the_rate_of_the_settings(folder: Path) -> None:
    example = open_rows(folder, {"prompt": "?", "videos": ["clips/a.mkv", "clips/b.mov"]})[0]
    first, second = example.videos
    assert first.indices == (0, 6, 12, 17, 23, 29), "3 seconds, 2 frames in each"
    assert second.indices == (0, 4, 7, 11)
    for video, fps, total in ((first, 10.0, 30), (second, 6.0, 12)):
        assert (video.fps, video.total) == (fps, total)
        assert numbers(video.frames) == list(video.indices)
        assert {(frame.mode, frame.size) for frame in video.frames} == {("RGB", (16, 8))}
    assert example.messages == [{"role": "user", "content": [VIDEO, VIDEO, text("?")]}]


def test_the_same_frames_are_taken_as_by_transformers() -> None:
    from copd_megatron.policy.platform import declare_torchvision_schemas

    declare_torchvision_schemas()
    from transformers import Qwen3VLVideoProcessor
    from transformers.video_utils import VideoMetadata

    processor = Qwen3VLVideoProcessor()
    for total in (1, 3, 4, 5, 29, 100, 999, 40_000):
        for fps in (0.5, 2.0, 23.976, 30.0):
            for wanted in (0.5, 2.0, 7.0):
                expected = processor.sample_frames(VideoMetadata(total, fps), fps=wanted)
                assert sampled(total, fps, VideoSettings(fps=wanted)) == expected.tolist()


def test_lists_of_frames_have_a_rate_and_are_sampled_likewise(folder: Path) -> None:
    rows = [
        {"prompt": "?", "videos": listed(12), "fps": 6},
        {"prompt": "?", "videos": [listed(4), listed(2, start=4)], "fps": [4.0, 1]},
        {"prompt": "?", "videos": [listed(2), listed(2, start=2)], "fps": 1},
        {"prompt": "?", "videos": None, "fps": None},
        {"prompt": "?", "videos": [], "fps": []},
    ]
    one, several, alike, *none = (example.videos for example in open_rows(folder, *rows, frames=True))
    assert [(video.indices, video.fps, video.total) for video in one] == [((0, 4, 7, 11), 6.0, 12)]
    assert numbers(one[0].frames) == [0, 4, 7, 11]
    assert [numbers(video.frames) for video in several] == [[0, 1, 2, 3], [4, 5]]
    assert [video.fps for video in several] == [4.0, 1.0]
    assert [video.fps for video in alike] == [1.0, 1.0]
    assert none == [(), ()]


def test_only_the_taken_frames_are_opened(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_rows(folder, {"prompt": "?", "videos": listed(12), "fps": 6}, frames=True, video={"max_frames": 4})
    (folder / "clips" / "5.png").unlink()
    assert numbers(source[0].videos[0].frames) == [0, 4, 7, 11]
    (folder / "clips" / "7.png").unlink()
    with pytest.raises(DataError, match=r"line 1: image 'clips/7\.png': no such file"):
        source[0]


@pytest.mark.parametrize("frames", [False, True])
def test_tables_hold_files_and_frames_as_bytes(folder: Path, frames: bool) -> None:
    import pyarrow
    import pyarrow.parquet

    file = io.BytesIO()
    write_clip(file, frames=8, fps=2)
    stills = [(folder / name).read_bytes() for name in listed(4)]
    videos = [[stills, stills[:2]], []] if frames else [[file.getvalue()], []]
    columns = {"prompt": ["<video>?" + "<video>" * frames, "?"], "answer": ["1", "2"], "videos": videos}
    table = pyarrow.table(columns | ({"fps": [[1.0, 2.0], []]} if frames else {}))
    pyarrow.parquet.write_table(table, folder / "rows.parquet")
    fields = FieldMap(videos="videos", video_fps="fps" if frames else None)
    source = open_source(SourceSettings(path=str(folder / "rows.parquet"), verifier="exact", fields=fields))
    assert [len(example.videos) for example in source] == [1 + frames, 0]
    first = source[0]
    assert [numbers(video.frames) for video in first.videos] == ([[0, 1, 2, 3], [0, 1]] if frames else [[*range(8)]])
    assert first.messages[0]["content"] == [VIDEO, text("?"), *[VIDEO] * frames]


def test_images_and_videos_stand_where_their_marks_are(folder: Path) -> None:
    row = {"prompt": "a <video> b <image> c", "videos": "clips/b.mov", "images": ["clips/0.png"]}
    source = open_rows(folder, row, row | {"prompt": "look: <image>"}, fields={"images": "images"})
    assert source[0].messages[0]["content"] == [text("a "), VIDEO, text(" b "), IMAGE, text(" c")]
    assert source[1].messages[0]["content"] == [VIDEO, text("look: "), IMAGE]
    renamed = open_rows(folder, {"prompt": "[V]<video>", "videos": "clips/b.mov"}, video_placeholder="[V]")
    assert renamed[0].messages[0]["content"] == [VIDEO, text("<video>")]


def test_messages_may_have_video_parts(folder: Path) -> None:
    turns = [{"role": "user", "content": [text("what?"), VIDEO]}]
    source = open_rows(folder, {"turns": turns, "videos": "clips/b.mov"}, fields={"messages": "turns"})
    assert source[0].messages == turns
    extra = [{"role": "user", "content": [{"type": "video", "video": "clips/b.mov"}]}]
    with pytest.raises(DataError, match=r"found 'video'; video parts mark the place, fields\.videos has what goes"):
        open_rows(folder, {"turns": extra, "videos": "clips/b.mov"}, fields={"messages": "turns"})


def test_places_and_videos_must_agree(folder: Path) -> None:
    with pytest.raises(DataError, match="line 1: 2 places for videos in the messages, but 1 videos"):
        open_rows(folder, {"prompt": "<video><video>", "videos": "clips/b.mov"})


@pytest.mark.parametrize(
    ("videos", "message"),
    [
        ("/etc/hostname", "video '/etc/hostname' is an absolute path"),
        ("../a.mkv", "leads out of"),
        ("https://example.org/a.mp4", "is a URL"),
        (7, "a video must be a path or bytes"),
    ],
)
def test_paths_that_lead_elsewhere_are_refused_at_once(folder: Path, videos: object, message: str) -> None:
    with pytest.raises(DataError, match=f"train.jsonl, line 1: .*{message}"):
        open_rows(folder, {"prompt": "?", "videos": videos})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"videos": "clips/a.mkv", "fps": 2}, "a video with a rate must be a list of frames"),
        ({"videos": ["../0.png"], "fps": 2}, "frame '../0.png' leads out of"),
        ({"videos": listed(2), "fps": 0}, "must be a number of frames per second above 0, found 0"),
        ({"videos": listed(2), "fps": "2"}, "must be a number of frames per second above 0, found '2'"),
        ({"videos": listed(2), "fps": None}, "field 'fps': expected the videos' frames per second, found null"),
        ({"videos": listed(2)}, "field 'fps' is missing"),
        ({"videos": [[]], "fps": 1}, "a video without frames"),
        ({"videos": [listed(2)], "fps": [1, 2]}, "1 videos, but rates of 2"),
    ],
)
def test_frames_that_cannot_be_used_are_refused_at_once(folder: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=f"line 1: .*{message}"):
        open_rows(folder, {"prompt": "?"} | row, frames=True)


def bad_files(folder: Path) -> dict[str, bytes | None]:
    whole = (folder / "clips" / "b.mov").read_bytes()
    short = io.BytesIO()
    write_clip(short, frames=12, fps=6, kind="avi")
    return {
        "missing": None,
        "text": b"not a video",
        "cut": whole[: len(whole) // 2],
        "short": b"00dc".join(short.getvalue().split(b"00dc")[:8]),  # the header and seven frames
        "playlist": b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile:///etc/hostname\n#EXT-X-ENDLIST\n",
        "list": b"ffconcat version 1.0\nfile a.mkv\n",
    }


@pytest.mark.parametrize(
    ("kind", "reason", "message"),
    [
        ("missing", "path", "video 'clips/bad.mkv': no such file in"),
        ("text", "video", "video 'clips/bad.mkv' is none of mov, mp4"),
        ("cut", "video", "video 'clips/bad.mkv' is none of mov, mp4"),
        ("short", "video", "video 'clips/bad.mkv' ends before frame 7 of the 12 that it names"),
        ("playlist", "video", "video 'clips/bad.mkv' is none of mov, mp4"),
        ("list", "video", "video 'clips/bad.mkv' is none of mov, mp4"),
    ],
)
def test_bad_video_is_reported_with_its_line_or_replaced_by_the_next_row(
    folder: Path, kind: str, reason: str, message: str
) -> None:
    content = bad_files(folder)[kind]
    if content is not None:
        (folder / "clips" / "bad.mkv").write_bytes(content)
    rows = [{"prompt": str(n), "videos": f"clips/{name}"} for n, name in enumerate(["a.mkv", "bad.mkv", "b.mov"])]
    source = open_rows(folder, *rows)
    with pytest.raises(DataError, match=f"train.jsonl, line 2: {message}"):
        source[1]
    source = open_rows(folder, *rows, on_error="skip")
    assert [example.uid.rpartition(":")[2] for example in source] == ["1", "3", "3"]
    assert source.skipped == {reason: 1}


def test_videos_beyond_the_limits_are_refused_before_they_are_decoded(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {"prompt": "?", "videos": "clips/a.mkv"}
    for settings, message in (
        ({"video": {"max_bytes": 100}}, "has [0-9]+ bytes; the limit video.max_bytes is 100"),
        ({"max_pixels": 127}, "has 16 x 8 pixels; the limit max_pixels is 127"),
        ({"video": {"max_pixels": 767}}, "6 frames of 16 x 8 are 768 pixels; the limit video.max_pixels is 767"),
    ):
        with pytest.raises(DataError, match=message):
            open_rows(folder, row, **settings)[0]
    assert len(open_rows(folder, row, video={"max_pixels": 768})[0].videos[0].frames) == 6
    frames = {"prompt": "?", "videos": listed(4), "fps": 2}
    with pytest.raises(DataError, match="4 frames of 16 x 8 are 512 pixels"):
        open_rows(folder, frames, frames=True, video={"max_pixels": 511})[0]


def test_frames_of_one_video_are_of_one_size(folder: Path) -> None:
    Image.new("RGB", (8, 8)).save(folder / "clips" / "2.png")
    with pytest.raises(DataError, match="frame 2 of a video differs from the first: 16 x 8 and 8 x 8"):
        open_rows(folder, {"prompt": "?", "videos": listed(4), "fps": 2}, frames=True)[0]


def test_without_pyav_files_are_refused_with_the_remedy_and_frames_are_not(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "av" else find(name, *rest))
    with pytest.raises(DataError, match=r"video files need PyAV: pip install 'copd-megatron\[video\]'"):
        open_rows(folder, {"prompt": "?", "videos": "clips/a.mkv"})
    assert len(open_rows(folder, {"prompt": "?", "videos": listed(4), "fps": 2}, frames=True)) == 1


@pytest.mark.parametrize(
    "wrong", [{"fps": 0}, {"max_frames": 1}, {"min_frames": 9, "max_frames": 8}, {"frames": 3}, {"max_bytes": 0}]
)
def test_wrong_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        VideoSettings(**wrong)
    with pytest.raises(ValidationError, match="say with `videos` which field has them"):
        FieldMap(video_fps="fps")
