"""Foreign value -> plain value: what a user logs becomes None, bool, int, float, str, lists and dicts of these.

- a copy is made at once, and nothing of the caller's is kept
- one file per library, asked only about types from that library, which is therefore loaded already: nothing
  here imports a library
- no conversion waits for a device
- bounded: depth, entries and text together, however often one object is referred to
- what has no plain form raises UnsupportedValue, with words for the user
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any

from sidestep.convert import foreign, jax, numpy, standard, torch
from sidestep.convert.histograms import Packed
from sidestep.convert.torch import quickly as quickly
from sidestep.errors import UnsupportedValue
from sidestep.media.base import MARK, Blobs, Media, packed
from sidestep.staging import Call, Deferred
from sidestep.wire import MAX_DEPTH, MAX_RECORD_BYTES
from sidestep.wire.plain import is_plain

PLAIN = frozenset({float, int, bool, str, type(None)})
"""The types that are packed as they are. Nothing of Python's runs while they are."""

Converter = Callable[[Any, Call | None], Any]
CONVERTERS: Mapping[str, Converter] = {
    "cupy": foreign.convert,
    "datetime": standard.moment,
    "decimal": standard.number,
    "enum": standard.member,
    "fractions": standard.number,
    "jax": jax.convert,
    "jaxlib": jax.convert,
    "mlx": foreign.convert,
    "numpy": numpy.convert,
    "paddle": foreign.convert,
    "pathlib": standard.text,
    "tensorflow": foreign.convert,
    "torch": torch.convert,
    "uuid": standard.text,
}
"""By the top module in which a type, or a type it derives from, is defined."""


def plain(
    value: object,
    fallback: Callable[[Any], Any] | None = None,
    blobs: Blobs | None = None,
    implied: Callable[[Any], Media | None] = lambda _: None,
    call: Call | None = None,
) -> Any:
    """A plain copy of `value`; `fallback` may find one for what no converter knows.

    Media are packed, and their bytes handed to `blobs`; without that there is no place for media. `implied` says
    which media a foreign value is. With `call`, arrays become histograms, and a Deferred stands for what is still
    on its way from a device.
    """
    try:
        return _Copy(fallback, blobs, implied, call).of(value, MAX_DEPTH)
    except UnsupportedValue:
        raise
    except Exception as error:  # noqa: BLE001 - a foreign value's own code may raise anything
        raise UnsupportedValue(f"reading it raised {type(error).__name__}") from None


ARRAY_BYTES = 1024
"""About what a histogram takes."""
_CONTAINERS = (list, tuple, dict, set, frozenset, range, deque)
_BYTES = (bytes, bytearray, memoryview)
_TOO_LARGE = f"it is larger than {MAX_RECORD_BYTES // 1024} KiB"
_TOO_DEEP = f"it is nested deeper than {MAX_DEPTH} levels"


class _Copy:
    """One copy in the making. Every entry takes a byte at least, so a record's bound bounds the walk."""

    __slots__ = ("_blobs", "_call", "_fallback", "_implied", "_left")

    def __init__(
        self,
        fallback: Callable[[Any], Any] | None,
        blobs: Blobs | None,
        implied: Callable[[Any], Media | None],
        call: Call | None,
    ) -> None:
        self._fallback = fallback
        self._implied = implied
        self._blobs = blobs
        self._call = call
        self._left = MAX_RECORD_BYTES

    def of(self, value: Any, depth: int) -> Any:
        """A plain copy of `value`, at most `depth` containers deep."""
        self._left -= 1
        if depth < 0 or self._left < 0:
            raise UnsupportedValue(_TOO_DEEP if depth < 0 else _TOO_LARGE)
        kind: Any = type(value)
        if kind is float or kind is bool or value is None:
            return value
        if isinstance(value, str):
            return self._text(value)
        if (convert := converter_of(kind)) is not None and not issubclass(kind, tuple):  # torch.Size
            found = convert(value, self._call)
            if isinstance(found, Deferred | Packed):
                self._take(ARRAY_BYTES)
                return found
            return self.of(found, depth - 1)
        if isinstance(value, int):
            return _integer(int(value))
        if isinstance(value, float):
            return float(value)
        if isinstance(value, _CONTAINERS):
            return self._container(value, depth)
        return self._rare(value, depth)

    def _rare(self, value: Any, depth: int) -> Any:
        if isinstance(value, _BYTES):
            self._take(memoryview(value).nbytes)
            return bytes(value).decode("utf-8", "replace")
        if isinstance(value, Media):
            return self._media(value)
        if (media := self._implied(value)) is not None:
            return self._media(media)
        if isinstance(value, complex):
            return standard.complex_number(value)
        if hasattr(type(value), "__dataclass_fields__"):
            return self.of(standard.fields(value), depth)
        if self._fallback is not None:
            return self.of(self._fallback(value), depth - 1)
        raise UnsupportedValue(
            f"{_type_name(value)} can not be logged: log numbers, text, lists or dicts of these, "
            "for example float(value)"
        )

    def _media(self, value: Media) -> dict[str, Any]:
        if self._blobs is None:
            raise UnsupportedValue(f"{_type_name(value)} can be logged, but has no place here")
        media = packed(value, self._blobs)
        if not is_plain(media):
            raise UnsupportedValue(f"{_type_name(value)} is described by something that is not plain")
        return media

    def _container(self, value: Any, depth: int) -> Any:
        if depth == 0:
            raise UnsupportedValue(_TOO_DEEP)
        self._take(len(value))
        if isinstance(value, dict):
            copy = {self._key(key): self.of(item, depth - 1) for key, item in _fixed(value.items())}
            if MARK in copy:
                raise UnsupportedValue(f"it is a dict with the key {MARK!r}, which is sidestep's own")
            return copy
        return [self.of(item, depth - 1) for item in _shown(_fixed(value))]

    def _key(self, key: Any) -> str:
        if isinstance(key, tuple):
            return ",".join(self._key(part) for part in key)
        key = self.of(key, 1)
        if isinstance(key, list | dict):
            raise UnsupportedValue("it is a dict whose keys are neither text nor numbers")
        return key if isinstance(key, str) else json.dumps(key)

    def _text(self, value: str) -> str:
        self._take(len(value))
        value = str.__str__(value)
        return value if value.isascii() else value.encode("utf-8", "replace").decode()

    def _take(self, size: int) -> None:
        self._left -= size
        if self._left < 0:
            raise UnsupportedValue(_TOO_LARGE)


@lru_cache(maxsize=1024)
def converter_of(kind: type) -> Converter | None:
    """The converter of the library that a type comes from, itself or by what it derives from."""
    for base in kind.__mro__:
        if (found := CONVERTERS.get(base.__module__.partition(".")[0])) is not None:
            return found
    return None


def _fixed(items: Iterable[Any]) -> list[Any]:
    """The entries as they are now: another thread may be changing the container."""
    return list(items)


def _shown(items: list[Any]) -> list[Any]:
    """Of a list of media of one kind those that are shown of it: the others need not travel."""
    kind: type = type(items[0]) if items else object
    if not issubclass(kind, Media) or any(type(item) is not kind for item in items):
        return items
    return kind.shown_of(items)


def _integer(value: int) -> int | float:
    if -(2**63) <= value < 2**64:
        return value
    try:
        return float(value)
    except OverflowError:
        raise UnsupportedValue("it is an integer beyond the range of a float") from None


def _type_name(value: object) -> str:
    kind = type(value)
    return f"a value of type {kind.__module__}.{kind.__qualname__}"
