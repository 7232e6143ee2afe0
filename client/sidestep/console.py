"""What the program prints is in the run's log too: a tee inside the worker.

- the stream is written first, as ever, and what that gives or raises is the caller's: nothing of ours stands in
  the output's path, so nothing can hold it up or break it
- a line goes on when it is complete. Of what is written over with carriage returns, as progress bars are, the last
  state is the line. Each thread's words are put together by themselves: there is no lock
- bounded: `BYTES_PER_S` on average, lines of `LINE_CHARS`, and never the second half of the outbox, which is for
  metrics. What is left out is counted, and the log says where
- what C code or a child process writes goes past `sys.stdout`, and is not in the log
- a forked child that logs nothing says nothing here either
"""

from __future__ import annotations

import re
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from sidestep._run import Run
from sidestep.outbox import DropReason
from sidestep.wire import Kind

BYTES_PER_S = 64 * 1024
BURST_BYTES = 1024 * 1024
LINE_CHARS = 4096
RECORD_BYTES = 64
"""What a record costs beside its text."""
MOST_THREADS = 256
"""Threads in the middle of a line."""
STREAMS = ("stdout", "stderr")
_MOVES = re.compile(r"\x1b\[[0-9;?]*[A-Za-ln-z]")
"""What moves a cursor or clears a line; colours stay."""


class Console:
    """The lines of this process's streams, from `start` to `stop`."""

    def __init__(self, run: Run, clock: Callable[[], float] = time.monotonic) -> None:
        self._session = run._session
        self._clock = clock
        self._room = self._session.settings.outbox_bytes // 2
        self._patched: list[tuple[Any, Callable[..., Any]]] = []
        self._partial: dict[tuple[str, int], str] = {}
        """By stream and thread, what has no end yet."""
        self._inside = threading.local()
        self._active = False
        self._left, self._at = float(BURST_BYTES), clock()
        self._missing = 0

    def start(self) -> None:
        """Listen to both streams, as they are now."""
        self._active = True
        for name in STREAMS:
            stream = getattr(sys, name, None)
            write = getattr(stream, "write", None)
            if write is None:
                continue  # a program without a console
            ours = self._teeing(name, write)
            try:
                stream.write = ours  # type: ignore[union-attr]
            except (AttributeError, TypeError):
                continue  # a stream of somebody's own, which takes no method
            self._patched.append((stream, ours))

    def stop(self) -> None:
        """Say what has no end yet, and leave the streams as they were."""
        for (name, _), text in [] if self._session.dormant else list(self._partial.items()):
            self._guarded(lambda name=name, text=text: self._say(name, [_seen(text)]))  # type: ignore[misc]
        self._active = False
        for stream, ours in self._patched:
            if vars(stream).get("write") is ours:
                del stream.write
        self._patched.clear()
        self._partial.clear()

    def _teeing(self, name: str, write: Callable[[str], Any]) -> Callable[[str], Any]:
        def tee(text: str) -> Any:
            result = write(text)
            if self._active and not self._session.dormant and not getattr(self._inside, "any", False):
                self._guarded(lambda: self._hear(name, text))
            return result

        return tee

    def _guarded(self, do: Callable[[], None]) -> None:
        """Whatever it is, printing must not fail of it; and what we print ourselves meanwhile is not heard."""
        self._inside.any = True
        try:
            do()
        except Exception as error:  # noqa: BLE001 - as above
            self._session.outbox.drop(DropReason.INTERNAL)
            self._session.notices.once("console", f"what is printed is not in the run's log: {error!r}")
        finally:
            self._inside.any = False

    def _hear(self, name: str, text: str) -> None:
        key = name, threading.get_ident()
        *lines, rest = (self._partial.pop(key, "") + str(text)).split("\n")
        if rest:
            if len(self._partial) >= MOST_THREADS:
                self._partial.pop(next(iter(self._partial)))
            self._partial[key] = rest if len(rest) <= LINE_CHARS else _seen(rest)[-LINE_CHARS:]
        if lines:
            self._say(name, [_seen(line) for line in lines])

    def _say(self, name: str, lines: list[str]) -> None:
        text = "\n".join(line if len(line) <= LINE_CHARS else f"{line[:LINE_CHARS]}…" for line in lines)
        cost = RECORD_BYTES + len(text)
        now = self._clock()
        self._left, self._at = min(BURST_BYTES, self._left + (now - self._at) * BYTES_PER_S), now
        if cost > self._left or self._session.outbox.room < self._room + cost:
            self._miss(len(lines))
            return
        self._left -= cost
        if self._missing:
            text = f"[sidestep: {self._missing} lines are left out here]\n{text}"
            self._missing = 0
        self._session.send(Kind.OUTPUT, {"stream": name, "text": text.encode("utf-8", "replace").decode()})

    def _miss(self, lines: int) -> None:
        self._missing += lines
        self._session.outbox.drop(DropReason.OUTPUT)
        self._session.notices.once(
            "console rate",
            f"this program prints more than {BYTES_PER_S // 1024} KiB/s, or the daemon is away: "
            "not all of it will be in the run's log",
        )


def _seen(line: str) -> str:
    """What a terminal shows of a line in the end."""
    if "\x1b" in line:
        line = _MOVES.sub("", line)
    if "\r" in line:
        line = next((part for part in reversed(line.split("\r")) if part), "")
    return line
