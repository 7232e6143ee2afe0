"""What people were told of GPUs and is not over, kept for the next process of the samplers.

- a GPU that is still lost when the samplers come back is not told again, and that it is back is told in any case
- what can not be read or written is forgotten: then it is told once more
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

logger = logging.getLogger("sidestepd.samplers.gpu")


class Told:
    """The troubles that are open. Kept in `path`, if that is given."""

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._lost: dict[str, str] = {}
        """The numbers of lost GPUs, and their UUIDs as far as they are known."""
        self._nvml: int | None = None
        self._count: int | None = None
        try:
            self._take_up(json.loads(path.read_text()) if path else {})
        except (OSError, ValueError, TypeError, AttributeError):
            pass  # the first life, or a file that was torn

    @property
    def nvml(self) -> int | None:
        """The error of NVML that was told last, while it lasts."""
        return self._nvml

    @nvml.setter
    def nvml(self, error: int | None) -> None:
        if error != self._nvml:
            self._nvml = error
            self._keep()

    @property
    def count(self) -> int | None:
        """How many GPUs there were last."""
        return self._count

    @count.setter
    def count(self, count: int) -> None:
        if count != self._count:
            self._count = count
            self._keep()

    def is_lost(self, number: int, uuid: str) -> bool:
        """Whether people were told that this GPU is lost; one that does not say its UUID may be that one."""
        known = self._lost.get(str(number))
        return known is not None and (not uuid or known in ("", uuid))

    def lose(self, number: int, uuid: str) -> None:
        """People are told so now."""
        self._lost[str(number)] = uuid
        self._keep()

    def find(self, number: int) -> None:
        """And now that it is back."""
        if self._lost.pop(str(number), None) is not None:
            self._keep()

    def _take_up(self, kept: dict[str, Any]) -> None:
        lost, nvml, count = kept.get("lost", {}), kept.get("nvml"), kept.get("count")
        self._lost = {str(number): str(uuid) for number, uuid in lost.items()}
        self._nvml = nvml if type(nvml) is int else None
        self._count = count if type(count) is int else None

    def _keep(self) -> None:
        if self._path is None:
            return
        draft = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        try:
            draft.write_text(json.dumps({"lost": self._lost, "nvml": self._nvml, "count": self._count}))
            draft.replace(self._path)
        except OSError as error:
            logger.warning("what was told of GPUs can not be kept: %s", error)
