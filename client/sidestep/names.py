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
    "CommError": "sidestep.errors",
    "Config": "sidestep.bags",
    "Error": "sidestep.errors",
    "Metric": "sidestep._run",
    "NeedsWandb": "sidestep.errors",
    "Scope": "sidestep._run",
    "Stage": "sidestep._run",
    "Stats": "sidestep.session",
    "UsageError": "sidestep.errors",
    "api": "sidestep.elsewhere",
    "ensure_configured": "sidestep._formalities",
    "join": "sidestep._formalities",
    "login": "sidestep._formalities",
    "require": "sidestep._formalities",
    "setup": "sidestep._formalities",
    "teardown": "sidestep._formalities",
    "termerror": "sidestep.terminal",
    "termlog": "sidestep.terminal",
    "termsetup": "sidestep.terminal",
    "termwarn": "sidestep.terminal",
}
"""Name to the module that has it."""

OF_THE_RUN: frozenset[str] = frozenset({"alert", "mark_preempting", "restore", "use_artifact", "use_model"})
"""Methods of `Run` that the module has too, for the current run."""

MODULES: frozenset[str] = frozenset({"errors", "sdk", "testing", "util"})
"""Modules of ours that are attributes without being imported."""
