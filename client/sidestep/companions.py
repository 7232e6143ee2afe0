"""What goes along with a run in its process, from `init` to `finish`.

- each is asked for, or kept away, by a keyword or setting of `init()` or by the environment, and leaves nothing
  behind when the run is finished
- one that can not start is said once, and the run is without it
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from time import monotonic
from typing import Any

from sidestep._run import Run

KEYWORDS = frozenset({"sync_tensorboard", "save_code"})
"""Keywords of `init()` that have their effect here."""
Stop = Callable[[float], None]
"""Ends a companion, in so many seconds at most."""


def accompany(run: Run, keywords: Mapping[str, Any], environ: Mapping[str, str] = os.environ) -> None:
    """Start what was asked for; the end of the run ends it. A recorder's run has none but TensorBoard's."""
    session = run._session
    if session.silent:
        return
    if keywords.get("sync_tensorboard"):
        _start(run, "sync_tensorboard", _tensorboard)
    if not session.is_sent or session.sender is None:
        return
    if session.settings.console and "off" not in (keywords.get("console"), environ.get("WANDB_CONSOLE")):
        _start(run, "console", _console)
    if session.settings.program and session.identity.rank == 0:
        _start(run, "save_code", partial(_program, options=_of_program(keywords, environ)))


def _of_program(keywords: Mapping[str, Any], environ: Mapping[str, str]) -> dict[str, bool]:
    """What is to be told of the program, as wandb's settings and variables have it."""
    code = keywords.get("save_code")
    if code is None:
        code = environ.get("WANDB_SAVE_CODE", "").lower() in ("1", "true")
    return {
        "code": bool(code) and not (keywords.get("disable_code") or _is_on(environ.get("WANDB_DISABLE_CODE"))),
        "git": not (keywords.get("disable_git") or _is_on(environ.get("WANDB_DISABLE_GIT"))),
        "requirements": bool(keywords.get("x_save_requirements", True)),
    }


def _is_on(variable: str | None) -> bool:
    return (variable or "").lower() in ("1", "true")


def _start(run: Run, name: str, make: Callable[[Run], Stop]) -> None:
    session = run._session
    before = session.on_finish
    try:
        stop = make(run)
    except Exception as error:
        if session.settings.strict:
            raise
        session.notices.once(("companion", name), f"init({name}=...): without effect: {error!r}")
        return

    def on_finish(seconds: float) -> None:
        ends = monotonic() + seconds
        stop(seconds)
        before(max(ends - monotonic(), 0.0))

    session.on_finish = on_finish


def _tensorboard(run: Run) -> Stop:
    from sidestep.tensorboard.sync import Sync  # only who asks for it needs it

    sync = Sync(run)
    sync.start()
    return lambda _: sync.stop()


def _console(run: Run) -> Stop:
    from sidestep.console import Console  # likewise

    console = Console(run)
    console.start()
    return lambda _: console.stop()


def _program(run: Run, options: Mapping[str, bool]) -> Stop:
    from sidestep.program import describe  # likewise

    return describe(run, options)
