"""`Runner`: an experiment's metrics and results: `runner.log_metrics`, `runner.results.save_artifact`.

- a result is a file here, whose path is returned, and an artifact of the run, noted in its summary
- files appear whole or not at all; those of other ranks than 0 are in a directory of their own
- a disk that takes no file is said once and counted; the path that is returned is where it would be
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any

from sidestep import _current
from sidestep._run import Run
from sidestep.logger.python_types import to_python_types
from sidestep.session import EXIT_S

RESULTS_DIR = "results"


class Runner:
    """One experiment, in the run that there is, or in one that `keywords` of `sidestep.init` begin."""

    def __init__(
        self,
        run: Run | None = None,
        *,
        results_dir: str | os.PathLike[str] = RESULTS_DIR,
        **keywords: Any,
    ) -> None:
        self.run: Run = run or (None if keywords else _current.current()) or _current.init(**keywords)
        self.results = Results(self.run, results_dir)

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """As `Run.log`: `SUB_EXPERIMENT/METRIC` to value. Steps may come in any order; none is thrown away."""
        self.run.log(metrics, step)

    def finish(self, exit_code: int | None = None, timeout: float = EXIT_S) -> None:
        """End this process's part of the run."""
        self.run.finish(exit_code, timeout)

    def __enter__(self) -> Runner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.finish(exit_code=0 if kind is None else 1)


class Results:
    """Files that an experiment comes to."""

    def __init__(self, run: Run, directory: str | os.PathLike[str] = RESULTS_DIR) -> None:
        self._run = run
        self.directory = Path(directory) / (f"rank{run.rank}" if run.rank else "")

    def save_artifact(self, name: str, data: bytes | str) -> Path:
        """Keep bytes or text in a file of this name, and as an artifact of the run; returns the file's path.

        It is noted in the summary as `results/NAME`.
        """
        content = data.encode() if isinstance(data, str) else bytes(data)
        path = self.directory.joinpath(*_parts(name))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            beside = path.with_name(f".{path.name}.{os.getpid()}")
            beside.write_bytes(content)
            beside.replace(path)
        except OSError as error:
            self._run._session.refuse_value(f"save_artifact({name})", type(data), f"{path}: {error}")
        else:
            noted = {"path": str(path.absolute()), "bytes": len(content)}
            name = path.relative_to(self.directory).as_posix()
            self._run.summary[f"results/{name}"] = noted
            self._log(name, path)
        return path

    def _log(self, name: str, path: Path) -> None:
        from sidestep.artifacts import Artifact, safe_name  # only who keeps results needs it

        artifact = Artifact(safe_name(name), "result")
        artifact.add_file(path, name)
        self._run.log_artifact(artifact)

    def save_json_artifact(self, name: str, value: Any) -> Path:
        """Keep a value as JSON; numpy's and torch's become Python's. NaN is written as Python's `json` does."""
        return self.save_artifact(name, json.dumps(to_python_types(value), indent=2))


def _parts(name: str) -> list[str]:
    """A name as directories and a file below where results are, whatever it says."""
    parts = [part for part in PurePosixPath(str(name)).parts if part not in ("/", "..", ".")]
    return parts or ["unnamed"]
