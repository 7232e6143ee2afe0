"""All that can be said of a run and of what is logged into it, in one place.

- every field has an effect; OPTIONS.md beside this file says which
- a value that can not be meant is refused here, with its name, before anything starts
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sidestep.errors import SettingsError

MODES = ("online", "offline", "disabled")
RESUMES = (True, False, None, "allow", "must", "never", "auto")
FINAL = frozenset({"latest", "best", "final"})
"""Aliases of which a model has one, and a checkpoint on the way to it has none."""


@dataclass(slots=True)
class WandbConfig:
    """How a `WandbLogger` logs."""

    project: str | None = None
    """The project in W&B."""
    name: str | None = None
    """What the run is called there."""
    tags: Sequence[str] = ()
    """The run's tags."""
    notes: str | None = None
    """Text about the run."""
    group: str | None = None
    """Runs of one group are shown together."""
    job_type: str | None = None
    """What kind of job this is within its group."""
    entity: str | None = None
    """The user or team in W&B that the run belongs to."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """What the run is configured with; more by `log_config`."""

    dir: str | os.PathLike[str] | None = None
    """Where the run's directory is made."""
    resume: bool | str | None = False
    """Go on with the run of a training that failed; or wandb's `allow`, `must`, `never`."""
    reinit: bool = False
    """End the run that this process has, and begin another one; else that one is joined."""
    mode: str | None = None
    """`online`, `offline` or `disabled`; where it is not given the environment says, else offline."""

    sync_tensorboard: bool = False
    """What is written with `SummaryWriter` is logged too."""
    save_code: bool = True
    """The source of the program is kept with the run."""
    save_requirements: bool = True
    """The installed packages are listed with the run."""

    log_model: bool = True
    """Off, `log_model` does nothing."""
    log_checkpoints: bool = True
    """Also models that are neither the latest nor the best."""
    checkpoint_prefix: str = "checkpoint"
    """What the names of models begin with."""
    sample_prefix: str = "samples"
    """What images are logged under, where `log_images` is not told."""
    max_images_to_log: int = 16
    """Images that one call of `log_images` logs; the others are left out, and that is said."""

    metric_prefix: str = ""
    """What the names of metrics begin with, with its slash."""
    log_system_metrics: bool = True
    """GPUs, CPU, memory, disks and network are sampled."""
    system_metrics_interval: float = 60.0
    """Seconds between two samples."""

    def __post_init__(self) -> None:
        if self.mode is not None and self.mode not in MODES:
            raise SettingsError(f"mode = {self.mode!r}: must be {', '.join(MODES[:-1])} or {MODES[-1]}")
        if self.resume not in RESUMES:
            raise SettingsError(f"resume = {self.resume!r}: must be True, False, 'allow', 'must' or 'never'")
        if type(self.max_images_to_log) is not int or self.max_images_to_log < 0:
            raise SettingsError(f"max_images_to_log = {self.max_images_to_log!r}: must be a number of images")
        interval = self.system_metrics_interval
        if not isinstance(interval, int | float) or not math.isfinite(interval) or not 0.5 <= interval < 3600:
            raise SettingsError(
                f"system_metrics_interval = {interval!r}: must be seconds, at least 0.5 and less than 3600"
            )
        if isinstance(self.tags, str):
            self.tags = (self.tags,)

    def keywords(self) -> dict[str, Any]:
        """What `sidestep.init()` is called with."""
        settings: dict[str, Any] = {"save_code": self.save_code, "x_save_requirements": self.save_requirements}
        if not self.log_system_metrics:
            settings["x_disable_stats"] = True
        else:
            settings["x_stats_sampling_interval"] = float(self.system_metrics_interval)
        return {
            **{name: getattr(self, name) for name in ("project", "entity", "name", "notes", "group", "job_type")},
            **{name: getattr(self, name) for name in ("dir", "mode", "sync_tensorboard")},
            "tags": list(self.tags) or None,
            "config": dict(self.config),
            "reinit": self.reinit or None,
            "settings": settings,
        }

    def is_wanted(self, aliases: Sequence[str]) -> bool:
        """Whether a model of these aliases is to be logged."""
        return self.log_model and (self.log_checkpoints or not FINAL.isdisjoint(aliases))
