"""`sync_tensorboard=True`: what torch's and tensorboardX's writers are told, the run is told too.

- their classes are changed where they are: it does not matter who imported them, or when. One that is imported
  later is changed then
- their files are written as ever, first; what goes wrong here is said once and reaches nobody
- a method that calls another one tells the run once
- at the end everything is as it was; where somebody else has wrapped a method since, ours lets all through
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from sidestep._run import Run
from sidestep.tensorboard.writer import Places, SummaryWriter

MODULES = ("torch.utils.tensorboard.writer", "tensorboardX.writer")
METHODS = (
    "add_scalar", "add_scalars", "add_histogram", "add_histogram_raw", "add_image", "add_images", "add_text",
    "add_figure", "add_audio", "add_video", "add_hparams",
)  # fmt: skip


class Sync:
    """The writers of this process tell `run`, from `start` to `stop`."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._places = Places()
        self._writers: weakref.WeakKeyDictionary[Any, SummaryWriter] = weakref.WeakKeyDictionary()
        self._inside = threading.local()
        self._patched: list[tuple[type, str, Any, Any]] = []
        self._finder = _Finder(self._patch)
        self._active = False

    def start(self) -> None:
        """Change what is loaded, and be told of what will be."""
        self._active = True
        for name in MODULES:
            if (module := sys.modules.get(name)) is not None:
                self._patch(module)
        sys.meta_path.insert(0, self._finder)

    def stop(self) -> None:
        """Leave everything as it was."""
        self._active = False
        if self._finder in sys.meta_path:
            sys.meta_path.remove(self._finder)
        for owner, name, original, ours in self._patched:
            if vars(owner).get(name) is ours:
                setattr(owner, name, original)
        self._patched.clear()

    def _patch(self, module: ModuleType) -> None:
        owner = getattr(module, "SummaryWriter", None)
        if not isinstance(owner, type) or not self._active:
            return
        for name in METHODS:
            if callable(original := vars(owner).get(name)):
                ours = self._telling(name, original)
                setattr(owner, name, ours)
                self._patched.append((owner, name, original, ours))

    def _telling(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def method(writer: Any, *args: Any, **keywords: Any) -> Any:
            if not self._active or getattr(self._inside, "any", False):
                return original(writer, *args, **keywords)
            self._inside.any = True
            try:
                result = original(writer, *args, **keywords)
                self._tell(writer, name, args, keywords)
            finally:
                self._inside.any = False
            return result

        return method

    def _tell(self, writer: Any, name: str, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        try:
            ours = self._writers.get(writer)
            if ours is None:
                log_dir = writer.get_logdir() if hasattr(writer, "get_logdir") else writer.logdir
                ours = SummaryWriter(log_dir, run=self._run, places=self._places)
                self._writers[writer] = ours
            getattr(ours, name)(*args, **keywords)
        except Exception as error:  # noqa: BLE001 - a foreign class's own ways must not end the training
            self._run._session.notices.once(
                ("tensorboard", name), f"sync_tensorboard: {name}: {type(error).__name__}: {error}"
            )


class _Finder(importlib.abc.MetaPathFinder):
    """Calls `then` with each of `MODULES` when it has been loaded."""

    def __init__(self, then: Callable[[ModuleType], None]) -> None:
        self._then = then
        self._looking = threading.local()

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,  # noqa: ARG002 - of the protocol
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> importlib.machinery.ModuleSpec | None:
        """What the others find, with our word behind its loader's."""
        if fullname not in MODULES or getattr(self._looking, "any", False):
            return None
        self._looking.any = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._looking.any = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self._then)
        return spec


class _Loader(importlib.abc.Loader):
    """Another loader, and something to do after it."""

    def __init__(self, loader: Any, then: Callable[[ModuleType], None]) -> None:
        self._loader, self._then = loader, then

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        """As the other."""
        made: ModuleType | None = self._loader.create_module(spec)
        return made

    def exec_module(self, module: ModuleType) -> None:
        """As the other; then ours."""
        self._loader.exec_module(module)
        self._then(module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)
