"""Images: pixels as they are, or a file that is one already. The daemon encodes.

- pixels leave the worker as 8 bits per channel, rows from top to bottom, copied once
- numpy, torch and PIL are used only where the training has loaded them
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from sidestep.errors import UnsupportedValue
from sidestep.media.base import Blobs, Files, Media

CHANNELS = {1: "L", 3: "RGB", 4: "RGBA"}
FORMATS = {
    b"\x89PNG\r\n\x1a\n": ".png",
    b"\xff\xd8\xff": ".jpg",
    b"GIF8": ".gif",
    b"BM": ".bmp",
    b"RIFF": ".webp",
}
"""How the files begin that are shown as they are."""


class Image(Media):
    """An image: an array or tensor of pixels, a PIL image, the bytes of a file, or a path."""

    kind: ClassVar[str] = "image"

    def __init__(self, data_or_path: Any, caption: str | None = None) -> None:
        self._data = data_or_path
        self._caption = caption

    def pack(self, blobs: Blobs) -> dict[str, Any]:
        """Pixels with their shape, or a file."""
        facts: dict[str, Any] = {} if self._caption is None else {"caption": str(self._caption)}
        data = self._data
        if isinstance(data, str | os.PathLike):
            return facts | {"file": blobs.add_file(data)}
        if isinstance(data, bytes | bytearray | memoryview):
            return facts | {"file": blobs.add(data)}
        height, width, channels, pixels = _pixels(data)
        return facts | {"pixels": blobs.add(pixels), "shape": [height, width, channels]}


def _pixels(data: Any) -> tuple[int, int, int, memoryview]:
    """Height, width, channels and the bytes of what holds pixels."""
    numpy, torch, pil = (sys.modules.get(name) for name in ("numpy", "torch", "PIL.Image"))
    if pil is not None and isinstance(data, pil.Image):
        data = data if data.mode in CHANNELS.values() else data.convert("RGBA" if "A" in data.mode else "RGB")
        return data.height, data.width, len(data.mode), memoryview(data.tobytes())
    if torch is not None and isinstance(data, torch.Tensor):
        if data.device.type != "cpu":
            raise UnsupportedValue(
                f"it is an image on {data.device.type!r}: log image.cpu() where your loop can wait"
            )
        data = data.detach().movedim(0, -1).numpy() if data.ndim == 3 else data.detach().numpy()
    if numpy is None or not isinstance(data, numpy.ndarray) or data.ndim not in (2, 3):
        raise UnsupportedValue(
            f"an image is made of pixels HxW or HxWxC, or of a file, not of {type(data).__name__}"
        )
    channels = 1 if data.ndim == 2 else data.shape[2]
    if channels not in CHANNELS or not data.size:
        raise UnsupportedValue(f"it is an image of shape {tuple(data.shape)}: 1, 3 or 4 channels can be shown")
    return data.shape[0], data.shape[1], channels, _bytes(data, numpy)


def _bytes(pixels: Any, numpy: Any) -> memoryview:
    """8 bits per channel; floats in [0, 1] are stretched over them."""
    if pixels.dtype == bool:
        pixels = pixels.astype(numpy.uint8) * 255
    elif pixels.dtype != numpy.uint8:
        top = 255.0 if pixels.dtype.kind == "f" and numpy.nanmax(pixels) <= 1 else 1.0
        pixels = numpy.clip(numpy.nan_to_num(pixels) * top, 0, 255).astype(numpy.uint8)
    return memoryview(numpy.ascontiguousarray(pixels)).cast("B")


def show(facts: Mapping[str, Any], files: Files) -> Any:
    """A `wandb.Image` of a file."""
    import wandb

    if "file" in facts:
        head = files.read(facts["file"])[:16]
        suffix = next((suffix for begin, suffix in FORMATS.items() if head.startswith(begin)), None)
        if suffix is None:
            raise ValueError("it is no image file of a known format")
        path = files.new(suffix)
        os.link(files.path(facts["file"]), path)
    else:
        path = _encoded(facts, files)
    return wandb.Image(str(path), caption=facts.get("caption"))


def _encoded(facts: Mapping[str, Any], files: Files) -> Path:
    from PIL import Image as Pillow

    height, width, channels = facts["shape"]
    pixels = files.read(facts["pixels"])
    if channels not in CHANNELS or len(pixels) != height * width * channels:
        raise ValueError(f"{len(pixels)} bytes are no image of shape {height}x{width}x{channels}")
    path = files.new(".png")
    Pillow.frombytes(CHANNELS[channels], (width, height), pixels).save(path)
    return path
