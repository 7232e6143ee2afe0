"""A daemon, as `sidestep run` starts one, with this process as its worker.

The command that `sidestep run` is given only tells its environment and waits, so that the process that measures
is no child of the daemon: it can freeze and kill all of it and go on.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import psutil

from tests.support.waiting import eventually

_HOLD = """
import json, os, sys
print(json.dumps({"pid": os.getpid(), "environ": dict(os.environ)}), flush=True)
sys.stdin.read()
"""


class ServedRun:
    """A run that is served while this context is open, and joined by an `init()` in it."""

    def __init__(self, base: Path, *settings: str) -> None:
        words = [sys.executable, "-m", "sidestep", "run", "--mode", "offline", "--dir", str(base)]
        words += [word for setting in settings for word in ("--set", setting)]
        self._supervisor = subprocess.Popen(
            [*words, "--", sys.executable, "-c", _HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        told = json.loads(_pipe(self._supervisor.stdout).readline())
        self._holder: int = told["pid"]
        self.environ = {name: told["environ"][name] for name in told["environ"] if name.startswith("SIDESTEP_")}
        """What a worker needs to find it."""

    def __enter__(self) -> Self:
        os.environ.update(self.environ)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in self.environ:
            os.environ.pop(name, None)
        self.kill()

    def processes(self) -> list[psutil.Process]:
        """All of the daemon: supervisor, intake, delivery, wandb-core."""
        supervisor = psutil.Process(self._supervisor.pid)
        return [supervisor, *(it for it in supervisor.children(recursive=True) if it.pid != self._holder)]

    def find(self, what: str) -> psutil.Process:
        """The process whose command line says so, when it is there."""

        def found() -> psutil.Process | None:
            for process in self.processes():
                try:
                    if any(what in word for word in process.cmdline()[:4]):
                        return process
                except psutil.NoSuchProcess:
                    pass
            return None

        return eventually(found, 60.0, f"there is no {what}")

    def hang(self, what: str) -> None:
        """Stop one process where it is."""
        process = self.find(what)
        process.suspend()
        eventually(lambda: process.status() == psutil.STATUS_STOPPED, 10.0, f"{process} goes on")

    def fill_the_disk(self) -> None:
        """Let no file of its grow any more: of what needs no privileges this is nearest to a disk that is full."""
        for process in self.processes():
            process.rlimit(psutil.RLIMIT_FSIZE, (0, 0))

    def freeze(self) -> int:
        """Stop every process where it is, and return how many there are."""
        stopped: set[int] = set()
        while new := {it.pid for it in self.processes()} - stopped:  # one may have just started another
            for pid in new:
                os.kill(pid, signal.SIGSTOP)
            stopped |= new
        return len(stopped)

    def kill(self) -> int:
        """End every process without a word, and return how many there were."""
        if self._supervisor.poll() is not None:
            return 0
        self.freeze()  # so that none starts another again
        doomed = self.processes()
        for process in doomed:
            process.kill()
        _pipe(self._supervisor.stdin).close()
        self._supervisor.wait()
        psutil.wait_procs(doomed, timeout=5)
        return len(doomed)

    def finish(self) -> int:
        """End the run in good order, and return the exit code of `sidestep run`."""
        _pipe(self._supervisor.stdin).close()
        return self._supervisor.wait()


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None
    return pipe
