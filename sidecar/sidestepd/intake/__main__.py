"""The intake process: of one run directory, or of a service directory for the runs that workers name."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import sqlite3
import sys
from collections.abc import Sequence
from pathlib import Path

import zmq

from sidestepd import rundir
from sidestepd.errors import AlreadyRunning, ExitCode, SpoolError
from sidestepd.home import ServiceFile
from sidestepd.intake.front import Front, Runs, bind
from sidestepd.intake.runs import OneRun, SeveralRuns
from sidestepd.processes import Lock
from sidestepd.rundir import RunFile

logger = logging.getLogger("sidestepd.intake")


async def serve(directory: Path, parent: int) -> int:
    """Start, serve, and shut down."""

    def orphaned() -> bool:
        return os.getppid() != parent

    several = ServiceFile.is_in(directory)
    address = ServiceFile.read(directory).address if several else RunFile.read(directory).address
    context = zmq.Context()
    runs: Runs | None = None
    try:
        lock = Lock(directory / "intake.lock") if several else None
        if lock:
            lock.acquire()
        front = Front(context.socket(zmq.ROUTER), supervisor=parent)
        kind = SeveralRuns if several else OneRun
        runs = front.runs = kind(directory, front.send, orphaned)
        bind(front.socket, address)
        rundir.open_to(address, rundir.stored_config(directory).serve.socket_mode)
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, runs.stop)
        return await front.serve()
    finally:
        if runs is not None:
            runs.shut()
        context.destroy(linger=100)
        if orphaned():
            rundir.clear_address(address)


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve one directory until its runs are complete."""
    parser = argparse.ArgumentParser(prog="sidestepd.intake", description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument(
        "--parent", type=int, default=os.getppid(), help="when this process ends, serve until the workers left"
    )
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the command; the run is drained after it
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    os.umask(0o077)
    try:
        return asyncio.run(serve(options.directory, options.parent))
    except AlreadyRunning as error:
        logger.error("%s", error)
        return ExitCode.ALREADY_RUNNING
    except (sqlite3.Error, SpoolError, OSError):
        logger.exception("the spool's disk failed; this process ends, and workers send again")
        return ExitCode.DISK


if __name__ == "__main__":
    sys.exit(main())
