"""What the program printed, and what it is: told beside the rows, once at most.

- values in, values out: who takes them writes `told` down before telling
- what comes of a session is told in its order; of several sessions as it was stored
- what breaks a rule is no record's fault but its own: it is dead-lettered, and all else goes on
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePosixPath

from sidestep.wire import Record
from sidestepd.rows import Described, Position, Printed

STREAMS = ("stdout", "stderr")
FILES = ("requirements.txt", "diff.patch")
CODE = "code"
_START = Position(0, -1)


class Beside:
    """Between what sessions say of their program and where it goes."""

    def __init__(self, *, told: Sequence[int] | None = None) -> None:
        self.told = Position(*told) if told else _START
        """Up to here all was told."""
        self._waiting: list[Printed | Described] = []

    def hear(self, said: Printed | Described) -> None:
        """Take it in, unless it was told in an earlier life."""
        if said.position > self.told:
            self._waiting.append(said)

    def take(self) -> list[Printed | Described]:
        """What is to be told now."""
        waiting, self._waiting = self._waiting, []
        self.told = max(self.told, *(said.position for said in waiting)) if waiting else self.told
        return waiting


def printed_from(record: Record, position: Position, label: str) -> Printed | None:
    """The lines of a record, each behind `label`, or None if it breaks a rule."""
    stream, text = record.data.get("stream"), record.data.get("text")
    if stream not in STREAMS or not isinstance(text, str):
        return None
    lines = "".join(f"{label}{line}\n" for line in text.split("\n"))
    return Printed(position=position, time=record.time, stream=stream, text=lines)


def described_from(record: Record, position: Position) -> Described | None:
    """What a record says of the program, likewise."""
    facts, file, text = (record.data.get(name) for name in ("facts", "file", "text"))
    if isinstance(facts, dict) and all(isinstance(name, str) for name in facts):
        return Described(position=position, time=record.time, facts=facts)
    if isinstance(file, str) and isinstance(text, str) and is_ours(file):
        return Described(position=position, time=record.time, facts={}, file=file, text=text)
    return None


def is_ours(file: str) -> bool:
    """Whether a worker may name this file: nothing it says leads out of the run's files, or over others there."""
    path = PurePosixPath(file)
    plain = file.isprintable() and "\\" not in file and not path.is_absolute() and ".." not in path.parts
    return plain and (file in FILES or (len(path.parts) > 1 and path.parts[0] == CODE))
