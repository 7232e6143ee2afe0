"""What `step=None` means, on one axis of one session.

The rules are wandb's. A step that is given opens its row; a call without a step joins the open row and closes
it, or takes the next step. `commit=True` closes at once, `commit=False` leaves open. Until the first step is
given, steps are the session's own count, which the daemon puts on the base of its launch.

- a step below one already taken is passed on (the daemon knows what is late) and moves nothing
- no lock: each number is taken by one statement that calls nothing, and the interpreter lets another thread in
  only at a call or a jump
"""

from __future__ import annotations

from sidestep import convert
from sidestep.errors import UnsupportedValue
from sidestep.wire import END_OF_STEPS, Kind

_COUNTED, _LOG = int(Kind.COUNTED), int(Kind.LOG)


class Steps:
    """The counter of one axis. `next` is the step that a call without one takes, and `kind` what it is."""

    __slots__ = ("kind", "next")

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Count from 0, as in a new session."""
        self.kind, self.next = _COUNTED, 0

    def take(self, step: int | None, commit: bool | None) -> tuple[int, int]:
        """The kind and the step of a call, moving the counter on; UnsupportedValue for what is no step."""
        if step is None:
            if commit is None or commit:
                self.next = (step := self.next) + 1
                return self.kind, step
            return self.kind, self.next
        if type(step) is not int or not 0 <= step < END_OF_STEPS:
            raise UnsupportedValue(f"step={step!r:.80}: a step is a whole number from 0 to 2**61 - 1")
        if step >= self.next:
            self.kind = _LOG
            self.next = step + 1 if commit else step
        return _LOG, step


class OffsetSteps(Steps):
    """Steps of a sub-experiment, which begin at `offset` of the axis: its step 0 is said as that."""

    __slots__ = ("offset",)

    def __init__(self, offset: int) -> None:
        self.offset = offset
        super().__init__()

    def restart(self) -> None:
        """Begin at the offset, as in a new session."""
        self.kind, self.next = _LOG, self.offset

    def take(self, step: int | None, commit: bool | None) -> tuple[int, int]:
        """As `Steps.take`, for a step that counts from the offset."""
        if type(step) is int and step >= 0:
            step += self.offset
        return super().take(step, commit)


def whole(step: object) -> int | None:
    """A step as users give it (an int, 5.0, numpy's or torch's 5 on the CPU) as an int."""
    if step is None:
        return None
    number = convert.plain(step)
    if isinstance(number, float) and number.is_integer():
        return int(number)
    if type(number) is int:
        return number
    raise UnsupportedValue(f"step={step!r:.80}: a step is a whole number from 0 to 2**61 - 1")


def truth(commit: object) -> bool | None:
    """`commit` as users give it, numpy's and torch's on the CPU too."""
    return None if commit is None else bool(convert.plain(commit))
