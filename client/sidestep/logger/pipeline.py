"""`PipelineContext`: several programs, one after another or side by side, in one run.

    training                                            evaluation
    context = PipelineContext.begin(project="pde")      context = PipelineContext.load("context.json")
    context.log_training_metric("operator", "loss", 0.5, step=3)
    context.save("context.json")                        context.log_eval_summary({"nrmse": 0.09})

- each stage of the training has a step of its own, which is data in every row: no chart can be empty, and no
  stage can be missing, whatever it is called
- who loads a context joins the run: there is never a second one. Under `sidestep run` that is so without a file
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from sidestep import _current
from sidestep._run import Run, Stage
from sidestep.errors import SettingsError
from sidestep.session import EXIT_S

TRAINING = "training"
VARIABLES = ("SIDESTEP_CONTEXT", "WANDB_CONTEXT_FILE")
"""Where the file is, for who is not told."""


class PipelineContext:
    """The run that a pipeline's programs share."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._stages: dict[str, Stage] = {}

    @classmethod
    def begin(cls, **keywords: Any) -> PipelineContext:
        """Begin the run, or join that of the surrounding command. The keywords are those of `sidestep.init`."""
        return cls(_current.init(**keywords))

    @classmethod
    def load(cls, path: str | os.PathLike[str] | None = None, **keywords: Any) -> PipelineContext:
        """Join the run that a file tells of: this one, or that of `SIDESTEP_CONTEXT` or `WANDB_CONTEXT_FILE`.

        What this process starts joins it too. Where the daemon of that run has ended, a new one goes on with
        it under its id. SettingsError if there is no such file, or it is none.
        """
        where = Path(path or next((os.environ[it] for it in VARIABLES if os.environ.get(it)), ""))
        try:
            said = json.loads(where.read_bytes())
            run_id, address = said["run_id"], said.get("address") or ""
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise SettingsError(f"{where}: no context of a run: {error!r}") from None
        if _is_served(address):
            os.environ[VARIABLES[0]] = os.fspath(where.absolute())
            return cls(_current.init(**keywords))
        names = {name: said[name] for name in ("project", "entity", "name") if said.get(name)}
        return cls(_current.init(**{**names, "id": run_id, "resume": "allow", **keywords}))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write down where the run is, for `load` and `SIDESTEP_CONTEXT`. May wait 5 s for the run's id."""
        run, settings = self.run, self.run._session.settings
        said = {"address": settings.address, "run_id": run.id, "run_dir": settings.run_dir}
        named = {"project": run.project, "entity": run.entity, "name": run.name}
        where = Path(path)
        try:
            where.parent.mkdir(parents=True, exist_ok=True)
            beside = where.with_name(f".{where.name}.{os.getpid()}")
            beside.write_text(json.dumps({key: it for key, it in {**said, **named}.items() if it}, indent=2))
            beside.replace(where)
        except OSError as error:
            run._session.notices.once(("context", where), f"{where} can not be written: {error}")
        return where

    def log_training_metric(self, stage: str, metric: str, value: Any, step: int) -> None:
        """A value of `training/STAGE/METRIC` at a step of that stage."""
        self.stage(stage).log({metric: value}, step)

    def log_training_metrics(self, stage: str, metrics: Mapping[str, Any], step: int) -> None:
        """Several of a stage at one step."""
        self.stage(stage).log(metrics, step)

    def log_eval_summary(self, metrics: Mapping[str, Any], prefix: str = "eval") -> None:
        """What an evaluation came to: `PREFIX/METRIC` in the run's summary."""
        self.run.summary.update({f"{prefix}/{name}" if prefix else name: it for name, it in metrics.items()})

    def update_config(self, config: Any) -> None:
        """What the pipeline is configured with, beside what was said before."""
        self.run.config.update(config)

    def stage(self, name: str) -> Stage:
        """A stage of the training, to log several things at once."""
        stage = self._stages.get(name)
        if stage is None:
            stage = self._stages[name] = self.run.stage(f"{TRAINING}/{name}")
        return stage

    def finish(self, exit_code: int | None = None, timeout: float = EXIT_S) -> None:
        """End this process's part of the run."""
        self.run.finish(exit_code, timeout)

    def __enter__(self) -> PipelineContext:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.finish(exit_code=0 if kind is None else 1)


def _is_served(address: str) -> bool:
    """Whether there may be a daemon: a socket in the file system is gone when its daemon is."""
    return bool(address) and (not address.startswith("ipc://") or Path(address.removeprefix("ipc://")).exists())
