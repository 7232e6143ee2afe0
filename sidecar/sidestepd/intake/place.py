"""The spool of a run, opened wherever it lies: who spoke, how much it may still take, and what is let go of."""

from __future__ import annotations

from pathlib import Path

from sidestepd import placement
from sidestepd.config import Config
from sidestepd.room import Ballast, Room, open_spool
from sidestepd.roster import Roster
from sidestepd.rowlog import RowLogReader
from sidestepd.spool import Spool


def open_room(run_dir: Path, config: Config) -> tuple[Spool, Room]:
    """Raises what the disk has against it."""
    options = config.spool
    home = placement.settle(run_dir, options.dir)
    above = RowLogReader(home / placement.ROW_LOG).newest()
    ballast = Ballast(home / "spool.ballast", options.ballast_bytes)
    spool = open_spool(lambda: Spool(home / placement.SPOOL, above=above, quota=options.max_bytes), ballast)
    return spool, Room(spool, ballast, [home, run_dir], quota=options.max_bytes, reserve=options.reserve_bytes)


def open_roster(spool: Spool, config: Config, *, now: float) -> Roster:
    """Everybody who spoke so far."""
    return Roster(
        spool.sessions(),
        lease=config.order.lease_s,
        relay_lease=config.order.relay_lease_s,
        now=now,
        duplicate_gate=config.unsafe.duplicate_gate,
    )


RELAYED_S = 0.05
"""How long frames of relays may wait for their commit: whoever said them has his answer already."""
NOTE_INTERVAL_S = 5.0
"""How often the rows of all sessions are written that frames moved: else with what happens to one, or for room."""


class Deleting:
    """Lets go of what delivery calls settled. For one thread at a time."""

    def __init__(self, spool: Spool, room: Room) -> None:
        self._spool, self._room = spool, room
        self._through, self._note_at = 0, 0.0

    def through(self, cursor: int, now: float) -> None:
        """Delete entries up to `cursor`; some of them later, unless room is short. Raises what the disk has."""
        note = now >= self._note_at or self._room.short
        through = cursor if note else min(cursor, self._spool.noted)
        if note or through > self._through:
            self._spool.delete_through(through, note=note)
            self._through = through
        if note:
            self._note_at = now + NOTE_INTERVAL_S
