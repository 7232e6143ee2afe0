"""What every kind of media is: facts that travel in a record, and bytes that travel beside it.

    Image(pixels) ── pack(blobs) ──▶ {"_sidestep": "image", "facts": {...}} ──▶ show(facts, files) ──▶ wandb.Image
        worker                              in the record                               daemon

- `pack` is called once, by `log()`, in the thread that logs: it copies what is the caller's, encodes nothing,
  waits for nothing, and raises UnsupportedValue, with words for the user, for what can not be shown
- facts are plain values. Bytes of less than `INLINE_BYTES` may be in them as they are; more goes to `blobs`, and
  what that gives back stands in the facts for it, at any depth
- `show` is a function of the kind's own file. It runs in the daemon, in a process beside delivery, when all bytes
  are there; it is a function of facts and files alone, called again after a crash. What is bad in the content it
  raises as ValueError, with words: that value is left out, counted and said, and its row goes on
- nothing here imports a library that the training has not loaded; `show` imports what it needs when it is called
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol

MARK = "_sidestep"
"""The key that makes a map in a record a media value; its value is the kind."""
BLOB = "_blob"
"""The only key of a map in the facts that stands for bytes which travel beside the record."""
INLINE_BYTES = 4096

Buffer = bytes | bytearray | memoryview
Ref = dict[str, Any]
"""`{"_blob": {...}}`: what `Blobs` gives for bytes, and `Files` takes. What is inside is the transport's."""


class Blobs(Protocol):
    """Takes bytes along, in the worker. Nothing here waits; what finds no room raises UnsupportedValue."""

    def add(self, data: Buffer | tuple[Buffer, ...]) -> Ref:
        """Take bytes, or pieces that follow on one another, and say what stands for them.

        Of `bytes` no copy is made; anything else, which its owner may change, is copied at once. A contiguous
        numpy array or tensor comes as a memoryview of its bytes.
        """
        ...

    def add_file(self, path: str | os.PathLike[str]) -> Ref:
        """Open a file now; its bytes are read later, in the background.

        One that is changed meanwhile is told by its inode, size or time, and rejected then. Raises
        UnsupportedValue if it is no file that can be read.
        """
        ...


class Files(Protocol):
    """Where the bytes are, in the daemon."""

    def path(self, ref: Ref | bytes) -> Path:
        """The file that holds what a ref stands for, complete and checked; for bytes, one that is made of them.

        It has no suffix, and is not to be written to. Where a library goes by suffixes, `new` gives a name, and
        `os.link` makes it the same file.
        """
        ...

    def read(self, ref: Ref | bytes) -> bytes:
        """What a ref stands for; bytes are themselves."""
        ...

    def new(self, suffix: str) -> Path:
        """A file to encode into, that is not there yet; it lives until the run holds the row."""
        ...


class Media:
    """A value that has more to it than fits into a record. One file for each kind derives from it."""

    kind: ClassVar[str]
    """What it is called in records, and in the table of kinds."""

    @classmethod
    def shown_of(cls, items: list[Any]) -> list[Any]:
        """Those of a list of this kind that are shown."""
        return items

    def pack(self, blobs: Blobs) -> dict[str, Any]:
        """The facts, with all bytes handed to `blobs`."""
        raise NotImplementedError


def packed(media: Media, blobs: Blobs) -> dict[str, Any]:
    """The plain map that stands for a media value in a record, or in the facts of another one."""
    return {MARK: media.kind, "facts": media.pack(blobs)}


def is_packed(value: object) -> bool:
    """Whether a value out of a record is media."""
    return type(value) is dict and type(value.get(MARK)) is str and type(value.get("facts")) is dict


def is_ref(value: object) -> bool:
    """Whether a value in the facts stands for bytes."""
    return type(value) is dict and len(value) == 1 and type(value.get(BLOB)) is dict


def refs_in(value: object) -> Iterator[Mapping[str, Any]]:
    """What all refs in a plain value say, at any depth."""
    if isinstance(value, dict):
        if is_ref(value):
            yield value[BLOB]
            return
        for item in value.values():
            yield from refs_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from refs_in(item)
