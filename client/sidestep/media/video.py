"""Videos: frames, which the daemon encodes, or a file.

- frames leave the worker as they are, copied once; their range is treated as that of images
- mp4 and webm are encoded by PyAV, which the daemon's extra `video` brings; gif by Pillow
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from sidestep.errors import UnsupportedValue
from sidestep.media import arrays
from sidestep.media.audio import file_of, of_path
from sidestep.media.base import Files
from sidestep.media.value import Content, Value, given, text_or_none

FORMATS = ("gif", "mp4", "webm", "ogg")
ENCODERS = {"mp4": "libx264", "webm": "libvpx-vp9"}
FPS = 4
"""wandb's."""


class Video(Value):
    """A video: frames TxCxHxW or TxHxWxC, several side by side as BxTxCxHxW, a path, or the bytes of a file.

    `format` is gif, mp4 or webm, for frames mp4 unless said; the bytes of a file need it. `fps` is for frames.
    """

    kind: ClassVar[str] = "video"

    __slots__ = ()

    def __init__(
        self,
        data_or_path: Any,
        caption: str | None = None,
        fps: int | None = None,
        format: str | None = None,  # noqa: A002 - wandb's name for it
    ) -> None:
        def facts() -> dict[str, Any]:
            if format is not None and format not in FORMATS:
                raise UnsupportedValue(f"format={format!r:.40}: it may be {', '.join(FORMATS)}")
            return given(caption=text_or_none(caption)) | _content(data_or_path, fps, format)

        super().__init__(facts)


def _content(data: Any, fps: Any, kind: str | None) -> dict[str, Any]:
    if isinstance(data, str | os.PathLike):
        found = of_path(data)
        if found["suffix"][1:].lower() not in FORMATS:
            raise UnsupportedValue(f"{os.fsdecode(data)!r:.200} is no video: it may end in {', '.join(FORMATS)}")
        return found
    if isinstance(data, bytes | io.BytesIO):
        if kind is None:
            raise UnsupportedValue("format= is needed where the video is the bytes of a file")
        content = data if isinstance(data, bytes) else data.getvalue()
        return {"file": Content(content), "suffix": f".{kind}"}
    if kind == "ogg":
        raise UnsupportedValue("frames are encoded as mp4, webm or gif, not as ogg")
    if fps is not None and not 0 < float(fps) <= 1000:
        raise UnsupportedValue(f"fps={fps!r:.40}: frames per second")
    frames = arrays.taken(data)
    if len(frames["shape"]) not in (4, 5) or 0 in frames["shape"]:
        raise UnsupportedValue(f"a video has the shape TxCxHxW, TxHxWxC or BxTxCxHxW, not {frames['shape']}")
    return {"frames": frames, "fps": FPS if fps is None else float(fps), "format": kind or "mp4"}


def show(facts: Mapping[str, Any], files: Files) -> Any:
    """A `wandb.Video` of a file."""
    import wandb

    if "file" in facts:
        return wandb.Video(str(file_of(facts, files)), caption=facts.get("caption"))
    frames = _frames(arrays.numpy_of(facts["frames"], files))
    kind = str(facts["format"])
    path = files.new(f".{kind}")
    (_write_gif if kind == "gif" else _write)(path, frames, float(facts["fps"]), kind)
    video = wandb.Video(str(path), caption=facts.get("caption"))
    _, video._height, video._width, _ = frames.shape
    return video


def _frames(video: Any) -> Any:
    """TxHxWx3, of uint8."""
    import numpy

    from sidestep.media.pixels import to_uint8

    if video.ndim == 5:
        video = _side_by_side(video)
    elif video.shape[1] in (1, 3, 4):
        video = numpy.moveaxis(video, 1, -1)
    if video.shape[-1] not in (1, 3, 4):
        raise ValueError(f"a video has 1, 3 or 4 channels, and this has the shape {list(video.shape)}")
    video = to_uint8(video)
    return numpy.repeat(video, 3, axis=-1) if video.shape[-1] == 1 else video[..., :3]


def _side_by_side(videos: Any) -> Any:
    """BxTxCxHxW as one video, TxHxWxC: rows of a number of videos that is a power of two, as wandb lays them."""
    import numpy

    batch, time, channels, height, width = videos.shape
    cells = 1 << (batch - 1).bit_length()
    rows = 1 << ((batch.bit_length() - 1) // 2)
    if cells > batch:
        videos = numpy.concatenate([videos, numpy.zeros((cells - batch, *videos.shape[1:]), videos.dtype)])
    videos = videos.reshape(rows, cells // rows, time, channels, height, width)
    return videos.transpose(2, 0, 4, 1, 5, 3).reshape(time, rows * height, cells // rows * width, channels)


def _write(path: Path, frames: Any, fps: float, kind: str) -> None:
    try:
        import av
    except ImportError:
        raise ValueError(
            f"encoding {kind} needs PyAV where the daemon runs: pip install 'sidestep[video]', or format='gif'"
        ) from None
    from fractions import Fraction

    height, width = (length + length % 2 for length in frames.shape[1:3])  # the colours of four pixels are shared
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(ENCODERS[kind], rate=Fraction(fps).limit_denominator(1000))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for frame in _even(frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def _even(frames: Any) -> Iterator[Any]:
    """Frames of an even width and height: the last column and row are repeated."""
    import numpy

    _, height, width, _ = frames.shape
    for frame in frames:
        if height % 2 or width % 2:
            frame = numpy.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        yield numpy.ascontiguousarray(frame)


def _write_gif(path: Path, frames: Any, fps: float, kind: str) -> None:  # noqa: ARG001 - as `_write`
    import numpy
    import PIL.Image

    first, *others = (PIL.Image.fromarray(numpy.ascontiguousarray(frame)) for frame in frames)
    first.save(path, save_all=True, append_images=others, duration=1000 / fps, loop=0)
