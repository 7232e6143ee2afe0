"""Values that are still on a device when they are logged: copied to host memory behind what computes them.

    log() ─▶ gather, copy, raise the flag (all enqueued) ─▶ slab in host memory ─▶ flag is up: the sender reads

- nothing here waits for a device: the thread that logs enqueues on its own stream, the sender looks at memory
- one copy for all numbers of a call that have one dtype; last of all the flag, so that what is below it is whole
- nothing of the caller's is kept: what was enqueued holds what it needs, and an update enqueued later comes later
- the slab is bounded. A slot whose flag is not up is the device's, whatever became of its record: it is used again
  only when the flag is up
- a call of which nothing is on a device costs nothing of this
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from sidestep.errors import UnsupportedValue

SLOT_BYTES = 1024
SLOTS = 4096
"""Of one device: as many as a `watch` of a large model fills at once, and 4 MiB in all."""
FLAG_AT = SLOT_BYTES - 8
"""The last bytes of a slot are its flag."""
CAPTURING = (
    "a CUDA graph is being captured: what is logged here would become part of it. Log outside of the capture"
)
NOT_WANTED = "it is not wanted"
FULL = "too many values are still on their way from the device"


MakeHistogram = Callable[[list[int], float, float, int], Any]
"""Of counts, the least, the largest, and how many elements these are of."""


class Device(Protocol):
    """What is done with one device. Whatever it says to do is enqueued there, and not waited for."""

    def memory(self, size: int) -> tuple[Any, memoryview]:
        """Host memory that the device can write to: as the device is told of it, and as Python reads it."""

    def capturing(self) -> bool:
        """Whether what is enqueued now is recorded, to be done later and again."""

    def numbers(self, tensors: Sequence[Any]) -> Any:
        """The one element of each tensor, all of one dtype, as they are now: a new array."""

    def array(self, tensor: Any) -> Any:
        """The elements of a tensor, in the order of their indices."""

    def histogram(self, tensor: Any, bins: int) -> Any:
        """Its histogram as an array of float64: counts, then the least, the largest and the number."""

    def copy(self, into: Any, start: int, array: Any) -> int:
        """Copy an array to host memory from byte `start` on; how many bytes it takes."""

    def raise_flag(self, into: Any, at: int) -> None:
        """Set a byte of host memory, after all that was enqueued before."""


class Layout(Protocol):
    """How a value is read from bytes."""

    size: int

    def read(self, memory: memoryview) -> Any:
        """The plain value; UnsupportedValue for what has none."""


class Numbers:
    """One number, or a list of them, nested by `shape`."""

    __slots__ = ("_format", "_shape", "_widened", "size")

    def __init__(self, code: str, shape: tuple[int, ...] = ()) -> None:
        self._widened = code == "bfloat16"  # the upper half of a float32
        count = 1
        for length in shape:
            count *= length
        self._format = struct.Struct(f"={count}{'H' if self._widened else code}")
        self._shape = shape
        self.size = self._format.size

    def read(self, memory: memoryview) -> Any:
        """The numbers, exactly."""
        flat = list(self._format.unpack_from(memory))
        if self._widened:
            flat = [struct.unpack("=f", struct.pack("=I", half << 16))[0] for half in flat]
        for length in reversed(self._shape[1:]):
            flat = [flat[at : at + length] for at in range(0, len(flat), length)] if length else []
        return flat if self._shape else flat[0]


class Counts:
    """A histogram as `Device.histogram` makes it."""

    __slots__ = ("_bins", "_make", "size")

    def __init__(self, bins: int, make: MakeHistogram) -> None:
        self._bins, self._make = bins, make
        self.size = 8 * (bins + 3)

    def read(self, memory: memoryview) -> Any:
        """What `make` makes of counts, the least, the largest, and how many they are of."""
        *counts, least, largest, number = struct.unpack_from(f"={self._bins + 3}d", memory)
        return self._make([int(count) for count in counts], least, largest, int(number))


class Slab:
    """The host memory of one device, in slots."""

    def __init__(self, device: Device, slots: int = SLOTS) -> None:
        self.device = device
        self.memory, self.view = device.memory(slots * SLOT_BYTES)
        self._free = deque(range(slots))
        self._left: list[Batch] = []  # given up before the device was done

    def take(self) -> int | None:
        """A slot, or None if there is none. From any thread."""
        if not self._free:
            self._reclaim()
        try:
            slot = self._free.popleft()
        except IndexError:
            return None
        self.view[slot * SLOT_BYTES + FLAG_AT] = 0
        return slot

    def give_back(self, slots: Iterable[int]) -> None:
        """The device is done with these."""
        self._free.extend(slots)

    def leave(self, batch: Batch) -> None:
        """Nobody waits for this any more, and the device may still write."""
        self._left.append(batch)

    @property
    def free(self) -> int:
        """How many slots there are to take."""
        return len(self._free)

    def _reclaim(self) -> None:
        for batch in list(self._left):
            if batch.ready():
                self._left.remove(batch)
                self.give_back(batch.slots)


class Batch:
    """What one call copies from one device. Its flag is in its last slot."""

    __slots__ = ("_slab", "_unread", "launched", "slots")

    def __init__(self, slab: Slab) -> None:
        self._slab = slab
        self._unread = 0
        self.slots: list[int] = []
        self.launched = False

    def ready(self) -> bool:
        """Whether all of it is in host memory. One look at one byte."""
        return self.launched and self._slab.view[self.slots[-1] * SLOT_BYTES + FLAG_AT] != 0

    def place(self, array: Any, staged: Sequence[Staged], at: int) -> int | None:
        """Have an array of values copied; where the next one may go in the last slot, None if there is no room."""
        size = sum(it.layout.size for it in staged)
        if not self.slots or at + size > FLAG_AT:
            slot = self._slab.take()
            if slot is None:
                return None
            self.slots.append(slot)
            at = 0
        start = self.slots[-1] * SLOT_BYTES + at
        self._slab.device.copy(self._slab.memory, start, array)
        for it in staged:
            it.batch, it.start = self, start
            start += it.layout.size
        self._unread += len(staged)
        return at + (size + 7) // 8 * 8

    def close(self) -> None:
        """Last of all: the flag."""
        if self.slots:
            self._slab.device.raise_flag(self._slab.memory, self.slots[-1] * SLOT_BYTES + FLAG_AT)
            self.launched = True

    def read(self, staged: Staged) -> Any:
        """The value of one; once for each."""
        try:
            return staged.layout.read(self._slab.view[staged.start : staged.start + staged.layout.size])
        finally:
            self._done()

    def give_up(self) -> None:
        """One of its values is not wanted any more."""
        self._done()

    def _done(self) -> None:
        self._unread -= 1
        if self._unread == 0:
            if self.ready():
                self._slab.give_back(self.slots)
            else:
                self._slab.leave(self)


class Deferred:
    """A value that is not here yet. It stands in a record's data in its place; `found` is what it came to."""

    __slots__ = ("found", "size", "why")

    def __init__(self, size: int) -> None:
        self.size = size
        """What it takes in a record, at most."""
        self.found: Any = None
        self.why = ""
        """Why it can not be had, as far as that is known."""

    def ready(self) -> bool:
        """Whether it can be read without waiting."""
        raise NotImplementedError

    def value(self) -> Any:
        """The plain value; UnsupportedValue if there is none. Called once."""
        raise NotImplementedError

    def give_up(self) -> None:
        """It is not wanted any more. Called instead of `value`."""


