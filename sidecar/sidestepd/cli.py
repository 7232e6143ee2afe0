"""The command `sidestep`: run a training with a daemon beside it, serve without one, see how a run stands.

- stdout belongs to the command; everything said here goes to stderr
- in a pipe it is quiet, except about errors and losses
- the exit code of `sidestep run` is the command's, unless there was none or the run could not be finished
"""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import click

from sidestep.errors import SettingsError, SidestepError
from sidestepd import command, rundir, status
from sidestepd.command import Command, Signals
from sidestepd.config import KEYS, SECTIONS, Config, Given, variables
from sidestepd.control import Control
from sidestepd.daemon import Daemon
from sidestepd.errors import AlreadyRunning, CanNotRun, ExitCode, Incomplete
from sidestepd.notify import notify
from sidestepd.rundir import RunFile

_QUIET_S = 1.0
"""A drain shorter than this is not worth a line."""
_STOP = (signal.SIGINT, signal.SIGTERM)
_F = TypeVar("_F", bound=Callable[..., Any])

_OPTIONS = {
    "--project": "run.project",
    "--entity": "run.entity",
    "--name": "run.name",
    "--id": "run.id",
    "--group": "run.group",
    "--job-type": "run.job_type",
    "--tags": "run.tags",
    "--notes": "run.notes",
    "--mode": "run.mode",
    "--dir": "run.dir",
    "--sink": "sink.kind",
    "--patience": "order.patience_s",
}
_OUR_CODES = f"""\
  {ExitCode.COMPLETE:>3}  the run is complete
    2  an option can not be used; the line says which and where it was given
   {ExitCode.UNAVAILABLE}  the daemon could not start
   {ExitCode.ALREADY_RUNNING}  another daemon serves this run or this address
"""
_RUN_CODES = f"""\b
Exit codes:
  that of CMD, or 128 + signal where a signal ended it; of our own:
{_OUR_CODES}\
   {ExitCode.INTERRUPTED}  CMD succeeded, but the run is not complete yet; all that was
       acknowledged is on disk: `sidestep serve RUN_DIR` takes it up
  {command.NOT_EXECUTABLE}  CMD can not be executed
  {command.NOT_FOUND}  there is no CMD of that name
"""
_SERVE_CODES = f"""\b
Exit codes:
{_OUR_CODES}\
   {ExitCode.INTERRUPTED}  stopped before the run was complete; all that was acknowledged
       is on disk: `sidestep serve RUN_DIR` takes it up
"""
_ENVIRONMENT = """\b
Environment (weaker than options, stronger than the file that --config or
SIDESTEP_CONFIG names; deploy/sidestepd.toml lists every option):
  WANDB_PROJECT, WANDB_ENTITY, WANDB_NAME, WANDB_RUN_ID, WANDB_RUN_GROUP,
  WANDB_JOB_TYPE, WANDB_TAGS, WANDB_NOTES, WANDB_MODE, WANDB_DIR
  SIDESTEP_<SECTION>_<OPTION>, such as SIDESTEP_ORDER_PATIENCE_S
"""


def _run_options(function: _F) -> _F:
    """The options that `run` and `serve` share; the checks are config.py's."""
    for add in (
        click.option("--set", "settings", multiple=True, metavar="SECTION.OPTION=VALUE", help="Any other option."),
        click.option(
            "--config", metavar="FILE", type=click.Path(path_type=Path), help="A TOML file with options."
        ),
        *(
            click.option(flag, _parameter(key), metavar=flag[2:].upper(), help=_sentence(key))
            for flag, key in reversed(_OPTIONS.items())
        ),
    ):
        function = add(function)
    return function


def _parameter(key: str) -> str:
    return f"option_{key.replace('.', '_')}"


def _sentence(key: str) -> str:
    section, _, name = key.partition(".")
    return SECTIONS[section].model_fields[name].description or ""


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(version("sidestep"), prog_name="sidestep")
def main() -> None:
    """Log a distributed training into one Weights & Biases run.

    \b
    sidestep run -- torchrun --nproc-per-node 4 train.py
    sidestep status

    In train.py every rank calls sidestep.init() and sidestep.log({...}); one
    daemon beside them writes one run. The training loop never waits for it.
    """


