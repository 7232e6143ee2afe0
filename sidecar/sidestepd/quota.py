"""How many names a run may have: a name is kept for ever, so who makes a new one at each step would fill memory.

- names of metrics as wandb shows them, of what is configured or summed up, and of what is declared count alike
- a name that was taken stays; of what comes when there are as many as may be, only what has a new name is left out
- it follows from what was said, in its order: read again from a checkpoint on, the same names are taken
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from sidestepd.packed import is_packed

MOST_NAMES = 100_000
"""More than any chart page can show; wandb's own advice ends here."""


class Names:
    """The names that were taken, `most` of them."""

    def __init__(self, most: int = MOST_NAMES) -> None:
        self.most = most
        self.refused = 0
        """Values that were left out."""
        self._taken: dict[str, None] = {}

    def admit(self, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """What of the values of a call may stay."""
        if values.keys() <= self._taken.keys() and dict not in map(type, values.values()):
            return values
        kept = self._only(values, {name: tuple(leaves({name: value})) for name, value in values.items()})
        if not kept:
            self.refused -= len(values)  # they are given up with their record, and counted so
        return kept

    def admit_to(self, where: str, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """What may stay of what is kept under names elsewhere than in rows."""
        return self._only(values, {name: (f"{where}\0{name}",) for name in values})

    def take(self, *names: str) -> bool:
        """Whether all of these may be; then they are taken."""
        new = dict.fromkeys(name for name in names if name not in self._taken)
        if new and len(self._taken) + len(new) > self.most:
            return False
        self._taken |= new
        return True

    def _only(self, values: Mapping[str, Any], names: Mapping[str, tuple[str, ...]]) -> Mapping[str, Any]:
        kept = {name: value for name, value in values.items() if self.take(*names[name])}
        self.refused += len(values) - len(kept)
        return kept

    def state(self) -> dict[str, Any]:
        """As plain values."""
        return {"taken": list(self._taken), "refused": self.refused}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up what `state` gave; nothing was counted before there was a quota."""
        self._taken, self.refused = dict.fromkeys(state.get("taken", ())), state.get("refused", 0)


def leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The names that wandb shows: those inside nested dicts are joined by dots."""
    for name, value in values.items():
        if not name:
            continue  # wandb knows no such name
        if isinstance(value, dict) and value and not is_packed(value):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"
