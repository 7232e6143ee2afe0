"""wandb's `util`, as far as training scripts use it; the rest of it is wandb's own."""

from __future__ import annotations

import random
import string
from typing import Any

from sidestep.elsewhere import of_wandb

_LETTERS = string.ascii_lowercase + string.digits


def generate_id(length: int = 8) -> str:
    """Letters and digits for a run's id, as wandb makes them."""
    return "".join(random.SystemRandom().choices(_LETTERS, k=length))


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return of_wandb(f"util.{name}")
