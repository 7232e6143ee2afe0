"""The command `sidestep`: run a training with a daemon beside it, serve without one, see how a run stands.

- stdout belongs to the command; everything said here goes to stderr
- in a pipe it is quiet, except about errors and losses
- the exit code of `sidestep run` is the command's, unless there was none or the run could not be finished
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import click

from sidestep.endpoint import Endpoint
from sidestep.errors import SettingsError, SidestepError
from sidestepd import collect, command, keygen, rundir, running, serving, status
from sidestepd.command import Signals
from sidestepd.config import SECTIONS, Config, Given, is_option, variables
from sidestepd.control import Control, endpoint_at, unwell
from sidestepd.errors import AlreadyRunning, CanNotRun, ExitCode, Incomplete, Unreachable
from sidestepd.rundir import RunFile
from sidestepd.saying import say, seen, table

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
    "--resume": "run.resume",
    "--dir": "run.dir",
    "--sink": "sink.kind",
    "--patience": "order.patience_s",
    "--listen": "listen.tcp",
    "--context-file": "listen.context_file",
    "--samplers": "samplers.enabled",
    "--sample-interval": "samplers.interval_s",
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
   {ExitCode.DISK}  CMD succeeded, but somebody deleted the run directory
   {ExitCode.INTERRUPTED}  CMD succeeded, but the run is not complete yet; all that was
       acknowledged is on disk: `sidestep drain RUN_DIR` takes it up
  {command.NOT_EXECUTABLE}  CMD can not be executed
  {command.NOT_FOUND}  there is no CMD of that name
"""
_SERVE_CODES = f"""\b
Exit codes:
{_OUR_CODES}\
   {ExitCode.DISK}  somebody deleted the run directory
   {ExitCode.INTERRUPTED}  stopped before all was complete; what was acknowledged is on disk:
       the same `sidestep serve` goes on, `sidestep drain RUN_DIR` finishes it
"""
_DOCTOR_CODES = """\b
Exit codes:
    0  nothing is in the way
    1  something is
    2  an option can not be used
"""
_SYNC_CODES = f"""\b
Exit codes:
    0  everything is on the server
    2  this directory, or what is there already, does not allow it
   {ExitCode.INTERRUPTED}  not everything is there yet; the line says why, and calling it again goes on
"""


def _every_option() -> str:
    """All options, as --set, the environment and the file name them."""
    lines = []
    for section, model in SECTIONS.items():
        for name, field in model.model_fields.items():
            default = "" if field.default is None else field.default
            lines += [f"  {section}.{name} = {default}", f"      {field.description}"]
            lines += [f"      {', '.join(variables(f'{section}.{name}'))}"]
    return "\n".join(lines)


_ENVIRONMENT = f"""\b
Every option, with its default and its variables, as --set takes it:
{_every_option()}
\b
Options are stronger than the environment, and that is stronger than the file
that --config or SIDESTEP_CONFIG names (deploy/sidestepd.toml is one). What a
script says in init() is stronger than the environment, weaker than options.
wandb's own WANDB_API_KEY is read by the daemon alone, and never written down;
WANDB_SILENT silences all but errors and losses.
"""


