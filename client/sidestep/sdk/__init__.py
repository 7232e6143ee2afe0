"""wandb's `sdk`, as far as libraries look into it.

That is `wandb_run.Run`, `wandb_settings.Settings`, `lib.RunDisabled` and `lib.config_util.ConfigError`.
The rest of it is wandb's own.
"""

from __future__ import annotations

import importlib
from typing import Any

from sidestep.elsewhere import of_wandb


def __getattr__(name: str) -> Any:
    if name in ("lib", "wandb_run", "wandb_settings"):
        return importlib.import_module(f"sidestep.sdk.{name}")
    if name.startswith("__"):
        raise AttributeError(name)
    return of_wandb(f"sdk.{name}")
