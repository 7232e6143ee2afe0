"""`sidestep run`: a daemon with one run, the command beside it, and the run finished as the command ended."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from sidestepd import command, job, rundir, stranded, sweep, together
from sidestepd.addresses import CONTEXT
from sidestepd.command import Command, Signals
from sidestepd.config import Config, Given
from sidestepd.control import Control
from sidestepd.daemon import Daemon
from sidestepd.errors import CanNotRun, Deleted, ExitCode, Incomplete
from sidestepd.home import RunHome, short
from sidestepd.processes import read_json, write_json
from sidestepd.rundir import RunFile
from sidestepd.saying import Progress, say, say_in_terminal, sum_up

STOP = (signal.SIGINT, signal.SIGTERM)


def run(words: Sequence[str], toml: Path | None, overrides: Mapping[str, Given]) -> int:
    """Run a command whose workers log into one run; returns our exit code, or does not return."""
    environ = dict(os.environ)
    if _joins_outer_run(environ):
        context = overrides.get("listen.context_file")
        if overrides.keys() - {"listen.context_file"}:
            say(f"joins run {environ.get('SIDESTEP_RUN_ID', '')}: its options are those of the outer command")
        if context:
            _write_context(Path(str(context.value)), _inherited(environ))
        command.become(words, environ)
    config = Config.load(toml, environ, overrides)
    if config.run.mode == "disabled":
        command.become(words, environ | {"SIDESTEP_MODE": "disabled"})
    command.check(words, environ)
    place = together.place_of(environ, words) if config.job.together and not config.is_relay else None
    if place is None:
        if not config.listen.tcp and (launcher := job.starts_elsewhere(environ, words)):
            say(
                f"what {launcher} starts on other nodes does not reach the daemon of this one: put `sidestep run` "
                f"behind it ({launcher} ... sidestep run -- COMMAND), or let them in with --listen and --keys"
            )
        return _serve_command(words, environ, Alone(config))
    part = together.Part(place, config, environ)
    if not place.hosts:
        return part.join(words)
    return _serve_command(words, environ, part)


class Alone:
    """A command that is no part of a job with others."""

    WAITS = ""
    """What is said to who would end the waiting for others: there are none."""

    def __init__(self, config: Config) -> None:
        self.config = rundir.with_run_id(config)

    def home(self, signals: Signals) -> RunHome:  # noqa: ARG002 - nobody is waited for
        """The directory of its run."""
        run_dir = rundir.new_run_dir(self.config, now=time.time())
        return RunHome(run_dir, self.config, RunFile.of(self.config, run_dir, rundir.private_address(run_dir)))

    def started(self, daemon: Daemon, exports: Mapping[str, str]) -> None:
        """Nobody has to know."""

    def ended(self, daemon: Daemon, code: int) -> int:  # noqa: ARG002
        """Its exit code is the run's."""
        return code

    def clear(self, *, complete: bool) -> None:
        """There is nothing beside the run."""


def _serve_command(words: Sequence[str], environ: Mapping[str, str], part: Alone | together.Part) -> int:
    """A daemon, and the command beside it; returns our exit code."""
    complete = False
    with Signals() as signals:
        try:
            home = part.home(signals)
            daemon = Daemon(home, pause=Drain(signals))
            try:
                daemon.start()
                exports = _exports(home.run, part.config)
                part.started(daemon, exports)
                say_in_terminal(f"run {home.run.id} in {short(home.directory)}")
                code = _attend(daemon, words, {**environ, **sweep.exports(environ), **exports}, signals)
                daemon.pause = Drain(signals, words=part.WAITS)
                code = part.ended(daemon, code)
                daemon.pause = Drain(signals)
                complete = finish(daemon, code)
            finally:
                daemon.release()
        finally:
            part.clear(complete=complete)
    if daemon.deleted:
        return code or ExitCode.DISK
    code = sum_up(home.directory, code, complete=complete)
    if complete:
        stranded.forget(home.directory)
    return code