def _run_options(function: _F) -> _F:
    """The options that `run` and `serve` share; the checks are config.py's."""
    for add in (
        click.option("--set", "settings", multiple=True, metavar="SECTION.OPTION=VALUE", help="Any other option."),
        click.option(
            "--reduce",
            multiple=True,
            metavar="NAME=OPERATION[,...]",
            help="How values of several ranks become one, by name or pattern.",
        ),
        click.option(
            "--keys",
            metavar="DIR",
            type=click.Path(path_type=Path, file_okay=False),
            help="For --listen: what `sidestep keygen DIR` made.",
        ),
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


def _target(function: _F) -> _F:
    """Which daemon is meant."""
    function = _key_file(click.option("--address", help="Where it listens.")(function))
    return click.argument("run_dir", type=click.Path(path_type=Path, file_okay=False), required=False)(function)


def _key_file(function: _F) -> _F:
    return click.option("--key-file", metavar="FILE", type=click.Path(path_type=Path), envvar="SIDESTEP_KEY_FILE",
                        help="Our key, for a daemon on tcp that asks for one.")(function)  # fmt: skip


def _endpoint_of(run_dir: Path | None, address: str | None, key_file: Path | None) -> Endpoint:
    """The daemon at an address, of a run, of our environment, or of the newest run here."""
    if run_dir:
        return Endpoint(address=RunFile.read(run_dir).address)
    said = address or os.environ.get("SIDESTEP_ADDRESS") or RunFile.read(_newest(os.environ)).address
    return endpoint_at(said, key_file)


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
def run(
    words: tuple[str, ...],
    config: Path | None,
    settings: tuple[str, ...],
    **options: Any,
) -> None:
    """Run a command whose workers all log into one run.

    \b
    sidestep run -- torchrun --nproc-per-node 4 train.py
    sidestep run --name lr3e-4 -- sh -c "torchrun ... && python evaluate.py"

    Starts a daemon, runs CMD, passes signals on to it, waits until everything
    that was logged is in the run, and exits as CMD did. Workers find the daemon
    by SIDESTEP_ADDRESS, SIDESTEP_RUN_ID and SIDESTEP_RUN_DIR, which CMD gets.
    Inside another `sidestep run` it joins that one's run.
    """
    sys.exit(_saying_why(lambda: running.run(words, config, _overrides(options, settings))))


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
    **options: Any,
) -> None:
    """Serve the runs of whoever comes, in the foreground, until SIGTERM or SIGINT.

    \b
    sidestep serve --address ipc:///run/sidestep/train.sock
    SIDESTEP_ADDRESS=ipc:///run/sidestep/train.sock torchrun ... train.py

    Workers of other nodes are let in by keys, and so are their tools:

    \b
    sidestep keygen sidestep-keys
    sidestep serve --listen 'tcp://*:7711' --keys sidestep-keys

    Workers name their run by init(id=...), WANDB_RUN_ID or SIDESTEP_RUN_ID; those
    that name none share one run per launch, and the second init() of a process
    begins a second run. A run is finished when its last worker has left for
    serve.linger_s. With --id it is one run that everybody joins.

    Says READY=1 to a service manager when workers can connect. Stopped, it waits
    for its workers to leave and finishes their runs; what is not done when --grace
    is over stays on disk (exit code 75). Started again with the same --dir and
    --address it goes on with it; with RUN_DIR it takes up one interrupted run.
    """
    overrides = _overrides(options, settings)
    sys.exit(_saying_why(lambda: serving.serve(run_dir, address, grace_s, config, overrides)))


@main.command(epilog=f"\b\nExit codes:\n{_OUR_CODES}")
@click.argument("run_dirs", metavar="RUN_DIR...", nargs=-1, required=True, type=click.Path(path_type=Path))
def drain(run_dirs: tuple[Path, ...]) -> None:
    """Finish runs that were interrupted, from what is on disk.

    \b
    sidestep drain sidestep-runs/20260102-030405-abcd1234

    Writes what is left into the run and closes it, with exit code 0 if all of its
    workers had left, else 1. Waits for no worker; `sidestep serve RUN_DIR` does.
    What relays of the run on other nodes kept when they were killed is handed on
    first, from sidestep-runs/.relays, if it is on a disk that is seen from here.
    One that can not be finished is said, and holds up none of the others.
    """
    sys.exit(max(_saying_why(partial(serving.drain, [run_dir])) for run_dir in run_dirs))


@main.command(
    epilog=f"\b\nExit codes:\n    0  it has stopped\n   {ExitCode.UNAVAILABLE}  there is none, or it did not end\n"
)
@_target
@click.option("--timeout", "timeout_s", type=click.FloatRange(min=0), default=120.0, show_default=True,
              help="Seconds to wait for its end.")  # fmt: skip
def stop(run_dir: Path | None, address: str | None, key_file: Path | None, timeout_s: float) -> None:
    """Stop a daemon of this node as SIGTERM does, and wait for it.

    Its runs are finished if that is possible within its --grace; what is not done
    stays on disk, for `sidestep drain`. The command of a `sidestep run` is sent
    SIGTERM, and decides.
    """
    sys.exit(_saying_why(lambda: serving.stop(_endpoint_of(run_dir, address, key_file), timeout_s)))


@main.command(
    epilog=f"\b\nExit codes:\n    0  it answers\n   {ExitCode.UNAVAILABLE}  nobody does, or its disk hangs\n"
)
@_target
@click.option("--timeout", "timeout_s", type=click.FloatRange(min=0), default=2.0, show_default=True,
              help="Seconds to wait for an answer.")  # fmt: skip
