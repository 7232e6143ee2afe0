"""Calls that wandb wants of a script, and that mean little here: `login`, `setup`, `require` and their like."""

from __future__ import annotations

import os
from typing import Any

from sidestep._current import finish, note

WHERE = "WANDB_API_KEY, or `wandb login`, where `sidestep run` or `sidestep serve` is started"


def login(key: str | None = None, relogin: Any = None, host: str | None = None, *_: Any, **__: Any) -> bool:  # noqa: ARG001
    """Say where the key belongs, which is with the daemon; asks nobody and waits for nothing. True.

    A `key` or `host` that is given goes into this process's environment, where a daemon that it starts itself
    finds it. A daemon that is there already never hears of it.
    """
    if os.environ.get("SIDESTEP_ADDRESS"):
        note("login", f"login(): the key is the daemon's alone: {WHERE}")
        return True
    given = {"WANDB_API_KEY": key, "WANDB_BASE_URL": host}
    os.environ.update({name: value for name, value in given.items() if isinstance(value, str) and value})
    if not os.environ.get("WANDB_API_KEY"):
        note(
            "login",
            f"login(): the key is the daemon's: {WHERE}; a daemon that this process starts looks for it here",
        )
    return True


def setup(settings: Any = None) -> None:
    """Nothing: there is no service to start in a worker."""


def teardown(exit_code: int | None = None) -> None:
    """Finish the run."""
    finish(exit_code)


def join(exit_code: int | None = None) -> None:
    """wandb's old name of `finish`."""
    finish(exit_code)


def require(requirement: Any = None, experiment: Any = None) -> None:
    """Nothing: whatever a script requires of wandb, it has it here or is told when it is used."""


def ensure_configured() -> None:
    """Nothing."""
