"""`sidestep run` as one of the commands of a job: the first makes the run, others are relays of it, or join one.

    node 0   sidestep run ─▶ daemon with the run ◀─────┐      other tasks there ─▶ join it
    node 1   sidestep run ─▶ relay, which finds it ────┘      other tasks there ─▶ join that

- the run is finished when the commands of all nodes have ended, with the worst of their exit codes
- a node that does not find the first one trains all the same: its relay keeps what is said, and looks on
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress

from sidestep.ranks import Here
from sidestepd import command, job, rundir
from sidestepd.command import Command, Signals
from sidestepd.config import Config
from sidestepd.daemon import Daemon
from sidestepd.errors import Deleted, Incomplete
from sidestepd.home import RunHome
from sidestepd.job import Place
from sidestepd.meeting import SECRET, Found, Meeting, Neighbours
from sidestepd.rundir import RunFile
from sidestepd.saying import say

LOST = 1
"""The exit code of a node of which no end was heard."""
TICK_S = 0.2
SAY_AFTER_S = 5.0
"""So long the end of a job may take without a word."""
MOST_NAMES = 5
"""Of nodes, in one sentence."""


def place_of(environ: Mapping[str, str], words: Sequence[str]) -> Place | None:
    """Which command of a job we are; None if by ourselves, or if it is not known how to find the others."""
    found = job.place_of(
        environ,
        words,
        Here.now(),
        is_here=is_here,
    )
    if found is None or (found.alone and found.tasks == 1):
        return None
    by_index_alone = found.nodes is None and found.master is None and environ.get("JOB_COMPLETION_INDEX")
    return None if by_index_alone and not environ.get(SECRET) else found


def is_here(host: str) -> bool:
    """Whether a host is this node, by name or by address."""
    node = os.uname().nodename
    if host in (node, node.partition(".")[0], socket.getfqdn(), "localhost", "127.0.0.1", "::1"):
        return True
    with suppress(OSError):
        addresses = {str(it[4][0]) for it in socket.getaddrinfo(host, None)}
        for address in addresses:
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.bind((address, 0))  # only what is ours can be bound to
                return True
    return False


class Part:
    """What a command of a job has in common with one by itself, and what not."""

    WAITS = "waiting for the other commands of this job; once more, and the run ends without what they still say"

    def __init__(self, place: Place, config: Config, environ: Mapping[str, str]) -> None:
        self.place = place
        self.config = rundir.with_run_id(config) if place.first else config
        self.environ = dict(environ)
        self.neighbours = Neighbours(place)
        self.meeting = None if place.alone else Meeting(place, config, environ)

    def join(self, words: Sequence[str]) -> int:
        """Run the command in the run of this node's daemon; returns its exit code."""
        with Signals() as signals:
            try:
                exports = self.neighbours.join(
                    os.getpid(), self.config.job.wait_s, lambda seconds: _pause(signals, seconds)
                )
            except Incomplete:
                return LOST
            if exports is None:
                say(f"no daemon of this job came on {self.place.node} in {self.config.job.wait_s:.0f} s")
            running = Command(words, self.environ | (exports or {}), in_foreground=command.in_foreground())
            while running.exit_code is None:
                for number in signals.wait(TICK_S):
                    running.pass_on(number)
            code = running.exit_code
        self.neighbours.note(os.getpid(), code)
        return code

    def home(self, signals: Signals) -> RunHome:
        """The directory to serve from; it waits for the first daemon if that is another one."""
        if self.place.first:
            if self.meeting is not None:
                self.config = self.meeting.open(self.config)
            run_dir = rundir.new_run_dir(self.config, now=time.time())
        else:
            self.config = _as_relay(self.config, self._find(signals), self.meeting)
            run_dir = rundir.new_run_dir(self.config, now=time.time(), node=self.place.node)
        return RunHome(run_dir, self.config, RunFile.of(self.config, run_dir, rundir.private_address(run_dir)))

    def _find(self, signals: Signals) -> Found:
        assert self.meeting is not None
        found = self.meeting.find(self.config.job.wait_s, lambda seconds: _pause(signals, seconds))
        if found is None:
            say(
                f"the first node of this job was not found in {self.config.job.wait_s:.0f} s: what is logged here "
                "waits on disk for it. It is looked for in a run directory that all nodes share, or by "
                f"{SECRET} and MASTER_ADDR"
            )
        else:
            self.meeting.come()
        return found or self.meeting.later()

    def started(self, daemon: Daemon, exports: Mapping[str, str]) -> None:
        """The daemon is there."""
        self.neighbours.tell(exports)
        if self.place.first and self.meeting is not None:
            self.meeting.tell(daemon.home.directory)

    def ended(self, daemon: Daemon, code: int) -> int:
        """Our command ended: wait for the others; the worst of all exit codes."""
        try:
            others = self.neighbours.wait(daemon.pause, self.config.job.wait_s)
            code = max([code, *(LOST if it is None else abs(it) for it in others)])
            if self.place.first and not self.place.alone:
                code = max(code, self._wait_for_nodes(daemon))
        except (Incomplete, Deleted) as error:
            say(f"the other commands of this job are not waited for: {error}")
        return code

    def _wait_for_nodes(self, daemon: Daemon) -> int:
        """Until the relays of all nodes have said how their commands ended."""
        began, said = time.monotonic(), False
        deadline = began + self.config.job.wait_s
        while daemon.tend():
            expected = self.meeting.others() if self.meeting else 0
            relays = (daemon.report() or {}).get("relays")
            if relays is not None:
                over = [it for it in relays if it["state"] not in ("live", "away")]
                if len(over) == len(relays) and (len(over) >= expected or time.monotonic() > deadline):
                    if len(over) < expected:
                        say(f"{expected - len(over)} of {expected} other nodes never came")
                        return max([LOST, *(_code_of(it) for it in over)])
                    return max((_code_of(it) for it in over), default=0)
                if not said and time.monotonic() > began + SAY_AFTER_S:
                    said = True
                    say(_awaited(relays, expected, self.config))
            daemon.pause(TICK_S)
        return 0

    def clear(self, *, complete: bool) -> None:
        """All is over, or is left for later."""
        self.neighbours.clear()
        if self.meeting is not None:
            self.meeting.clear(complete=complete)