def ping(run_dir: Path | None, address: str | None, key_file: Path | None, timeout_s: float) -> None:
    """See whether a daemon answers, and its disk does: for health checks."""

    def answer() -> int:
        where = _endpoint_of(run_dir, address, key_file)
        with Control(where) as control:
            info = control.ask_status(timeout_s)
        if info is None:
            raise Unreachable(f"nobody answers at {where}")
        if why := unwell(info):
            raise Unreachable(f"the daemon at {where} answers, but {why}")
        click.echo(f"process {info['pid']}, {info['live']} workers")
        return 0

    sys.exit(_saying_why(answer))


@main.command(hidden=True)
@click.argument("address")
@click.argument("lock", type=int)
@click.option("--dir", "folder", type=click.Path(path_type=Path))
def autostarted(address: str, lock: int, folder: Path | None) -> None:
    """Serve the launch of the worker that starts this; `lock` is the descriptor that holds the address."""
    sys.exit(_saying_why(lambda: serving.autostarted(address, lock, folder)))


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
        text = json.dumps(found.to_json(), indent=2) if as_json else table(found)
        click.echo(text)
        return 0

    sys.exit(_saying_why(show))


@main.command()
@click.option("--interval", "interval_s", type=click.FloatRange(min=0.1), default=1.0, show_default=True,
              help="Seconds between two looks.")  # fmt: skip
@click.argument("run_dir", type=click.Path(path_type=Path, file_okay=False), required=False)
def top(run_dir: Path | None, interval_s: float) -> None:
    """Watch how a run stands, until it has ended or Ctrl-C.

    What `sidestep status` shows, and how fast records are said and rows written.
    """

    def show() -> int:
        from sidestepd.top import watch

        try:
            watch(run_dir or _newest(os.environ), interval_s)
        except KeyboardInterrupt:
            pass
        return 0

    sys.exit(_saying_why(show))


@main.command()
@click.argument("run_dir", type=click.Path(path_type=Path, file_okay=False), required=False)
def leet(run_dir: Path | None) -> None:
    """Look at a run's charts in the terminal, with wandb's own `wandb leet`."""

    def become() -> int:
        files = (run_dir or _newest(os.environ)) / "wandb"
        if not files.is_dir():
            raise SettingsError(f"there is no run of wandb in {files}")
        command.become([sys.executable, "-m", "wandb", "leet", str(files)], os.environ)
        return 0

    sys.exit(_saying_why(become))


@main.command(
    epilog="\b\nExit codes:\n    0  nothing is in the way\n    1  something is\n    2  an option is wrong\n"
)
@_run_options
@click.option("--json", "as_json", is_flag=True, help="As a list, for programs.")
def doctor(as_json: bool, config: Path | None, settings: tuple[str, ...], **options: Any) -> None:
    """See whether a run with these options would work here, and say what is in the way.

    \b
    sidestep doctor
    sidestep doctor --mode online --dir /scratch/me

    Looks at wandb and its core, the key and the server (--mode online), the run
    directory and its disks, network file systems, sockets, limits, GPUs, the
    launcher's variables, and at what earlier runs left behind.
    """

    def look() -> int:
        from sidestepd.doctor import FAIL, examine

        found = []
        for finding in examine(Config.load(config, os.environ, _overrides(options, settings))):
            found.append(finding)
            if not as_json:
                click.echo(f"{finding.level:<5} {finding.what:<12} {seen(finding.text)}")
        if as_json:
            click.echo(json.dumps([asdict(finding) for finding in found], indent=2))
        return int(any(finding.level == FAIL for finding in found))

    sys.exit(_saying_why(look))


@main.command(epilog=_SYNC_CODES)
@click.option("--project", help="The W&B project; otherwise as the run is called.")
@click.option("--entity", help="The W&B user or team; otherwise as the run is called.")
@click.option("--id", "run_id", help="The id there; otherwise the run's own.")
@click.option("--server", help="The address of the W&B server; otherwise as for `sidestep run`.")
@click.argument("run_dir", type=click.Path(path_type=Path, file_okay=False, exists=True))
def sync(run_dir: Path, project: str | None, entity: str | None, run_id: str | None, server: str | None) -> None:
    """Send a run to W&B, whole and once.

    An offline run goes up as one run, however often its daemon was killed. A run
    that was interrupted is finished first. Stopped at any time, it goes on from
    what the server holds when it is called again.
    """
    from sidestepd import transfer  # with all that delivery needs, which no other command does

    target = transfer.Target(project=project, entity=entity, id=run_id, server=server)

    def send() -> int:
        with Signals() as signals:
            say(transfer.send(run_dir.absolute(), target, running.Drain(signals)))
        return 0

    sys.exit(_saying_why(send))


