"""Which runs a daemon serves: exactly one, which everybody joins, or those that its workers name.

- a run is named by its id; sessions that give none share one run per launch, and per turn of `init()` in it
- a run that workers named closes `linger_s` after its last session left, with what they ended with
- which runs are open is written down before the first answer: whoever starts again takes all of them up
- of runs that are over nothing is kept but a bounded list of their sessions, which are told so
"""

from __future__ import annotations

import asyncio
import logging
import re
import shutil
import sqlite3
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sidestep.errors import SettingsError
from sidestep.wire import FILES, LANES, RELAY, WORKER, Bye, Hello, Message, Refuse
from sidestepd import rundir
from sidestepd.errors import AlreadyRunning, ExitCode, SpoolError
from sidestepd.exits import Lifeline, is_here
from sidestepd.home import ServiceFile
from sidestepd.intake.run import Intake, Send
from sidestepd.launches import Launches
from sidestepd.rundir import RunFile

logger = logging.getLogger("sidestepd.intake")

TEND_INTERVAL_S = 0.1
CLOSED_BY_ORPHAN = 1
"""The exit code of a run whose `sidestep run` is gone."""
SESSIONS_REMEMBERED = 10_000
FIRST_WORKER_WITHIN_S = 120.0
"""A daemon that a worker started ends when nobody has come for so long."""

Orphaned = Callable[[], bool]
"""Whether the process that started this one is gone."""


class OneRun:
    """One run that everybody joins; the supervisor says when it closes, and with what."""

    def __init__(self, run_dir: Path, send: Send, orphaned: Orphaned) -> None:
        self.intake = Intake.open(run_dir, send)
        self._orphaned = orphaned

    async def serve(self) -> int:
        """Until the run is complete, or this process is told to stop."""
        tending = asyncio.create_task(self._tend())
        try:
            return await self.intake.serve()
        finally:
            tending.cancel()
            await asyncio.gather(tending, return_exceptions=True)

    async def _tend(self) -> None:
        while True:
            if self._orphaned() and not self.intake.closing and not self.intake.roster.awaited:
                logger.warning("whoever started this daemon is gone, and so are its workers: closing the run")
                self.intake.close(CLOSED_BY_ORPHAN)
            await asyncio.sleep(TEND_INTERVAL_S)

    def stop(self) -> None:
        """End, resumably."""
        self.intake.stop()

    def shut(self) -> None:
        """Let go of everything."""
        self.intake.shut()

    def greet(self, route: bytes, hello: Hello, peer: str) -> None:
        """Whoever comes joins."""
        self.intake.hear(route, hello, peer)

    def owner(self, session: bytes) -> str | None:
        """Who a session belongs to."""
        return self.intake.roster.owner(session)

    def of(self, session: bytes) -> Intake | None:  # noqa: ARG002 - there is but one
        """The run."""
        return self.intake

    def close(self, exit_code: int, then: tuple[bytes, Message]) -> None:
        """The command ended."""
        self.intake.close(exit_code, then)

    def facts(self) -> dict[str, Any]:
        """What is known of the run."""
        return self.intake.facts()

    def report(self) -> dict[str, Any]:
        """How the run is."""
        return self.intake.report()


@dataclass(slots=True, kw_only=True)
class OpenRun:
    """A run that workers named: by an id of theirs, or as the `turn`-th of a launch."""

    intake: Intake
    named: str | None
    launch: str
    turn: int
    task: asyncio.Task[int]
    empty_since: float | None = None
    processes: dict[int, Lifeline] = field(default_factory=dict)
    """The workers' processes that live on this node, by pid."""
    all_gone: bool = False
    """There were such processes, and none is there any more."""


