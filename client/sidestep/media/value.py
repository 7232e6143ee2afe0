"""A media value whose making never raises: what is wrong with it is told when it is logged.

- what it is made of is looked at, and copied, when it is made: what the caller does to it afterwards is not seen
- what wandb raises in a constructor is kept as words here, and `pack` refuses the value with them
- until it is packed, its bytes stand in its facts as `Content`
"""

from __future__ import annotations

import stat
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any

from sidestep.errors import UnsupportedValue
from sidestep.media.base import INLINE_BYTES, Blobs, Media, Ref, packed
from sidestep.wire import plain

READ_AT_ONCE_BYTES = 4 << 20
"""Files up to this size are read by `log()` itself: scripts write the next picture over the one just logged, which
is in memory still. Larger ones are opened at once, and read in the background."""


class Content:
    """Bytes on their way: those of the caller, copied, or those of a file."""

    __slots__ = ("data", "path")

    def __init__(self, data: bytes = b"", *, path: str | None = None) -> None:
        self.data = data
        self.path = path

    def handed_to(self, blobs: Blobs) -> Ref | bytes:
        """What stands for them in the facts."""
        if self.path is not None:
            return _of_file(self.path, blobs)
        return self.data if len(self.data) < INLINE_BYTES else blobs.add(self.data)


class Value(Media):
    """What all kinds derive from."""

    __slots__ = ("_facts", "_wrong")

    def __init__(self, facts: Callable[[], dict[str, Any]]) -> None:
        self._facts: dict[str, Any] = {}
        self._wrong = ""
        try:
            self._facts = facts()
        except UnsupportedValue as error:
            self._wrong = str(error)
        except Exception as error:  # noqa: BLE001 - a foreign value's own code may raise anything
            self._wrong = f"reading it raised {type(error).__name__}: {error!s:.200}"

    def pack(self, blobs: Blobs) -> dict[str, Any]:
        """The facts, or what is wrong with them."""
        if self._wrong:
            raise UnsupportedValue(self._wrong)
        facts: dict[str, Any] = _handed(self._facts, blobs)
        return facts


def say(cause: Hashable, text: str) -> None:
    """Tell the user once what was done with a value."""
    from sidestep import _current  # not before it is needed: a run imports media

    _current.notices().once(("media", cause), text)


def refuse(what: str, kind: type, why: str) -> None:
    """Count, and say once, that a part of a value is left out; `strict` raises it."""
    from sidestep import _current

    if (run := _current.current()) is not None:
        run._session.refuse_value(what, kind, why)
    else:
        say(what, f"{what}: {why}")


def given(**facts: Any) -> dict[str, Any]:
    """The facts that were given: those that are not None."""
    return {name: fact for name, fact in facts.items() if fact is not None}


def unpacked(content: bytes) -> Any:
    """The plain value that `plain_content` packed, in the daemon."""
    if plain.ends(content, 1) != [len(content)]:
        raise ValueError(f"{len(content)} bytes are no plain value")
    return plain.load(content)


def plain_content(value: Any) -> Content:
    """A plain value too large for a record, as bytes."""
    return Content(plain.dump(value))


def text_or_none(value: Any) -> str | None:
    """A caption, as text."""
    return None if value is None else str(value)


def _handed(value: Any, blobs: Blobs) -> Any:
    if isinstance(value, Content):
        return value.handed_to(blobs)
    if isinstance(value, Media):
        return packed(value, blobs)
    if isinstance(value, Mapping):
        return {name: _handed(item, blobs) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_handed(item, blobs) for item in value]
    return value


def _of_file(path: str, blobs: Blobs) -> Ref | bytes:
    try:
        found = Path(path).stat()
        if stat.S_ISREG(found.st_mode) and found.st_size <= READ_AT_ONCE_BYTES:
            return Content(Path(path).read_bytes()).handed_to(blobs)
    except OSError as error:
        raise UnsupportedValue(f"{path!r:.200} can not be read: {error.strerror}") from None
    return blobs.add_file(path)
