"""What can be told of media in plain values without showing them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sidestep.media.base import is_packed, refs_in

__all__ = ["BlobId", "blobs_in", "count_media", "has_media", "is_packed"]

BlobId = tuple[bytes, int]
"""The session that sends a blob, and its number there."""
_CONTAINERS = frozenset({dict, list})


def has_media(value: Any) -> bool:
    """Whether a plain value is media, or has some in it."""
    if isinstance(value, dict):
        return is_packed(value) or any(has_media(item) for item in value.values() if type(item) in _CONTAINERS)
    return isinstance(value, list) and any(has_media(item) for item in value if type(item) in _CONTAINERS)


def blobs_in(value: Any) -> Iterator[BlobId]:
    """The blobs that a plain value refers to."""
    for ref in refs_in(value):
        of, number = ref.get("of"), ref.get("id")
        if type(of) is bytes and len(of) == 16 and type(number) is int:
            yield of, number


def count_media(values: Any) -> int:
    """How many values of a row are media, or have some in them."""
    return sum(type(value) in _CONTAINERS and has_media(value) for value in values)
