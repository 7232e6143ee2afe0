"""Things in space: clouds of points, scenes of points, boxes and vectors, or a file of a 3D format."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any, ClassVar

from sidestep import convert
from sidestep.errors import UnsupportedValue
from sidestep.media import arrays
from sidestep.media.audio import file_of
from sidestep.media.base import Files
from sidestep.media.value import Content, Value, given, plain_content, text_or_none, unpacked

FILE_TYPES = ("obj", "gltf", "glb", "babylon", "stl", "pts.json")
LIDAR = "lidar/beta"
"""The only type of scene that wandb knows."""
COLUMNS = (3, 4, 6)


class Object3D(Value):
    """Points as an array Nx3, Nx4 with a category from 1 to 14, or Nx6 with a colour; a scene; or a file.

    A scene is a dict with `type` "lidar/beta" and `points`, `boxes` and `vectors`. A file is a path, or a file
    object with `file_type`.
    """

    kind: ClassVar[str] = "object3d"

    __slots__ = ()

    def __init__(self, data_or_path: Any, caption: str | None = None, **keywords: Any) -> None:
        super().__init__(
            lambda: _content(data_or_path, keywords.get("file_type")) | given(caption=text_or_none(caption))
        )

    @classmethod
    def from_file(cls, data_or_path: Any, file_type: str | None = None) -> Object3D:
        """Of a path, or of a file object and what type it is of."""
        return cls(data_or_path, file_type=file_type)

    @classmethod
    def from_numpy(cls, data: Any) -> Object3D:
        """Of points."""
        return cls(data)

    @classmethod
    def from_point_cloud(
        cls, points: Any, boxes: Any, vectors: Any = None, point_cloud_type: str = LIDAR
    ) -> Object3D:
        """Of a scene."""
        return cls({"type": point_cloud_type, "points": points, "boxes": boxes, "vectors": vectors})


def box3d(
    *, center: Any, size: Any, orientation: Any, color: Any, label: str | None = None, score: Any = None
) -> dict[str, Any]:
    """A box in space: its centre, lengths, and rotation as a quaternion [r, x, y, z]. Colours are in [0, 1].

    What can not be read makes a box without corners, which its scene is refused for.
    """
    try:
        corners = _corners(*(_floats(it) for it in (center, size, orientation)))
    except (TypeError, ValueError, UnsupportedValue, ZeroDivisionError):
        corners = ()
    return {"corners": corners, "color": color, "label": label, "score": score}


def _corners(center: list[float], size: list[float], orientation: list[float]) -> tuple[Any, ...]:
    length = math.sqrt(sum(it * it for it in orientation))
    # wandb 0.31 drops the signs of a quaternion's parts; with them it is the rotation that was meant
    r, i, j, k = (it / length for it in orientation)
    turn = (
        (1 - 2 * (j * j + k * k), 2 * (i * j + k * r), 2 * (i * k - j * r)),
        (2 * (i * j - k * r), 1 - 2 * (i * i + k * k), 2 * (j * k + i * r)),
        (2 * (i * k + j * r), 2 * (j * k - i * r), 1 - 2 * (i * i + j * j)),
    )
    corners = []
    for signs in ((x, y, z) for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)):
        half = [0.5 * sign * it for sign, it in zip(signs, size, strict=True)]
        corners.append(tuple(center[at] + sum(half[row] * turn[row][at] for row in range(3)) for at in range(3)))
    return tuple(corners)


def _floats(values: Any) -> list[float]:
    return [float(it) for it in (values.tolist() if hasattr(values, "tolist") else values)]


def _content(data: Any, file_type: Any) -> dict[str, Any]:
    if isinstance(data, Mapping):
        return _scene(data)
    if isinstance(data, str | os.PathLike):
        return _of_path(os.fsdecode(data))
    if hasattr(data, "read"):
        return _of_stream(data, file_type)
    if not arrays.is_array(data):
        raise UnsupportedValue(
            f"a thing in space is an array of points, a scene or a file, not {type(data).__name__}"
        )
    points = arrays.taken(data)
    if len(points["shape"]) != 2 or points["shape"][1] not in COLUMNS:
        raise UnsupportedValue(f"points have the shape Nx3, Nx4 (category) or Nx6 (colour), not {points['shape']}")
    return {"points": points}


def _scene(scene: Mapping[str, Any]) -> dict[str, Any]:
    if scene.get("type") != LIDAR:
        raise UnsupportedValue(f"the type of a scene is {LIDAR!r}, not {scene.get('type')!r:.40}")
    found = {name: _plain_list(scene.get(name)) for name in ("points", "boxes", "vectors")}
    if any(isinstance(box, dict) and len(box.get("corners", ())) != 8 for box in found["boxes"]):
        raise UnsupportedValue("a box of the scene has not got 8 corners")
    return {"scene": plain_content(found)}


def _plain_list(values: Any) -> list[Any]:
    if values is None:
        return []
    if arrays.is_tensor(values) and values.device.type != "cpu":
        raise UnsupportedValue(f"its points are on {values.device.type!r}: hand over points.cpu()")
    if hasattr(values, "dtype") and getattr(values.dtype, "kind", "O") != "O":
        return list(values.tolist())  # of numbers alone
    return [convert.plain(it) for it in values]


def _of_path(path: str) -> dict[str, Any]:
    for kind in FILE_TYPES:
        if path.endswith(kind):
            return {"file": Content(path=path), "suffix": f".{kind}"}
    raise UnsupportedValue(f"{path!r:.200} is no thing in space: it may end in {', '.join(FILE_TYPES)}")


def _of_stream(stream: Any, file_type: Any) -> dict[str, Any]:
    if isinstance(name := getattr(stream, "name", None), str):
        return _of_path(name)
    if file_type not in FILE_TYPES:
        raise UnsupportedValue(
            f"file_type={file_type!r:.40}: of a file object it is needed: {', '.join(FILE_TYPES)}"
        )
    return {"file": Content(whole(stream)), "suffix": f".{file_type}"}


def whole(stream: Any) -> bytes:
    """All of a file object, of text or bytes."""
    if hasattr(stream, "seek"):
        stream.seek(0)
    content = stream.read()
    return content if isinstance(content, bytes) else str(content).encode("utf-8", "replace")


def show(facts: Mapping[str, Any], files: Files) -> Any:
    """A `wandb.Object3D` of a file."""
    import json

    import wandb

    if "file" in facts:
        path = file_of(facts, files)
    else:
        path = files.new(".pts.json")
        if "scene" in facts:
            scene = unpacked(files.read(facts["scene"]))
            content = {"type": LIDAR} | {name: scene[name] for name in ("vectors", "points", "boxes")}
        else:
            content = arrays.numpy_of(facts["points"], files).tolist()
        path.write_text(json.dumps(content, separators=(",", ":")), encoding="utf-8")
    return wandb.Object3D(str(path), caption=facts.get("caption"))
