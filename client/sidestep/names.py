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
    "Audio": "sidestep.media.audio",
    "Classes": "sidestep.media.overlays",
    "Histogram": "sidestep.media.histogram",
    "Html": "sidestep.media.html",
    "Image": "sidestep.media.image",
    "Metric": "sidestep._run",
    "Molecule": "sidestep.media.molecule",
    "Object3D": "sidestep.media.object3d",
    "Plotly": "sidestep.media.plotly",
    "Scope": "sidestep._run",
    "Stage": "sidestep._run",
    "Stats": "sidestep.session",
    "Table": "sidestep.media.table",
    "Video": "sidestep.media.video",
    "box3d": "sidestep.media.object3d",
    "plot_table": "sidestep.plot",
}
"""Name to the module that has it."""

OF_THE_RUN: frozenset[str] = frozenset({"unwatch", "watch"})
"""Methods of `Run` that the module has too, for the current run."""

MODULES: frozenset[str] = frozenset({"errors", "logger", "media", "plot", "tensorboard", "testing"})
"""Modules of ours that are attributes without being imported."""
