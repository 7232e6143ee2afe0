"""A tape of entries, and a resolver that reads it."""

from __future__ import annotations

from typing import Any

from sidestepd.resolve import Lost, Resolver, Said
from sidestepd.rows import Part
from tests.support.builders import (
    Tape,
)


class Reading:
    """A tape, and a resolver that reads it."""

    def __init__(self) -> None:
        self.tape, self.resolver = Tape(), Resolver()
        self._read = 0

    def said(self) -> list[Said]:
        """What the entries say that were not read yet."""
        entries, self._read = self.tape.entries[self._read :], len(self.tape.entries)
        return [said for entry in entries for said in self.resolver.read(entry)]

    def parts(self) -> list[Part]:
        return [said for said in self.said() if isinstance(said, Part)]

    def places(self) -> list[tuple[str, int]]:
        return [(part.axis, part.step) for part in self.parts()]

    def values(self) -> list[dict[str, Any]]:
        return [dict(part.values) for part in self.parts()]

    def losses(self) -> list[Lost]:
        return [said for said in self.said() if isinstance(said, Lost)]