class Staged(Deferred):
    """A value on its way through a slab."""

    __slots__ = ("batch", "layout", "start", "tensor")

    def __init__(self, tensor: Any, layout: Layout) -> None:
        self.found: Any = None
        self.why = ""
        self.size = 3 * layout.size + 64  # a number of one byte takes two, nested lists a byte each
        self.tensor = tensor  # until the call has enqueued what it needs
        self.layout = layout
        self.batch: Batch | None = None
        self.start = 0

    def ready(self) -> bool:
        """Whether the flag is up."""
        return self.batch is None or self.batch.ready()

    def value(self) -> Any:
        """What the device wrote."""
        if self.batch is None:
            raise UnsupportedValue(self.why)
        return self.batch.read(self)

    def give_up(self) -> None:
        """Leave it to the device."""
        if self.batch is not None:
            self.batch.give_up()


class Call:
    """What one call of `log` has found on devices.

    `find` says which device a tensor is on: None for host memory; UnsupportedValue if it can not be copied from.
    """

    __slots__ = ("_groups", "_staging", "bins", "by_name", "deferred", "find")

    def __init__(self, staging: Staging, bins: int) -> None:
        self._staging = staging
        self.find = staging.find
        self._groups: dict[Any, tuple[Device, dict[str, list[Staged]], list[Staged]]] = {}
        self.bins = bins
        """How many bins a histogram has."""
        self.deferred: list[Deferred] = []
        self.by_name: dict[str, list[Deferred]] = {}

    def number(self, device: Device, tensor: Any, code: str) -> Staged:
        """The one element of a tensor."""
        staging = self._staging
        staged = Staged(tensor, staging.layouts.get(code) or staging.layout(code))
        group = self._groups.get(id(device)) or self._group(device)
        group[1].setdefault(code, []).append(staged)
        self.deferred.append(staged)
        return staged

    def array(self, device: Device, tensor: Any, layout: Layout) -> Staged:
        """A few elements."""
        staged = Staged(tensor, layout)
        self._group(device)[2].append(staged)
        self.deferred.append(staged)
        return staged

    def histogram(self, device: Device, tensor: Any, make: MakeHistogram) -> Staged:
        """What `make` makes of a tensor's histogram, which is enqueued at once: the tensor is not kept."""
        if device.capturing():
            raise UnsupportedValue(CAPTURING)
        return self.array(device, device.histogram(tensor, self.bins), Counts(self.bins, make))

    def defer(self, value: Deferred) -> Deferred:
        """A value that comes by a way of its own."""
        self.deferred.append(value)
        return value

    def named(self, name: str, count: int) -> None:
        """What was found after the first `count` belongs to a name of the record."""
        if len(self.deferred) > count:
            self.by_name[name] = self.deferred[count:]

    def without(self, count: int) -> None:
        """What was found after the first `count` is not wanted: something beside it can not be logged."""
        for it in self.deferred[count:]:
            it.why = NOT_WANTED
        del self.deferred[count:]

    def launch(self) -> None:
        """Enqueue the copies of all. What can not be copied says `why`."""
        for device, numbers, arrays in self._groups.values():
            numbers = {code: kept for code, some in numbers.items() if (kept := [it for it in some if not it.why])}
            arrays = [it for it in arrays if not it.why]
            try:
                if device.capturing():
                    raise UnsupportedValue(CAPTURING)
                self._staging.launch(device, numbers, arrays)
            except UnsupportedValue as error:
                _refuse([*_all(numbers), *arrays], str(error))
            except Exception as error:  # noqa: BLE001 - a device fails in many ways, and none may reach the training
                reason = str(error).strip().partition("\n")[0]
                _refuse([*_all(numbers), *arrays], f"it can not be copied: {type(error).__name__}: {reason:.120}")
        self._groups.clear()

    def _group(self, device: Device) -> tuple[Device, dict[str, list[Staged]], list[Staged]]:
        return self._groups.setdefault(id(device), (device, {}, []))


