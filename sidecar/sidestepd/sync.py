"""Send a run to a W&B server: an offline one in however many segments, and what an interrupted one had left.

- a run that is not finished is finished first, by its own daemon: what its rows are is decided once, and stays
- then its rows go up in the order of `_step`, each once: what the server holds is asked of it, never remembered,
  so a sync that was killed goes on where the server says
- a run that is there already, and was not begun by a sync of this directory, is left alone
- an online run needs no more than the first of these: it ends on the server
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sidestep.errors import SettingsError
from sidestepd import meeting, placement, rundir, status, stranded
from sidestepd.config import Config
from sidestepd.daemon import Daemon
from sidestepd.errors import Incomplete, SinkError, Trouble
from sidestepd.home import RunHome
from sidestepd.processes import Lock, read_json, write_json
from sidestepd.replay import UNFINISHED, facts_of, replay
from sidestepd.rowlog import RowLog, RowLogReader
from sidestepd.rundir import RunFile

NOTE = "sync.json"
"""Where the run was sent: `server`, `project`, `entity` and `id` as given, and its `url` when all is there."""
_ASK_EVERY_S = 2.0

Progress = Callable[[int, int], None]
"""Called with how many rows are done, and of how many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Synced:
    """Where the run is now, and how many rows it has; `again` if it was all there before."""

    url: str
    rows: int
    again: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What the run shall be on the server; None is what it is here."""

    project: str | None = None
    entity: str | None = None
    id: str | None = None
    server: str | None = None

    @property
    def given(self) -> dict[str, str]:
        """What was said of it."""
        named = {name: getattr(self, name) for name in ("project", "entity", "id", "server")}
        return {name: value for name, value in named.items() if value}


def sync(
    run_dir: Path, target: Target, *, progress: Progress = lambda *_: None, pause: Callable[[float], object]
) -> Synced:
    """Return when everything is on the server. Raises SettingsError, AlreadyRunning or Incomplete."""
    config = Config.from_json((run_dir / "config.json").read_bytes())
    if config.is_relay:
        raise SettingsError(
            f"{run_dir} is a relay's: `sidestep drain` hands what it has on, and the run is elsewhere"
        )
    if config.sink.kind != "wandb":
        raise SettingsError(f"{run_dir}: its sink is {config.sink.kind}; only wandb's runs can be sent")
    lock = Lock(run_dir / "sync.lock")
    lock.acquire()
    report = status.report(run_dir)
    if report.state == "running":
        raise SettingsError(f"{run_dir}: the run is not over")
    if report.state != "finished":
        if report.run.mode == "online" or _mode(run_dir) == "online":
            _rename(run_dir, config, target)
        report = _finish(run_dir, config, pause)
    if report.run.mode == "online":
        return Synced(url=report.run.url or "", rows=report.rows)
    return _send(run_dir, config, target, rows=report.rows, progress=progress)


def _mode(run_dir: Path) -> str:
    said: Mapping[str, Any] = RowLogReader(placement.home(run_dir) / placement.ROW_LOG).meta("run") or {}
    return str(said.get("mode", RunFile.read(run_dir).mode))


def _rename(run_dir: Path, config: Config, target: Target) -> None:
    """Call an online run otherwise, as long as nothing of it is anywhere."""
    names = target.given
    if not names:
        return
    if target.server:
        raise SettingsError("--server: an online run keeps the server it was begun for")
    if read_json(run_dir / "about.json"):
        raise SettingsError(f"the run is on the server already; {' and '.join(names)} can not be changed")
    if target.id:  # what `resume` said was said of the other one
        replace(RunFile.read(run_dir), id=names.pop("id"), resume="allow").write(run_dir)
        names["resume"] = "allow"
    rowlog = RowLog(placement.settle(run_dir, config.spool.dir) / placement.ROW_LOG)
    rowlog.settle(run={**rowlog.meta("run", {}), **names})
    rowlog.close()


def _finish(run_dir: Path, config: Config, pause: Callable[[float], object]) -> status.Report:
    """Have the run's own daemon bring it to its end."""
    found = RunFile.read(run_dir)
    here = found.at(run_dir, rundir.private_address(run_dir))
    daemon = Daemon(RunHome(run_dir, config, here, listens=False), pause=pause)
    try:
        stranded.start(daemon, found.id, pause)
        daemon.close(UNFINISHED if found.exit_code is None else found.exit_code)
        daemon.wait_closed(lambda _: None)
    finally:
        daemon.release()
    meeting.forget(run_dir, config)
    return status.report(run_dir)


def _send(run_dir: Path, config: Config, target: Target, *, rows: int, progress: Progress) -> Synced:
    """Copy an offline run that is finished."""
    noted = read_json(run_dir / NOTE)
    given = target.given or dict(noted.get("to", {}))
    if noted.get("url") and given == noted["to"]:
        return Synced(url=noted["url"], rows=rows, again=True)
    own = run_dir / "sync"
    if noted.get("to") != given:  # what an earlier sync began elsewhere is no business of this one
        shutil.rmtree(own, ignore_errors=True)
    own.mkdir(mode=0o700, exist_ok=True)
    earlier = () if target.id else _sent_before(run_dir, given)
    resume = "allow" if earlier else "never"
    facts = facts_of(run_dir, own, mode="online", resume=resume, ask_every_s=_ASK_EVERY_S)
    facts = replace(facts, **({"server": config.sink.server} | given))
    from sidestepd.sinks.wandb_copy import CopySink  # these import wandb
    from sidestepd.sinks.wandb_server import Held

    sink = CopySink(run_dir / "wandb", began=lambda: write_json(run_dir / NOTE, {"to": given}))
    try:
        done = replay(run_dir, sink, facts, progress=lambda count: progress(count, rows), waiting=_unless_it_lasts)
        there = (sink.ask() or Held()).rows
    except SinkError as error:
        raise Incomplete(str(error)) from error
    due = done.rows + sum(status.report(one).rows for one in earlier)
    if there != due:
        raise Incomplete(f"the server holds {there} rows of {due}")
    url = str(sink.about()["url"])
    write_json(run_dir / NOTE, {"to": given, "url": url})
    shutil.rmtree(own, ignore_errors=True)
    return Synced(url=url, rows=done.rows)


def _sent_before(run_dir: Path, given: Mapping[str, str]) -> tuple[Path, ...]:
    """The directories of what this run goes on from, all of which must be where it goes. Raises SettingsError."""
    earlier = rundir.earlier_of(run_dir, RunFile.read(run_dir).id)
    for one in earlier:
        noted = read_json(one / NOTE)
        there = noted.get("url") and noted.get("to") == given
        if not there and not (_mode(one) == "online" and not given):
            raise SettingsError(
                f"{run_dir} goes on from {one}: sync that first, or give this one an id of its own"
            )
    return earlier


def _unless_it_lasts(trouble: Trouble | None) -> None:
    if trouble and trouble.lasting:
        raise Incomplete(trouble.what)
