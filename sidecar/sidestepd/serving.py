"""`sidestep serve` and its kin: a daemon without a command, its end, and what an ended one left behind.

- SIGTERM begins an end within a grace period: workers may leave, runs are finished; what is not done by then
  stays on disk, and the same command, or `sidestep drain`, goes on with it
- a daemon that a worker started serves that worker's launch, and ends when the processes of it have
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from sidestep.autostart import log_of
from sidestep.endpoint import Endpoint
from sidestep.errors import SettingsError
from sidestepd import meeting, rundir, status, stranded
from sidestepd.command import Signals
from sidestepd.config import Config, Given
from sidestepd.control import Control
from sidestepd.daemon import Daemon
from sidestepd.errors import Deleted, ExitCode, Incomplete, Unreachable
from sidestepd.exits import Lifeline
from sidestepd.hindrances import Hindrances
from sidestepd.home import Home, RunHome, ServiceHome, short
from sidestepd.metrics import Metrics
from sidestepd.notify import Watchdog, notify, stopping
from sidestepd.rundir import RunFile
from sidestepd.running import STOP, Drain, finish
from sidestepd.saying import say, sum_up

AUTOSTARTED_GRACE_S = 60.0
LOST = 1
"""The exit code of a run whose workers had not left when it was interrupted."""


def serve(
    run_dir: Path | None, address: str | None, grace_s: float, toml: Path | None, given: Mapping[str, Given]
) -> int:
    """Serve until told to stop; returns our exit code."""
    if address:
        rundir.check_address(address)
    home = (
        _taken_up(run_dir, address, toml, given)
        if run_dir
        else _new(address, Config.load(toml, os.environ, given))
    )
    return ExitCode.COMPLETE if home is None else _serve(home, grace_s)


def autostarted(address: str, lock: int, folder: Path | None) -> int:
    """Serve the launch of the worker that started us, which holds the address's lock for us."""
    given = {"run.dir": Given(str(folder), "init(dir=...)")} if folder else {}
    config = Config.load(None, os.environ, given)
    config = config.model_copy(
        update={"run": config.run.model_copy(update={"id": None})}
    )  # workers name their runs
    home = ServiceHome(config, address, until_idle=True)
    with Signals() as signals, os.fdopen(lock, "ab") as held:
        daemon = Daemon(home, pause=Drain(signals), lock=held)
        code = _until_over(daemon, signals, AUTOSTARTED_GRACE_S, quiet=True)
    if code == ExitCode.COMPLETE:
        log_of(address).unlink(missing_ok=True)
    return code


def drain(run_dirs: Sequence[Path]) -> int:
    """Finish runs that were interrupted: write what is on disk, and close them."""
    codes = [_drain(run_dir.absolute()) for run_dir in run_dirs]
    return max(codes, default=0)


def _drain(run_dir: Path) -> int:
    found = status.report(run_dir)
    if found.state == "finished":
        return sum_up(run_dir, 0, complete=True)
    here = found.run.at(run_dir, rundir.private_address(run_dir))
    home = RunHome(run_dir, rundir.stored_config(run_dir), here, listens=False)
    with Signals() as signals:
        daemon = Daemon(home, pause=Drain(signals))
        try:
            stranded.start(daemon, found.run.id, Drain(signals))
            left = all(session.state == "bye" for session in status.report(run_dir).sessions)
            complete = finish(daemon, 0 if left else LOST)
        except Incomplete as error:
            say(f"not complete: {error}. `{home.resume}` takes it up")
            complete = False
        finally:
            daemon.release()
    if complete:
        meeting.forget(run_dir, home.options)
    code = sum_up(run_dir, 0, complete=complete)
    if complete:
        stranded.forget(run_dir)
    return code


def stop(endpoint: Endpoint, timeout_s: float) -> int:
    """Have a daemon of this node stop, and wait for it. Raises Unreachable."""
    with Control(endpoint) as control:
        info = control.ask_status(timeout_s=2.0)
    if info is None:
        raise Unreachable(f"nobody answers at {endpoint}")
    if info.get("node", os.uname().nodename) != os.uname().nodename:
        raise Unreachable(f"the daemon at {endpoint} is on node {info['node']}: stop it there")
    daemon = _supervisor(int(info["pid"]), int(info["supervisor"]))
    lifelines = [Lifeline(pid) for pid in dict.fromkeys((daemon, int(info["pid"])))]
    with suppress(ProcessLookupError):
        os.kill(daemon, signal.SIGTERM)
    deadline = time.monotonic() + timeout_s
    while any(lifeline.is_alive() for lifeline in lifelines):
        if time.monotonic() > deadline:
            raise Unreachable(f"the daemon at {endpoint} (process {daemon}) did not end in {timeout_s:.0f} s")
        time.sleep(0.1)
    return 0