@main.command(
    epilog=f"{_RUN_CODES}\n{_ENVIRONMENT}",
    context_settings={"allow_interspersed_args": False, "ignore_unknown_options": False},
)
@_run_options
@click.argument("words", metavar="-- CMD...", nargs=-1, type=click.UNPROCESSED, required=True)
def run(words: tuple[str, ...], config: Path | None, settings: tuple[str, ...], **options: str | None) -> None:
    """Run a command whose workers all log into one run.

    \b
    sidestep run -- torchrun --nproc-per-node 4 train.py
    sidestep run --name lr3e-4 -- sh -c "torchrun ... && python evaluate.py"

    Starts a daemon, runs CMD, passes signals on to it, waits until everything
    that was logged is in the run, and exits as CMD did. Workers find the daemon
    by SIDESTEP_ADDRESS, SIDESTEP_RUN_ID and SIDESTEP_RUN_DIR, which CMD gets.
    Inside another `sidestep run` it joins that one's run.
    """
    sys.exit(_saying_why(lambda: _run(words, config, _overrides(options, settings))))


@main.command(epilog=f"{_SERVE_CODES}\n{_ENVIRONMENT}")
@_run_options
@click.option("--address", help="ipc:///path or tcp://127.0.0.1:PORT; made up when not given.")
@click.option("--grace", "grace_s", type=click.FloatRange(min=0), default=60.0, show_default=True,
              help="Seconds from SIGTERM in which workers may leave and the run be finished.")  # fmt: skip
@click.argument("run_dir", type=click.Path(path_type=Path, file_okay=False), required=False)
def serve(
    run_dir: Path | None,
    address: str | None,
    grace_s: float,
    config: Path | None,
    settings: tuple[str, ...],
    **options: str | None,
) -> None:
    """Serve one run in the foreground, until SIGTERM or SIGINT.

    \b
    sidestep serve --address ipc:///run/sidestep/train.sock --id nightly
    SIDESTEP_ADDRESS=ipc:///run/sidestep/train.sock torchrun ... train.py

    Says READY=1 to a service manager when workers can connect. Stopped, it waits
    for its workers to leave and finishes the run; what is not done when --grace
    is over stays on disk (exit code 75). With RUN_DIR it takes up such a run.
    """
    overrides = _overrides(options, settings)
    sys.exit(_saying_why(lambda: _serve(run_dir, address, grace_s, config, overrides)))


@main.command("status")
@click.option("--json", "as_json", is_flag=True, help="Everything, for programs.")
@click.argument("run_dir", type=click.Path(path_type=Path, file_okay=False), required=False)
def show_status(run_dir: Path | None, as_json: bool) -> None:
    """Show how a run stands, living or finished.

    RUN_DIR is by default that of SIDESTEP_RUN_DIR, else the newest in
    ./sidestep-runs.

    offered = delivered + rejected + dropped + pending (+ unknown: offered by
    a worker that was killed, and never seen).
    """

    def show() -> int:
        found = status.report(run_dir or _newest(os.environ))
        text = json.dumps(found.to_json(), indent=2) if as_json else _table(found)
        click.echo(text)
        return 0

    sys.exit(_saying_why(show))


# run


def _run(words: Sequence[str], toml: Path | None, overrides: Mapping[str, Given]) -> int:
    environ = dict(os.environ)
    if _joins_outer_run(environ):
        if overrides:
            _say(f"joins run {environ.get('SIDESTEP_RUN_ID', '')}: its options are those of the outer command")
        command.become(words, environ)
    config = rundir.with_run_id(Config.load(toml, environ, overrides))
    if config.run.mode == "disabled":
        command.become(words, environ | {"SIDESTEP_MODE": "disabled"})
    command.check(words, environ)
    run_dir, found = _new_run(config)
    with Signals() as signals:
        daemon = Daemon(run_dir, config, found, pause=_Drain(signals))
        try:
            daemon.start()
            _say_in_terminal(f"run {found.id} in {_short(run_dir)}")
            code = _attend(daemon, words, environ | _exports(found), signals)
            complete = _finish(daemon, code)
        finally:
            daemon.release()
    return _sum_up(run_dir, code, complete=complete)


def _joins_outer_run(environ: dict[str, str]) -> bool:
    """Whether there is a daemon around us; what a dead one left in the environment is taken out of it."""
    address = environ.get("SIDESTEP_ADDRESS")
    if not address:
        return False
    with Control(address) as control:
        if control.ask_status(timeout_s=2.0) is not None:
            return True
    _say(f"nobody answers at SIDESTEP_ADDRESS={address}: starting a daemon of our own")
    for name in ("SIDESTEP_ADDRESS", "SIDESTEP_RUN_ID", "SIDESTEP_RUN_DIR"):
        environ.pop(name, None)
    return False


def _new_run(config: Config, address: str | None = None) -> tuple[Path, RunFile]:
    run_dir = rundir.new_run_dir(config, now=time.time())
    return run_dir, RunFile.of(config, run_dir, _address(run_dir, address))


def _address(run_dir: Path, address: str | None) -> str:
    if address:
        rundir.check_address(address)
    return address or rundir.private_address(run_dir)


