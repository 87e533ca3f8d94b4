"""Videos of a row: lists of frames or video files, of which frames are taken uniformly and decoded.

Frames are chosen as `Qwen3VLVideoProcessor.sample_frames` of transformers chooses them. Files are read by PyAV, the
extra `video` of this package.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np

from copd_megatron.data.example import Video
from copd_megatron.data.media import Folders, Reference, Unread, checked_reference, located, open_image
from copd_megatron.data.row import BadRow
from copd_megatron.data.settings import SourceSettings, VideoSettings
from copd_megatron.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("mov", "mp4", "matroska", "webm", "avi", "mpeg", "mpegts", "flv", "ogg", "gif")
"""What is read. FFmpeg's playlists are not among them: they name further files, and addresses in the network."""


@dataclass(frozen=True)
class VideoReference:
    """A video that is not loaded yet: a `file`, or its `frames` shown at `fps` frames per second."""

    file: Reference | None
    frames: tuple[Reference, ...] = ()
    fps: float = 0.0


def checked_videos(value: Any, rate: Any, folders: Folders) -> tuple[VideoReference, ...]:
    """What a row gives as videos: files if `rate` is None, else the frames of one video, or of several. Opens nothing.

    `rate` is their frames per second, one number or one per video. Raises BadRow.
    """
    if value is None or value == []:
        return ()
    if rate is None:
        files = value if isinstance(value, list) else [value]
        return tuple(VideoReference(checked_reference(file, folders, "video")) for file in files)
    if not isinstance(value, list):
        raise BadRow("field", f"a video with a rate must be a list of frames, found {repr(value)[:80]}")
    several = all(isinstance(video, list) for video in value)
    videos = value if several else [value]
    rates = rate if isinstance(rate, list) else [rate] * len(videos)
    if len(rates) != len(videos):
        raise BadRow("videos", f"{len(videos)} videos, but rates of {len(rates)}")
    return tuple(_frames(video, fps, folders) for video, fps in zip(videos, rates, strict=True))


def _frames(video: list[Any], fps: Any, folders: Folders) -> VideoReference:
    if not isinstance(fps, int | float) or isinstance(fps, bool) or not 0 < fps < float("inf"):
        raise BadRow("field", f"the rate of a video must be a number of frames per second above 0, found {fps!r}")
    if not video:
        raise BadRow("videos", "a video without frames")
    return VideoReference(None, tuple(checked_reference(frame, folders, "frame") for frame in video), float(fps))


def open_video(reference: VideoReference, folders: Folders, settings: SourceSettings) -> Video:
    """The decoded frames: RGB, of one size. Raises BadRow."""
    video = settings.video
    if reference.file is None:
        total, fps = len(reference.frames), reference.fps
        indices = sampled(total, fps, video)
        frames: list[Image.Image] = []
        for index in indices:
            frames.append(open_image(reference.frames[index], folders, settings.max_pixels))
            if frames[-1].size != frames[0].size:
                sizes = " and ".join(f"{frame.width} x {frame.height}" for frame in (frames[0], frames[-1]))
                raise BadRow("video", f"frame {index} of a video differs from the first: {sizes}; give one size")
            _check_pixels("of frames", len(indices), frames[-1].size, video)
        return Video(tuple(frames), fps, tuple(indices), total)
    return _decoded(reference.file, folders, settings)


def sampled(total: int, fps: float, video: VideoSettings) -> list[int]:
    """Numbers of the frames that are taken of `total` frames shown at `fps` per second, first and last among them."""
    count = min(max(int(total / fps * video.fps), video.min_frames), video.max_frames, total)
    return [int(index) for index in np.linspace(0, total - 1, count).round()]


def check_decoder() -> None:
    """Raises DataError where video files cannot be read."""
    if importlib.util.find_spec("av") is None:
        raise DataError(
            "video files need PyAV: pip install 'copd-megatron[video]', or give frames as images and their rate with "
            "fields.video_fps"
        )


def _decoded(file: Reference, folders: Folders, settings: SourceSettings) -> Video:
    name = repr(file) if isinstance(file, str) else "in the row"
    with _opened(file, name, folders, settings.video) as container:
        stream = next(iter(container.streams.video), None)
        if stream is None or not stream.average_rate:
            raise BadRow("video", f"video {name} has no stream of pictures with a frame rate")
        size = (stream.width, stream.height)
        if size[0] * size[1] > settings.max_pixels:
            raise BadRow(
                "video", f"video {name} has {size[0]} x {size[1]} pixels; the limit max_pixels is {settings.max_pixels}"
            )
        # Some containers do not say how many frames they have; their packets do.
        total = stream.frames or sum(packet.size > 0 for packet in container.demux(stream))
        if not total:
            raise BadRow("video", f"video {name} has no frames")
        indices = sampled(total, float(stream.average_rate), settings.video)
        _check_pixels(name, len(indices), size, settings.video)
        container.seek(0)
        frames = _taken(container, indices)
        if len(frames) < len(indices):
            raise BadRow("video", f"video {name} ends before frame {indices[len(frames)]} of the {total} that it names")
        return Video(tuple(frames), float(stream.average_rate), tuple(indices), total)


def _taken(container: Any, indices: Sequence[int]) -> list[Image.Image]:
    """The frames of these ascending numbers, as far as there are that many."""
    frames: list[Image.Image] = []
    for number, frame in enumerate(container.decode(video=0)):
        if number == indices[len(frames)]:
            frames.append(frame.to_image())
            if len(frames) == len(indices):
                break
    return frames


@contextmanager
def _opened(file: Reference, name: str, folders: Folders, video: VideoSettings) -> Iterator[Any]:
    """A container of the formats that are read. Raises BadRow, also for what fails inside the block."""
    import av

    if isinstance(file, str):
        path = located(file, folders, "video")
        source: Any = str(path)
        size = path.stat().st_size
    elif isinstance(file, bytes):
        source, size = BytesIO(file), len(file)
    else:
        raise BadRow("video", "video in the row was not read" if isinstance(file, Unread) else "a picture is no video")
    if size > video.max_bytes:
        raise BadRow("video", f"video {name} has {size} bytes; the limit video.max_bytes is {video.max_bytes}")
    try:
        with av.open(
            source, options={"format_whitelist": ",".join(FORMATS), "protocol_whitelist": "file"}
        ) as container:
            yield container
    except (av.FFmpegError, OSError, ValueError) as error:
        raise BadRow("video", f"video {name} is none of {', '.join(FORMATS)}, or damaged: {error}") from error


def _check_pixels(name: str, frames: int, size: tuple[int, int], video: VideoSettings) -> None:
    pixels = frames * size[0] * size[1]
    if pixels > video.max_pixels:
        raise BadRow(
            "video",
            f"video {name}: {frames} frames of {size[0]} x {size[1]} are {pixels} pixels; the limit video.max_pixels "
            f"is {video.max_pixels}: lower video.fps or video.max_frames, or give smaller frames",
        )
