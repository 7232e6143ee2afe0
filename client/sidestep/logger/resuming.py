"""Which run to go on with when a training failed: its id, in a file that a good end removes.

- all ranks of a launch come to the same id, without a word between them: the file's, else one that follows from
  the launch
- rank 0 alone writes and removes the file; a disk that does not let it is said once, and no harm
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

from sidestep import ranks
from sidestep.notices import say

FILE = "sidestep-resume.json"


class Resuming:
    """The run to go on with, kept in `folder`."""

    def __init__(self, folder: str | os.PathLike[str] | None, environ: Mapping[str, str] = os.environ) -> None:
        self._path = Path(folder or ".") / FILE
        identity = ranks.identify(environ, ranks.Here.now())
        self._is_first = identity.rank == 0
        self._launch = identity.launch

    def begin(self) -> str:
        """The id of the run to go on with, or of the new one, which is kept from now on."""
        if (kept := self._kept()) is not None:
            return kept
        made = hashlib.sha256(self._launch.encode(errors="replace")).hexdigest()[:8]
        if self._is_first:
            self._write(json.dumps({"run_id": made}))
        return made

    def end(self) -> None:
        """The training ended well: the next one is another run."""
        if self._is_first:
            self._write(None)

    def _kept(self) -> str | None:
        try:
            kept = json.loads(self._path.read_bytes())["run_id"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return kept if isinstance(kept, str) and kept else None

    def _write(self, text: str | None) -> None:
        try:
            if text is None:
                self._path.unlink(missing_ok=True)
                return
            self._path.parent.mkdir(parents=True, exist_ok=True)
            beside = self._path.with_suffix(f".{os.getpid()}")
            beside.write_text(text)
            beside.replace(self._path)
        except OSError as error:
            say(f"resume=True: {self._path} can not be kept: {error}")