def _exports(run: RunFile) -> dict[str, str]:
    return {"SIDESTEP_ADDRESS": run.address, "SIDESTEP_RUN_ID": run.id, "SIDESTEP_RUN_DIR": run.dir}


def _attend(daemon: Daemon, words: Sequence[str], environ: Mapping[str, str], signals: Signals) -> int:
    """Run the command to its end, keep the daemon alive meanwhile, and return the command's exit code."""
    for number in signals.wait(0):
        if number in _STOP:
            return 128 + number
    try:
        running = Command(words, environ, in_foreground=command.in_foreground())
    except CanNotRun as error:
        _say(str(error))
        return error.exit_code
    while running.exit_code is None:
        daemon.tend()
        for number in signals.wait(0.2):
            running.pass_on(number)
    return running.exit_code


def _finish(daemon: Daemon, exit_code: int) -> bool:
    """Have the run finished; False, having said why, if that must wait for another time."""
    progress = _Progress()
    try:
        daemon.close(exit_code)
        daemon.wait_closed(progress)
    except Incomplete as error:
        progress.clear()
        _say(f"the run is not complete: {error}. `sidestep serve {_short(daemon.run_dir)}` takes it up")
        return False
    progress.clear()
    return True


class _Drain:
    """How the end of a run waits: the first signal is answered, the second ends the waiting."""

    def __init__(self, signals: Signals, deadline: float | None = None) -> None:
        self._signals = signals
        self._deadline = deadline
        self._asked = False

    def __call__(self, seconds: float) -> None:
        for number in self._signals.wait(seconds):
            if number not in _STOP:
                continue
            if self._asked:
                raise Incomplete(f"stopped by {number.name}")
            self._asked = True
            _say("writing the last rows; once more, and they are left on disk for later")
        if self._deadline is not None and time.monotonic() > self._deadline:
            raise Incomplete("its time to stop was over")


# serve


def _serve(
    run_dir: Path | None, address: str | None, grace_s: float, toml: Path | None, given: Mapping[str, Given]
) -> int:
    if run_dir is None:
        config = rundir.with_run_id(Config.load(toml, os.environ, given))
        if config.run.mode == "disabled":
            raise SettingsError(f"run.mode = disabled (from {config.source('run.mode')}): nothing to serve")
        run_dir, found = _new_run(config, address)
    elif toml or given:
        named = ", ".join([one.source for one in given.values()] or ["--config"])
        raise SettingsError(f"{named}: a run that is taken up keeps the options it began with")
    else:
        run_dir, config = run_dir.absolute(), _stored_config(run_dir)
        if status.report(run_dir).state == "finished":
            return _sum_up(run_dir, 0, complete=True)
        found = RunFile.read(run_dir).at(run_dir, _address(run_dir, address))
    with Signals() as signals:
        daemon = Daemon(run_dir, config, found, pause=_Drain(signals))
        try:
            daemon.start()
            _say(f"run {found.id} at {found.address} in {_short(run_dir)}")
            notify("READY=1")
            complete = _until_stopped(daemon, signals) or _wind_up(daemon, signals, grace_s)
        finally:
            daemon.release()
    return _sum_up(run_dir, 0, complete=complete)


def _stored_config(run_dir: Path) -> Config:
    try:
        return Config.from_json((run_dir / "config.json").read_bytes())
    except (OSError, ValueError) as error:
        raise SettingsError(f"{run_dir} can not be taken up: {error}") from None


def _until_stopped(daemon: Daemon, signals: Signals) -> bool:
    """Serve; True if the run was finished meanwhile, False if we are told to stop."""
    while daemon.tend():
        if any(number in _STOP for number in signals.wait(0.2)):
            return False
    return True


def _wind_up(daemon: Daemon, signals: Signals, grace_s: float) -> bool:
    """Wait for the workers to leave, then finish the run: all within `grace_s`."""
    notify("STOPPING=1")
    pause = daemon.pause = _Drain(signals, time.monotonic() + grace_s)
    try:
        while daemon.tend() and daemon.live_sessions() != 0:
            pause(0.2)
    except Incomplete as error:
        _say(f"workers are still there: {error}. `sidestep serve {_short(daemon.run_dir)}` takes the run up")
        return False
    return _finish(daemon, 0)


# Words


class _Progress:
    """One line, written over and over, while a run drains in a terminal."""

    def __init__(self) -> None:
        self._since = time.monotonic()
        self._shown = False

    def __call__(self, pending: int) -> None:
        if sys.stderr.isatty() and time.monotonic() > self._since + _QUIET_S:
            self._shown = True
            click.echo(f"\r\033[Ksidestep: writing the last rows, {pending} records to go", err=True, nl=False)

    def clear(self) -> None:
        """Leave an empty line."""
        if self._shown:
            click.echo("\r\033[K", err=True, nl=False)


