"""Where libraries look for the class of a run that does nothing, and for the error of a changed configuration."""

from __future__ import annotations

import importlib
from typing import Any

from sidestep._run import SilentRun as RunDisabled
from sidestep.elsewhere import of_wandb

__all__ = ["RunDisabled"]


def __getattr__(name: str) -> Any:
    if name == "config_util":
        return importlib.import_module("sidestep.sdk.lib.config_util")
    if name.startswith("__"):
        raise AttributeError(name)
    return of_wandb(f"sdk.lib.{name}")