class SeveralRuns:
    """The runs that workers name, each opened by the first HELLO that means it."""

    def __init__(self, home: Path, send: Send, orphaned: Orphaned) -> None:
        self._home, self._send, self._orphaned = home, send, orphaned
        self._file = ServiceFile.read(home)
        self._config = rundir.stored_config(home)
        self._open: dict[str, OpenRun] = {}
        self._launches = Launches()
        self._sessions: dict[bytes, OpenRun] = {}
        self._over: OrderedDict[bytes, int | None] = OrderedDict()
        """Sessions of runs that are finished: of those that said BYE, the sequence after their last record."""
        self._processes: dict[int, Lifeline] = {}
        self._draining = self._file.closing
        self._stopping = False
        self._idle_since = time.monotonic()
        self._had_workers = False

    async def serve(self) -> int:
        """Until all is complete and nobody is expected any more, or this process is told to stop."""
        for kept in self._file.runs:
            self._take_up(**kept)
        self._write_down()
        while not self._stopping:
            self._tend(time.monotonic())
            if not self._open and self._is_over(time.monotonic()):
                return ExitCode.COMPLETE
            await asyncio.sleep(TEND_INTERVAL_S)
        for run in self._open.values():
            run.intake.stop()
        await asyncio.gather(*(run.task for run in self._open.values()))
        return ExitCode.INTERRUPTED

    def stop(self) -> None:
        """End, resumably."""
        self._stopping = True

    def shut(self) -> None:
        """Let go of everything."""
        for run in self._open.values():
            run.task.cancel()
            run.intake.shut()

    # Opening

    def greet(self, route: bytes, hello: Hello, peer: str) -> None:
        """Find the run that a HELLO means, or open it. One whose run is just ending asks again."""
        if hello.session in self._over:
            self._answer_late(route, hello)
            return
        run = self._sessions.get(hello.session) or self._find(route, hello)
        if run is None:
            return
        if not run.intake.closing:
            self._join(run, hello)
        if not run.intake.closing or hello.session in self._sessions:
            run.intake.hear(route, hello, peer)

    def owner(self, session: bytes) -> str | None:
        """Who a session belongs to, if it is in an open run."""
        run = self._sessions.get(session)
        return run.intake.roster.owner(session) if run else None

    def _answer_late(self, route: bytes, hello: Hello) -> None:
        """The run is finished. Who said all it had, and did not hear that this was taken, hears it now."""
        if hello.first == self._over[hello.session] and not hello.more:
            self._send(route, Bye(session=hello.session, first=hello.first))
        else:
            self._refuse(route, hello, "closed", "the run is finished", final=True)

    def _find(self, route: bytes, hello: Hello) -> OpenRun | None:
        if hello.role == WORKER:
            return self._find_or_open(route, hello)
        if hello.role in LANES and re.fullmatch("[0-9a-f]{32}", hello.beside):
            beside = bytes.fromhex(hello.beside)
            if beside not in self._over:
                return self._sessions.get(beside)  # whose HELLO may come later: this one asks again
        return self._find_its_own(route, hello)

    def _find_or_open(self, route: bytes, hello: Hello) -> OpenRun | None:
        named = str(hello.run or hello.settings.get("id") or "") or None
        turn = 0 if named else hello.turn - 1 if hello.turn else self._launches.turn_of(_who(hello))
        found = self._open.get(_key(named, hello.launch, turn))
        if found is not None:
            return found
        if self._draining:
            self._refuse(route, hello, "run", "this daemon takes no more runs: it is being stopped")
            return None
        if len(self._open) >= self._config.serve.max_runs:
            self._refuse(route, hello, "run", f"{len(self._open)} runs are open here, and more are not taken")
            return None
        try:
            return self._begin(named, hello.launch, turn)
        except (OSError, sqlite3.Error, SpoolError, SettingsError) as error:
            logger.error("can not open a run: %s", error)
            self._refuse(route, hello, "run", f"the daemon can not open a run: {error}")
            return None

    def _find_its_own(self, route: bytes, hello: Hello) -> OpenRun | None:
        """A sampler is of the run that started it, whatever its workers called that, and opens none."""
        for run in self._open.values():
            if run.intake.run.id == hello.run:
                return run
        if hello.role == RELAY:  # it may be here before its workers
            self._refuse(route, hello, "run", "this run is not open here")
        else:
            self._refuse(route, hello, "closed", "the run is finished", final=True)
        return None

    def _begin(self, named: str | None, launch: str, turn: int) -> OpenRun:
        """A new run, in a directory of its own."""
        id_ = _usable(named) if named else rundir.new_id()
        options = self._config.run.model_copy(update={"id": id_})
        config = self._config.model_copy(update={"run": options})
        run_dir = rundir.new_run_dir(config, now=time.time())
        run = RunFile.of(config, run_dir, self._file.address)
        run = replace(run, named=named is not None, turn=0 if named else turn + 1)
        rundir.lay_out(run_dir, config, run)
        try:
            opened = self._serve(run_dir, named, launch, turn)
        except BaseException:
            shutil.rmtree(run_dir, ignore_errors=True)  # nothing is in it, and its worker asks again
            raise
        self._write_down()
        logger.info("run %s in %s", id_, run_dir)
        return opened

    def _take_up(self, dir: str, named: str | None, launch: str, turn: int) -> None:  # noqa: A002 - as in the file
        """A run that was open when the last process of this daemon ended. One that is gone is left alone."""
        run_dir = Path(dir)
        try:
            run = self._serve(run_dir, named, launch, turn)
        except (SettingsError, AlreadyRunning, FileNotFoundError) as error:
            logger.error("%s is not taken up: %s", run_dir, error)
            return
        for session in run.intake.roster.sessions.values():
            self._sessions[session.id] = run
            if not session.is_worker:
                continue
            if named is None:
                self._launches.take({"launch": launch, **session.hello}, turn)
            self._watch_process(run, session.hello)

    def _serve(self, run_dir: Path, named: str | None, launch: str, turn: int) -> OpenRun:
        intake = Intake.open(run_dir, self._send)
        task = asyncio.create_task(intake.serve())
        run = OpenRun(intake=intake, named=named, launch=launch, turn=turn, task=task)
        self._open[_key(named, launch, turn)] = run
        return run

    def _join(self, run: OpenRun, hello: Hello) -> None:
        self._sessions[hello.session] = run
        if hello.role == FILES:
            self._watch_process(run, _who(hello))
        if hello.role != WORKER:
            return
        if run.named is None:
            self._launches.take(_who(hello), run.turn)
        self._watch_process(run, _who(hello))

    def _watch_process(self, run: OpenRun, who: dict[str, Any]) -> None:
        """Only where it is sure that the pid means the same here as there."""
        here = is_here(who["node"], pids=who.get("pids", ""))
        if self._file.until_idle and here and who["pid"] not in run.processes:
            known = self._processes.get(who["pid"])
            lifeline = known if known is not None and known.is_alive() else Lifeline(who["pid"])
            if lifeline.is_alive():
                run.processes[who["pid"]] = self._processes[who["pid"]] = lifeline

    # Tending and closing

    def _tend(self, now: float) -> None:
        orphaned = self._orphaned()
        for key, run in list(self._open.items()):
            if run.task.done():
                run.task.result()
                self._forget(key, run)
            elif not run.intake.closing:
                self._lose_the_dead(run)
                self._close_if_left(run, now, at_once=orphaned or self._draining)
        self._processes = {pid: line for pid, line in self._processes.items() if line.is_alive()}

    def _lose_the_dead(self, run: OpenRun) -> None:
        dead = {pid for pid, lifeline in run.processes.items() if not lifeline.is_alive()}
        for session in run.intake.roster.awaited:
            if session.hello["pid"] in dead:
                run.intake.lose(session.id)
        for pid in dead:
            del run.processes[pid]
        run.all_gone = not run.processes if dead else run.all_gone and not run.processes

    def _close_if_left(self, run: OpenRun, now: float, *, at_once: bool) -> None:
        roster = run.intake.roster
        if roster.awaited:
            run.empty_since = None
            return
        run.empty_since = now if run.empty_since is None else run.empty_since
        over = run.all_gone and roster.is_full_world  # ranks that start more slowly than others end are waited for
        if at_once or over or now - run.empty_since >= self._config.serve.linger_s:
            run.intake.close(roster.exit_code)

    def _forget(self, key: str, run: OpenRun) -> None:
        del self._open[key]
        exit_code = run.intake.rowlog.meta("exit_code")
        run.intake.shut()
        for session in run.intake.roster.sessions.values():
            self._sessions.pop(session.id, None)
            self._over[session.id] = session.next if session.state == "bye" else None
        while len(self._over) > SESSIONS_REMEMBERED:
            self._over.popitem(last=False)
        if run.named is None:
            self._launches.closed(run.launch, run.turn)
        run.intake.run.now("finished", exit_code).write(run.intake.run_dir)
        self._write_down()
        logger.info("run %s is finished", run.intake.run.id)

    def _is_over(self, now: float) -> bool:
        """Whether nobody is expected any more, with no run open."""
        if self._draining or self._orphaned():
            return True
        if not self._file.until_idle:
            return False
        self._had_workers = self._had_workers or bool(self._over)
        return not self._processes if self._had_workers else now - self._idle_since > FIRST_WORKER_WITHIN_S

    def close(self, exit_code: int, then: tuple[bytes, Message]) -> None:  # noqa: ARG002 - each run has its own
        """This daemon shall end: it takes no more runs, and closes each that is left."""
        self._draining = True
        self._write_down()
        self._send(*then)

    def _write_down(self) -> None:
        kept = [
            {"dir": str(run.intake.run_dir), "named": run.named, "launch": run.launch, "turn": run.turn}
            for run in self._open.values()
        ]
        self._file = replace(self._file, runs=tuple(kept), closing=self._draining)
        self._file.write(self._home)

    # Who is who

    def of(self, session: bytes) -> Intake | None:
        """The run that a session is in."""
        run = self._sessions.get(session)
        return run.intake if run else None

    def facts(self) -> dict[str, Any]:
        """Of no run in particular."""
        return {}

    def report(self) -> dict[str, Any]:
        """How each run is."""
        now = time.monotonic()
        return {
            "runs": [run.intake.report() for run in self._open.values()],
            "live": sum(len(run.intake.roster.live) for run in self._open.values()),
            "silent_s": max((now - run.intake.went_round_at for run in self._open.values()), default=0.0),
            "closing": self._draining,
        }

    def _refuse(self, route: bytes, hello: Hello, code: str, message: str, *, final: bool = False) -> None:
        self._send(route, Refuse(session=hello.session, code=code, message=message, final=final))


def _key(named: str | None, launch: str, turn: int) -> str:
    return f"id {named}" if named else f"launch {turn} {launch}"


def _who(hello: Hello) -> dict[str, Any]:
    return {name: getattr(hello, name) for name in ("launch", "rank", "node", "pid", "pids", "attempt")}


def _usable(named: str) -> str:
    """An id of a worker's, as a directory may be called: a worker sends bytes, and no paths."""
    usable = re.sub(r"[^A-Za-z0-9_.=+@-]", "-", named)[: rundir.MAX_ID_CHARS].lstrip(".=+@-") or rundir.new_id()
    if usable != named:
        logger.warning("the id %.80r is used as %s", named, usable)
    return usable
