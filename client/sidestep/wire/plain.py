"""Plain values, which is all that travels: None, bool, int, float, str, bytes, lists and dicts of these.

- no pickle, no ext types, no timestamps
- the extent of a packed value is found before anything is built of it, so that what is built is never larger
  than what arrived can pay for: a length that is announced and not there costs nothing
- a fresh unpacker each time: one that has raised is in no state to be used again
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NoReturn

import msgpack

from sidestep.wire.limits import MAX_DEPTH

_SCALARS = frozenset({type(None), bool, int, float, str, bytes})


def ends(packed: bytes, count: int) -> list[int]:
    """Where the first `count` values end; fewer if what follows is no msgpack, too deep, or not all there."""
    unpacker = msgpack.Unpacker(max_buffer_size=max(len(packed), 1))
    unpacker.feed(packed)
    found: list[int] = []
    try:
        while len(found) < count:
            unpacker.skip()
            found.append(unpacker.tell())
    except (msgpack.UnpackException, ValueError):
        pass
    return found


def load(packed: bytes) -> Any:
    """Build the one value whose extent `ends` has found to be all of `packed`, or raise ValueError."""
    try:
        return msgpack.unpackb(packed, raw=False, strict_map_key=False, ext_hook=_refuse_ext, max_ext_len=0)
    except TypeError as error:  # a list or a dict as the key of a dict
        raise ValueError(str(error)) from error


def dump(value: object) -> bytes:
    """Pack a value, or raise ValueError, TypeError or OverflowError for what msgpack can not."""
    packed: bytes = msgpack.packb(value)
    return packed


def is_plain(value: object, depth: int = MAX_DEPTH) -> bool:
    """Whether a value is one the wire carries, no deeper than `depth` containers."""
    if type(value) in _SCALARS:
        return True
    if depth == 0:
        return False
    if isinstance(value, list):
        return all_scalar(value) or all(is_plain(item, depth - 1) for item in value)
    if isinstance(value, dict):
        items = value.values()
        return all_scalar(value) and (all_scalar(items) or all(is_plain(item, depth - 1) for item in items))
    return False


def all_scalar(values: Iterable[object]) -> bool:
    """Whether no value holds others: one pass without a Python call for each."""
    return _SCALARS.issuperset(map(type, values))


def _refuse_ext(code: int, data: bytes) -> NoReturn:
    raise ValueError(f"ext type {code} ({len(data)} bytes) is not allowed on this wire")
