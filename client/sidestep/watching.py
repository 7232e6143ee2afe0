"""Histograms of a torch model's gradients and parameters, as wandb's `watch` names and counts them.

- hooks of this process alone, and no collective: ranks need not watch at the same batch, nor at all
- counted where the tensor is. On a GPU that is enqueued and comes later, as all that `log()` takes from there
- what a backward or forward pass finds is said when that has ended, as `log(..., commit=False)` would: it is in
  the row of the next call
- where torch.compile looks inside of a hook it sees nothing: parameters of a compiled model are then counted in
  its backward pass
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from sidestep.convert import histograms
from sidestep.convert.torch import count, local
from sidestep.errors import UnsupportedValue
from sidestep.outbox import DropReason
from sidestep.session import Refusal, Session
from sidestep.staging import Call

HISTOGRAMS = 100
"""In one record, which has room for more."""
WHAT = ("gradients", "parameters", "all", None)


def watch(session: Session, models: Any, log: Any, log_freq: Any, idx: Any, *, log_graph: Any) -> None:
    """Put hooks into models; raises Refusal with words for what can not be watched."""
    torch = sys.modules.get("torch")
    models = list(models) if isinstance(models, list | tuple) else [models]
    if torch is None or not all(isinstance(model, torch.nn.Module) for model in models):
        wrong = next(
            (type(it).__name__ for it in models if torch is None or not isinstance(it, torch.nn.Module)), ""
        )
        raise Refusal(DropReason.UNSUPPORTED, f"watch() takes torch models, not {wrong or 'nothing'}")
    if log not in WHAT:
        raise Refusal(DropReason.UNSUPPORTED, f"watch(log={log!r:.80}) is one of {', '.join(map(repr, WHAT))}")
    if log_graph:
        session.notices.once(
            "log_graph", "watch(log_graph=True): the graph is not logged; gradients and parameters are"
        )
    if session.watcher is None:
        session.watcher = Watcher(session, torch)
    every = log_freq if isinstance(log_freq, int) else 1000
    session.watcher.watch(models, log, every, idx if isinstance(idx, int) else None)


class Watcher:
    """The hooks of a session, and what they have found and not said yet."""

    def __init__(self, session: Session, torch: Any) -> None:
        self._session = session
        self._torch = torch
        self._handles: dict[int, list[Any]] = {}
        self._models = 0
        self._lock = threading.Lock()  # a backward pass runs in a thread for each device
        self._found: _Found | None = None

    def watch(self, models: Iterable[Any], log: str | None, every: int, idx: int | None) -> None:
        """Begin; a second model, and the same again, is named `graph_1` and so on, as in wandb."""
        first = self._models if idx is None else idx
        for number, model in enumerate(models, first):
            self._models += 1
            prefix = f"graph_{number}" if number > 0 else ""
            handles = self._handles.setdefault(id(model), [])
            trained = [(name, it) for name, it in model.named_parameters() if it.requires_grad]
            if log in ("parameters", "all"):
                parameters = _Parameters(self, self._torch, model, f"parameters/{prefix}", every)
                handles.append(model.register_forward_hook(parameters.after_forward))
                handles += [it.register_hook(parameters.in_backward) for _, it in trained[:1]]
            if log in ("gradients", "all"):
                hooks = ((it, self._gradient_hook(f"gradients/{prefix}{name}", every)) for name, it in trained)
                handles += [it.register_hook(hook) for it, hook in hooks]

    def unwatch(self, models: Any = None) -> None:
        """Take the hooks out again."""
        if models is None:
            wanted = list(self._handles)
        else:
            wanted = [id(model) for model in (models if isinstance(models, list | tuple) else [models])]
        for key in wanted:
            for handle in self._handles.pop(key, []):
                handle.remove()

    def add(self, tensors: Iterable[tuple[str, Any]]) -> None:
        """Count some tensors. They are said when the backward pass has ended, or now if there is none."""
        if self._session.finished:
            return
        with self._lock:
            if self._found is None:
                self._found = _Found(self._session.staging.call(histograms.WATCH_BINS))
            for name, tensor in tensors:
                self._session.guard(partial(self._found.add, self._session, self._torch, name, tensor))
        try:
            self._torch.autograd.Variable._execution_engine.queue_callback(self.say)
        except (AttributeError, RuntimeError):
            self.say()

    def say(self) -> None:
        """Say what was found, if that was not done yet."""
        with self._lock:
            found, self._found = self._found, None
        if found is not None:
            self._session.guard(partial(found.say, self._session))

    def _gradient_hook(self, name: str, every: int) -> Callable[[Any], None]:
        due = _Every(every)
        compiler = self._torch.compiler

        def hook(gradient: Any) -> None:
            if not compiler.is_compiling() and due():
                self.add([(name, gradient)])

        return hook


class _Every:
    """True at every so-manieth call."""

    __slots__ = ("_calls", "_every")

    def __init__(self, every: int) -> None:
        self._calls, self._every = 0, every

    def __call__(self) -> bool:
        self._calls += 1
        if self._calls < self._every:
            return False
        self._calls = 0
        return True


class _Parameters:
    """The parameters of one model, counted after a forward pass; in the backward pass where that was compiled."""

    __slots__ = ("_compiler", "_due", "_model", "_prefix", "_seen", "_watcher")

    def __init__(self, watcher: Watcher, torch: Any, model: Any, prefix: str, every: int) -> None:
        self._watcher, self._compiler = watcher, torch.compiler
        self._model = weakref.ref(model)
        self._prefix = prefix
        self._due = _Every(every)
        self._seen = False

    def after_forward(self, *_: Any) -> None:
        """The hook of the model."""
        if self._compiler.is_compiling():
            return
        self._seen = True
        self._count()

    def in_backward(self, _: Any) -> None:
        """The hook of its first parameter: no forward pass was seen if it was compiled."""
        if self._compiler.is_compiling():
            return
        seen, self._seen = self._seen, False
        if not seen:
            self._count()

    def _count(self) -> None:
        model = self._model()
        if model is not None and self._due():
            self._watcher.add((f"{self._prefix}{name}", it) for name, it in model.named_parameters())


class _Found:
    """What one pass has found."""

    __slots__ = ("_call", "_data")

    def __init__(self, call: Call) -> None:
        self._call = call
        self._data: dict[str, Any] = {}

    def add(self, session: Session, torch: Any, name: str, tensor: Any) -> None:
        """Count one tensor where it is."""
        call, before = self._call, len(self._call.deferred)
        try:
            value = local(torch, tensor)
            device = call.find(value)
            if device is not None:
                self._data[name] = call.histogram(device, value, histograms.single)
            else:
                self._data[name] = histograms.single(*count(torch, value, call.bins))
        except (UnsupportedValue, RuntimeError) as error:
            session.refuse_value(name, type(tensor), str(error).partition("\n")[0][:200])
        else:
            call.named(name, before)

    def say(self, session: Session) -> None:
        """In the row of the next call, in as many records as it takes."""
        self._call.launch()
        names = list(self._data)
        for start in range(0, len(names), HISTOGRAMS):
            some = {name: self._data[name] for name in names[start : start + HISTOGRAMS]}
            wanted = {name: its for name, its in self._call.by_name.items() if name in some}
            said = session.steps_of(None).take(None, False)
            session.offer_staged(said, some, None, wanted)
