"""The reorder buffer, spoken to in few words."""

from __future__ import annotations

from typing import Any

from sidestepd.order import ReorderBuffer
from sidestepd.resolve import Booted, Heard, Joined, Left
from sidestepd.rows import MAIN_AXIS
from tests.support.builders import part, session_id

PATIENCE = 5.0


class Buffer:
    """A buffer of patience 5, spoken to by session numbers; what left is shown as (axis, step, cause)."""

    def __init__(self, **options: Any) -> None:
        self.order = ReorderBuffer(**{"patience": PATIENCE, "capacity": 1000} | options)

    def join(
        self, *sessions: int, now: float = 0.0, world: int | None = None, launch: str = "L", more: bool = False
    ) -> None:
        for session in sessions:
            said = Joined(
                session=session_id(session), rank=session, world=world or len(sessions), launch=launch, more=more
            )
            self.order.hear(said, now)

    def say(
        self, session: int, *steps: int, now: float, axis: str = MAIN_AXIS, more: bool = False, used: bool = False
    ) -> None:
        for step in steps:
            self.order.hear(part(step, rank=session, axis=axis, used=used), now)
        self.order.hear(Heard(session=session_id(session), more=more), now)

    def leave(self, session: int, now: float) -> None:
        self.order.hear(Left(session_id(session)), now)

    def boot(self, now: float) -> None:
        self.order.hear(Booted(), now)

    def ready(self, now: float) -> list[tuple[str, int, str]]:
        return [(bundle.axis, bundle.step, bundle.cause) for bundle in self.order.ready(now)]

    def steps(self, now: float) -> list[int]:
        return [bundle.step for bundle in self.order.ready(now)]


def two_ranks_at(step: int, **options: Any) -> Buffer:
    """Two ranks that are settled on the main axis, at time 100, and said `step` last."""
    buffer = Buffer(**options)
    buffer.join(0, 1)
    for session in (0, 1):
        buffer.say(session, step - 1, step, now=0.0)
    assert [step - 1] == buffer.steps(now=0.0)
    return buffer
