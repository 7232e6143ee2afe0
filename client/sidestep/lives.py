"""How often torchrun has started this process's place on its node, over all nodes that start again together.

torchrun counts restarts on the node where a process failed. On the others the processes are started again as well,
after those of all nodes have ended, and are told the count of before. Each node sees as many lives as any other.

    TMP/sidestep-UID/lives-PID-START-LOCALRANK    of the torchrun of that pid and start: a line for each life

- only a process that torchrun itself started is a life; those that it starts, or forks, belong to it
- nothing is raised: where this can not be told, what torchrun says is all that is known
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

Started = Callable[[int], str]
"""When a process began; "0" for one that is not there."""


def count(local_rank: str, *, folder: Path | None, started: Started, parent_of: Callable[[int], int]) -> int:
    """Which life this is, from 1 on; 0 if it can not be told. `folder` is ours alone."""
    if folder is None or not local_rank.isdecimal():
        return 0
    me = os.getpid()
    try:
        for leader in _above(me, parent_of):
            path = folder / f"lives-{leader}-{started(leader)}-{local_rank}"
            if path.exists() and leader != parent_of(me):
                return len(_lives(path))  # we belong to one of these
        return _add(
            folder, f"{parent_of(me)}-{started(parent_of(me))}-{local_rank}", f"{me}-{started(me)}", started
        )
    except (OSError, ValueError):
        return 0


def _above(pid: int, parent_of: Callable[[int], int]) -> Iterator[int]:
    while (pid := parent_of(pid)) > 1:
        yield pid


def _lives(path: Path) -> list[str]:
    return path.read_text().split() if path.exists() else []


def _add(folder: Path, name: str, life: str, started: Started) -> int:
    """Note a life, once; returns how many there were."""
    path = folder / f"lives-{name}"
    lives = _lives(path)
    if not lives:
        _clear(folder, started)
    if life not in lives:
        lives.append(life)
        with path.open("a") as file:
            file.write(f"{life}\n")
    return len(lives)


def _clear(folder: Path, started: Started) -> None:
    """What launchers left that are there no more. A name that is not ours is left alone."""
    for path in folder.glob("lives-*"):
        words = path.name.removeprefix("lives-").split("-")
        if len(words) == 3 and words[0].isdecimal() and started(int(words[0])) != words[1]:
            with contextlib.suppress(OSError):
                path.unlink()
