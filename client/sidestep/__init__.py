"""Log a distributed training into one Weights & Biases run without the training loop ever waiting.

    import sidestep

    run = sidestep.init(project="digits", config={"lr": 1e-3})
    run.log({"train/loss": loss})

Every rank does this; `sidestep run -- torchrun train.py` starts the daemon that makes one run of it. The API is
wandb's: `import sidestep as wandb` carries a training script over. Names that are not needed at once are in
`names.py`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sidestep import elsewhere as _elsewhere
from sidestep import names as _names
from sidestep._current import bag, current, define_metric, finish, init, log, of_run
from sidestep._run import Run
from sidestep._version import __version__
from sidestep.errors import SettingsError, SidestepError, UnsupportedValue
from sidestep.settings import Settings

if TYPE_CHECKING:  # what a type checker is told of them; a method of the run is a line `alert = _run.alert`
    from typing import cast

    from sidestep import errors as errors
    from sidestep import logger as logger
    from sidestep import media as media
    from sidestep import plot as plot
    from sidestep import sdk as sdk
    from sidestep import tensorboard as tensorboard
    from sidestep import testing as testing
    from sidestep import util as util
    from sidestep._formalities import ensure_configured as ensure_configured
    from sidestep._formalities import join as join
    from sidestep._formalities import login as login
    from sidestep._formalities import require as require
    from sidestep._formalities import setup as setup
    from sidestep._formalities import teardown as teardown
    from sidestep._run import Metric as Metric
    from sidestep._run import Scope as Scope
    from sidestep._run import Stage as Stage
    from sidestep.alerts import AlertLevel as AlertLevel
    from sidestep.artifacts import Artifact as Artifact
    from sidestep.bags import Bag
    from sidestep.bags import Config as Config
    from sidestep.elsewhere import api as api
    from sidestep.errors import CommError as CommError
    from sidestep.errors import Error as Error
    from sidestep.errors import NeedsWandb as NeedsWandb
    from sidestep.errors import UsageError as UsageError
    from sidestep.media.audio import Audio as Audio
    from sidestep.media.histogram import Histogram as Histogram
    from sidestep.media.html import Html as Html
    from sidestep.media.image import Image as Image
    from sidestep.media.molecule import Molecule as Molecule
    from sidestep.media.object3d import Object3D as Object3D
    from sidestep.media.object3d import box3d as box3d
    from sidestep.media.overlays import Classes as Classes
    from sidestep.media.plotly import Plotly as Plotly
    from sidestep.media.table import Table as Table
    from sidestep.media.video import Video as Video
    from sidestep.plot import plot_table as plot_table
    from sidestep.plot import visualize as visualize
    from sidestep.session import Stats as Stats
    from sidestep.terminal import termerror as termerror
    from sidestep.terminal import termlog as termlog
    from sidestep.terminal import termsetup as termsetup
    from sidestep.terminal import termwarn as termwarn

    _run = cast("Run", None)
    run: Run | None
    config: Bag
    summary: Bag
    alert = _run.alert
    log_artifact = _run.log_artifact
    log_code = _run.log_code
    log_model = _run.log_model
    mark_preempting = _run.mark_preempting
    restore = _run.restore
    save = _run.save
    save_artifact = _run.save_artifact
    save_json_artifact = _run.save_json_artifact
    unwatch = _run.unwatch
    use_artifact = _run.use_artifact
    use_model = _run.use_model
    watch = _run.watch

__all__ = [
    "Run",
    "Settings",
    "SettingsError",
    "SidestepError",
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
__all__.extend({*_names.LAZY, *_names.OF_THE_RUN, *_names.MODULES})
__all__.sort()


def __getattr__(name: str) -> Any:
    if name == "run":
        return current()
    if name in ("config", "summary"):
        return bag(name)
    if name in _names.OF_THE_RUN:
        found: Any = of_run(name)
    elif name in _names.LAZY:
        found = getattr(importlib.import_module(_names.LAZY[name]), name)
    elif name in _names.MODULES:
        found = importlib.import_module(f"sidestep.{name}")
    elif name in _elsewhere.LOGGED_HERE:
        return _elsewhere.logged_here(name)
    elif name in _elsewhere.WANDBS:
        return _elsewhere.of_wandb(name, _elsewhere.WANDBS[name])
    else:
        raise AttributeError(f"module 'sidestep' has no attribute {name!r}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return __all__
