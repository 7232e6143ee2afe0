"""The command that `sidestep run` was given: found, started, signalled, waited for.

- a signal never ends the supervisor: it is passed on, and the command decides
- in the foreground of a terminal the command shares our process group, as job control wants it, and what is
  typed there reaches it by itself; everywhere else it leads a group of its own, so that a signal reaches the
  training inside `sh -c "torchrun ... && python evaluate.py"` too
- a command that ended by a signal has the exit code 128 + signal, as in a shell
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import socket
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

from sidestepd.errors import CanNotRun

NOT_EXECUTABLE, NOT_FOUND = 126, 127
_PASSED_ON = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
)
_TYPED = (signal.SIGINT, signal.SIGQUIT)
"""What a terminal sends to everything in its foreground."""


class Signals:
    """Signals as values: inside this context they end nothing, and `wait` returns those that came."""

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for number in (*_PASSED_ON, signal.SIGCHLD):
            # What our caller ignores (nohup, a shell's background) stays ignored, by the command too.
            if number == signal.SIGCHLD or signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, _noted)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        signal.set_wakeup_fd(-1)
        self._reader.close()
        self._writer.close()

    def wait(self, seconds: float) -> list[signal.Signals]:
        """Return at the next signal or the end of a child, or after `seconds`, with what came until then."""
        if not select.select([self._reader], [], [], seconds)[0]:
            return []
        numbers = self._reader.recv(4096)
        return [signal.Signals(number) for number in numbers if number != signal.SIGCHLD]


class Command:
    """A command that runs; `in_foreground` tells whether what is typed in a terminal reaches it and us."""

    def __init__(self, words: Sequence[str], environ: Mapping[str, str], *, in_foreground: bool) -> None:
        self._own_group = not in_foreground
        try:
            self._process = subprocess.Popen(
                words, env=dict(environ), process_group=0 if self._own_group else None
            )
        except OSError as error:
            raise CanNotRun(f"can not run {words[0]}: {error.strerror}", NOT_EXECUTABLE) from None

    @property
    def exit_code(self) -> int | None:
        """What a shell would say of it; None while it runs."""
        code = self._process.poll()
        return code if code is None or code >= 0 else 128 - code

    def pass_on(self, number: signal.Signals) -> None:
        """Hand a signal to the command, unless the terminal has done so."""
        if self._own_group:
            _send(-self._process.pid, number)
        elif number not in _TYPED:
            _send(self._process.pid, number)


def check(words: Sequence[str], environ: Mapping[str, str]) -> None:
    """Raise CanNotRun for a command that is not there, before anything is made for it."""
    if shutil.which(words[0], path=environ.get("PATH")):
        return
    if Path(words[0]).exists() and "/" in words[0]:
        raise CanNotRun(f"{words[0]} is not executable", NOT_EXECUTABLE)
    raise CanNotRun(f"{words[0]}: no such command", NOT_FOUND)


def become(words: Sequence[str], environ: Mapping[str, str]) -> None:
    """Be the command instead: for when there is nothing to supervise. Raises CanNotRun."""
    check(words, environ)
    try:
        os.execvpe(words[0], list(words), dict(environ))
    except OSError as error:
        raise CanNotRun(f"can not run {words[0]}: {error.strerror}", NOT_EXECUTABLE) from None


def _noted(number: int, frame: FrameType | None) -> None:
    """A handler has to be there for the wakeup descriptor to be written to."""


def _send(to: int, number: signal.Signals) -> None:
    try:
        os.kill(to, number)
    except ProcessLookupError:
        pass


def in_foreground() -> bool:
    """Whether what is typed in our terminal reaches us."""
    try:
        with Path("/dev/tty").open() as terminal:
            return os.tcgetpgrp(terminal.fileno()) == os.getpgrp()
    except OSError:
        return False
