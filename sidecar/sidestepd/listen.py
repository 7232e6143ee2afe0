"""Who is heard, and whose process has ended: what intake knows of its sessions that they do not say themselves.

- a session is *quiet* when nothing came of it for `HEARTBEATS` heartbeats, and *heard* when something comes again
- a session is *gone* when its process was seen to end on this node, and nothing came of it for a while after: what
  it had sent is read first, and a process of the same number in another container is not taken for it
- each change is an entry for the spool, once; delivery makes of it what it means
- no I/O and no clock: sessions and `now` in, entries out
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from sidestepd.entries import Entry, EntryKind
from sidestepd.roster import Session

HEARTBEATS = 3
GONE_AFTER_HEARTBEATS = 1.5
LEAST_QUIET_S = 1.0
"""Shorter, and it may be this machine that is slow."""


class Listener:
    """What was told of each session so far."""

    def __init__(self, *, heartbeat_s: float) -> None:
        self._quiet_s = max(LEAST_QUIET_S, HEARTBEATS * heartbeat_s)
        self._gone_s = max(LEAST_QUIET_S, GONE_AFTER_HEARTBEATS * heartbeat_s)
        self._quiet: set[bytes] = set()
        self._exited: dict[bytes, float] = {}
        """When a process was seen to end; until that is told, or it turns out to be another one."""

    def exited(self, session: bytes, now: float) -> None:
        """The process of a session ended."""
        self._exited.setdefault(session, now)

    def restart(self, pause_s: float) -> None:
        """Nobody listened for so long: whoever is quiet is told of anew."""
        self._quiet.clear()
        self._exited = {session: at + pause_s for session, at in self._exited.items()}

    def look(self, live: Iterable[Session], now: float) -> list[Entry]:
        """What has changed by `now`, by when it began."""
        return sorted(self._changes(list(live), now), key=lambda entry: float(entry.facts["since"]))

    def close(self, live: Iterable[Session], now: float) -> list[Entry]:
        """The command ended: a process that is seen to have ended will say no more, and its BYE will not come."""
        dead = [(at, it) for it in live if (at := self._exited.pop(it.id, None)) is not None]
        return [_vital(it, "gone", at, now) for at, it in sorted(dead, key=lambda pair: pair[0])]

    def _changes(self, live: list[Session], now: float) -> Iterator[Entry]:
        for session in live:
            at = self._exited.get(session.id)
            if at is not None and session.heard > at + self._gone_s:
                del self._exited[session.id]  # it speaks: it was another process that ended
            elif at is not None and now >= max(at, session.heard) + self._gone_s:
                del self._exited[session.id]
                yield _vital(session, "gone", at, now)
            elif now >= session.heard + self._quiet_s and session.id not in self._quiet:
                self._quiet.add(session.id)
                yield _vital(session, "quiet", session.heard, now)
            elif session.id in self._quiet and now < session.heard + self._quiet_s:
                self._quiet.discard(session.id)
                yield _vital(session, "heard", session.heard, now)


def _vital(session: Session, state: str, since: float, now: float) -> Entry:
    return Entry.of_event(EntryKind.VITAL, session.id, first=session.next, received=now, state=state, since=since)