def _supervisor(intake: int, supervisor: int) -> int:
    """Who to tell: the supervisor, or an intake that outlived it."""
    try:
        return supervisor if psutil.Process(intake).ppid() == supervisor else intake
    except psutil.NoSuchProcess:
        return supervisor


def _new(address: str | None, config: Config) -> Home:
    """One run if its id is given, else those that workers name."""
    if config.run.mode == "disabled":
        raise SettingsError(f"run.mode = disabled (from {config.source('run.mode')}): nothing to serve")
    if config.run.id is None:
        return ServiceHome(config, address)
    run_dir = rundir.new_run_dir(config, now=time.time())
    return RunHome(run_dir, config, RunFile.of(config, run_dir, address or rundir.private_address(run_dir)))


def _taken_up(run_dir: Path, address: str | None, toml: Path | None, given: Mapping[str, Given]) -> RunHome | None:
    """A run that was interrupted; None for one that is finished."""
    if toml or given:
        named = ", ".join([one.source for one in given.values()] or ["--config"])
        raise SettingsError(f"{named}: a run that is taken up keeps the options it began with")
    run_dir, config = run_dir.absolute(), rundir.stored_config(run_dir)
    if status.report(run_dir).state == "finished":
        sum_up(run_dir, 0, complete=True)
        return None
    return RunHome(run_dir, config, RunFile.read(run_dir).at(run_dir, address or rundir.private_address(run_dir)))


def _serve(home: Home, grace_s: float) -> int:
    with Signals() as signals:
        return _until_over(Daemon(home, pause=Drain(signals)), signals, grace_s)


def _until_over(daemon: Daemon, signals: Signals, grace_s: float, *, quiet: bool = False) -> int:
    """Start, serve until told to stop or nobody is left, and end."""
    home = daemon.home
    hindrances = Hindrances(lambda: home.open_runs, say)
    watchdog = Watchdog(daemon.ask, beside=lambda: hindrances.words)
    metrics = Metrics(home, None if quiet else home.options.serve.metrics)  # one address is for one daemon
    try:
        metrics.start()
        daemon.start()
        if not quiet:
            what = f"run {home.run.id}" if isinstance(home, RunHome) else "runs"
            say(f"{what} at {home.address} in {short(home.directory)}")
        notify("READY=1")
        complete = _until_stopped(daemon, signals, watchdog, hindrances) or _wind_up(
            daemon, signals, watchdog, grace_s
        )
    except Deleted as error:
        say(str(error))
        return ExitCode.DISK
    finally:
        metrics.stop()
        daemon.release()
    if isinstance(home, RunHome):
        if complete:
            meeting.forget(home.directory, home.options)
        return sum_up(home.directory, 0, complete=complete)
    return ExitCode.COMPLETE if complete else ExitCode.INTERRUPTED


def _until_stopped(daemon: Daemon, signals: Signals, watchdog: Watchdog, hindrances: Hindrances) -> bool:
    """Serve; True if all was finished meanwhile, False if we are told to stop."""
    while daemon.tend():
        hindrances(time.monotonic())
        watchdog()
        if any(number in STOP for number in signals.wait(0.2)):
            return False
    return True


def _wind_up(daemon: Daemon, signals: Signals, watchdog: Watchdog, grace_s: float) -> bool:
    """Wait for the workers to leave, then finish: all within `grace_s`."""
    notify(stopping(grace_s))
    drain = Drain(signals, time.monotonic() + grace_s)

    def pause(seconds: float) -> None:
        watchdog()
        drain(seconds)

    daemon.pause = pause
    try:
        while daemon.tend() and daemon.live_sessions() != 0:
            pause(0.2)
    except Incomplete as error:
        say(f"workers are still there: {error}. `{daemon.home.resume}` goes on")
        return False
    return finish(daemon, 0)
