"""What goes along with a run in its process, from `init` to `finish`.

- each is asked for by a keyword of `init()`, and leaves nothing behind when the run is finished
- one that can not start is said once, and the run is without it
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sidestep._run import Run

KEYWORDS = frozenset({"sync_tensorboard"})
"""Keywords of `init()` that have their effect here."""


def accompany(run: Run, keywords: Mapping[str, Any]) -> None:
    """Start what was asked for; the end of the run ends it."""
    if keywords.get("sync_tensorboard"):
        _start(run, "sync_tensorboard", _tensorboard)


def _start(run: Run, name: str, make: Callable[[Run], Callable[[], None]]) -> None:
    session = run._session
    before = session.on_finish
    try:
        stop = make(run)
    except Exception as error:
        if session.settings.strict:
            raise
        session.notices.once(("companion", name), f"init({name}=...): without effect: {error!r}")
        return

    def on_finish() -> None:
        stop()
        before()

    session.on_finish = on_finish


def _tensorboard(run: Run) -> Callable[[], None]:
    from sidestep.tensorboard.sync import Sync  # only who asks for it needs it

    sync = Sync(run)
    sync.start()
    return sync.stop
