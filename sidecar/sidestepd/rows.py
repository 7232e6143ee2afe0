"""What flows from stage to stage behind the spool: values, no behaviour but packing.

entry ─resolve▶ Part ─match▶ Part ─order▶ Bundle ─assemble▶ Row ─▶ row log and sink
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgpack

MAIN_AXIS = "global_step"
"""The axis of everything that is logged outside a stage."""
OWN_PREFIX = "sidestep/"
"""Names that sidestep itself adds to rows."""
PROCESS = "sidestep/process"
"""Whose own row it is: the process that no rank stands for, as `node:pid`."""


class Position(NamedTuple):
    """Where a record lies: the spool's entry and the record's sequence in its session."""

    entry: int
    seq: int


class Call(NamedTuple):
    """A call without a step: the session's own count of it, and the names that were said."""

    own: int
    names: frozenset[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What one rank said in one call, on one axis at one step of one attempt.

    `used`: a row of the row log holds it already; it only moves its session along. `call` is there where its step
    may be that of the same call of a lower rank; a part that lies between such calls does not `move` its session.
    `settled`: its record has its fate in another row, and this is what came late of it. `apart` names the process
    whose own count the step is, which is nobody else's: its rows are its own.
    """

    position: Position
    session: bytes
    rank: int
    axis: str
    step: int
    time: float
    values: Mapping[str, Any]
    attempt: int = 0
    used: bool = False
    call: Call | None = None
    moves: bool = True
    settled: bool = False
    apart: str = ""

    @property
    def owner(self) -> bytes:
        """The session whose own rows it belongs to; b"" if its row is everybody's."""
        return self.session if self.apart else b""


@dataclass(frozen=True, slots=True, kw_only=True)
class Blob:
    """Bytes of media of which no more come: all `size` of them are in a file, or it `failed`, and why."""

    session: bytes
    number: int
    size: int = 0
    crc: int = 0
    failed: str = ""
    sha256: bytes = b""
    """Of its content, where its worker said that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """What a session read of its machine at `time`, by names of ours.

    With `ordinal`, which is CUDA's number in that process, they are of one GPU, and its part of the names is left
    out; `device` is its UUID, `visible` what CUDA_VISIBLE_DEVICES said. `gpus` maps UUIDs to the numbers of GPUs.
    """

    position: Position
    session: bytes
    node: str
    time: float
    values: Mapping[str, float]
    ordinal: int | None = None
    device: str | None = None
    visible: str | None = None
    gpus: Mapping[str, int] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Raised:
    """A session raised an alert, for people to hear of now; `level` is INFO, WARN or ERROR."""

    position: Position
    title: str
    text: str
    level: str = "WARN"


@dataclass(frozen=True, slots=True, kw_only=True)
class Printed:
    """Lines that a session's program printed at `time` on `stream`, each with its end and with who printed it."""

    position: Position
    time: float
    stream: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Described:
    """What a session's program is: facts, or a file of the run by its name and content."""

    position: Position
    time: float
    facts: Mapping[str, Any]
    file: str | None = None
    text: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What was read of one node at `time`, by full names, for the sink's stream of system metrics."""

    time: float
    node: str
    values: Mapping[str, float]


Range = tuple[bytes, int, int]
"""Blobs of a session, from the first number to the last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Logged:
    """A session logged a version of an artifact, or files of the run where `facts` is None.

    `entries` is a list of what is in it, as bytes or as what stands for them; `blobs` are all that it takes to
    have the whole of it. `id` tells it from every other, in all lives of everybody.
    """

    position: Position
    time: float
    session: bytes
    id: str
    facts: Mapping[str, Any] | None
    entries: Any
    blobs: tuple[Range, ...]

    @property
    def name(self) -> str:
        """What it is called; "" for files of the run."""
        return "" if self.facts is None else str(self.facts["name"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """One thing in an artifact, by its path there: a file on this disk, an address, or media to be shown."""

    path: str
    size: int = 0
    sha256: str = ""
    """Of the file, in hexadecimal, checked."""
    file: Path | None = None
    ref: str = ""
    media: Any = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """An artifact with all that is in it, ready for a sink; or files of the run, where `facts` is None.

    `facts` are `name`, `type`, `aliases`, and where they were given `description`, `metadata`, `tags`, `ttl_s`;
    with `of_run` the run's id goes before the name. `files` is where the bytes of media are.
    """

    id: str
    time: float
    facts: Mapping[str, Any] | None
    contents: tuple[Content, ...]
    files: Any = None


Cause = Literal["passed", "patience", "forced", "closing", "late"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """Everything that was said at one step of one axis, ready to leave; parts in order of rank.

    `own` is what sidestep itself knows of the step, for a row of the main axis.
    """

    axis: str
    step: int
    parts: tuple[Part, ...]
    attempt: int = 0
    cause: Cause = "passed"
    own: Mapping[str, Any] = field(default_factory=dict)

    @property
    def late(self) -> bool:
        """Whether its row had left before."""
        return self.cause == "late"

    @property
    def apart(self) -> str:
        """The process whose own row it is; "" if it is everybody's."""
        return self.parts[0].apart


@dataclass(frozen=True, slots=True, kw_only=True)
class Definition:
    """What wandb is told of a name, once: exact names only, never a pattern."""

    name: str
    step_metric: str | None = None
    summary: str | None = None
    hidden: bool | None = None

    def pack(self) -> bytes:
        """As bytes."""
        return bytes(msgpack.packb((self.name, self.step_metric, self.summary, self.hidden)))

    @classmethod
    def unpack(cls, raw: bytes) -> Definition:
        """From bytes."""
        name, step_metric, summary, hidden = msgpack.unpackb(raw)
        return cls(name=name, step_metric=step_metric, summary=summary, hidden=hidden)


@dataclass(frozen=True, slots=True, kw_only=True)
class Latest:
    """The newest value of a name: at the highest step of its axis in the newest attempt, said at `time`."""

    axis: str
    step: int
    time: float
    value: Any
    attempt: int = 0

    def pack(self) -> bytes:
        """As bytes."""
        return bytes(msgpack.packb((self.axis, self.step, self.time, self.value, self.attempt)))

    @classmethod
    def unpack(cls, raw: bytes) -> Latest:
        """From bytes."""
        axis, step, time, value, attempt = msgpack.unpackb(raw, strict_map_key=False)
        return cls(axis=axis, step=step, time=time, value=value, attempt=attempt)


@dataclass(slots=True)
class Aggregate:
    """What a summary may show of a name's rows. wandb counts it anew in each life of its own, so we do too."""

    least: float
    most: float
    total: float
    count: int
    first: float
    last: float

    @classmethod
    def of(cls, value: float) -> Aggregate:
        """Of one row."""
        return cls(value, value, value, 1, value, value)

    def add(self, value: float) -> None:
        """And another one."""
        self.least, self.most = min(self.least, value), max(self.most, value)
        self.total, self.count, self.last = self.total + value, self.count + 1, value

    def shown(self, summary: str) -> dict[str, float]:
        """By the operations that a definition names."""
        known = {
            "min": self.least,
            "max": self.most,
            "mean": self.total / self.count,
            "first": self.first,
            "last": self.last,
        }
        return {name: known[name] for name in summary.split(",") if name in known}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One call to a sink, decided.

    `step` is wandb's `_step`; `places` the steps of the axes that met in it, all of one `attempt`; `time` seconds
    since the epoch in the worker. `restore` is what a late row must not leave behind in the summary: newer values,
    to be put back. One that is `apart` is a process's own: its place says nothing of how far the others are.
    """

    step: int
    time: float
    values: Mapping[str, Any]
    places: Mapping[str, int]
    positions: tuple[Position, ...]
    attempt: int = 0
    late: bool = False
    restore: Mapping[str, Any] = field(default_factory=dict)
    apart: bool = False

    def pack(self) -> bytes:
        """As bytes, without the positions."""
        parts = (self.step, self.time, self.values, self.places, self.attempt, self.late, self.restore, self.apart)
        return bytes(msgpack.packb(parts))

    @classmethod
    def unpack(cls, content: bytes, positions: bytes) -> Row:
        """From what `pack` and `pack_positions` made."""
        step, time, values, places, attempt, late, restore, *apart = msgpack.unpackb(content, strict_map_key=False)
        return cls(
            step=step,
            time=time,
            values=values,
            places=places,
            attempt=attempt,
            late=late,
            restore=restore,
            apart=any(apart),
            positions=tuple(Position(*pair) for pair in msgpack.unpackb(positions)),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Alert:
    """What a person should look at, told once while `cause` lasts, and once more when it is `over`.

    `level` is INFO, WARN or ERROR, as wandb has them; `time` is spool time.
    """

    cause: str
    title: str
    text: str
    level: str = "WARN"
    time: float = 0.0
    over: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Dead:
    """A record that could not be read: where it lies, and why in one word."""

    entry: int
    seq: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """What is settled: everything up to entry `cursor`, whose reading had taught `fold`."""

    cursor: int = 0
    fold: bytes = b""
