"""A record whose values are partly still on a device. It stands in the outbox, at its place, until they are here.

- it is packed by the sender, when all that it waits for is ready, or when that is given up
- a value that is given up, or turns out to be none, is left out and counted: its record leaves without it
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from msgpack import Packer

from sidestep.errors import UnsupportedValue
from sidestep.staging import Deferred

NOT_IN_TIME = "its value did not come from the device"


class Waiting:
    """A record in the making. Its length is what it takes in the outbox: at least what it will have packed."""

    __slots__ = ("_data", "_head", "_refuse", "_size", "_stage", "_wanted", "since")

    def __init__(
        self,
        head: tuple[int, float, int | None],
        data: dict[str, Any],
        stage: str | None,
        wanted: Mapping[str, Sequence[Deferred]],
        *,
        since: float,
        refuse: Callable[[str, str], None],
    ) -> None:
        self._head, self._data, self._stage = head, data, stage
        self._wanted = dict(wanted)
        self._refuse = refuse
        self.since = since
        """When it was said, by the clock of who asks."""
        self._size = len(self._packed(default=_nothing)) + sum(it.size for some in wanted.values() for it in some)

    def __len__(self) -> int:
        return self._size

    def ready(self) -> bool:
        """Whether it can be packed whole."""
        return all(it.ready() for some in self._wanted.values() for it in some)

    def pack(self) -> bytes:
        """The record, with the values that are there."""
        for name, wanted in self._wanted.items():
            why = self._why_not(wanted)
            if why:
                del self._data[name]
                self._refuse(name, why)
        return self._packed(default=lambda it: it.found)

    def give_up(self) -> None:
        """It will not be packed."""
        for wanted in self._wanted.values():
            for it in wanted:
                it.give_up()

    def _why_not(self, wanted: Sequence[Deferred]) -> str:
        """Read what a name waits for; why that is not to be had, or nothing."""
        why = ""
        for it in wanted:
            if why or not it.ready():
                it.give_up()
                why = why or NOT_IN_TIME
                continue
            try:
                it.found = it.value()
            except UnsupportedValue as error:
                why = str(error)
            except Exception as error:  # noqa: BLE001 - a foreign array's own code may raise anything
                why = f"reading it raised {type(error).__name__}"
        return why

    def _packed(self, default: Callable[[Any], Any]) -> bytes:
        parts = (*self._head, self._data)
        packer = Packer(buf_size=4 * 1024, default=default)
        record: bytes = packer.pack(parts if self._stage is None else (*parts, self._stage))
        return record


def _nothing(_: Any) -> None:
    return None
