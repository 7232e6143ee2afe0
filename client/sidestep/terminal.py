"""wandb's lines on the terminal: `termlog`, `termwarn`, `termerror`. They go to stderr and never raise."""

from __future__ import annotations

import sys
from typing import Any

MOST_REMEMBERED = 10_000
"""Lines that are not to be repeated."""
_printed: set[str] = set()


def termlog(string: str = "", newline: bool = True, repeat: bool = True, prefix: bool = True) -> None:
    """Print a line; with `repeat=False` only if it was not printed before."""
    _print(string, "sidestep: ", newline=newline, repeat=repeat, prefix=prefix)


def termwarn(string: str, newline: bool = True, repeat: bool = True, prefix: bool = True) -> None:
    """A warning, likewise."""
    _print(string, "sidestep: WARNING ", newline=newline, repeat=repeat, prefix=prefix)


def termerror(string: str, newline: bool = True, repeat: bool = True, prefix: bool = True) -> None:
    """An error, likewise."""
    _print(string, "sidestep: ERROR ", newline=newline, repeat=repeat, prefix=prefix)


def termsetup(settings: Any = None, logger: Any = None) -> None:
    """Nothing: there is nothing to set up."""


def _print(string: object, head: str, *, newline: bool, repeat: bool, prefix: bool) -> None:
    try:
        text = str(string)
        line = "\n".join(f"{head}{part}" for part in text.split("\n")) if prefix else text
        if not repeat:
            if line in _printed or len(_printed) >= MOST_REMEMBERED:
                return
            _printed.add(line)
        sys.stderr.write(f"{line}\n" if newline else line)
        sys.stderr.flush()
    except Exception:  # noqa: BLE001 - a closed terminal, or a foreign object, is no harm to the training
        pass