def _joins_outer_run(environ: dict[str, str]) -> bool:
    """Whether there is a daemon around us; what a dead one left in the environment is taken out of it.

    An id that is not of the directory beside it was chosen by somebody since, such as a batch script.
    """
    address = environ.get("SIDESTEP_ADDRESS")
    if not address:
        return False
    with Control(address) as control:
        if control.ask_status(timeout_s=2.0) is not None:
            return True
    say(f"nobody answers at SIDESTEP_ADDRESS={address}: starting a daemon of our own")
    environ.pop("SIDESTEP_ADDRESS")
    run_dir = environ.pop("SIDESTEP_RUN_DIR", "")
    if run_dir.endswith(f"-{environ.get('SIDESTEP_RUN_ID')}"):
        environ.pop("SIDESTEP_RUN_ID")
    return False


def _exports(found: RunFile, config: Config) -> dict[str, str]:
    """What leads the command's processes here, also those that it starts on other nodes."""
    elsewhere = {"SIDESTEP_CONTEXT": f"{found.dir}/{CONTEXT}"} if config.listen.tcp else {}
    return found.exports() | elsewhere


def _inherited(environ: Mapping[str, str]) -> dict[str, str]:
    names = ("SIDESTEP_ADDRESS", "SIDESTEP_RUN_ID", "SIDESTEP_RUN_DIR")
    return {name: environ[name] for name in names if environ.get(name)}


def _write_context(path: Path, exports: Mapping[str, str]) -> None:
    """What a process needs to join later: the same names as in the environment, in lower case and without ours."""
    write_json(path, {name.removeprefix("SIDESTEP_").lower(): value for name, value in exports.items()})


def _attend(daemon: Daemon, words: Sequence[str], environ: Mapping[str, str], signals: Signals) -> int:
    """Run the command to its end, keep the daemon alive meanwhile, and return the command's exit code."""
    for number in signals.wait(0):
        if number in STOP:
            return 128 + number
    try:
        running = Command(words, environ, in_foreground=command.in_foreground())
    except CanNotRun as error:
        say(str(error))
        return error.exit_code
    warned = ""
    while running.exit_code is None:
        _keep_alive(daemon)
        warned = _warn(daemon.home.directory, warned)
        for number in signals.wait(0.2):
            running.pass_on(number)
    return running.exit_code


def _warn(run_dir: Path, warned: str) -> str:
    """Say what keeps rows from the run until somebody does something; once, while there is time to do it."""
    trouble = read_json(run_dir / rundir.TROUBLE)
    what = str(trouble.get("what", "")) if trouble.get("lasting") else ""
    if what and what != warned:
        say(f"{what}. Rows are kept on disk meanwhile")
    return what or warned


def _keep_alive(daemon: Daemon) -> None:
    """Where the run was deleted the training goes on; it has nobody to tell, which is no harm to it."""
    if not daemon.deleted:
        try:
            daemon.tend()
        except Deleted as error:
            say(str(error))


def finish(daemon: Daemon, exit_code: int) -> bool:
    """Have all finished; False, having said why, if that must wait for another time or will never be."""
    if daemon.deleted:
        return False
    progress = Progress()
    try:
        daemon.close(exit_code)
        daemon.wait_closed(progress)
    except Incomplete as error:
        progress.clear()
        say(f"not complete: {error}. `{daemon.home.resume}` takes it up")
        return False
    except Deleted as error:
        progress.clear()
        say(str(error))
        return False
    progress.clear()
    return True


class Drain:
    """How the end of a run waits: the first signal is answered, the second ends the waiting."""

    ENDS = "writing the last rows; once more, and they are left on disk for later"

    def __init__(self, signals: Signals, deadline: float | None = None, *, words: str = ENDS) -> None:
        self._signals = signals
        self._deadline = deadline
        self._words = words
        self._asked = False

    def __call__(self, seconds: float) -> None:
        """Wait; raises Incomplete when the waiting is over."""
        for number in self._signals.wait(seconds):
            if number not in STOP:
                continue
            if self._asked:
                raise Incomplete(f"stopped by {number.name}")
            self._asked = True
            say(self._words)
        if self._deadline is not None and time.monotonic() > self._deadline:
            raise Incomplete("its time to stop was over")
