"""The two mappings of a run, `config` and `summary`: read here, and told to the daemon as they change.

- what is read back is what this process wrote: another rank's entries, and the last values of metrics, are
  known to the run alone
- entries are available as attributes too
- nothing raises but a missing entry; what can not be stored is left out and said, as in `log()`
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

from sidestep import configs, convert
from sidestep.configs import merged
from sidestep.errors import UnsupportedValue
from sidestep.session import Session
from sidestep.wire import MAX_NAME_CHARS, Kind


class Bag(MutableMapping[str, Any]):
    """Entries that belong to the run rather than to a step."""

    def __init__(
        self, session: Session | None, kind: Kind, others: Callable[[dict[Any, Any]], None] | None = None
    ) -> None:
        """`others` takes what has no place here: media, and arrays that are more than a list."""
        vars(self).update(_session=session, _kind=kind, _entries={}, _locked=frozenset(), _others=others)

    def update(self, *others: Any, allow_val_change: bool | None = None, **entries: Any) -> None:  # noqa: ARG002
        """Set entries from mappings, namespaces, dataclasses or keywords; a nested dict replaces the one before.

        `allow_val_change` is wandb's, and always true here.
        """
        given: dict[Any, Any] = {}
        for other in others:
            try:
                given.update(entries_of(other))
            except UnsupportedValue as error:
                self._refuse("update", other, error)
        self._store({**given, **entries})

    def setdefaults(self, d: Mapping[str, Any]) -> dict[str, Any]:
        """Set the entries that are not there yet, and return all."""
        try:
            given = entries_of(d)
        except UnsupportedValue as error:
            self._refuse("setdefaults", d, error)
        else:
            self._store({name: value for name, value in given.items() if name not in self._entries})
        return self.as_dict()

    def as_dict(self) -> dict[str, Any]:
        """A copy."""
        return dict(self._entries)

    def persist(self) -> None:
        """wandb's; here everything is told at once."""

    def lock(self, entries: Mapping[str, Any]) -> None:
        """Set entries that nothing overrules: the choices of a sweep. Dicts in dicts are merged."""
        chosen = merged({name: self._entries[name] for name in entries if name in self._entries}, entries)
        vars(self)["_locked"] = frozenset()
        self._store(chosen)
        vars(self)["_locked"] = frozenset(chosen)

    def _store(self, entries: Mapping[Any, Any]) -> None:
        plain = {}
        for name, value in entries.items():
            if name in self._locked:
                self._pass_over(name)
                continue
            try:
                plain[_name(name)] = convert.plain(value, fallback=_known_by_its_text)
            except UnsupportedValue as error:
                if self._others is not None:
                    self._others({name: value})
                else:
                    self._refuse(name, value, error)
        self._entries.update(plain)
        if plain and self._session is not None:
            self._session.send(self._kind, plain)

    def _refuse(self, name: Any, value: Any, error: UnsupportedValue) -> None:
        if self._session is not None:
            self._session.refuse_value(name if isinstance(name, str) else "?", type(value), str(error))

    def _pass_over(self, name: str) -> None:
        if self._session is not None:
            self._session.notices.once(
                ("locked", name), f"config: {name[:80]!r} is the sweep's, and stays as it is"
            )

    def __setitem__(self, name: str, value: Any) -> None:
        self._store({name: value})

    def __getitem__(self, name: str) -> Any:
        value = self._entries[name]
        if type(value) is dict and self._kind is Kind.SUMMARY:
            return _Inner(value, self, name)
        return value

    def __delitem__(self, name: str) -> None:
        del self._entries[name]  # for this process: the run keeps what it was told

    def __iter__(self) -> Iterator[str]:
        return iter(dict(self._entries))

    def __len__(self) -> int:
        return len(self._entries)

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"there is no entry {name!r}") from None

    def __repr__(self) -> str:
        return repr(self._entries)

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self._entries),)


Config = Bag
"""wandb's name for it."""


class _Inner(dict[str, Any]):
    """A dict in the summary: what is set in it, however deep, is set in the run."""

    def __init__(self, entries: Mapping[str, Any], outer: Bag | _Inner, name: str) -> None:
        super().__init__(entries)
        self._outer, self._name = outer, name

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        self._outer[self._name] = dict(self)

    def __getitem__(self, name: str) -> Any:
        value = super().__getitem__(name)
        return _Inner(value, self, name) if type(value) is dict else value

    def update(self, *others: Any, **entries: Any) -> None:
        """Set several."""
        super().update(*others, **entries)
        self._outer[self._name] = dict(self)


def entries_of(other: Any) -> dict[Any, Any]:
    """The entries of what people use as a configuration, or UnsupportedValue.

    That may be a mapping, a namespace, a dataclass, the flags of absl, or the path of a file.
    """
    if isinstance(other, str):
        return dict(configs.read(other))
    try:
        if isinstance(other, Mapping):
            return dict(other)
        if hasattr(other, "flag_values_dict"):
            return dict(other.flag_values_dict())
        if dataclasses.is_dataclass(other) and not isinstance(other, type):
            return dataclasses.asdict(other)
        return dict(vars(other) if hasattr(other, "__dict__") else other or {})
    except Exception as error:  # noqa: BLE001 - a foreign object's own code may raise anything
        raise UnsupportedValue(f"it has no entries ({type(error).__name__})") from None


def _name(name: Any) -> str:
    text = convert.plain(name, fallback=str)
    text = text if isinstance(text, str) else str(text)
    if len(text) > MAX_NAME_CHARS:
        raise UnsupportedValue(f"its name has {len(text)} characters; {MAX_NAME_CHARS} is the most")
    return text


def _known_by_its_text(value: Any) -> Any:
    """In a configuration, as in wandb, anything may be named."""
    if isinstance(value, Mapping):
        return dict(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{getattr(value, '__module__', '')}.{value.__qualname__}".lstrip(".")
    return str(value)[:1000]