def _awaited(relays: Sequence[Mapping[str, object]], expected: int, config: Config) -> str:
    """Who is waited for, and for how long that may be."""
    names = {
        state: sorted({str(it["node"]) for it in relays if it["state"] == state}) for state in ("live", "away")
    }
    parts = [_some(names["live"])] if names["live"] else []
    if names["away"]:
        parts.append(f"{_some(names['away'])} (not heard of, for at most {config.order.relay_lease_s:.0f} s)")
    if (missing := expected - len(relays)) > 0:
        parts.append(f"{missing} that never came (for at most {config.job.wait_s:.0f} s)")
    return f"the command has ended here; waiting for those of other nodes: {', '.join(parts)}"


def _some(names: Sequence[str]) -> str:
    more = len(names) - MOST_NAMES
    return ", ".join(names[:MOST_NAMES]) + (f" and {more} more" if more > 0 else "")


def _code_of(relay: Mapping[str, object]) -> int:
    code = relay.get("exit_code")
    return abs(code) if relay.get("state") == "bye" and isinstance(code, int) else LOST


def _as_relay(config: Config, found: Found, meeting: Meeting | None) -> Config:
    """Our options, as of a relay of what was found."""
    assert meeting is not None
    upstream = config.upstream.model_copy(
        update={
            "address": None if found.context else found.address,
            "context": found.context,
            "key_file": config.upstream.key_file or meeting.key_file,
        }
    )
    sink = config.sink.model_copy(update={"kind": "upstream"})
    run = config.run.model_copy(update={"id": found.run_id or config.run.id})
    sources = {**config.sources, "run.id": "the job"} if run.id else config.sources
    updated = config.model_copy(update={"sink": sink, "upstream": upstream, "run": run, "sources": sources})
    return rundir.with_run_id(updated)


def _pause(signals: Signals, seconds: float) -> None:
    """Wait; raises Incomplete if we are told to stop meanwhile."""
    for number in signals.wait(seconds):
        if number.name in ("SIGINT", "SIGTERM"):
            raise Incomplete(f"stopped by {number.name}")
