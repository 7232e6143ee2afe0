"""Foreign values as Python's own, of any size: for JSON, not for `log()`.

What is on a device is fetched, which waits for it: whoever calls this wants the values.
"""

from __future__ import annotations

import dataclasses
import datetime
import enum
from collections.abc import Mapping
from typing import Any

MAX_DEPTH = 64


def to_python_types(value: Any, *, _depth: int = MAX_DEPTH) -> Any:
    """A copy of `value` made of dicts, lists, text, numbers, bools and None.

    Arrays and tensors become lists, those without dimensions numbers; dataclasses become dicts. What has no such
    form becomes its text.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if _depth <= 0:
        return str(value)
    if isinstance(value, Mapping):
        return {_key(key): to_python_types(item, _depth=_depth - 1) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [to_python_types(item, _depth=_depth - 1) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {it.name: getattr(value, it.name) for it in dataclasses.fields(value)}
        return to_python_types(fields, _depth=_depth - 1)
    return _foreign(value, _depth)


def _foreign(value: Any, depth: int) -> Any:
    if isinstance(value, enum.Enum):
        return to_python_types(value.value, _depth=depth - 1)
    if isinstance(value, bytes | bytearray):
        return bytes(value).decode("utf-8", "replace")
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    for kind in (bool, int, float, str):  # numpy.float64 and other subclasses
        if isinstance(value, kind):
            return kind(value)
    for unpack in ("tolist", "item"):  # numpy, torch, JAX
        if callable(method := getattr(value, unpack, None)):
            try:
                found = method()
            except Exception:  # noqa: BLE001 - a foreign value's own code may raise anything
                continue
            return str(value) if type(found) is type(value) else to_python_types(found, _depth=depth - 1)
    return str(value)


def _key(key: Any) -> str:
    plain = to_python_types(key, _depth=1)
    return plain if isinstance(plain, str) else str(plain)
