"""The relays of a run, as the daemon above sees them: each vouches for the sessions that speak through it.

- a relay's heartbeat is that of all its sessions; it comes often enough that a cut is noticed before patience ends
- of a relay that is not heard of nothing is known but that more is to come: rows wait for its sessions, for as
  long as leases last there. So a cut link makes rows complete later, and not late
- what a relay alone sees of a session (it is quiet, or gone) is written down as it is for our own
- no I/O and no clock: sessions, messages and `now` in, entries out
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sidestep.wire import Status
from sidestepd.entries import Entry, EntryKind
from sidestepd.roster import Roster, Session

MISSED = 2.5
"""Heartbeats after which a relay is away."""
BEATS_IN_PATIENCE = 4
VITAL = ("quiet", "heard", "gone")


class Relays:
    """Those of one run."""

    def __init__(self, roster: Roster, *, heartbeat_s: float, patience_s: float) -> None:
        self._roster = roster
        self.heartbeat_s = min(heartbeat_s, max(patience_s / BEATS_IN_PATIENCE, 0.1))
        """How often relays shall say that they are there."""
        self._away: set[bytes] = set()

    def hear(self, status: Status, now: float) -> list[Entry]:
        """A relay's heartbeat, or what it says of a session of its own."""
        session = self._roster.sessions.get(status.session)
        if session is None:
            return []
        if session.is_relay:
            self._away.discard(session.id)
            for one in self._roster.behind(session):
                one.heard = max(one.heard, now)
        state, since_s = status.info.get("vital"), status.info.get("since_s")
        if not session.relay or state not in VITAL or not isinstance(since_s, int | float):
            return []
        facts = {"state": state, "since": now - max(since_s, 0.0)}
        return [Entry.of_event(EntryKind.VITAL, session.id, first=session.next, received=now, **facts)]

    def look(self, now: float) -> list[Entry]:
        """What is to be noted of relays that have not been heard of."""
        return [entry for relay in self._roster.relays for entry in self._look_at(relay, now)]

    def _look_at(self, relay: Session, now: float) -> Iterator[Entry]:
        if relay.state != "live" or relay.id in self._away or now < relay.heard + MISSED * self.heartbeat_s:
            return
        self._away.add(relay.id)
        for session in self._roster.behind(relay):
            if not session.more:
                session.more = True
                yield Entry.of_event(EntryKind.COUNTERS, session.id, received=now, more=True, **session.counters)

    def report(self) -> list[dict[str, Any]]:
        """How they are, for who asks."""
        return [
            {
                "node": relay.hello.get("node", ""),
                "state": "away" if relay.state == "live" and relay.id in self._away else relay.state,
                "exit_code": relay.exit_code,
                "sessions": len(self._roster.behind(relay)),
            }
            for relay in self._roster.relays
        ]
