"""What lies over an image: boxes, masks, and the classes that both name.

- positions, scores and labels are looked at in the worker; numbers may be numpy's or torch's, where wandb 0.31
  wants Python's own
- a mask is an array HxW of class ids from 0 to 255, copied once, or a file; wandb 0.31 shows ids above 127 as 0
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sidestep import convert
from sidestep.errors import UnsupportedValue
from sidestep.media import arrays
from sidestep.media.base import Files
from sidestep.media.value import Content, given, plain_content, unpacked

MIDDLE = ("middle", "width", "height")
CORNERS = ("minX", "maxX", "minY", "maxY")
_POSITION = f"a box needs a position with {', '.join(MIDDLE)}, or with {', '.join(CORNERS)}"

Labels = list[list[Any]]
"""Pairs of an id and a name."""


class Classes:
    """The classes of boxes and masks, as wandb's: dicts with `id` and `name`."""

    def __init__(self, class_set: Iterable[Mapping[str, Any]]) -> None:
        self.class_set = [dict(it) for it in class_set]


# In the worker


def classes(given_classes: Any) -> Labels | None:
    """What `classes=` says."""
    if given_classes is None:
        return None
    entries = given_classes.class_set if isinstance(given_classes, Classes) else given_classes
    try:
        return [[_class_id(it["id"]), str(it["name"])] for it in entries]
    except (TypeError, KeyError):
        raise UnsupportedValue("classes= is a list of dicts with id and name") from None


def boxes(groups: Any) -> dict[str, Any] | None:
    """What `boxes=` says, by the name of the group."""
    return {name: _box_group(group) for name, group in _groups(groups, "boxes").items()} or None


def masks(groups: Any) -> dict[str, Any] | None:
    """What `masks=` says, by the name of the group."""
    return {name: _mask(group) for name, group in _groups(groups, "masks").items()} or None


def _groups(groups: Any, what: str) -> dict[str, Mapping[str, Any]]:
    if groups is None:
        return {}
    if not isinstance(groups, Mapping) or not all(isinstance(it, Mapping) for it in groups.values()):
        raise UnsupportedValue(f"{what}= is a dict of groups, each a dict")
    return {str(name): group for name, group in groups.items()}


def _box_group(group: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(group.get("box_data"), list | tuple):
        raise UnsupportedValue("boxes= needs a list box_data in each group")
    found = [_box(box) for box in group["box_data"]]
    return {"boxes": plain_content(found)} | given(labels=_labels(group.get("class_labels")))


def _box(box: Any) -> dict[str, Any]:
    found: dict[str, Any] = convert.plain(box)
    position = found.get("position") if isinstance(found, dict) else None
    if not isinstance(position, dict):
        raise UnsupportedValue(_POSITION)
    middle = position.get("middle")
    if isinstance(middle, list) and len(middle) == 2:
        if not _numbers([*middle, position.get("width"), position.get("height")]):
            raise UnsupportedValue(_POSITION)
    elif not _numbers([position.get(name) for name in CORNERS]):
        raise UnsupportedValue(_POSITION)
    if "class_id" in found:
        found["class_id"] = _class_id(found["class_id"])
    if "scores" in found and not (isinstance(found["scores"], dict) and _numbers(found["scores"].values())):
        raise UnsupportedValue("the scores of a box are a dict of names and numbers")
    if "box_caption" in found:
        found["box_caption"] = str(found["box_caption"])
    return found


def _mask(group: Mapping[str, Any]) -> dict[str, Any]:
    labels = given(labels=_labels(group.get("class_labels")))
    if "path" in group:
        return {"file": Content(path=str(group["path"]))} | labels
    if "mask_data" not in group:
        raise UnsupportedValue("masks= needs mask_data, an array HxW, or a path in each group")
    found = arrays.taken(group["mask_data"])
    if len(found["shape"]) != 2:
        raise UnsupportedValue(f"a mask is an array HxW of class ids, not {found['shape']}")
    return {"pixels": found} | labels


def _labels(labels: Any) -> Labels | None:
    if labels is None:
        return None
    if not isinstance(labels, Mapping):
        raise UnsupportedValue("class_labels is a dict of class ids and names")
    return [[_class_id(it), str(name)] for it, name in labels.items()]


def _class_id(value: Any) -> int:
    plain = convert.plain(value)
    if isinstance(plain, bool) or not isinstance(plain, int | float) or plain != int(plain):
        raise UnsupportedValue(f"{value!r:.80} is no class id: these are whole numbers")
    return int(plain)


def _numbers(values: Iterable[Any]) -> bool:
    return all(isinstance(it, int | float) for it in values)


# In the daemon


def shown_classes(facts: Mapping[str, Any]) -> Any:
    """For `classes=`."""
    found = facts.get("classes")
    return None if found is None else [{"id": number, "name": name} for number, name in found]


def shown_boxes(facts: Mapping[str, Any], files: Files) -> Any:
    """For `boxes=`."""
    return {
        name: {"box_data": unpacked(files.read(group["boxes"]))} | _class_labels(group)
        for name, group in facts.get("boxes", {}).items()
    } or None


def shown_masks(facts: Mapping[str, Any], files: Files) -> Any:
    """For `masks=`."""
    return {name: _shown_mask(name, group, files) for name, group in facts.get("masks", {}).items()} or None


def _shown_mask(name: str, group: Mapping[str, Any], files: Files) -> Any:
    """Of a file, since what wandb makes of an array loses half of the ids; else what it makes itself."""
    from wandb.sdk.data_types.helper_types.image_mask import ImageMask

    path, ids = _mask_file(group, files)
    mask = ImageMask({"path": str(path)}, name)
    mask._extension = ".mask.png"
    mask._key = name
    if labels := _class_labels(group):
        mask._val = labels
    elif ids:
        mask._val = {"class_labels": {number: f"class_{number}" for number in ids}}
    return mask


def _mask_file(group: Mapping[str, Any], files: Files) -> tuple[Path, list[int]]:
    import numpy
    import PIL.Image

    path = files.new(".mask.png")
    if "file" in group:
        shutil.copyfile(files.path(group["file"]), path)
        return path, []
    pixels = arrays.numpy_of(group["pixels"], files)
    if not pixels.size or not ((pixels >= 0) & (pixels <= 255)).all():
        raise ValueError("a mask has class ids from 0 to 255")
    PIL.Image.fromarray(pixels.astype(numpy.uint8)).save(path)
    return path, numpy.unique(pixels.astype(numpy.uint8)).tolist()


def _class_labels(group: Mapping[str, Any]) -> dict[str, Any]:
    found = group.get("labels")
    return {} if found is None else {"class_labels": {number: str(name) for number, name in found}}
