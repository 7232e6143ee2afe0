"""The intake process: of one run directory, or of a service directory for the runs that workers name."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import resource
import signal
import sqlite3
import sys
from collections.abc import Sequence
from pathlib import Path

import zmq

from sidestep.errors import SettingsError
from sidestepd import addresses, meeting, rundir, stranded
from sidestepd.errors import AlreadyRunning, ExitCode, SpoolError
from sidestepd.home import ServiceFile
from sidestepd.intake.front import Front, Runs, bind, bind_tcp
from sidestepd.intake.gate import Gate
from sidestepd.intake.runs import OneRun, SeveralRuns
from sidestepd.listening import ListenOptions
from sidestepd.processes import Lock, read_json
from sidestepd.rundir import RunFile

logger = logging.getLogger("sidestepd.intake")


async def serve(directory: Path, parent: int, *, listens: bool = True) -> int:
    """Start, serve, and shut down; `listens` beyond the socket on this node, as the options say."""

    def orphaned() -> bool:
        return os.getppid() != parent

    several = ServiceFile.is_in(directory)
    address = ServiceFile.read(directory).address if several else RunFile.read(directory).address
    options = rundir.stored_config(directory).listen if listens else ListenOptions()
    context = zmq.Context()
    runs: Runs | None = None
    try:
        lock = Lock(directory / "intake.lock") if several else None
        if lock:
            lock.acquire()
        gate = None
        if options.tcp and options.key_file and options.clients:
            gate = Gate(context, key_file=options.key_file, clients=options.clients)
        front = Front(context.socket(zmq.ROUTER), supervisor=parent, gate=gate)
        kind = SeveralRuns if several else OneRun
        runs = front.runs = kind(directory, front.send, orphaned)
        bind(front.socket, address)
        rundir.open_to(address, rundir.stored_config(directory).serve.socket_mode)
        if gate is not None:
            gate.open()
            gate.secure(front.socket)
        _tell(directory, address, gate, options, bind_tcp(front.socket, directory, options.tcp))
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, runs.stop)
        code = await front.serve()
    finally:
        if runs is not None:
            runs.shut()
        context.destroy(linger=100)
        if orphaned():
            rundir.clear_address(address)
    if code == ExitCode.COMPLETE and not several:
        meeting.forget(directory, rundir.stored_config(directory))  # a launcher may kill all that is above us now
        if orphaned():
            stranded.forget(directory)
    return code


def _tell(directory: Path, address: str, gate: Gate | None, options: ListenOptions, bound: Sequence[str]) -> None:
    """Write down where this daemon is, for those that shall find it."""
    run = {} if ServiceFile.is_in(directory) else read_json(directory / "run.json")
    remote = addresses.remote_of(bound[0], options.advertise) if bound else None
    told = addresses.context_of(address, remote, None if gate is None else gate.keys.public, run)
    if bound:
        addresses.write_context(directory / addresses.CONTEXT, told)
    if options.context_file is not None:
        addresses.write_context(options.context_file, told)


def _take_all_descriptors() -> None:
    """Each connection is a descriptor, and shells begin with 1,024: as many as this process may have by itself."""
    try:
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    except (OSError, ValueError) as error:  # macOS says that there is no limit, and means another
        logger.info("open files are limited as before: %s", error)


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve one directory until its runs are complete."""
    parser = argparse.ArgumentParser(prog="sidestepd.intake", description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument(
        "--parent", type=int, default=os.getppid(), help="when this process ends, serve until the workers left"
    )
    parser.add_argument("--local", action="store_true", help="listen on this node's socket alone")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the command; the run is drained after it
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    os.umask(0o077)
    _take_all_descriptors()
    try:
        return asyncio.run(serve(options.directory, options.parent, listens=not options.local))
    except AlreadyRunning as error:
        logger.error("%s", error)
        return ExitCode.ALREADY_RUNNING
    except SettingsError as error:
        logger.error("%s", error)
        return ExitCode.UNAVAILABLE
    except (sqlite3.Error, SpoolError, OSError):
        logger.exception("the spool's disk failed; this process ends, and workers send again")
        return ExitCode.DISK


if __name__ == "__main__":
    sys.exit(main())
