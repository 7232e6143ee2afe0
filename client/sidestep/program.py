"""What the training is, told to its run: looked up by a process of its own, from a thread.

- the training's process only starts that process (program_facts.py), with its own interpreter, environment and
  directory
- told before the session's last record, or not at all
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from sidestep._run import Run
from sidestep.session import Session
from sidestep.wire import Kind

if TYPE_CHECKING:
    from subprocess import Popen

PATIENCE_S = 60.0
LAST_WORD_S = 1.0
"""So long a run that ends at once waits for its facts."""


def describe(run: Run, options: Mapping[str, Any]) -> Callable[[float], None]:
    """Have it looked up in the background, and told to the run; returns what stops that."""
    started: list[Popen[bytes]] = []
    question = {**_known_here(), **options}
    word = Word(run._session)
    thread = threading.Thread(target=_ask, args=(word, question, started), name="sidestep-program", daemon=True)
    thread.start()

    owner = os.getpid()

    def stop(seconds: float) -> None:
        if os.getpid() != owner:
            return  # a forked child: it has neither the thread nor the process
        thread.join(min(LAST_WORD_S, seconds / 4))
        word.end()
        for process in started:
            if process.poll() is None:
                process.kill()

    return stop


class Word:
    """What is told of the program: before the session's last record, or not at all."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self._lock = threading.Lock()
        self._over = False

    def say(self, facts: Iterable[Mapping[str, Any]]) -> None:
        """Tell these, unless it is too late."""
        with self._lock:
            for said in () if self._over else facts:
                self.session.send(Kind.PROGRAM, said)

    def end(self) -> None:
        """Nothing more is told."""
        with self._lock:
            self._over = True


def _known_here() -> dict[str, Any]:
    torch = sys.modules.get("torch")
    return {
        "argv": [str(it) for it in sys.argv],
        "cuda": getattr(getattr(torch, "version", None), "cuda", None),
        "directory": os.getcwd(),  # noqa: PTH109 - a text
    }


def _ask(word: Word, question: Mapping[str, Any], started: list[Popen[bytes]]) -> None:
    import subprocess  # takes longer than init() may

    try:
        process = subprocess.Popen(
            # -P: what lies in the directory of the training shall not be imported.
            [sys.executable, "-P", "-m", "sidestep.program_facts"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        started.append(process)
        answer, _ = process.communicate(json.dumps(question).encode(), timeout=PATIENCE_S)
        if process.returncode < 0:
            return  # the run ended before its facts were known
        word.say(json.loads(answer))
    except Exception as error:  # noqa: BLE001 - a thread's head: the training is none the worse for it
        for process in started:
            process.kill()
        word.session.notices.once("program", f"what the program is could not be found out: {error!r}")
