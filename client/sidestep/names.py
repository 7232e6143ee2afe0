"""The names of the package that are looked up when they are used, so that `import sidestep` stays thin.

Adding one is one line here:

- a class or function of a module of ours: a line in `LAZY`
- a method of `Run` that is a function of the module too (`sidestep.alert(...)`): a word in `OF_THE_RUN`
- a module that is used as `sidestep.plot.line(...)`: a word in `MODULES`

A module is never named like a function of the package: importing it would put it in the function's place.
"""

from __future__ import annotations

from collections.abc import Mapping

LAZY: Mapping[str, str] = {
    "AlertLevel": "sidestep.alerts",
    "Artifact": "sidestep.artifacts",
    "Audio": "sidestep.media.audio",
    "Classes": "sidestep.media.overlays",
    "CommError": "sidestep.errors",
    "Config": "sidestep.bags",
    "Error": "sidestep.errors",
    "Histogram": "sidestep.media.histogram",
    "Html": "sidestep.media.html",
    "Image": "sidestep.media.image",
    "Metric": "sidestep._run",
    "Molecule": "sidestep.media.molecule",
    "NeedsWandb": "sidestep.errors",
    "Object3D": "sidestep.media.object3d",
    "Plotly": "sidestep.media.plotly",
    "Scope": "sidestep._run",
    "Stage": "sidestep._run",
    "Stats": "sidestep.session",
    "Table": "sidestep.media.table",
    "UsageError": "sidestep.errors",
    "Video": "sidestep.media.video",
    "api": "sidestep.elsewhere",
    "box3d": "sidestep.media.object3d",
    "ensure_configured": "sidestep._formalities",
    "join": "sidestep._formalities",
    "login": "sidestep._formalities",
    "plot_table": "sidestep.plot",
    "require": "sidestep._formalities",
    "setup": "sidestep._formalities",
    "teardown": "sidestep._formalities",
    "termerror": "sidestep.terminal",
    "termlog": "sidestep.terminal",
    "termsetup": "sidestep.terminal",
    "termwarn": "sidestep.terminal",
    "visualize": "sidestep.plot",
}
"""Name to the module that has it."""

OF_THE_RUN: frozenset[str] = frozenset(
    {
        "alert",
        "log_artifact",
        "log_code",
        "log_model",
        "mark_preempting",
        "restore",
        "save",
        "save_artifact",
        "save_json_artifact",
        "unwatch",
        "use_artifact",
        "use_model",
        "watch",
    }
)
"""Methods of `Run` that the module has too, for the current run."""

MODULES: frozenset[str] = frozenset({"errors", "logger", "media", "plot", "sdk", "tensorboard", "testing", "util"})
"""Modules of ours that are attributes without being imported."""