class Staging:
    """A session's values on their way from devices."""

    def __init__(self, find: Callable[[Any], Device | None], *, slots: int = SLOTS) -> None:
        self.find = find
        self._slots = slots
        self._slabs: dict[int, Slab] = {}
        self.layouts: dict[str, Numbers] = {}

    def call(self, bins: int = 32) -> Call:
        """For the values of one call."""
        return Call(self, bins)

    def layout(self, code: str) -> Numbers:
        """That of one number."""
        return self.layouts.setdefault(code, Numbers(code))

    def slab(self, device: Device) -> Slab:
        """The host memory of a device, made when it is first wanted."""
        found = self._slabs.get(id(device))
        if found is None:
            found = self._slabs.setdefault(id(device), Slab(device, self._slots))
        return found

    def launch(self, device: Device, numbers: Mapping[str, list[Staged]], arrays: Sequence[Staged]) -> None:
        """Enqueue the copies of a call from one device, and the flag behind them."""
        batch, at = Batch(self.slab(device)), 0
        try:
            for staged in numbers.values():
                most = FLAG_AT // staged[0].layout.size
                for start in range(0, len(staged), most):
                    some = staged[start : start + most]
                    at = _placed(batch, device.numbers([it.tensor for it in some]), some, at)
            for it in arrays:
                at = _placed(batch, device.array(it.tensor), [it], at)
        finally:
            batch.close()
            for it in [*_all(numbers), *arrays]:
                it.tensor = None


def _placed(batch: Batch, array: Any, staged: Sequence[Staged], at: int) -> int:
    found = batch.place(array, staged, at)
    if found is None:
        _refuse(staged, FULL)
        return at
    return found


def _refuse(staged: Iterable[Staged], why: str) -> None:
    for it in staged:
        it.tensor = None
        if it.batch is None or not it.batch.launched:
            it.batch, it.why = None, it.why or why


def _all(numbers: Mapping[str, list[Staged]]) -> list[Staged]:
    return [it for group in numbers.values() for it in group]