@main.command()
@click.option("--sink", required=True, metavar="KIND:PLACE", help="jsonl:PATH, or wandb:DIR for an offline run.")
@click.argument("run_dir", type=click.Path(path_type=Path, file_okay=False, exists=True))
def replay(run_dir: Path, sink: str) -> None:
    """Write a run's rows once more, into another place.

    Reads the run directory and changes nothing in it. The rows come with the run's
    configuration, summary and definitions. A run that is not finished is written
    as it stands, with what is still in its spool.
    """

    def write() -> int:
        from sidestepd import transfer

        say(transfer.write(run_dir.absolute(), sink))
        return 0

    sys.exit(_saying_why(write))


@main.command("keygen", epilog="\b\nExit codes:\n    0  done\n    2  it can not be; the line says why\n")
@click.option("--client", "names", multiple=True, metavar="NAME", help="A further client, with a key of its own.")
@click.option("--rotate", "rotated", multiple=True, metavar="NAME",
              help="Replace the key of this client, or of `server`; the old one stays valid.")  # fmt: skip
@click.argument("folder", metavar="[DIR]", type=click.Path(path_type=Path, file_okay=False), required=False)
def make_keys(folder: Path | None, names: tuple[str, ...], rotated: tuple[str, ...]) -> None:
    """Make keys, so that workers of other nodes can speak to a daemon.

    \b
    sidestep keygen sidestep-keys
    sidestep serve --listen 'tcp://*:7711' --keys sidestep-keys
    export SIDESTEP_ADDRESS=tcp://head:7711             # on each node
    export SIDESTEP_KEY_FILE=sidestep-keys/client.key

    Writes DIR/server.key, the daemon's secret; DIR/clients, the public keys that
    it lets in; and DIR/client.key, which workers need and nobody else may read.
    DIR is by default ./sidestep-keys. What is there stays.

    To replace a key while a job runs: `--rotate client` lets a new one in beside
    the old one, and writes it into DIR/client.key. Bring that file to the workers;
    they read it whenever they connect. Then take the old line out of DIR/clients:
    who still uses it is refused, and comes back with the new key. `--rotate server`
    tells the clients here of a new key of the daemon's: bring their files to the
    workers first, then restart the daemon. Nothing is lost meanwhile: workers keep
    what was not acknowledged.
    """

    def make() -> int:
        for path in keygen.keygen(folder or Path("sidestep-keys"), names, rotated):
            click.echo(path)
        return 0

    sys.exit(_saying_why(make))


main.add_command(collect.command)


# Options


def _overrides(options: Mapping[str, Any], settings: Sequence[str]) -> dict[str, Given]:
    """What the command line says, with the option's own name as its source."""
    given = {
        key: Given(options[_parameter(key)], flag)
        for flag, key in _OPTIONS.items()
        if options[_parameter(key)] is not None
    }
    if keys := options["keys"]:
        names = {"listen.key_file": keys / f"{keygen.SERVER}.key", "listen.clients": keys / keygen.CLIENTS}
        given |= {key: Given(str(path), "--keys") for key, path in names.items()}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not is_option(key):
            raise click.BadParameter(f"{setting}: say SECTION.OPTION=VALUE; see deploy/sidestepd.toml")
        given[key] = Given(value, f"--set {key}")
    for reduction in options["reduce"] or ():
        name, equals, operations = reduction.rpartition("=")
        if not equals or not name:
            raise click.BadParameter(f"{reduction}: say NAME=OPERATION, such as 'train/*=max'")
        given[f"reduce.{name}"] = Given(operations, "--reduce")
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
    except Incomplete as error:
        code, why = ExitCode.INTERRUPTED, str(error)
    except SidestepError as error:
        code, why = ExitCode.UNAVAILABLE, str(error)
    say(why)
    return code