def _sum_up(run_dir: Path, exit_code: int, *, complete: bool) -> int:
    """Say what the run holds, and return our exit code."""
    try:
        found = status.report(run_dir)
    except (OSError, sqlite3.Error, SidestepError) as error:
        _say(f"can not read {_short(run_dir)}: {error}")
    else:
        _tell(found, run_dir, complete=complete)
    return exit_code if complete or exit_code else ExitCode.INTERRUPTED


def _tell(found: status.Report, run_dir: Path, *, complete: bool) -> None:
    if complete:
        _say_in_terminal(
            f"{found.rows} rows of {_many(found.ranks, 'rank')}: {found.late_rows} late, "
            f"{sum(found.ledger.dropped.values())} dropped, {sum(found.ledger.rejected.values())} rejected"
        )
        for wandb_dir in sorted((run_dir / "wandb").glob("offline-run-*"))[:1]:
            _say_in_terminal(f"wandb sync {_short(wandb_dir.parent)}/offline-run-*")
    lost = status.losses(found.ledger)
    if lost and complete:
        _say(f"not in the run: {lost}; `sidestep status {_short(run_dir)}` says more")


def _table(found: status.Report) -> str:
    run, ledger = found.run, found.ledger
    lines = [
        f"run       {run.id}" + (f" ({run.name})" if run.name else "") + f", {found.state}",
        f"in        {_short(Path(run.dir))}",
        f"rows      {found.rows}" + ("" if found.last_step is None else f", the last at step {found.last_step}"),
        f"late      {found.late_rows}, forced {found.forced}",
        f"records   {_equation(ledger)}",
        f"spool     {found.spool_bytes / 1e6:.1f} MB"
        + (", FULL: workers keep what they have" if found.full else ""),
    ]
    lines += [f"nothing matched the declared {pattern}" for pattern in found.unmatched]
    lines += [
        f"rank {one.rank:<4} {one.state:<5} {one.acknowledged} of {one.offered} acknowledged"
        + (f", {_by_reason(one.dropped)} dropped" if any(one.dropped.values()) else "")
        + f"   {one.node}:{one.pid}"
        for one in found.sessions
    ]
    return "\n".join(lines)


def _equation(ledger: status.Ledger) -> str:
    return (
        f"{ledger.offered} offered = {ledger.delivered} delivered + {_by_reason(ledger.rejected)} rejected"
        f" + {_by_reason(ledger.dropped)} dropped + {ledger.pending} pending + {ledger.unknown} unknown"
        + ("" if ledger.balances else "   DOES NOT BALANCE")
    )


def _by_reason(counts: Mapping[str, int]) -> str:
    reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(counts.items()) if count)
    return f"{sum(counts.values())} ({reasons})" if reasons else "0"


def _many(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _short(path: Path) -> str:
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _say(text: str) -> None:
    click.echo(f"sidestep: {text}", err=True)


def _say_in_terminal(text: str) -> None:
    if sys.stderr.isatty():
        _say(text)


# Options


def _overrides(options: Mapping[str, str | None], settings: Sequence[str]) -> dict[str, Given]:
    """What the command line says, with the option's own name as its source."""
    given = {
        key: Given(options[_parameter(key)], flag)
        for flag, key in _OPTIONS.items()
        if options[_parameter(key)] is not None
    }
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or key not in KEYS:
            raise click.BadParameter(f"{setting}: say SECTION.OPTION=VALUE; see deploy/sidestepd.toml")
        given[key] = Given(value, f"--set {key}")
    return given


def _newest(environ: Mapping[str, str]) -> Path:
    if environ.get("SIDESTEP_RUN_DIR"):
        return Path(environ["SIDESTEP_RUN_DIR"])
    base = next((environ[name] for name in reversed(variables("run.dir")) if environ.get(name)), ".")
    newest = rundir.newest_run_dir(Path(base))
    if newest is None:
        raise SettingsError(f"there are no runs in {Path(base) / rundir.RUNS}")
    return newest


def _saying_why(act: Callable[[], int]) -> int:
    """Turn what went wrong into a line and an exit code."""
    try:
        return act()
    except CanNotRun as error:
        code = error.exit_code
        why = str(error)
    except SettingsError as error:
        code, why = 2, str(error)
    except AlreadyRunning as error:
        code, why = ExitCode.ALREADY_RUNNING, str(error)
    except SidestepError as error:
        code, why = ExitCode.UNAVAILABLE, str(error)
    _say(why)
    return code
