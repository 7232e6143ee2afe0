"""Images: pixels as they are, or a file that is one already. The daemon encodes.

- pixels leave the worker as they are, copied once; what becomes of their range is said in `pixels.py`, and differs
  from wandb 0.31 where that shows black or noise: floats in [0, 1], bools, 16 bits
- an image that is a file stays that file; a figure of matplotlib's is drawn at once, as it may be changed
- an image made of an image takes the new caption, which wandb 0.31 forgets
"""

from __future__ import annotations

import io
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from sidestep.errors import UnsupportedValue
from sidestep.media import arrays, overlays, pixels
from sidestep.media.base import Files
from sidestep.media.figures import is_figure, picture
from sidestep.media.value import Content, Value, given, say, text_or_none

FILE_TYPES = ("png", "jpg", "jpeg", "bmp")
"""What pixels may be encoded as."""
OF_PILLOW = frozenset({"1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "I", "I;16", "F"})
"""The modes of PIL whose pixels travel as they are."""
ENCODED = frozenset({"1", "L", "LA", "P", "RGB", "RGBA", "I;16"})
"""Those that a PNG has."""


class Image(Value):
    """An image: an array or tensor of pixels, a PIL image, a figure of matplotlib's, a path, or a file's bytes.

    Arrays are HxW or HxWxC, tensors of torch CxHxW, with 1, 3 or 4 channels. `normalize=False` takes numbers to be
    from 0 to 255 whatever their range is. The other arguments are wandb's.
    """

    kind: ClassVar[str] = "image"
    MAX_ITEMS: ClassVar[int] = 108
    """How many of a list of images wandb shows."""

    __slots__ = ()

    def __init__(
        self,
        data_or_path: Any,
        mode: str | None = None,
        caption: str | None = None,
        grouping: int | None = None,
        classes: Any = None,
        boxes: Any = None,
        masks: Any = None,
        file_type: str | None = None,
        normalize: bool = True,
    ) -> None:
        def facts() -> dict[str, Any]:
            if file_type is not None and file_type not in FILE_TYPES:
                raise UnsupportedValue(f"file_type={file_type!r:.40}: it may be {', '.join(FILE_TYPES)}")
            return content_of(data_or_path) | given(
                mode=text_or_none(mode),
                caption=text_or_none(caption),
                grouping=None if grouping is None else int(grouping),
                classes=overlays.classes(classes),
                boxes=overlays.boxes(boxes),
                masks=overlays.masks(masks),
                file_type=file_type,
                stretch=None if normalize else False,
            )

        super().__init__(facts)

    @classmethod
    def shown_of(cls, items: list[Any]) -> list[Any]:
        """The first ones, and a word about the others."""
        most = cls.MAX_ITEMS
        if len(items) > most:
            say("list of images", f"of a list of {len(items)} images the first {most} are logged, as wandb does")
        return items[:most]


def content_of(data: Any) -> dict[str, Any]:
    """The facts of what an image is made of."""
    if isinstance(data, Image):
        if data._wrong:
            raise UnsupportedValue(data._wrong)
        return {name: fact for name, fact in data._facts.items() if name not in ("boxes", "masks")}
    if isinstance(data, str | os.PathLike):
        return _of_path(os.fspath(data))
    if isinstance(data, bytes | bytearray | memoryview):
        return {"file": Content(bytes(data))}
    if is_figure(data):
        return {"file": Content(picture(data)), "suffix": ".png"}
    if (pillow := sys.modules.get("PIL.Image")) is not None and isinstance(data, pillow.Image):
        return _of_pillow(data)
    if isinstance(data, io.IOBase) or (hasattr(data, "read") and hasattr(data, "seek")):
        return {"file": Content(_read(data))}
    return _of_array_like(data)


def show(facts: Mapping[str, Any], files: Files) -> Any:
    """A `wandb.Image` of a file."""
    import wandb

    path = _file(facts, files) if "file" in facts else _encoded(facts, files)
    try:
        return wandb.Image(
            str(path),
            caption=facts.get("caption"),
            grouping=facts.get("grouping"),
            classes=overlays.shown_classes(facts),
            boxes=overlays.shown_boxes(facts, files),
            masks=overlays.shown_masks(facts, files),
        )
    except (TypeError, KeyError, OSError, SyntaxError) as error:
        raise ValueError(f"wandb makes no image of it: {error}") from error


def _of_path(path: str | bytes) -> dict[str, Any]:
    path = os.fsdecode(path)
    if "://" in path:
        raise UnsupportedValue(f"{path!r:.200} is an address: wandb shows images of files, and of artifacts alone")
    return {"file": Content(path=path), "suffix": Path(path).suffix.lower()}


def _of_pillow(image: Any) -> dict[str, Any]:
    image.load()
    if image.mode not in OF_PILLOW:
        image = image.convert("RGBA")
    facts = {"pillow": image.mode, "size": list(image.size), "data": Content(image.tobytes())}
    if image.mode == "P":
        facts["palette"] = bytes(image.getpalette("RGB"))
    return facts


def _of_array_like(data: Any) -> dict[str, Any]:
    found, first = arrays.taken(data), arrays.is_tensor(data)
    try:
        pixels.layout(found["shape"], channels_first=first)
    except ValueError as error:
        raise UnsupportedValue(str(error)) from None
    return {"pixels": found} | ({"channels_first": True} if first else {})


def _read(stream: Any) -> bytes:
    stream.seek(0)
    content = stream.read()
    if not isinstance(content, bytes):
        raise UnsupportedValue("it is a file of text, and images are files of bytes")
    return content


def _file(facts: Mapping[str, Any], files: Files) -> Path:
    """The file as it came, under a name that says what it is."""
    import PIL.Image

    source = files.path(facts["file"])
    try:
        with PIL.Image.open(source) as image:
            image.load()
            of_content = f".{(image.format or 'png').lower()}"
    except (OSError, SyntaxError, PIL.Image.DecompressionBombError) as error:
        raise ValueError(f"it is no image: {str(error).replace(str(source), 'the file')}") from error
    suffix = str(facts.get("suffix", ""))
    path = files.new(suffix if suffix[1:].isalnum() and len(suffix) <= 6 else of_content)
    shutil.copyfile(source, path)
    return path


def _encoded(facts: Mapping[str, Any], files: Files) -> Path:
    image = _of_mode(facts, files) if "pillow" in facts else _of_pixels(facts, files)
    if mode := facts.get("mode"):
        image = image.convert(str(mode))
    kind = facts.get("file_type", "png")
    if kind not in FILE_TYPES:
        raise ValueError(f"an image is not encoded as {kind!r:.40}")
    if kind in ("jpg", "jpeg") and image.mode not in ("L", "RGB"):
        image = image.convert("RGB")
    path = files.new(f".{kind}")
    image.save(path, transparency=None)
    return path


def _of_mode(facts: Mapping[str, Any], files: Files) -> Any:
    import PIL.Image

    mode, (width, height) = str(facts["pillow"]), facts["size"]
    if mode not in OF_PILLOW:
        raise ValueError(f"no image has the mode {mode!r:.40}")
    image = PIL.Image.frombytes(mode, (width, height), files.read(facts["data"]))
    if mode == "P":
        image.putpalette(facts["palette"], "RGB")
    if mode in ("F", "I"):
        return _of_array(image, facts)
    return image if mode in ENCODED else image.convert("RGB")


def _of_pixels(facts: Mapping[str, Any], files: Files) -> Any:
    return _of_array(arrays.numpy_of(facts["pixels"], files), facts)


def _of_array(values: Any, facts: Mapping[str, Any]) -> Any:
    import numpy
    import PIL.Image

    values = pixels.channels_last(numpy.asarray(values), channels_first=bool(facts.get("channels_first")))
    values = pixels.to_uint8(values, stretch=facts.get("stretch", True) is not False)
    return PIL.Image.fromarray(numpy.ascontiguousarray(values))
