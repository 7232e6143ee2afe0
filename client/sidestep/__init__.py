"""Log a distributed training into one Weights & Biases run without the training loop ever waiting.

    import sidestep

    run = sidestep.init(project="digits", config={"lr": 1e-3})
    run.log({"train/loss": loss})

Every rank does this; `sidestep run -- torchrun train.py` starts the daemon that makes one run of it. The API is
wandb's: `import sidestep as wandb` carries a training script over.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sidestep._current import bag, current, define_metric, finish, init, log
from sidestep._run import Metric, Run, Scope, Stage
from sidestep._version import __version__
from sidestep.errors import SettingsError, SidestepError, UnsupportedValue
from sidestep.session import Stats
from sidestep.settings import Settings

if TYPE_CHECKING:
    from sidestep.bags import Bag

    run: Run | None
    config: Bag
    summary: Bag

__all__ = [
    "Metric",
    "Run",
    "Scope",
    "Settings",
    "SettingsError",
    "SidestepError",
    "Stage",
    "Stats",
    "UnsupportedValue",
    "__version__",
    "config",
    "define_metric",
    "finish",
    "init",
    "log",
    "run",
    "summary",
]


def __getattr__(name: str) -> Any:
    if name == "run":
        return current()
    if name in ("config", "summary"):
        return bag(name)
    raise AttributeError(f"module 'sidestep' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
