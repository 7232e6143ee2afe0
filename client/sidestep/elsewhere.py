"""What a worker has no part in: names that are wandb's own.

- looking one up in this package imports wandb, if it is installed in the worker; importing this package never does
- without wandb the name is a stand-in, so that `from sidestep import Api` works; using it raises `NeedsWandb`,
  which says what to do
- what wandb then does is its own: it asks the server itself, it waits, and it needs its own key
- but for the charts of `wandb.sklearn`: they are drawn by wandb's code and logged here
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from sidestep.errors import NeedsWandb

WANDBS: Mapping[str, str] = {
    "Api": "",
    "ArtifactTTL": "",
    "EvalTable": "",
    "Graph": "",
    "JoinedTable": "",
    "agent": "start the agent outside (`wandb agent`) and have it run `sidestep run -- COMMAND`",
    "agents": "",
    "analytics": "",
    "annotations": "",
    "apis": "",
    "attach": "every process says init(), and joins the run",
    "controller": "run the controller in a process of its own",
    "data_types": "the kinds that can be logged are names of sidestep itself",
    "env": "",
    "helper": "",
    "integration": "",
    "jupyter": "",
    "keras": "",
    "lightgbm": "",
    "catboost": "",
    "gym": "",
    "patched": "",
    "profiler": "",
    "proto": "",
    "sacred": "",
    "sagemaker_auth": "",
    "sklearn": "",
    "sweep": "create the sweep outside (`wandb sweep FILE`)",
    "tensorflow": "",
    "trigger": "",
    "wandb_agent": "",
    "wandb_lib": "",
    "wandb_sdk": "",
    "wandb_torch": "",
    "xgboost": "",
}
"""Names that are looked up in wandb itself, and what to do instead where there is something."""


LOGGED_HERE: Mapping[str, str] = {"sklearn": "wandb.integration.sklearn"}
"""Names of wandb's whose code logs into the run of its process, which is ours; and where that code is."""


class Missing:
    """Stands where wandb's own object would be, as long as it is not used."""

    def __init__(self, name: str, instead: str = "") -> None:
        self._name = name
        self._instead = instead

    def __call__(self, *_: Any, **__: Any) -> NoReturn:
        """What it is for, which can not be."""
        raise self._error()

    def __getattr__(self, name: str) -> NoReturn:
        raise self._error()

    def __repr__(self) -> str:
        return f"<{self._error()}>"

    def _error(self) -> NeedsWandb:
        instead = f", or {self._instead}" if self._instead else ""
        return NeedsWandb(
            f"sidestep.{self._name} is wandb's own: install wandb for this process (pip install wandb){instead}"
        )


def logged_here(name: str) -> Any:
    """A module of wandb's, whose code has this package where it had `wandb`; or what stands for it.

    Raises AttributeError if it can not be imported, for want of scikit-learn for instance.
    """
    found = of_wandb(name)
    if isinstance(found, Missing):
        return found
    package = LOGGED_HERE[name]
    module = _module(package)
    for at, part in list(sys.modules.items()):
        if (at == package or at.startswith(f"{package}.")) and isinstance(vars(part).get("wandb"), ModuleType):
            vars(part)["wandb"] = sys.modules["sidestep"]
    return module


def of_wandb(path: str, instead: str = "") -> Any:
    """`wandb.<path>`, or what stands for it; AttributeError if wandb has no such name."""
    try:
        found: Any = importlib.import_module("wandb")
    except ImportError:
        return Missing(path, instead)
    at = "wandb"
    for part in path.split("."):
        at = f"{at}.{part}"
        found = getattr(found, part) if hasattr(found, part) else _module(at)
    return found


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise AttributeError(f"wandb has no {name.removeprefix('wandb.')}: {error}") from None


class OldApi:
    """wandb's `api` object, as far as scripts use it: to see whether there is a key."""

    @property
    def api_key(self) -> str | None:
        """The key of this process's environment; the daemon's is not told."""
        return os.environ.get("WANDB_API_KEY") or None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(of_wandb("api"), name)


api = OldApi()


class Elsewhere:
    """The part of `Run` that asks the server: by wandb itself, which waits for it."""

    __slots__ = ()

    def use_artifact(self, artifact_or_name: Any, type: str | None = None, *_: Any, **__: Any) -> Any:  # noqa: A002
        """An artifact of the server, by wandb itself. That this run uses it is not written down."""
        if not isinstance(artifact_or_name, str):
            return artifact_or_name
        return of_wandb("Api")().artifact(self._named_here(artifact_or_name), type=type)

    def use_model(self, name: str) -> Any:
        """The path of a model of the server, fetched by wandb itself."""
        artifact = self.use_artifact(name)
        folder = artifact.download()
        files = list(artifact.files())
        return str(Path(folder) / files[0].name) if len(files) == 1 else folder

    def restore(
        self, name: str, run_path: str | None = None, replace: bool = False, root: str | None = None
    ) -> Any:
        """A file of a run on the server, fetched by wandb itself."""
        return of_wandb("restore")(name, run_path or self._path(), replace, root or str(Path.cwd()))

    def _named_here(self, name: str) -> str:
        if "/" in name:
            return name
        return "/".join([*self._path().split("/")[:-1], name])

    def _path(self) -> str:
        return str(getattr(self, "path", ""))
